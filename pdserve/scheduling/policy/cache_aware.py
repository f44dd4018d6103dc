"""sglang-router's ``cache_aware``: follow the prefix cache while load is even, else the shortest queue.

Behaviour and parameters are those published for sglang-router 0.3.2, each leg
for itself. Two things differ. What a worker was sent is kept in the balancer's prompt tree
(prefix/tree.py). And what outgrew ``max_tree_size`` is cut back with the insertion that made it too
large, not every so many seconds: the bound always holds, and no clock is read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from pdserve.scheduling.policy.simple import LegByLeg
from pdserve.scheduling.policy.view import Reason, WorkerView
from pdserve.scheduling.prefix.tree import PromptTree
from pdserve.types import InstanceId, RequestShape, Role


@dataclass(frozen=True, slots=True)
class CacheParams:
    """The parameters of ``cache_aware``, with sglang-router's defaults.

    The match must exceed ``cache_threshold`` of the prompt. Load decides when the fullest worker has
    more than ``balance_abs_threshold`` requests more than the emptiest and more than
    ``balance_rel_threshold`` times as many. ``max_tree_size``: prompt bytes remembered per worker.
    """

    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5
    max_tree_size: int = 2**26


class CacheAware(LegByLeg):
    """The worker that was sent most of this prompt before, unless queues are uneven."""

    name = "cache_aware"
    needs_prompt = True

    def __init__(self, params: CacheParams | None = None) -> None:
        self._params = params or CacheParams()
        self._tree = PromptTree(sys.maxsize, inf, self._params.max_tree_size)

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """By load if uneven or if too little of the prompt is known, else by the longest match."""
        prefix = self._tree.read(request.prompt, with_tail=True)
        ids = [view.info.instance_id for view in views]
        index, why = self._decide(views, self._tree.match(prefix, ids, 0.0), len(request.prompt))
        self._tree.hold(prefix, ids[index], 0.0)
        return index, why

    def forget(self, instance_id: InstanceId) -> None:
        """Drop the worker's prompts."""
        self._tree.forget(instance_id)

    def _decide(
        self, views: Sequence[WorkerView], shares: Sequence[float], num_bytes: int
    ) -> tuple[int, Reason]:
        params = self._params
        counts = [view.inflight for view in views]
        low, high = min(counts), max(counts)
        if high - low > params.balance_abs_threshold and high > low * params.balance_rel_threshold:
            shortest = min(range(len(views)), key=lambda i: (counts[i], views[i].last_turn))
            return shortest, Reason("shortest queue, {} of {}..{} in flight", counts[shortest], low, high)
        best = min(range(len(views)), key=lambda i: (-shares[i], counts[i]))
        share = shares[best]
        if share > params.cache_threshold:
            return best, Reason("has {:.0%} of the prompt's {} bytes", share, num_bytes)
        size = self._tree.size_bytes
        least = min(
            range(len(views)),
            key=lambda i: (counts[i], size(views[i].info.instance_id), views[i].last_turn),
        )
        return least, Reason("least loaded, {} in flight; {:.0%} known at most", counts[least], share)

"""sglang-router's ``cache_aware``: follow the prefix cache while load is even, else the shortest queue.

Behaviour and parameters are those published for sglang-router 0.3.2, each leg
for itself. Two things differ. A worker's tree is a set of chained block
hashes (prefix/blocks.py). And a tree that outgrew ``max_tree_size`` is cut back with
the insertion that made it too large, not every so many seconds: the
bound always holds, no pause grows with the traffic, and no clock is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.scheduling.policy.simple import LegByLeg
from pdserve.scheduling.policy.view import Reason, WorkerView
from pdserve.scheduling.prefix.blocks import PrefixForest
from pdserve.types import InstanceId, RequestShape, Role

BLOCK_BYTES = 64


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
        self._forest = PrefixForest(BLOCK_BYTES, with_tail=True)

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """By load if uneven or if too little of the prompt is known, else by the longest match."""
        hashes = self._forest.hashes(request.prompt)
        index, why = self._decide(request.prompt, hashes, views)
        if hashes:
            chosen = views[index].info.instance_id
            self._forest.remember(chosen, hashes, self._params.max_tree_size, _ids(views))
        return index, why

    def forget(self, instance_id: InstanceId) -> None:
        """Drop the worker's tree."""
        self._forest.forget(instance_id)

    def _decide(
        self, prompt: bytes, hashes: Sequence[int], views: Sequence[WorkerView]
    ) -> tuple[int, Reason]:
        params = self._params
        counts = [view.inflight for view in views]
        low, high = min(counts), max(counts)
        if high - low > params.balance_abs_threshold and high > low * params.balance_rel_threshold:
            shortest = min(range(len(views)), key=lambda i: (counts[i], views[i].last_turn))
            return shortest, Reason("shortest queue, {} of {}..{} in flight", counts[shortest], low, high)
        best, blocks = self._longest_match(hashes, views)
        share = self._forest.matched_bytes(blocks, prompt) / (len(prompt) or 1)
        if share > params.cache_threshold:
            return best, Reason("has {:.0%} of the prompt's {} bytes", share, len(prompt))
        size = self._forest.size_bytes
        least = min(
            range(len(views)),
            key=lambda i: (counts[i], size(views[i].info.instance_id), views[i].last_turn),
        )
        return least, Reason("least loaded, {} in flight; {:.0%} known at most", counts[least], share)

    def _longest_match(self, hashes: Sequence[int], views: Sequence[WorkerView]) -> tuple[int, int]:
        """(index, blocks); of workers that match alike, the one with fewest in flight."""
        best, blocks = 0, 0
        for index, view in enumerate(views):
            matched = self._forest.match(view.info.instance_id, hashes, max(1, blocks))
            if matched > blocks or (matched and view.inflight < views[best].inflight):
                best, blocks = index, matched
        return best, blocks


def _ids(views: Sequence[WorkerView]) -> list[InstanceId]:
    return [view.info.instance_id for view in views]

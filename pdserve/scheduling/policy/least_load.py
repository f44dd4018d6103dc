"""The pair that would finish the request's two legs soonest."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from pdserve.scheduling.policy.pair_search import PairSearch
from pdserve.scheduling.policy.score import decode_cost_s, most_cached, prefill_cost_s
from pdserve.scheduling.policy.view import Candidates, Choice, PairView, Reason, WorkerView
from pdserve.scheduling.prefix.tree import Prefix, PromptTree
from pdserve.types import InstanceId, RequestShape, Role

TIE_SHARE = 0.05
"""Costs this close count as equal."""
MIN_PREFIX_BYTES = 256
"""Common prefixes shorter than this, some 64 tokens, are not worth a look."""

_PLAIN = "least_load {} {:.3f}s ({:.0f} tokens ahead) {} {:.3f}s ({} reqs)"
_FULL = _PLAIN + ", {} tokens cached, link {:.3f}s"


class LeastLoad:
    """Least joint cost in seconds; ties go to fewest in flight, then to the longest unused.

    Remembers as much of each prefill worker's prompts as its KV pool holds, so
    that a prompt whose beginning was there before costs only the rest there.
    """

    name = "least_load"
    needs_prompt = True
    needs_ends = False

    def __init__(self) -> None:
        self._tree = PromptTree(ttl_s=inf)
        self._turn = 0.0
        self._search = PairSearch(TIE_SHARE)

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """O(P + D) on a whole grid while links count as alike, else best first."""
        prefills, decodes = candidates.prefills, candidates.decodes
        prefix, cached = self._look_up(request, prefills)
        prefill_s = _prefill_costs(request, prefills, cached)
        decode_s = [decode_cost_s(view, request) for view in decodes]
        told = candidates.link_s
        extra = None if told is None else lambda p, d: told(prefills[p], decodes[d], request)
        p, d = self._search.choose(prefill_s, decode_s, candidates, extra)
        link_s = extra(p, d) if extra else 0.0
        prefill, decode = prefills[p], decodes[d]
        num_cached = cached[p] if cached else 0
        why = Reason(
            _PLAIN if not num_cached and not link_s else _FULL,
            prefill.info.worker_id,
            prefill_s[p],
            prefill.queued_tokens,
            decode.info.worker_id,
            decode_s[d],
            decode.num_reqs,
            num_cached,
            link_s,
        )
        self._remember(prefix, prefill)
        return Choice(PairView(prefill, decode, link_s), why, num_cached)

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """The worker where this leg costs least."""
        if role is Role.DECODE:
            costs = [decode_cost_s(view, request) for view in views]
            best = self._search.least_of(costs, views)
            return best, Reason("{:.3f}s ({} reqs)", costs[best], views[best].num_reqs)
        prefix, cached = self._look_up(request, views)
        costs = _prefill_costs(request, views, cached)
        best = self._search.least_of(costs, views)
        self._remember(prefix, views[best])
        return best, Reason("{:.3f}s ({:.0f} tokens ahead)", costs[best], views[best].queued_tokens)

    def leg_ended(self, choice: Choice, role: Role, *, is_whole: bool, now_s: float) -> None:
        """Nothing depends on it."""

    def reach_s(self, request: RequestShape, prefills: Sequence[WorkerView], now_s: float) -> Sequence[float]:
        """No worker is worth a longer wait than another."""
        return ()

    def forget(self, instance_id: InstanceId) -> None:
        """Drop what is remembered of the worker's prompts."""
        self._tree.forget(instance_id)

    def _look_up(
        self, request: RequestShape, prefills: Sequence[WorkerView]
    ) -> tuple[Prefix | None, Sequence[int]]:
        """The prompt's blocks, and how many of its tokens each worker should have; neither if it is too short
        or there is no choice."""
        if len(request.prompt) < MIN_PREFIX_BYTES or len(prefills) < 2:
            return None, ()
        prefix = self._tree.read(request.prompt)
        shares = self._tree.match(prefix, [view.info.instance_id for view in prefills], self._turn)
        return prefix, [most_cached(request, share) for share in shares] if any(shares) else ()

    def _remember(self, prefix: Prefix | None, chosen: WorkerView) -> None:
        if prefix is None:
            return
        self._turn += 1.0
        self._tree.resize(chosen.info.instance_id, chosen.kv_capacity)
        self._tree.hold(prefix, chosen.info.instance_id, self._turn)


def _prefill_costs(
    request: RequestShape, prefills: Sequence[WorkerView], cached: Sequence[int]
) -> list[float]:
    if not cached:
        return [prefill_cost_s(view, request) for view in prefills]
    return [prefill_cost_s(view, request, tokens) for view, tokens in zip(prefills, cached, strict=True)]

"""The pair that would finish the request's two legs soonest."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from pdserve.scheduling.policy.score import decode_cost_s, most_cached, prefill_cost_s
from pdserve.scheduling.policy.view import Candidates, Choice, PairView, Reason, WorkerView
from pdserve.scheduling.prefix.tree import Prefix, PromptTree
from pdserve.types import InstanceId, RequestShape, Role

TIE_SHARE = 0.05
TIE_S = 0.001
"""Costs this close (5 % plus 1 ms) count as equal: fitted rates are no better than that, and an
idle fleet of equal machines must take turns."""
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

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """O(P + D) on a whole grid while links count as alike, else O(pairs)."""
        prefills, decodes = candidates.prefills, candidates.decodes
        prefix, cached = self._look_up(request, prefills)
        prefill_s = _prefill_costs(request, prefills, cached)
        decode_s = [decode_cost_s(view, request) for view in decodes]
        link_s = 0.0
        if candidates.allowed is None and candidates.link_s is None:
            p, d = _least(prefill_s, prefills), _least(decode_s, decodes)
        else:
            p, d, link_s = _least_pair(request, prefill_s, decode_s, candidates)
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
            best = _least(costs, views)
            return best, Reason("{:.3f}s ({} reqs)", costs[best], views[best].num_reqs)
        prefix, cached = self._look_up(request, views)
        costs = _prefill_costs(request, views, cached)
        best = _least(costs, views)
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


def _least(cost_s: Sequence[float], views: Sequence[WorkerView]) -> int:
    """Argmin; of costs that count as equal, fewest in flight, then longest unused."""
    limit_s = min(cost_s) * (1.0 + TIE_SHARE) + TIE_S
    best, inflight, turn = -1, 0, 0
    for index, view in enumerate(views):
        if cost_s[index] <= limit_s:
            count = view.inflight
            if best < 0 or count < inflight or (count == inflight and view.last_turn < turn):
                best, inflight, turn = index, count, view.last_turn
    return best


def _least_pair(
    request: RequestShape, prefill_s: Sequence[float], decode_s: Sequence[float], candidates: Candidates
) -> tuple[int, int, float]:
    """Argmin over the allowed pairs, its link's seconds last; each term's ties are told by its own cost."""
    grid, link = candidates.indices(), candidates.link_s
    prefills, decodes = candidates.prefills, candidates.decodes
    links_s = [link(prefills[p], decodes[d], request) if link else 0.0 for p, d in grid]
    totals_s = [prefill_s[p] + decode_s[d] + link_s for (p, d), link_s in zip(grid, links_s, strict=True)]
    best = totals_s.index(min(totals_s))
    best_p, best_d = grid[best]
    limits = [
        cost * (1.0 + TIE_SHARE) + TIE_S for cost in (prefill_s[best_p], decode_s[best_d], links_s[best])
    ]

    def rank(index: int) -> tuple[int, int]:
        prefill, decode = prefills[grid[index][0]], decodes[grid[index][1]]
        return prefill.inflight + decode.inflight, prefill.last_turn + decode.last_turn

    ties = (
        index
        for index, (p, d) in enumerate(grid)
        if prefill_s[p] <= limits[0] and decode_s[d] <= limits[1] and links_s[index] <= limits[2]
    )
    chosen = min(ties, key=rank)
    return *grid[chosen], links_s[chosen]

"""The default: the pair that would finish the request's two legs soonest."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.balancer.policy.score import decode_cost_s, prefill_cost_s
from pdserve.balancer.policy.view import Candidates, Choice, WorkerView
from pdserve.types import RequestShape

TIE_SHARE = 0.05
TIE_S = 0.001
"""Costs this close (5 % plus 1 ms) count as equal: fitted rates are no better than that, and an
idle fleet of equal machines must take turns."""


class LeastLoad:
    """Least joint cost in seconds; ties go to fewest in flight, then to the longest unused."""

    name = "least_load"

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """O(P + D) on a whole grid, O(pairs) on one with holes."""
        prefill_s = [prefill_cost_s(view, request) for view in candidates.prefills]
        decode_s = [decode_cost_s(view, request) for view in candidates.decodes]
        if candidates.allowed is None:
            p = _least(prefill_s, candidates.prefills)
            d = _least(decode_s, candidates.decodes)
        else:
            p, d = _least_pair(prefill_s, decode_s, candidates)
        pair = candidates.at(p, d)
        return Choice(
            pair,
            f"least_load {pair.prefill.info.worker_id} {prefill_s[p]:.3f}s"
            f" ({pair.prefill.queued_tokens:.0f} tokens ahead)"
            f" {pair.decode.info.worker_id} {decode_s[d]:.3f}s ({pair.decode.num_reqs} reqs)",
        )


def _limit(best_s: float) -> float:
    return best_s * (1.0 + TIE_SHARE) + TIE_S


def _least(cost_s: Sequence[float], views: Sequence[WorkerView]) -> int:
    limit = _limit(min(cost_s))
    best, best_rank = 0, (1 << 62, 0)
    for index, view in enumerate(views):
        if cost_s[index] <= limit:
            rank = (view.inflight, view.last_turn)
            if rank < best_rank:
                best, best_rank = index, rank
    return best


def _least_pair(
    prefill_s: Sequence[float], decode_s: Sequence[float], candidates: Candidates
) -> tuple[int, int]:
    """Argmin over the allowed pairs; each leg's ties are told by its own cost."""
    grid = candidates.indices()
    best_p, best_d = min(grid, key=lambda pair: prefill_s[pair[0]] + decode_s[pair[1]])
    p_limit, d_limit = _limit(prefill_s[best_p]), _limit(decode_s[best_d])
    ties = (pair for pair in grid if prefill_s[pair[0]] <= p_limit and decode_s[pair[1]] <= d_limit)

    def rank(pair: tuple[int, int]) -> tuple[int, int]:
        prefill, decode = candidates.prefills[pair[0]], candidates.decodes[pair[1]]
        return prefill.inflight + decode.inflight, prefill.last_turn + decode.last_turn

    return min(ties, key=rank)

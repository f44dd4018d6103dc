"""The cheapest of all allowed pairs, without looking at most of them.

    cost(p, d) = prefill_s[p] + decode_s[d] + extra(p, d),   extra >= 0

Rows are walked from cheap to dear; as ``extra`` only adds, a row ends at the first
worker that cannot win even with an extra of nothing, and so does the search. While
links count as alike there is no extra, and the two rows are independent: O(P + D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdserve.scheduling.policy.view import Candidates, WorkerView

Extra = Callable[[int, int], float]
"""Seconds that a pair, by its two indices, costs beyond its workers' own; never negative."""

TIE_S = 0.001


class PairSearch:
    """Finds the pair. Remembers nothing but the shape of the last grid with holes.

    Costs within ``tie_share`` plus 1 ms count as equal: an idle fleet of equal machines must take turns,
    and fitted rates are no better than that.
    """

    __slots__ = ("_allowed", "_partners", "_tie")

    def __init__(self, tie_share: float = 0.02) -> None:
        self._tie = 1.0 + tie_share
        self._allowed: Sequence[tuple[int, int]] | None = None
        self._partners: dict[int, set[int]] = {}

    def choose(
        self,
        prefill_s: Sequence[float],
        decode_s: Sequence[float],
        candidates: Candidates,
        extra: Extra | None,
    ) -> tuple[int, int]:
        """The least pair; of pairs that count as equal, fewest in flight, then longest unused.

        Pairs count as equal when each of their three terms is within the tie of the least pair's.
        """
        prefills, decodes = candidates.prefills, candidates.decodes
        if extra is None and candidates.allowed is None:
            return self.least_of(prefill_s, prefills), self.least_of(decode_s, decodes)
        p, d = self.least(prefill_s, decode_s, candidates, extra)
        limit_s = self._limit_s(extra(p, d)) if extra else 0.0
        ties_p = _ties(prefill_s, self._limit_s(prefill_s[p]), prefills)
        ties_d = _ties(decode_s, self._limit_s(decode_s[d]), decodes)
        partners = self._partners_of(candidates)
        for tie_p in ties_p:
            for tie_d in ties_d:
                if partners is not None and tie_d not in partners.get(tie_p, ()):
                    continue
                if extra is None or extra(tie_p, tie_d) <= limit_s:
                    return tie_p, tie_d
        return p, d

    def least(
        self,
        prefill_s: Sequence[float],
        decode_s: Sequence[float],
        candidates: Candidates,
        extra: Extra | None,
    ) -> tuple[int, int]:
        """The indices of an allowed pair than which none is cheaper, ties left to chance of order."""
        partners = self._partners_of(candidates)
        order_d = sorted(range(len(decode_s)), key=decode_s.__getitem__)
        floor_s = decode_s[order_d[0]]
        best, best_s = (-1, -1), float("inf")
        for p in sorted(range(len(prefill_s)), key=prefill_s.__getitem__):
            own_s = prefill_s[p]
            if own_s + floor_s >= best_s:
                break
            row = None if partners is None else partners.get(p, ())
            for d in order_d:
                cost_s = own_s + decode_s[d]
                if cost_s >= best_s:
                    break
                if row is not None and d not in row:
                    continue
                if extra is not None:
                    cost_s += extra(p, d)
                if cost_s < best_s:
                    best, best_s = (p, d), cost_s
        return best if best_s < float("inf") else candidates.indices()[0]

    def least_of(self, cost_s: Sequence[float], views: Sequence[WorkerView]) -> int:
        """Argmin; of costs that count as equal, fewest in flight, then longest unused."""
        limit_s = self._limit_s(min(cost_s))
        best, inflight, turn = -1, 0, 0
        for index, cost in enumerate(cost_s):
            if cost <= limit_s:
                view = views[index]
                count = view.inflight
                if best < 0 or count < inflight or (count == inflight and view.last_turn < turn):
                    best, inflight, turn = index, count, view.last_turn
        return best

    def _limit_s(self, cost_s: float) -> float:
        return cost_s * self._tie + TIE_S

    def _partners_of(self, candidates: Candidates) -> dict[int, set[int]] | None:
        allowed = candidates.allowed
        if allowed is None:
            return None
        if allowed is not self._allowed:
            self._allowed, self._partners = allowed, {}
            for p, d in allowed:
                self._partners.setdefault(p, set()).add(d)
        return self._partners


def _ties(cost_s: Sequence[float], limit_s: float, views: Sequence[WorkerView]) -> list[int]:
    """Everybody within the limit, the one to take first in front."""
    ties = [index for index, cost in enumerate(cost_s) if cost <= limit_s]
    if len(ties) > 1:
        ties.sort(key=lambda index: (views[index].inflight, views[index].last_turn))
    return ties

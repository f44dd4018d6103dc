"""Policies that look at little or nothing: baselines, and sglang-router's names."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pdserve.balancer.policy.score import decode_cost_s, prefill_cost_s
from pdserve.balancer.policy.view import Candidates, Choice, WorkerView
from pdserve.types import RequestShape


class RoundRobin:
    """The longest-unused prefill worker, then its longest-unused decode partner."""

    name = "round_robin"

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """Ignores the request and every load."""
        prefills, decodes = candidates.prefills, candidates.decodes
        p = min(range(len(prefills)), key=lambda index: prefills[index].last_turn)
        d = min(candidates.partners(p), key=lambda index: decodes[index].last_turn)
        return Choice(candidates.at(p, d), "round_robin")


class Random:
    """Any pair, all equally likely."""

    name = "random"

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """Ignores the request and every load."""
        return Choice(candidates[self._random.randrange(len(candidates))], "random")


class PowerOfTwo:
    """The cheaper of two random prefill workers, then of two random partners.

    Cost as in least_load. Randomness keeps several balancers, which do not see
    each other's dispatches, from all picking the same worker.
    """

    name = "power_of_two"

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """Four scores at most, however large the fleet."""
        prefills, decodes = candidates.prefills, candidates.decodes
        p = self._better(range(len(prefills)), prefills, prefill_cost_s, request)
        d = self._better(candidates.partners(p), decodes, decode_cost_s, request)
        return Choice(candidates.at(p, d), "power_of_two")

    def _better(
        self,
        indices: Sequence[int],
        views: Sequence[WorkerView],
        cost_s: Callable[[WorkerView, RequestShape], float],
        request: RequestShape,
    ) -> int:
        drawn = self._random.sample(indices, min(2, len(indices)))
        return min(drawn, key=lambda index: cost_s(views[index], request))

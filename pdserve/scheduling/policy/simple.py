"""Policies that look at little or nothing: baselines, and sglang-router's names."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pdserve.scheduling.policy.score import decode_cost_s, prefill_cost_s
from pdserve.scheduling.policy.view import Candidates, Choice, LegPolicy, Reason, WorkerView
from pdserve.types import InstanceId, RequestShape, Role


def choose_by_leg(
    prefill: LegPolicy, decode: LegPolicy, request: RequestShape, candidates: Candidates
) -> Choice:
    """The prefill worker first, then one of the decode workers that may follow it."""
    p, prefill_why = prefill.pick(Role.PREFILL, request, candidates.prefills)
    decodes = candidates.decodes
    if candidates.allowed is None:
        d, decode_why = decode.pick(Role.DECODE, request, decodes)
    else:
        partners = candidates.partners(p)
        index, decode_why = decode.pick(Role.DECODE, request, [decodes[d] for d in partners])
        d = partners[index]
    pair = candidates.at(p, d)
    why = Reason(
        "{} {}: {}; {} {}: {}",
        *(prefill.name, pair.prefill.info.worker_id, prefill_why),
        *(decode.name, pair.decode.info.worker_id, decode_why),
    )
    return Choice(pair, why)


class LegByLeg:
    """Base of policies that choose the two legs one after the other. Subclasses give ``pick``."""

    name = ""
    needs_prompt = False
    needs_ends = False

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """The prefill worker first, then one of the decode workers that may follow it."""
        return choose_by_leg(self, self, request, candidates)

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """The index of one of ``views`` and why."""
        raise NotImplementedError

    def leg_ended(self, choice: Choice, role: Role, *, is_whole: bool, now_s: float) -> None:
        """Nothing depends on it."""

    def reach_s(self, request: RequestShape, prefills: Sequence[WorkerView], now_s: float) -> Sequence[float]:
        """No worker is worth a longer wait than another."""
        return ()

    def forget(self, instance_id: InstanceId) -> None:
        """Nothing is remembered."""


class RoundRobin(LegByLeg):
    """The longest-unused prefill worker, then its longest-unused decode partner."""

    name = "round_robin"
    _why = Reason("longest unused")

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """Ignores the request and every load."""
        return min(range(len(views)), key=lambda index: views[index].last_turn), self._why


class Random(LegByLeg):
    """Any pair, all equally likely."""

    name = "random"
    _why = Reason("random")

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """Ignores the request and every load; on a grid with holes pairs are alike, not prefill workers."""
        return Choice(candidates[self._random.randrange(len(candidates))], self._why)

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """Any worker."""
        return self._random.randrange(len(views)), self._why


class PowerOfTwo(LegByLeg):
    """The cheaper of two random prefill workers, then of two random partners.

    Cost as in least_load. Randomness keeps several balancers, which do not see
    each other's dispatches, from all picking the same worker. Four scores at
    most, however large the fleet.
    """

    name = "power_of_two"

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """The cheaper of two that were drawn."""
        cost_s = prefill_cost_s if role is Role.PREFILL else decode_cost_s
        drawn = self._random.sample(range(len(views)), min(2, len(views)))
        costs = [cost_s(views[index], request) for index in drawn]
        best = costs.index(min(costs))
        return drawn[best], Reason("{:.3f} s, the least of {}", costs[best], len(drawn))


class SplitPolicy:
    """Prefill is chosen first; decode then among its allowed partners."""

    def __init__(self, prefill: LegPolicy, decode: LegPolicy) -> None:
        self._prefill = prefill
        self._decode = decode
        self.name = f"{prefill.name}/{decode.name}"
        self.needs_prompt = prefill.needs_prompt or decode.needs_prompt
        self.needs_ends = prefill.needs_ends or decode.needs_ends

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """Each leg by its own policy."""
        return choose_by_leg(self._prefill, self._decode, request, candidates)

    def leg_ended(self, choice: Choice, role: Role, *, is_whole: bool, now_s: float) -> None:
        """Told to the one that chose the leg."""
        leg = self._prefill if role is Role.PREFILL else self._decode
        leg.leg_ended(choice, role, is_whole=is_whole, now_s=now_s)

    def reach_s(self, request: RequestShape, prefills: Sequence[WorkerView], now_s: float) -> Sequence[float]:
        """As the one that chooses the prefill leg says."""
        return self._prefill.reach_s(request, prefills, now_s)

    def forget(self, instance_id: InstanceId) -> None:
        """Told to both."""
        self._prefill.forget(instance_id)
        self._decode.forget(instance_id)

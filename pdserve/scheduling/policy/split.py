"""One policy for the prefill leg, another for the decode leg."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.scheduling.policy.simple import choose_by_leg
from pdserve.scheduling.policy.view import Candidates, Choice, LegPolicy, WorkerView
from pdserve.types import InstanceId, RequestShape, Role


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

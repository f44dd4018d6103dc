"""Which prefill and which decode worker should serve this request.

Policies are pure: they see a snapshot of loads and return a pair. They hold no
sockets and read no clock, so a simulator can run exactly these objects.
"""

from __future__ import annotations

from collections.abc import Callable

from pdserve.balancer.policy.least_load import LeastLoad
from pdserve.balancer.policy.simple import PowerOfTwo, Random, RoundRobin
from pdserve.balancer.policy.view import Candidates, Choice, PairView, Policy, WorkerView
from pdserve.errors import ConfigError

__all__ = ["POLICIES", "Candidates", "Choice", "PairView", "Policy", "WorkerView", "make_policy"]

_MAKERS: dict[str, Callable[[int | None], Policy]] = {
    "least_load": lambda seed: LeastLoad(),
    "round_robin": lambda seed: RoundRobin(),
    "random": Random,
    "power_of_two": PowerOfTwo,
}

POLICIES = tuple(_MAKERS)
"""Names that ``--policy`` takes; the first is the default."""


def make_policy(name: str, seed: int | None = None) -> Policy:
    """Build a policy by name; ``seed`` makes the random ones repeatable.

    Raises:
        ConfigError: for an unknown name, listing the known ones.
    """
    try:
        return _MAKERS[name](seed)
    except KeyError:
        raise ConfigError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}") from None

"""Which prefill and which decode worker should serve this request.

Policies are pure: they see the loads at one moment and return a pair. They hold no
sockets and read no clock, so a simulator can run exactly these objects.
"""

from __future__ import annotations

from collections.abc import Callable

from pdserve.balancer.policy.cache_aware import CacheAware, CacheParams
from pdserve.balancer.policy.least_load import LeastLoad
from pdserve.balancer.policy.simple import PowerOfTwo, Random, RoundRobin
from pdserve.balancer.policy.split import SplitPolicy
from pdserve.balancer.policy.view import (
    Candidates,
    Choice,
    LegPolicy,
    LinkCost,
    PairView,
    Policy,
    Reason,
    WorkerView,
)
from pdserve.balancer_config import BalancerConfig
from pdserve.errors import ConfigError

__all__ = [
    "POLICIES",
    "CacheParams",
    "Candidates",
    "Choice",
    "LegPolicy",
    "LinkCost",
    "PairView",
    "Policy",
    "Reason",
    "SplitPolicy",
    "WorkerView",
    "make_policy",
    "policy_of",
]

_MAKERS: dict[str, Callable[[int | None, CacheParams], LegPolicy]] = {
    "least_load": lambda seed, cache: LeastLoad(),
    "cache_aware": lambda seed, cache: CacheAware(cache),
    "power_of_two": lambda seed, cache: PowerOfTwo(seed),
    "round_robin": lambda seed, cache: RoundRobin(),
    "random": lambda seed, cache: Random(seed),
}

POLICIES = tuple(_MAKERS)
"""Names that ``--policy`` takes; the first is the default."""

_NEAREST = {
    "bucket": "least_load",
    "manual": "cache_aware",
    "consistent_hashing": "cache_aware",
    "prefix_hash": "cache_aware",
    "passthrough": "round_robin",
}
"""Policies of sglang-router and smg that are not here, and what serves their purpose best."""


def make_policy(name: str, seed: int | None = None, cache: CacheParams | None = None) -> LegPolicy:
    """Build a policy by name; ``seed`` makes the random ones repeatable.

    Raises:
        ConfigError: for an unknown name, listing the known ones.
    """
    if maker := _MAKERS.get(name):
        return maker(seed, cache or CacheParams())
    hint = f"; the nearest to {name!r} is {_NEAREST[name]!r}" if name in _NEAREST else ""
    raise ConfigError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}{hint}")


def policy_of(config: BalancerConfig, seed: int | None = None) -> Policy:
    """The policy a balancer with these settings uses: one for both legs, or one for each if they differ.

    Raises:
        ConfigError: for an unknown name, listing the known ones.
    """
    cache = CacheParams(
        cache_threshold=config.cache_threshold,
        balance_abs_threshold=config.balance_abs_threshold,
        balance_rel_threshold=config.balance_rel_threshold,
        max_tree_size=config.max_tree_size,
    )
    prefill = config.prefill_policy or config.policy
    decode = config.decode_policy or config.policy
    if prefill == decode:
        return make_policy(prefill, seed, cache)
    decode_seed = None if seed is None else seed + 1
    return SplitPolicy(make_policy(prefill, seed, cache), make_policy(decode, decode_seed, cache))

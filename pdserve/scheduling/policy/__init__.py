"""Which prefill and which decode worker should serve this request.

Policies are pure: they see the loads at one moment and return a pair. They hold no
sockets and read no clock, so a simulator can run exactly these objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from pdserve.scheduling.policy.cache_aware import CacheAware, CacheParams
from pdserve.scheduling.policy.least_load import LeastLoad
from pdserve.scheduling.policy.pair_cost import PairCost, PairCostParams
from pdserve.scheduling.policy.simple import PowerOfTwo, Random, RoundRobin, SplitPolicy
from pdserve.scheduling.policy.view import (
    Candidates,
    Choice,
    LegPolicy,
    LinkCost,
    PairView,
    Policy,
    Reason,
    WorkerView,
)
from pdserve.scheduling.prefix.tree import PromptTree

__all__ = [
    "MAKERS",
    "POLICIES",
    "CacheParams",
    "Candidates",
    "Choice",
    "LegPolicy",
    "LinkCost",
    "Maker",
    "PairCost",
    "PairCostParams",
    "PairView",
    "Policy",
    "PolicyParams",
    "PromptTree",
    "Reason",
    "SplitPolicy",
    "WorkerView",
    "make_policy",
    "policy_of",
]


@dataclass(frozen=True, slots=True)
class PolicyParams:
    """What any of the policies may be set up with; each takes its own part.

    ``prefix_ttl_s``: a prefix known only from our own dispatches is forgotten when unused this long.
    """

    cache: CacheParams = field(default_factory=CacheParams)
    pair: PairCostParams = field(default_factory=PairCostParams)
    prefix_ttl_s: float = 600.0

    @classmethod
    def of(cls, config: BalancerConfig) -> PolicyParams:
        """The part of the balancer's settings that policies know of."""
        cache = CacheParams(
            cache_threshold=config.cache_threshold,
            balance_abs_threshold=config.balance_abs_threshold,
            balance_rel_threshold=config.balance_rel_threshold,
            max_tree_size=config.max_tree_size,
        )
        pair = PairCostParams(slo_ttft_s=config.slo_ttft_s, slo_tpot_s=config.slo_tpot_s)
        return cls(cache, pair, config.prefix_ttl_s)

    def tree(self) -> PromptTree:
        """A new, empty one."""
        return PromptTree(ttl_s=self.prefix_ttl_s)


Maker = Callable[[int | None, PolicyParams], LegPolicy]
"""Builds one policy from a seed, which only random policies use, and its parameters."""

MAKERS: Mapping[str, Maker] = {
    "pair_cost": lambda seed, params: PairCost(params.pair, params.tree()),
    "least_load": lambda seed, params: LeastLoad(),
    "cache_aware": lambda seed, params: CacheAware(params.cache),
    "power_of_two": lambda seed, params: PowerOfTwo(seed),
    "round_robin": lambda seed, params: RoundRobin(),
    "random": lambda seed, params: Random(seed),
}
"""The balancer's policies by the name that ``--policy`` takes; the first is the default."""

POLICIES = tuple(MAKERS)

_NEAREST = {
    "bucket": "least_load",
    "manual": "cache_aware",
    "consistent_hashing": "cache_aware",
    "prefix_hash": "cache_aware",
    "passthrough": "round_robin",
}
"""Policies of sglang-router and smg that are not here, and what serves their purpose best."""


def make_policy(
    name: str,
    seed: int | None = None,
    params: PolicyParams | None = None,
    makers: Mapping[str, Maker] = MAKERS,
) -> LegPolicy:
    """Build the policy of that name among ``makers``; ``seed`` makes the random ones repeatable.

    Raises:
        ConfigError: for an unknown name, listing the known ones.
    """
    if maker := makers.get(name):
        return maker(seed, params or PolicyParams())
    hint = f"; the nearest to {name!r} is {_NEAREST[name]!r}" if name in _NEAREST else ""
    raise ConfigError(f"unknown policy {name!r}; known: {', '.join(makers)}{hint}")


def policy_of(
    config: BalancerConfig, seed: int | None = None, makers: Mapping[str, Maker] = MAKERS
) -> Policy:
    """The policy a balancer with these settings uses: one for both legs, or one for each if they differ.

    Raises:
        ConfigError: for an unknown name, listing the known ones.
    """
    params = PolicyParams.of(config)
    prefill = config.prefill_policy or config.policy
    decode = config.decode_policy or config.policy
    if prefill == decode:
        return make_policy(prefill, seed, params, makers)
    decode_seed = None if seed is None else seed + 1
    return SplitPolicy(
        make_policy(prefill, seed, params, makers), make_policy(decode, decode_seed, params, makers)
    )

"""The checks of a running fleet, by the address of its balancer."""

from __future__ import annotations

import functools
from urllib.parse import urlsplit

from pdserve.config.worker_env import keys_from_environment
from pdserve.doctor import fleet_checks, pair_checks
from pdserve.doctor.finding import Finding
from pdserve.doctor.fleet_facts import (
    ALL_PROBES_S,
    HEALTH_S,
    INFO_S,
    STATE_S,
    FleetFacts,
    Keys,
    gather_fleet,
    gather_pairs,
)
from pdserve.doctor.runner import Check, Group
from pdserve.errors import ConfigError

LOOK_S = STATE_S + HEALTH_S + 3 * INFO_S + 10.0


def fleet_url(text: str) -> str:
    """``HOST:PORT`` or a URL as ``http://host:port``.

    Raises:
        ConfigError: if it is neither.
    """
    url = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urlsplit(url)
        is_good = bool(parts.hostname) and parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or parts.path or parts.query:
        raise ConfigError(f"URL must be the balancer's address, http://HOST:PORT, got {text!r}")
    return url


def fleet_groups(url: str, api_key: str) -> list[Group]:
    """Every check of the fleet whose balancer is at ``url``.

    Raises:
        ConfigError: if ``url`` is no address.
    """
    looks = _FleetLooks(fleet_url(url), Keys.of(api_key, keys_from_environment()))
    checks = (
        Check("balancer", lambda: fleet_checks.judge_balancer(looks.facts()), LOOK_S),
        Check("workers", lambda: looks.health(fleet_checks.judge_workers)),
        Check("versions", lambda: looks.health(fleet_checks.judge_versions)),
        Check("clocks", lambda: looks.health(fleet_checks.judge_clocks)),
        Check("load", lambda: looks.health(fleet_checks.judge_load)),
        Check("KV layouts", lambda: looks.health(pair_checks.judge_layouts)),
        Check("pairs", lambda: looks.health(pair_checks.judge_pair_states)),
        Check("a token", lambda: looks.health(looks.pairs), ALL_PROBES_S + 20.0),
    )
    return [Group(f"Fleet at {looks.url}", checks, in_turn=True)]


class _FleetLooks:
    """The fleet is asked once; every health sees the same answers."""

    def __init__(self, url: str, keys: Keys) -> None:
        self.url = url
        self._keys = keys
        self.facts = functools.cache(lambda: gather_fleet(url, keys))

    def health(self, health: fleet_checks.Judge) -> list[Finding]:
        """Nothing is judged of a fleet whose balancer does not answer: that was said already."""
        facts: FleetFacts = self.facts()
        return [] if facts.balancer.trouble else health(facts)

    def pairs(self, facts: FleetFacts) -> list[Finding]:
        """A token through every pair that is not known to be impossible."""
        misfits = {
            label: f"KV layouts differ ({text})"
            for label, text in pair_checks.layout_mismatches(facts).items()
        }
        return pair_checks.judge_pairs(gather_pairs(facts, self._keys, misfits))

"""What ``pdserve bench`` was asked to do, checked. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pdserve.errors import ConfigError
from pdserve.workload import LengthDistribution

ROUTES = {"generate": "/generate", "completions": "/v1/completions", "chat": "/v1/chat/completions"}
"""Names of ``--route`` and their paths."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """One run. Lengths in tokens, times in seconds, rates in requests per second.

    ``rate`` 0: as fast as ``concurrency`` allows; ``concurrency`` 0: no bound. ``trace``: a file whose
    lengths, prefixes and, scaled by ``speed``, arrival times are replayed in place of synthetic ones.
    ``prefixes`` > 0: each request begins with one of so many shared prefixes of ``prefix_tokens``.
    ``rounds``: with ``vs`` both services are asked in turn, a part of the requests at a time.
    """

    url: str
    vs: str = ""
    route: str = "generate"
    model: str = ""
    requests: int = 100
    rate: float = 0.0
    concurrency: int = 16
    cv: float = 1.0
    input: str = "256"
    output: str = "64"
    prefixes: int = 0
    prefix_tokens: int = 0
    trace: str = ""
    speed: float = 1.0
    slo_ttft_s: float = 0.0
    slo_tpot_s: float = 0.0
    warmup: int = 4
    rounds: int = 3
    seed: int = 0
    vocabulary: int = 1000
    stream: bool = True
    flush: bool = False
    timeout_s: float = 600.0
    api_key: str = ""
    json_path: str = ""
    plot_path: str = ""

    def __post_init__(self) -> None:
        for name in ("url", "vs"):
            value = getattr(self, name)
            if (value or name == "url") and not value.startswith(("http://", "https://")):
                raise ConfigError(f"{name} must be http://host:port or https://host:port, got {value!r}")
        if self.route not in ROUTES:
            raise ConfigError(f"route must be one of {', '.join(ROUTES)}, got {self.route!r}")
        if self.trace and not Path(self.trace).is_file():
            raise ConfigError(f"trace {self.trace}: no such file")
        for name, least in (("requests", 1), ("rounds", 1), ("vocabulary", 20)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("rate", "concurrency", "prefixes", "prefix_tokens", "warmup"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("speed", "cv", "timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if not (self.rate or self.concurrency or self.trace):
            raise ConfigError("nothing bounds the load: give --rate, --concurrency or --trace")
        if bool(self.prefixes) != bool(self.prefix_tokens):
            raise ConfigError("shared prefixes need both --prefixes and --prefix-tokens")
        lengths(self.input, "input")
        lengths(self.output, "output")


def lengths(text: str, name: str) -> LengthDistribution:
    """``256`` (all alike), ``128-512`` (uniform) or ``256~0.5`` (lognormal: mean and spread over it).

    Raises:
        ConfigError: for anything else.
    """
    if match := re.fullmatch(r"(\d+)", text):
        length = LengthDistribution("fixed", float(match[1]))
    elif match := re.fullmatch(r"(\d+)-(\d+)", text):
        length = LengthDistribution("uniform", low=int(match[1]), high=int(match[2]))
    elif match := re.fullmatch(r"(\d+)~(\d*\.?\d+)", text):
        length = LengthDistribution("lognormal", float(match[1]), float(match[2]))
    else:
        length = LengthDistribution("fixed", 0.0)
    if length.mean < 1 or not 1 <= length.low <= length.high:
        raise ConfigError(
            f"{name} must be tokens as 256, 128-512 (uniform) or 256~0.5 (lognormal), got {text!r}"
        )
    return length

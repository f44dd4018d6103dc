"""What ``pdserve bench`` was asked to do, checked. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pdserve.config.setting import KEYS, LOAD, OUTPUT, RUN, check_choices, setting
from pdserve.errors import ConfigError
from pdserve.workload import LengthDistribution

ROUTES = {"generate": "/generate", "completions": "/v1/completions", "chat": "/v1/chat/completions"}
"""Names of ``--route`` and their paths."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """One run. Lengths in tokens, times in seconds, rates in requests per second."""

    url: str = setting("http://127.0.0.1:30000", "The service, any OpenAI or SGLang URL.", "URL", "URL")
    vs: str = setting("", "A second service, asked in turn.", "URL", "--vs URL", panel=LOAD)
    route: str = setting("generate", "What is asked.", "name", "--route", choices=tuple(ROUTES))
    model: str = setting("", "Name for the OpenAI routes.", "name", "--model", empty="the service's first")
    requests: int = setting(100, "Requests.", "count", "-n --requests")
    rate: float = setting(0.0, "Arrivals.", "requests/s", "--rate", empty="as --concurrency allows")
    concurrency: int = setting(16, "At once at most; 0: no bound.", "count", "-c --concurrency")
    cv: float = setting(1.0, "Spread of the gaps between arrivals; 1 is Poisson.", "factor", "--cv")
    input: str = setting("256", "Prompt: 256, 128-512 or 256~0.5 (lognormal).", "tokens", "--input")
    output: str = setting("64", "Answer, likewise.", "tokens", "--output")
    prefixes: int = setting(0, "Prompts begin with one of this many shared prefixes.", "count", "--prefixes")
    prefix_tokens: int = setting(0, "Length of those prefixes.", "tokens", "--prefix-tokens")
    trace: str = setting("", "Replay a Mooncake .jsonl or Azure .csv trace.", "path", "--trace FILE")
    speed: float = setting(1.0, "Pace of the trace.", "factor", "--speed")
    slo_ttft_s: float = 0.0
    slo_tpot_s: float = 0.0
    warmup: int = setting(4, "First requests, not counted.", "count", "--warmup")
    rounds: int = setting(3, "With --vs: parts sent in turn.", "count", "--rounds")
    seed: int = setting(0, "Of prompts, lengths and arrivals.", "number", "--seed")
    vocabulary: int = setting(1000, "Token ids are drawn from 10 to this.", "count", "--vocabulary")
    stream: bool = setting(True, "Stream answers.", "flag", "--stream/--no-stream")
    flush: bool = setting(False, "POST /flush_cache before each part.", "flag", "--flush")
    timeout_s: float = setting(600.0, "Longest silence of the service.", "seconds", "--timeout", panel=RUN)
    api_key: str = setting("", "The service's key; or PDSERVE_API_KEY.", "text", "--api-key KEY", panel=KEYS)
    json_path: str = setting("", "Write the figures as JSON.", "path", "--json FILE", panel=OUTPUT)
    plot_path: str = setting("", "Draw a PNG.", "path", "--plot FILE")

    def __post_init__(self) -> None:
        for name in ("url", "vs"):
            value = getattr(self, name)
            if (value or name == "url") and not value.startswith(("http://", "https://")):
                raise ConfigError(f"{name} must be http://host:port or https://host:port, got {value!r}")
        check_choices(self)
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

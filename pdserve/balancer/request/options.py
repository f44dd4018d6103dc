"""A request's options as SGLang's models type them: ``"stream": "true"`` streams, ``"n": 2.0`` is two.

The OpenAI and Anthropic routes have pydantic models, which coerce (``lax_bool``, ``lax_int``). /generate
has a contract besides (api_contract.py), which takes JSON's own types only; /vertex_generate makes its
request of whatever it is given. What a model refuses counts as absent here: the worker refuses it. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from pdserve.balancer.request.request import DEFAULT_NEW_TOKENS, MAX_NEW_TOKENS, RequestRefused, Route

MAX_SAMPLES = 1024

_BOOLS = {
    **dict.fromkeys(("1", "on", "t", "true", "y", "yes"), True),
    **dict.fromkeys(("0", "off", "f", "false", "n", "no"), False),
}
_INT = re.compile(r"\s*[+-]?[0-9]+(?:_[0-9]+)*(?:\.0+)?\s*", re.ASCII)
_FLOAT_END = 2.0**63
"""pydantic takes a whole float for an int if it fits into 64 bits."""
_MAX_DIGITS = 4300
"""Python converts no longer ones, and pydantic refuses them."""


def lax_bool(value: Any) -> bool | None:
    """A bool as pydantic reads one; None for what it refuses."""
    if isinstance(value, str):
        return _BOOLS.get(value.lower())
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    return None


def lax_int(value: Any) -> int | None:
    """An int as pydantic reads one; None for what it refuses."""
    if isinstance(value, str):
        if len(value) > _MAX_DIGITS or not _INT.fullmatch(value):
            return None
        return int(value.partition(".")[0])
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < _FLOAT_END else None
    return int(value) if isinstance(value, int) else None


_Reader = Callable[[Any], Any]
_COMMON: dict[str, _Reader] = {"stream": lax_bool, "priority": lax_int}
_CHAT = {
    **_COMMON,
    **dict.fromkeys(("logprobs", "return_routed_experts"), lax_bool),
    **dict.fromkeys(("n", "top_logprobs", "max_tokens", "max_completion_tokens"), lax_int),
}
_READERS: dict[Route, dict[str, _Reader]] = {
    Route.CHAT: _CHAT,
    Route.INVOCATIONS: _CHAT,
    Route.COMPLETIONS: {
        **_COMMON,
        **dict.fromkeys(("echo", "return_routed_experts"), lax_bool),
        **dict.fromkeys(("n", "logprobs", "max_tokens"), lax_int),
    },
    Route.RESPONSES: {**_COMMON, "max_output_tokens": lax_int, "top_logprobs": lax_int},
    Route.MESSAGES: {"stream": lax_bool, "max_tokens": lax_int},
    # Its contract knows stream, but not this one.
    Route.GENERATE: {"return_routed_experts": lax_bool},
    Route.VERTEX: {"stream": bool},
}
_LIMITS = {
    Route.CHAT: ("max_completion_tokens", "max_tokens"),
    Route.INVOCATIONS: ("max_completion_tokens", "max_tokens"),
    Route.COMPLETIONS: ("max_tokens",),
    Route.MESSAGES: ("max_tokens",),
    Route.RESPONSES: ("max_output_tokens",),
}


def typed_options(route: Route, options: dict[str, Any]) -> dict[str, Any]:
    """The same options with those that the balancer looks at as the worker will read them."""
    typed = dict(options)
    for name, read in _READERS[route].items():
        if name in typed and (value := read(typed.pop(name))) is not None:
            typed[name] = value
    return typed


def sampling_of(route: Route, options: dict[str, Any]) -> list[dict[str, Any]]:
    """The sampling parameters of the native routes: one set for all prompts, or one for each."""
    if route not in (Route.GENERATE, Route.VERTEX):
        return []
    value = options.get("sampling_params")
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]


def num_samples(route: Route, options: dict[str, Any], sampling: Sequence[dict[str, Any]]) -> int:
    """How many answers to each prompt are asked for, 1 where SGLang makes them of one request.

    Raises:
        RequestRefused: if prompts of a batch ask for different numbers, or for too many.
    """
    if route in (Route.RESPONSES, Route.MESSAGES):
        return 1  # they have no such field
    places = sampling if route in (Route.GENERATE, Route.VERTEX) else [options]
    counts = {1 if _count(place, "beam_width") > 1 else _count(place, "n") for place in places}
    if len(counts) > 1:
        raise RequestRefused("n must be the same for every prompt of a batch")
    samples = counts.pop() if counts else 1
    if samples > MAX_SAMPLES:
        raise RequestRefused(f"n may be {MAX_SAMPLES} at most, got {samples}")
    return samples


def _count(place: dict[str, Any], name: str) -> int:
    value = place.get(name)
    return value if isinstance(value, int) and value > 1 else 1


def new_tokens(route: Route, options: dict[str, Any], sampling: Sequence[dict[str, Any]]) -> int:
    """The most tokens that an answer may have; SGLang's own default where no limit was given."""
    limits = [item.get("max_new_tokens") for item in sampling]
    limits += [options.get(name) or None for name in _LIMITS.get(route, ())]  # a chat's 0 is no limit
    limit = next((n for n in limits if isinstance(n, int) and n >= 0), DEFAULT_NEW_TOKENS)
    return min(limit, MAX_NEW_TOKENS)


def priority_of(options: dict[str, Any]) -> int | None:
    """None without one."""
    value = options.get("priority")
    return value if isinstance(value, int) else None


def user_of(options: dict[str, Any]) -> str:
    """Empty without one."""
    value = options.get("user")
    return value if isinstance(value, str) else ""

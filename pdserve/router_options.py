"""sglang-router's flags out of a ``pdserve balance`` command line, by the table of router_flags.py. Pure.

argv ─ take_router_flags ─► what typer parses, and RouterOptions(settings, ignored)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pdserve.errors import ConfigError
from pdserve.router_flags import ROUTER_FLAGS, RouterFlag


@dataclass(slots=True)
class RouterOptions:
    """What sglang-router's flags came to. ``ignored`` are those without effect, in order, each once."""

    settings: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)

    @property
    def note(self) -> str:
        """One line on the flags without effect; empty if there are none. Never a value: some are secrets."""
        reasons: dict[str, list[str]] = {}
        for name in self.ignored:
            reasons.setdefault(ROUTER_FLAGS[name].why_ignored, []).append(name)
        told = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
        return f"note: accepted without effect: {told}" if told else ""


def take_router_flags(argv: Sequence[str]) -> tuple[list[str], RouterOptions]:
    """The arguments without sglang-router's own flags, and what those say.

    Raises:
        ConfigError: for a flag that is refused, without its value or with a wrong one.
    """
    rest: list[str] = []
    options = RouterOptions()
    dependent: list[tuple[str, RouterFlag, list[str]]] = []
    at = 0
    while at < len(argv):
        name, equals, given = argv[at].partition("=")
        at += 1
        flag = ROUTER_FLAGS.get(name)
        if flag is None:
            rest.append(argv[at - 1])
            continue
        values = [given] if equals else _values(flag, argv[at:])
        at += 0 if equals else len(values)
        if flag.needs:
            dependent.append((name, flag, values))
        else:
            _apply(name, flag, values, options)
    for name, flag, values in dependent:  # they win over what their switch sets
        _apply(name, flag if flag.needs in argv else replace(flag, field=""), values, options)
    return rest, options


def _values(flag: RouterFlag, following: Sequence[str]) -> list[str]:
    """The values of a flag as argparse reads them: a negative number is a value, another dash ends them."""
    wanted = {"0": 0, "1": 1}.get(flag.nargs, len(following))
    values: list[str] = []
    for text in following[:wanted]:
        if text.startswith("-") and not _is_number(text):
            break
        values.append(text)
    return values


def _apply(name: str, flag: RouterFlag, values: list[str], options: RouterOptions) -> None:
    if flag.nargs in "1+" and not values:
        raise ConfigError(f"{name} needs a value")
    asks_nothing = (flag.default and values == [flag.default]) or (flag.nargs == "*" and not values)
    if asks_nothing:
        return
    if flag.refusal:
        raise ConfigError(f"{name} is not supported: {flag.refusal}")
    if not flag.field:
        if name not in options.ignored:
            options.ignored.append(name)
        return
    try:
        read = tuple(flag.read(value) for value in values or [""])
    except ValueError:
        raise ConfigError(f"{name} takes a number, got {values[0]!r}") from None
    options.settings[flag.field] = read if flag.nargs in "*+" else read[0]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

"""A setting is one dataclass field that carries its default, help, unit, option name and choices.

The command line (cli/options.py), configs/*.toml and docs/options.md (cli/reference.py) are generated
from these fields, so each of them is written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from pdserve.errors import ConfigError

FLEET, LISTEN, ENGINE, RUN, ROUTING = "Fleet", "Addresses", "SGLang", "Running", "Routing"
TRANSFER, LIMITS, FAILURES, KEYS = "KV transfer", "Limits", "Failures", "Keys and TLS"
LOAD, OUTPUT, MODEL = "Load", "Output", "Model"
"""Panels of the help, sections of docs/options.md."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a user reads about one setting. ``default`` is MISSING for an option that must be given."""

    name: str
    default: Any
    help: str
    unit: str
    flag: str
    panel: str
    choices: tuple[str, ...]
    empty: str

    @property
    def flags(self) -> tuple[str, ...]:
        """The option's names; empty for an argument and for what only a file can set."""
        return tuple(word for word in self.flag.split() if word.startswith("-"))

    @property
    def metavar(self) -> str:
        """What stands for the value in the help; empty: the value's type."""
        words = [word for word in self.flag.split(" ") if not word.startswith("-")]
        return " ".join(words) or "|".join(self.choices)

    @property
    def default_text(self) -> str:
        """``default 60``, ``default: the cache``, ``default 0: any free one``; empty if it is required."""
        if self.default is MISSING:
            return ""
        if self.default in ("", (), None):
            return f"default: {self.empty}" if self.empty else "default none"
        return f"default {plain(self.default)}" + (f": {self.empty}" if self.empty else "")


def setting(
    default: Any,
    help: str,
    unit: str,
    flag: str = "",
    panel: str = "",
    choices: tuple[str, ...] = (),
    empty: str = "",
) -> Any:
    """A dataclass field that is a setting.

    Args:
        default: MISSING makes it required.
        help: one or two sentences; unit and default are appended where it is shown.
        unit: ``seconds``, ``count``, ``path`` …
        flag: the option's names and its metavar, ``-n --requests`` or ``--join HOST:PORT``; a metavar alone
            is a positional argument; empty: only a configuration file can set it.
        panel: the part of the help it belongs to; empty: that of the setting before it.
        choices: the only values allowed.
        empty: what the default (``""``, ``0`` or ``()``) means.
    """
    about = dict(help=help, unit=unit, flag=flag, panel=panel, choices=choices, empty=empty)
    return field(default=default, metadata=about)


def admin_key_setting() -> Any:
    """The key that a tool sends to a service's control routes."""
    help = "Admin key of the service; or PDSERVE_ADMIN_API_KEY, PDSERVE_API_KEY."
    return setting("", help, "text", "--api-key KEY", panel=KEYS)


def same_setting(config: type[Any], name: str) -> Any:
    """A dataclass field like the one of ``config``: the same setting of another command."""
    known = next(known for known in settings_of(config) if known.name == name)
    about = {item.name: getattr(known, item.name) for item in fields(known)}
    return field(default=about.pop("default"), metadata={k: v for k, v in about.items() if k != "name"})


def settings_of(config: type[Any]) -> Iterator[Setting]:
    """The settings of a dataclass in the order of its fields; fields without help are none."""
    panel = RUN
    for item in fields(config):
        if item.metadata:
            panel = item.metadata["panel"] or panel
            yield Setting(item.name, item.default, **{**item.metadata, "panel": panel})


def check_choices(config: Any) -> None:
    """Raise ConfigError, naming the setting, unless each value is one of its choices."""
    for known in settings_of(type(config)):
        value = getattr(config, known.name)
        if known.choices and value not in known.choices:
            raise ConfigError(f"{known.name} must be one of {', '.join(known.choices)}, got {value!r}")


def plain(value: Any) -> str:
    """A default as the help shows it: on, off, numbers without a needless fraction."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value)

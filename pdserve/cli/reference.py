"""Writes configs/*.toml and docs/options.md from the settings: ``python -m pdserve.cli.reference``.

A test compares what stands in the checkout with what this would write.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from pdserve.cli.app import COMMANDS
from pdserve.cli.options import Command, help_text
from pdserve.config.file import SECTIONS
from pdserve.config.setting import Setting, settings_of

ROOT = Path(__file__).parents[2]
WIDTH = 110
COMMENT_AT = 28
"""Column of the comments in configuration files."""
COMMAND_OF = {"launch": "launch", "balancer": "balance", "bootstrap": "bootstrap"}
"""The command that reads each section of a configuration file."""
INTRODUCTION = """# Options

Every option and setting of `pdserve`, by command: what it does, unit and default. This page and
[configs/](../configs) are generated from the settings' dataclasses (`python -m pdserve.cli.reference`).

A default yields to the key of a configuration file (`--config FILE`), a key to an option on the command line.
`PDSERVE_API_KEY`, `PDSERVE_ADMIN_API_KEY` and `PDSERVE_WORKER_API_KEY` stand between file and command line.
Settings that are shown without an option can only be set in a file.
"""


def generated_files() -> dict[str, str]:
    """The text of each generated file by its path in the checkout."""
    files = {f"configs/{name}.toml": format_toml(name) for name in SECTIONS}
    return files | {"docs/options.md": format_options()}


def format_toml(section: str) -> str:
    """A configuration file with every key of ``section`` and its default."""
    lines = [
        f"# pdserve {COMMAND_OF[section]} --config configs/{section}.toml",
        "# Every key with its default. An option on the command line wins over this file.",
        "",
        f"[{section}]",
    ]
    for panel, known in groupby(settings_of(SECTIONS[section]), lambda setting: setting.panel):
        lines += ["", f"# {panel}"]
        for setting in known:
            lines += _toml_lines(setting)
    return "\n".join(lines) + "\n"


def format_options() -> str:
    """docs/options.md: every command with its options, and the keys of its section of a file."""
    parts = [INTRODUCTION]
    for command in COMMANDS:
        settings = [known for config in command.configs() for known in settings_of(config)]
        if settings:
            parts.append("\n".join(_command_lines(command, settings)))
    return "\n".join(parts)


def _command_lines(command: Command, settings: list[Setting]) -> Iterator[str]:
    section = _section(command)
    keys = {known.name for known in settings_of(SECTIONS[section])} if section else set()
    yield f"## pdserve {command.name}\n"
    yield textwrap.fill(f"{command.run.__doc__} {command.epilog}", WIDTH) + "\n"
    for panel in dict.fromkeys(known.panel for known in settings):
        yield f"**{panel}**\n"
        for known in settings:
            if known.panel == panel:
                option = " ".join((*known.flags, known.metavar)).strip() if known.flag else ""
                names = filter(None, (option, known.name if known.name in keys else ""))
                line = f"* {', '.join(f'`{name}`' for name in names)}: {help_text(known)}"
                yield textwrap.fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        yield ""


def _section(command: Command) -> str:
    """The section of a configuration file that ``command`` reads; empty for none."""
    return next((name for name, reader in COMMAND_OF.items() if reader == command.name), "")


def _toml_lines(known: Setting) -> list[str]:
    empty = f"{_toml(known.default)}: {known.empty}" if known.empty else ""
    text = f"{known.help} ({'; '.join(filter(None, (' | '.join(known.choices) or known.unit, empty)))})"
    start = f"{known.name} = {_toml(known.default)}".ljust(COMMENT_AT - 1) + " # "
    more = " " * COMMENT_AT + "# "
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=more, break_on_hyphens=False)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


if __name__ == "__main__":
    for path, text in generated_files().items():
        (ROOT / path).write_text(text)

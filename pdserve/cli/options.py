"""From the settings of dataclasses to a typer command: options, arguments, help with unit and default.

An option that is not given on the command line is absent from ``Given``; its default is the dataclass's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pkgutil import resolve_name
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from pdserve.cli.router_flags import RouterOptions
from pdserve.config.setting import Setting, settings_of

T = TypeVar("T")

ONE_TEXT = ("prefill_args", "decode_args", "port_range")
"""Settings of several values that the command line takes as one text."""


@dataclass(frozen=True, slots=True)
class Given:
    """The options that the user gave, by setting, and what followed that is not ours."""

    values: Mapping[str, Any]
    sglang_args: tuple[str, ...] = ()
    router: RouterOptions | None = None

    def of(self, config: type[Any]) -> dict[str, Any]:
        """Those that are fields of ``config``."""
        names = {item.name for item in fields(config)}
        return {name: value for name, value in self.values.items() if name in names}

    def make(self, config: type[T]) -> T:
        """``config`` with them in place of its defaults."""
        return config(**self.of(config))


@dataclass(frozen=True, slots=True)
class Command:
    """One command of ``pdserve``. The docstring of ``run`` is its help."""

    run: Callable[[Given], int | None]
    panel: str
    options: tuple[str, ...]
    """Dataclasses that hold its options, as ``module:Name``; imported only for the command that runs."""
    epilog: str = ""
    needs: str = ""
    """A package without which it cannot run."""

    @property
    def name(self) -> str:
        """What the user types."""
        return self.run.__name__

    def configs(self) -> list[type[Any]]:
        """The dataclasses of ``options``, imported."""
        return [resolve_name(path) for path in self.options]


def typer_function(command: Command, call: Callable[[dict[str, Any]], int | None]) -> Callable[..., None]:
    """A function with one parameter per option of ``command``, as typer reads it, that ends in ``call``."""

    def function(**values: Any) -> None:
        raise typer.Exit(call({k: v for k, v in values.items() if v not in (None, [], ())}) or 0)

    parameters: dict[str, inspect.Parameter] = {}
    for config in command.configs():
        types = get_type_hints(config)
        for known in settings_of(config):
            if known.flag:
                parameters[known.name] = _parameter(known, types[known.name])
    function.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    function.__annotations__ = {}
    function.__doc__ = command.run.__doc__
    return function


def listed_function(command: Command) -> Callable[[], None]:
    """As much of ``command`` as the list of all commands shows."""

    def function() -> None:
        raise AssertionError(f"{command.name} is only listed")

    function.__doc__ = command.run.__doc__
    return function


def help_text(known: Setting) -> str:
    """Help, unit and default of one option, as ``--help`` shows them."""
    return f"{known.help} ({'; '.join(filter(None, (known.unit, known.default_text)))})"


def _parameter(known: Setting, python_type: Any) -> inspect.Parameter:
    given = _given_type(known.name, python_type)
    about: dict[str, Any] = dict(help=help_text(known), show_default=False, rich_help_panel=known.panel)
    if known.flags:
        declared = typer.Option(*known.flags, metavar=known.metavar or None, **about)
    else:
        declared = typer.Argument(**{**about, "rich_help_panel": None})
    is_required = not known.default_text
    return inspect.Parameter(
        known.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if is_required else None,
        annotation=Annotated[given if is_required else given | None, declared],
    )


def _given_type(name: str, python_type: Any) -> Any:
    """What typer parses: numbers, texts and switches as they are, tuples as lists of texts."""
    if get_origin(python_type) is tuple:
        return str if name in ONE_TEXT else list[str]
    plain = [part for part in get_args(python_type) if part is not type(None)]
    return plain[0] if plain else python_type

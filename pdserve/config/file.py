"""Configuration files and the merge of defaults, file and flags.

Files are TOML, one table per section, keys named as the fields of the settings'
dataclasses. A flag given on the command line wins over the file, the file over the default.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pdserve.config.balancer import BalancerConfig
from pdserve.config.launch import BootstrapConfig, LaunchConfig
from pdserve.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileConfig:
    """A parsed configuration file: only the keys it names, by section."""

    launch: Mapping[str, Any] = field(default_factory=dict)
    balancer: Mapping[str, Any] = field(default_factory=dict)
    bootstrap: Mapping[str, Any] = field(default_factory=dict)


SECTIONS: dict[str, type[Any]] = {
    "launch": LaunchConfig,
    "balancer": BalancerConfig,
    "bootstrap": BootstrapConfig,
}


def load_file(path: Path) -> FileConfig:
    """Parse a TOML file and check its names and the types of its values.

    Raises:
        ConfigError: if the file is missing, is not TOML, has an unknown section or key,
            or a value of another type than the default.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(f"cannot read config file {path}: {exc.strerror}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path} is not valid TOML: {exc}") from exc
    for section, values in raw.items():
        known = SECTIONS.get(section)
        if known is None or not isinstance(values, dict):
            raise ConfigError(f"{path}: unknown section [{section}]; known: {', '.join(SECTIONS)}")
        names = {f.name for f in fields(known)}
        for key in values:
            if key not in names:
                raise ConfigError(f"{path}: unknown key {section}.{key}; known: {', '.join(sorted(names))}")
        try:
            msgspec.convert(values, type=known)
        except msgspec.ValidationError as exc:
            raise ConfigError(f"{path}: {str(exc).replace('$', section)}") from exc
    return FileConfig(**raw)


def merge(default: T, file_values: Mapping[str, Any], flags: Mapping[str, Any]) -> T:
    """Default < file < flags; a flag that is ``None`` was not given. Lists become tuples."""
    values = {**file_values, **{k: v for k, v in flags.items() if v is not None}}
    clean = {k: _tuples(v) for k, v in values.items()}
    try:
        return replace(default, **clean)  # type: ignore[type-var]
    except TypeError as exc:
        raise ConfigError(f"bad configuration value: {exc}") from exc


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value

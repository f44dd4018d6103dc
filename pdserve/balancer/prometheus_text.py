"""Several servers' Prometheus expositions as one, each sample labelled with its server. Pure.

The text format wants all samples of a metric together under one HELP and TYPE
line, so the parts are regrouped by metric; values are not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


class _Family:
    """One metric: its header lines, once, and everybody's samples."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.samples: list[str] = []


def merge_expositions(parts: Iterable[tuple[Mapping[str, str], str]]) -> str:
    """One exposition from ``(labels to add, text)`` pairs; the first HELP and TYPE of a metric win."""
    families: dict[str, _Family] = {}
    for labels, text in parts:
        added = label_pairs(labels.items())
        current = ""
        for line in text.splitlines():
            if line.startswith("#"):
                kind, name = _header(line)
                if name:
                    current = name
                    families.setdefault(name, _Family()).headers.setdefault(kind, line)
            elif line.strip():
                current = _owner(line, current)
                families.setdefault(current, _Family()).samples.append(_labelled(line, added))
    lines = [line for family in families.values() for line in (*family.headers.values(), *family.samples)]
    return "\n".join(lines) + "\n" if lines else ""


def label_pairs(labels: Iterable[tuple[str, str]]) -> str:
    """``name="value",…`` with the values escaped, as it stands between the braces."""
    return ",".join([f'{name}="{_escaped(value)}"' for name, value in labels])


def _escaped(value: str) -> str:
    has_odd = "\\" in value or '"' in value or "\n" in value
    return value.translate(_ESCAPES) if has_odd else value


def _header(line: str) -> tuple[str, str]:
    """``HELP`` or ``TYPE`` and the metric's name; empty strings for a plain comment."""
    words = line.split(None, 3)
    return (words[1], words[2]) if len(words) >= 3 and words[1] in ("HELP", "TYPE") else ("", "")


def _owner(sample: str, current: str) -> str:
    """The metric a sample belongs to: ``x_bucket`` stands under ``x``."""
    name = _name(sample)
    return current if current and (name == current or name.startswith(current + "_")) else name


def _name(sample: str) -> str:
    ends = [at for at in (sample.find("{"), sample.find(" ")) if at >= 0]
    return sample[: min(ends)] if ends else sample


def _labelled(sample: str, added: str) -> str:
    name = _name(sample)
    rest = sample[len(name) :]
    if not rest.startswith("{"):
        return f"{name}{{{added}}}{rest}"
    separator = "" if rest.startswith("{}") else ","
    return f"{name}{{{added}{separator}{rest[1:]}"

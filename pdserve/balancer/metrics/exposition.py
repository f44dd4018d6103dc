"""Several servers' Prometheus expositions as one, each sample labelled with its server. Pure.

The text format wants all samples of a metric together under one HELP and TYPE
line, so the parts are regrouped by metric; values are not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_SUFFIXES = ("", "_bucket", "_sum", "_count", "_total", "_created")
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


class _Family:
    """One metric: its header lines, once, and everybody's samples, several lines at a time."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.samples: list[str] = []


class ExpositionMerger:
    """Puts one exposition after the other into one; the first HELP and TYPE of a metric win.

    A metric's samples are labelled together, not line by line: 64 workers may tell a hundred thousand
    of them, and streams wait meanwhile. Let others run between two ``add``.
    """

    def __init__(self) -> None:
        self._families: dict[str, _Family] = {}

    def add(self, labels: Mapping[str, str], text: str) -> None:
        """Add one server's exposition with ``labels`` in front of its own."""
        added = label_pairs(labels.items())
        before, *pieces = f"\n{text}".split("\n# ")
        self._add_samples("", before, added)
        current = ""
        for piece in pieces:
            header, _, samples = piece.partition("\n")
            kind, name = _header(header)
            if name:
                current = name
                self._family(name).headers.setdefault(kind, f"# {header.rstrip()}")
            self._add_samples(current, samples, added)

    def text(self) -> str:
        """All of it."""
        families = self._families.values()
        lines = [line for family in families for line in (*family.headers.values(), *family.samples)]
        return "\n".join(lines) + "\n" if lines else ""

    def _family(self, name: str) -> _Family:
        family = self._families.get(name)
        if family is None:
            family = self._families[name] = _Family()
        return family

    def _add_samples(self, current: str, block: str, added: str) -> None:
        block = block.strip()
        if not block:
            return
        if current and (quick := _all_labelled(current, block, added)):
            self._family(current).samples.append(quick)
            return
        for line in block.splitlines():
            if line.strip() and not line.startswith("#"):
                current = _owner(line, current)
                self._family(current).samples.append(_labelled(line, added))


def label_pairs(labels: Iterable[tuple[str, str]]) -> str:
    """``name="value",…`` with the values escaped, as it stands between the braces."""
    return ",".join([f'{name}="{_escaped(value)}"' for name, value in labels])


def _escaped(value: str) -> str:
    has_odd = "\\" in value or '"' in value or "\n" in value
    return value.translate(_ESCAPES) if has_odd else value


def _header(text: str) -> tuple[str, str]:
    """``HELP`` or ``TYPE`` and the metric's name; empty strings for a plain comment."""
    words = text.split(None, 2)
    return (words[0], words[1]) if len(words) >= 2 and words[0] in ("HELP", "TYPE") else ("", "")


def _all_labelled(name: str, block: str, added: str) -> str:
    """All lines of a block labelled at once; empty unless each is a sample of that metric.

    What is replaced begins with a line break, which a label's value cannot contain.
    """
    if "{}" in block or "\r" in block:
        return ""
    lines, missing = f"\n{block}", block.count("\n") + 1
    for suffix in _SUFFIXES:
        begin = f"\n{name}{suffix}"
        for old, new in ((f"{begin}{{", f"{begin}{{{added},"), (f"{begin} ", f"{begin}{{{added}}} ")):
            if count := lines.count(old):
                lines, missing = lines.replace(old, new), missing - count
                if not missing:
                    return lines[1:]
    return ""


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

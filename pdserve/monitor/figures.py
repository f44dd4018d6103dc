"""Numbers as an operator reads them: at most seven cells, with their unit where it is not in a heading. Pure.

``None`` is shown as ``-``: not known, which is not the same as 0.
"""

from __future__ import annotations

from collections.abc import Sequence

UNKNOWN = "-"
_BLOCKS = "▁▂▃▄▅▆▇█"
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_seconds(value: float | None) -> str:
    """A latency in at most six cells: ``0.4 ms``, ``210 ms``, ``1.20 s``, ``12.3 s``, ``3m20``."""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0 s"
    size = abs(value)
    if size < 0.00995:
        return f"{value * 1e3:.1f} ms"
    if size < 0.9995:
        return f"{value * 1e3:.0f} ms"
    if size < 9.995:
        return f"{value:.2f} s"
    if size < 99.95:
        return f"{value:.1f} s"
    return format_age(value)


def format_age(value: float | None) -> str:
    """A duration in at most five cells up to a year: ``45s``, ``3m20``, ``2h03``, ``12d``."""
    if value is None:
        return UNKNOWN
    whole = round(max(0.0, value))
    if whole < 100:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}"
    if whole < 100 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02}"
    if whole < 10_000 * 86_400:
        return f"{whole // 86_400}d"
    return ">27y"


def format_count(value: float | None) -> str:
    """A whole number: ``0``, ``9999``, ``12.3k``, ``4.56M``."""
    if value is None:
        return UNKNOWN
    return f"{value:.0f}" if abs(value) < 9999.5 else _scaled(value)


def format_short(value: float | None) -> str:
    """A whole number in at most four cells: ``9999``, ``12k``, ``3M``."""
    if value is None:
        return UNKNOWN
    if abs(value) < 9999.5:
        return f"{value:.0f}"
    factor, prefix = next(((f, p) for f, p in reversed(_PREFIXES) if abs(value) < f * 999.5), (0.0, ""))
    return f"{value / factor:.0f}{prefix}" if factor else ">1P"


def format_rate(value: float | None) -> str:
    """Something per second: ``0``, ``0.25``, ``12.3``, ``841``, ``5.12k``."""
    if value is None:
        return UNKNOWN
    size = abs(value)
    if size == 0:
        return "0"
    if size < 9.995:
        return f"{value:.2f}"
    if size < 99.95:
        return f"{value:.1f}"
    return f"{value:.0f}" if size < 999.5 else _scaled(value)


def format_bytes(value: float | None, unit: str = "B") -> str:
    """Decimal bytes: ``0 B``, ``831 kB``, ``1.20 GB``; ``unit`` may be ``B/s``."""
    if value is None:
        return UNKNOWN
    if abs(value) < 999.5:
        return f"{value:.0f} {unit}"
    scaled = _scaled(value)
    return f"{scaled[:-1]} {scaled[-1]}{unit}" if scaled[-1].isalpha() else f"{scaled} {unit}"


def format_percent(value: float | None) -> str:
    """A fraction of 1 as a percentage without decimals."""
    return UNKNOWN if value is None else f"{min(max(value, 0.0), 9.99) * 100:.0f}%"


def bar(fraction: float | None, width: int) -> str:
    """``fraction`` of 1 as a bar of ``width`` cells; dots if it is not known."""
    if fraction is None:
        return "·" * width
    filled = round(min(max(fraction, 0.0), 1.0) * width)
    if fraction > 0 and not filled:
        filled = min(1, width)
    return "█" * filled + "░" * (width - filled)


def sparkline(values: Sequence[float | None], width: int) -> str:
    """The newest values in ``width`` cells, oldest first, from 0 to their maximum; blank where unknown.

    Neighbours that share a cell show their maximum, so no peak is lost.
    """
    if not values or width < 1:
        return " " * max(width, 0)
    per_cell = -(-len(values) // width)
    lead = -len(values) % per_cell
    padded = [None] * lead + list(values)
    cells = [_highest(padded[i : i + per_cell]) for i in range(0, len(padded), per_cell)]
    top = max((cell for cell in cells if cell is not None), default=0.0)
    line = "".join(" " if cell is None else _block(cell, top) for cell in cells)
    return line.rjust(width)


def _highest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _block(value: float, top: float) -> str:
    if top <= 0 or value <= 0:
        return _BLOCKS[0]
    return _BLOCKS[min(len(_BLOCKS) - 1, int(value / top * len(_BLOCKS)))]


def _scaled(value: float) -> str:
    size = abs(value)
    if size >= 1e15:
        return f"{value:.0e}"
    for factor, prefix in _PREFIXES:
        if size >= factor * 0.9995:
            scaled = value / factor
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{prefix}"
    return f"{value:.0f}"

"""Rows of a screen, exact to the cell: pieces of styled text, tables, columns side by side. Pure.

    Line.add(…) ──► Frame(lines, columns) ──► rich segments, each row exactly ``columns`` cells wide

Nothing here wraps: what does not fit is cut and ends in ``…``. Text is never read as markup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, Self, TypeVar

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

ELLIPSIS = "…"
_ASCII = str.maketrans(
    {
        "▁": "_",
        "▂": ".",
        "▃": "-",
        "▄": "=",
        "▅": "+",
        "▆": "*",
        "▇": "%",
        "█": "#",
        "░": ".",
        "▓": "=",
        "▒": "-",
    }
    | {"─": "-", "│": "|", "●": "*", "○": "o", "◐": "~", "▲": "!", "▽": "v", "×": "x", "▶": ">", "▸": ">"}
    | {"▾": "v", "·": ".", "…": "~", "→": ">", "↑": "^", "↓": "v"}
)
Row = TypeVar("Row")
Cell = str | tuple[str, str]
"""A text, or a text and its style."""


@lru_cache(maxsize=256)
def _style(name: str) -> Style | None:
    return Style.parse(name) if name else None


def fit(text: str, width: int, *, is_right: bool = False) -> str:
    """``text`` in exactly ``width`` cells: padded, or cut and ended by ``…``."""
    size = cell_len(text)
    if size > width:
        return set_cell_size(text, width - 1) + ELLIPSIS if width > 0 else ""
    return " " * (width - size) + text if is_right else text + " " * (width - size)


def to_ascii(text: str) -> str:
    """``text`` in as many cells, for terminals that show nothing but ASCII."""
    if text.isascii():
        return text
    known = text.translate(_ASCII)
    return "".join(c if c.isascii() else "?" * cell_len(c) for c in known)


class Line:
    """One row being put together. ``width`` is what it takes so far, in cells."""

    __slots__ = ("pieces", "width")

    def __init__(self, text: str = "", style: str = "") -> None:
        self.pieces: list[tuple[str, str]] = []
        self.width = 0
        self.add(text, style)

    def add(self, text: str, style: str = "") -> Self:
        """Append ``text`` in a rich style; it must be one clean line (state/client.py)."""
        if text:
            self.pieces.append((text, style))
            self.width += cell_len(text)
        return self

    def extend(self, other: Line) -> Self:
        """Append another line's pieces."""
        self.pieces += other.pieces
        self.width += other.width
        return self

    def pad(self, width: int, filler: str = " ", style: str = "") -> Self:
        """Fill up to ``width`` cells; a longer line stays."""
        return self.add(filler * (width - self.width), style) if width > self.width else self

    def fitted(self, width: int) -> Line:
        """The same in exactly ``width`` cells."""
        if self.width <= width:
            return Line().extend(self).pad(width)
        cut = Line()
        for text, style in self.pieces:
            room = width - cut.width
            is_last = cell_len(text) >= room
            cut.add(fit(text, room) if is_last and self.width > width else text, style)
            if is_last:
                break
        return cut

    def restyled(self, style: str) -> Line:
        """The same text in one style."""
        return Line("".join(text for text, _ in self.pieces), style)

    @property
    def plain(self) -> str:
        """Its text."""
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True)
class Frame:
    """A whole screen: a rich renderable of ``len(lines)`` rows, each of exactly ``columns`` cells.

    ``scroll`` is how far the detail or help text really is scrolled; ``is_ascii``: nothing else is shown.
    """

    lines: Sequence[Line]
    columns: int
    scroll: int = 0
    is_ascii: bool = False

    def rows(self) -> list[list[Segment]]:
        """The segments of each row."""
        return [
            [
                Segment(to_ascii(text) if self.is_ascii else text, _style(style))
                for text, style in line.fitted(self.columns).pieces
            ]
            for line in self.lines
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As rich draws it: rows that end in a new line."""
        for row in self.rows():
            yield from row
            yield Segment.line()


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """A column of a table. ``rank`` 0 is always shown; the highest ranks are dropped first.

    ``width`` and ``most`` bound its cells: what is left of a line goes to the first columns that may grow.
    """

    title: str
    width: int
    cell: Callable[[Row], Cell]
    rank: int = 0
    is_right: bool = True
    most: int = 0


def choose_columns(columns: Iterable[Column[Row]], width: int) -> list[tuple[Column[Row], int]]:
    """The columns that fit into ``width`` cells with one space between, and the width of each."""
    chosen = list(columns)
    while len(chosen) > 1 and sum(c.width + 1 for c in chosen) - 1 > width:
        dropped = max(range(len(chosen)), key=lambda i: (chosen[i].rank, i))
        if chosen[dropped].rank == 0:
            break
        del chosen[dropped]
    widths = [column.width for column in chosen]
    spare = width - sum(widths) - len(widths) + 1
    for i, column in enumerate(chosen):
        grown = max(0, min(spare, column.most - widths[i]))
        widths[i] += grown
        spare -= grown
    return list(zip(chosen, widths, strict=True))


@dataclass(slots=True)
class Table(Generic[Row]):
    """Rows in columns that were chosen for a width. ``sorted_by``: the heading that gets a ``▾``."""

    columns: list[tuple[Column[Row], int]]
    sorted_by: str = ""
    lines: list[Line] = field(default_factory=list)

    def heading(self) -> Line:
        """The names of the columns."""
        line = Line()
        for column, width in self.columns:
            title = column.title
            if title and title == self.sorted_by:
                title = f"▾{title}" if cell_len(title) < width else f"▾{title[: width - 1]}"
            line.add(fit(title, width, is_right=column.is_right), "bold").add(" ")
        return line

    def row(self, row: Row, *, style: str = "") -> Line:
        """One row; ``style`` goes over all cells, as for a selected one."""
        line = Line()
        for column, width in self.columns:
            cell = column.cell(row)
            text, own = cell if isinstance(cell, tuple) else (cell, "")
            line.add(fit(text, width, is_right=column.is_right), style or own).add(" ", style)
        return line


def longest(texts: Iterable[str], most: int) -> int:
    """The cells of the longest of ``texts``, at most ``most``."""
    return min(most, max(map(cell_len, texts), default=0))


def beside(left: Sequence[Line], right: Sequence[Line], left_width: int, gap: str = " │ ") -> list[Line]:
    """Two blocks next to each other; the right one begins after ``left_width`` cells and ``gap``."""
    height = max(len(left), len(right))
    lines = []
    for i in range(height):
        line = (left[i] if i < len(left) else Line()).fitted(left_width).add(gap, "dim")
        lines.append(line.extend(right[i]) if i < len(right) else line)
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """``text`` in pieces of at most ``width`` cells, broken at spaces where there are any."""
    pieces: list[str] = []
    rest = text.strip()
    while cell_len(rest) > max(width, 2):
        head = set_cell_size(rest, max(width, 2)).rstrip()
        head = head if rest.startswith(head) else head[:-1]
        at = head.rfind(" ")
        head = head[:at] if at > width // 3 else head
        pieces.append(head)
        rest = rest[max(len(head), 1) :].lstrip()
    return [*pieces, rest] if rest else pieces or [""]

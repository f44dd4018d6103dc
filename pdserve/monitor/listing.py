"""What every list of the screen shares: its area, the part of its rows shown, the marked row. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.monitor.lines import Line, Table
from pdserve.monitor.snapshot import Snapshot
from pdserve.monitor.view_state import Pane, ViewState, order_of

SELECTED = "reverse"
WIDE = 104
"""Columns from which names and queues are shown in full."""
Shown = tuple[list[Line], str]
"""Lines below a list's title, and which part of its rows that is (empty: all of them)."""


@dataclass(frozen=True, slots=True)
class Area:
    """Where a list is drawn. ``index``: where its selected row stands."""

    snapshot: Snapshot
    view: ViewState
    pane: Pane
    width: int
    height: int
    index: int = 0

    @property
    def is_wide(self) -> bool:
        """There is room for names and queues in full."""
        return self.width >= WIDE

    @property
    def marked(self) -> int | None:
        """The row that is marked; none in a list without focus."""
        return self.index if self.view.pane is self.pane and self.view.is_interactive else None

    @property
    def sorted_by(self) -> str:
        """The heading of the column that the list is sorted by."""
        return order_of(self.view, self.pane).title


def part_around(num: int, index: int, height: int) -> range:
    """Which of ``num`` rows are shown so that ``index`` is among them, in the middle where possible."""
    first = max(0, min(index - height // 2, num - height))
    return range(first, min(num, first + height))


def body(table: Table[Any], rows: Sequence[Any], area: Area, empty: str, above: Sequence[Line] = ()) -> Shown:
    """``above``, then as many rows as fit; ``empty`` is said where there are none."""
    if not rows:
        return [*above, Line(f"  {empty}", "dim")][: area.height], ""
    marked = area.marked
    part = part_around(len(rows), marked or 0, max(0, area.height - len(above)))
    lines = [table.row(rows[i], style=SELECTED if i == marked else "") for i in part]
    told = f"{part.start + 1}-{part.stop} of {len(rows)}" if part and len(part) < len(rows) else ""
    return [*above, *lines], told

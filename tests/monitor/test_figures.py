"""Numbers on the monitor: right, with a unit, and never wider than their column."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from pdserve.monitor.figures import (
    bar,
    format_age,
    format_bytes,
    format_count,
    format_percent,
    format_rate,
    format_seconds,
    format_short,
    sparkline,
)
from pdserve.monitor.keys import KeyReader
from pdserve.monitor.lines import Column, choose_columns, fit, to_ascii, wrapped
from pdserve.state.client import clean

FIGURES = st.floats(min_value=0, max_value=1e14, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0, "0 s"), (0.00042, "0.4 ms"), (0.0094, "9.4 ms"), (0.00995, "10 ms"), (0.21, "210 ms"),
     (0.9996, "1.00 s"), (1.2, "1.20 s"), (12.34, "12.3 s"), (99.96, "1m40"), (3725, "1h02")],
)  # fmt: skip
def test_seconds(value: float | None, shown: str) -> None:
    assert format_seconds(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0s"), (99.4, "99s"), (200, "3m20"), (7380, "2h03"), (1.1e6, "12d"), (1e12, ">27y")],
)
def test_ages(value: float, shown: str) -> None:
    assert format_age(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 B/s"),
        (831_400, "831 kB/s"),
        (999_600, "1.00 MB/s"),
        (1.2e9, "1.20 GB/s"),
        (4.1e13, "41.0 TB/s"),
    ],
)
def test_bytes(value: float, shown: str) -> None:
    assert format_bytes(value, "B/s") == shown


def test_counts_rates_and_shares() -> None:
    assert [format_count(n) for n in (0, 9999, 12_345, 4_560_000)] == ["0", "9999", "12.3k", "4.56M"]
    assert [format_rate(n) for n in (0, 0.25, 12.34, 841.2, 5120)] == ["0", "0.25", "12.3", "841", "5.12k"]
    assert [format_percent(n) for n in (None, 0, 0.576, 1.0)] == ["-", "0%", "58%", "100%"]


@given(FIGURES)
def test_figures_fit_their_columns(value: float) -> None:
    assert len(format_seconds(value)) <= 6
    assert len(format_age(value)) <= 5
    assert len(format_short(value)) <= 4
    assert len(format_rate(value)) <= 5
    assert len(format_count(value)) <= 5
    assert len(format_bytes(value, "B/s")) <= 9


@given(st.none() | st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 20))
def test_bars_have_their_width(value: float | None, width: int) -> None:
    assert len(bar(value, width)) == width


def test_a_bar_shows_the_least_use() -> None:
    assert (bar(0.01, 4), bar(0.0, 4), bar(1.0, 4), bar(None, 4)) == ("█░░░", "░░░░", "████", "····")


@given(st.lists(st.one_of(st.none(), st.floats(-1e300, 1e300)), max_size=130), st.integers(0, 80))
def test_sparklines_have_their_width(values: list[float | None], width: int) -> None:
    assert len(sparkline(values, width)) == width


def test_a_sparkline_keeps_the_newest_right_and_every_peak() -> None:
    assert sparkline([0.0, 1.0, None, 4.0], 6) == "  ▁▃ █"
    assert sparkline([1.0, 9.0, 1.0, 1.0], 2) == "█▁"


@given(st.text(), st.integers(0, 12), st.booleans())
def test_fitted_text_has_exactly_its_cells(text: str, width: int, is_right: bool) -> None:
    fitted = fit(clean(text), width, is_right=is_right)
    assert cell_len(fitted) == width
    assert cell_len(to_ascii(fitted)) == width
    assert to_ascii(fitted).isascii()


@given(st.text())
def test_cleaned_text_is_one_visible_line(text: str) -> None:
    assert clean(text).isprintable()
    assert clean(clean(text)) == clean(text)


@given(st.text(), st.integers(2, 30))
def test_wrapped_text_loses_nothing_but_spaces(text: str, width: int) -> None:
    whole = clean(text)
    pieces = wrapped(whole, width)
    assert all(cell_len(piece) <= width for piece in pieces)
    assert "".join(pieces).replace(" ", "") == whole.replace(" ", "")


@given(st.integers(1, 200))
def test_columns_are_dropped_by_rank_and_never_too_wide(width: int) -> None:
    columns: list[Column[str]] = [
        Column("a", 5, str, most=20),
        Column("b", 9, str, rank=2),
        Column("c", 9, str, rank=1),
        Column("d", 9, str, rank=3),
    ]
    chosen = choose_columns(columns, width)
    titles = [column.title for column, _ in chosen]
    assert titles in (["a", "b", "c", "d"], ["a", "b", "c"], ["a", "c"], ["a"])
    if len(chosen) > 1:
        assert sum(size for _, size in chosen) + len(chosen) - 1 <= width


@given(
    st.lists(
        st.sampled_from(["\x1b[A", "\x1bOB", "\x1b[6~", "q", "\t", "\x1b[Z", "\x1b[1;5C", "é"]), max_size=8
    )
)
def test_keys_are_the_same_however_the_bytes_are_cut(typed: list[str]) -> None:
    data = "".join(typed).encode()
    whole, single = KeyReader(), KeyReader()
    assert list(whole.feed(data)) == [key for byte in data for key in single.feed(bytes([byte]))]


def test_a_lone_escape_is_a_key_once_nothing_follows() -> None:
    keys = KeyReader()
    assert list(keys.feed(b"\x1b")) == []
    assert keys.is_waiting
    assert list(keys.flush()) == ["esc"]
    assert list(keys.feed(b"\x1bx")) == ["esc", "x"]
    assert not keys.is_waiting

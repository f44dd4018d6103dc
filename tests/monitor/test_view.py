"""The monitor's frame: what it shows at four sizes, and that it fits and survives any document."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from pdserve.monitor.keys import HELP, press
from pdserve.monitor.snapshot import Snapshot
from pdserve.monitor.view import allot, render
from pdserve.monitor.view_state import ORDERS, Lost, Pane, ViewState
from pdserve.state.client import read_state
from pdserve.state.document import state_schema
from tests.support.examples import n_examples
from tests.support.monitor_terminal import large_fleet, recorded

SIZES = [(80, 24), (100, 30), (120, 40), (200, 60)]
STATES = ["empty", "healthy", "overloaded", "failing", "large"]
URL = "http://127.0.0.1:30000"


def state_of(name: str) -> dict[str, Any]:
    return large_fleet() if name == "large" else recorded(name)


def view_of(state: dict[str, Any], **settings: Any) -> ViewState:
    now_s = float(state.get("now_s") or 1e9)
    return replace(ViewState(url=URL, now_s=now_s, received_s=now_s), **settings)


def drawn(state: dict[str, Any], size: tuple[int, int] = (120, 40), **settings: Any) -> list[str]:
    """The rows of a frame as text; checks that it fits."""
    return rows_of(state, view_of(state, **settings), size)


def rows_of(state: dict[str, Any], view: ViewState, size: tuple[int, int]) -> list[str]:
    frame = render(read_state(state), view, size)
    console = Console(width=size[0], file=io.StringIO(), color_system=None)
    console.print(frame, end="")
    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    rows = written.split("\n")[:-1]
    assert len(rows) <= size[1]
    assert {cell_len(row) for row in rows} <= {size[0]}, [row for row in rows if cell_len(row) != size[0]]
    assert not [c for c in written if c != "\n" and not c.isprintable()]
    return rows


def text_of(state: dict[str, Any], size: tuple[int, int] = (120, 40), **settings: Any) -> str:
    return "\n".join(drawn(state, size, **settings))


# -- geometry ----------------------------------------------------------------------------------


def test_a_live_frame_fills_the_screen_exactly() -> None:
    for name, size in itertools.product(STATES, SIZES):
        state = state_of(name)
        frames = [drawn(state, size, pane=pane) for pane in Pane]
        frames += [drawn(state, size, pane=pane, is_detailed=True) for pane in Pane]
        frames.append(drawn(state, size, is_help=True))
        assert {len(rows) for rows in frames} == {size[1]}, (name, size)


@pytest.mark.slow
def test_any_other_size_fits_too() -> None:
    columns = (1, 2, 20, 39, 40, 79, 81, 103, 104, 111, 112, 149, 150, 169, 170, 400)
    for size in itertools.product(columns, (1, 2, 4, 5, 6, 9, 10, 19, 20, 24, 200)):
        for name in ("healthy", "failing"):
            drawn(recorded(name), size)


def test_a_printed_frame_takes_no_more_rows_than_it_needs() -> None:
    for size in SIZES:
        rows = drawn(recorded("empty"), size, is_interactive=False)
        assert len(rows) < 30
        assert "quit" not in "".join(rows)


def test_rows_are_shared_by_focus_and_need() -> None:
    wanted = {Pane.WORKERS: 40, Pane.PAIRS: 5, Pane.REQUESTS: 66, Pane.EVENTS: 20}
    for rows in range(1, 140):
        heights = allot(wanted, Pane.WORKERS, rows)
        assert sum(heights.values()) == min(rows, sum(wanted.values()))
        assert all(0 < height <= wanted[pane] for pane, height in heights.items())
    assert allot(wanted, Pane.REQUESTS, 20)[Pane.REQUESTS] > allot(wanted, Pane.WORKERS, 20)[Pane.REQUESTS]


# -- what is shown -----------------------------------------------------------------------------


def test_the_whole_healthy_fleet_is_seen_at_every_size() -> None:
    for size in SIZES:
        text = text_of(recorded("healthy"), size)
        for word in (
            "SmolLM2-135M-Instruct", "v0.1.0", "up 2h03", "policy least_load", "regime normal 2h00", "● live",
            "prefill-0", "decode-0", "decode-1", "18%", "57%", "49%", "9.12k", "1.41k", "1.29k", "2h03",
            "queue 0/1024", "shed 0", "in flight 29", "arrived 13.2/s", "158 ms", "402 ms", "911 ms",
            "12 ms", "31 ms", "412 MB/s direct 9.4 ms", "358 MB/s direct  11 ms", "nothing needs attention",
            "▇", "in 5 min", "last 5 min", "over 60 s", "joins, deaths", "stop",
        ):  # fmt: skip
            assert word in text, word


def test_every_figure_of_a_worker_is_in_its_row() -> None:
    (row,) = [row for row in drawn(recorded("overloaded"), (120, 40)) if row.startswith("decode-1")]
    assert row.split() == [
        "decode-1", "decode", "●", "ready", "25h03", "-", "38", "1", "2", "48", "4", "██████████",
        "99%", "2.05k", "93", "ok", "0",
    ]  # fmt: skip
    heading = next(
        row for row in drawn(recorded("overloaded"), (120, 40)) if "tok/s" in row and "wait" in row
    )
    assert heading.split() == [
        "▾worker", "role", "state", "age", "boot", "preall", "wait", "xfer", "run", "retr", "KV", "used",
        "tok/s", "infl", "brk", "err",
    ]  # fmt: skip


def test_an_empty_fleet_says_what_to_do() -> None:
    for size in SIZES:
        text = text_of(recorded("empty"), size)
        assert "no workers: start some with pdserve launch" in text
        assert "none has joined yet" in text
        assert "no model yet" in text


def test_overload_is_told_in_words() -> None:
    for size in SIZES:
        text = text_of(recorded("overloaded"), size)
        for word in (
            "regime overload 3m41",
            "queue 256/256, oldest 9.40 s",
            "shed 21.3k",
            "256 requests",
        ):
            assert word in text, word
        if size[0] >= 120:
            assert "shed 21.3k · by queue_full 19.9k, timeout 1414" in text
            assert "decode-1 KV pool 99% used (and 3 more)" in text


def test_failures_are_told_in_words_and_the_worst_comes_first() -> None:
    text = text_of(recorded("failing"), (200, 60))
    for word in (
        "▲ suspect", "○ joining", "▽ drain", "open", "half", "× failed", "◐ probing", "○ untested",
        "▲ decode-1 suspect: http://127.0.0.1:31003: connection refused", "× bootstrap lost",
        "decode-2 makes no progress for 13 s", "short of decode 38s", "normal → decode_short", "× 502 failed",
    ):  # fmt: skip
        assert word in text, word
    first, second, _ = text.splitlines()[2:5]
    assert "decode-1 suspect" in first
    assert "× pair prefill-0>decode-1 and" in second or "decode-2" in second


def test_meaning_does_not_hang_on_colour() -> None:
    """Without styles and in ASCII the frame still tells good from bad."""
    text = text_of(recorded("failing"), is_ascii=True)
    assert text.isascii()
    for word in ("! suspect", "o joining", "v drain", "* ready", "x failed", "x 502 failed", "! wedged"):
        assert word in text, word


def test_a_matrix_becomes_a_list_where_there_are_many_pairs() -> None:
    small, large = (
        text_of(recorded("overloaded"), (80, 40)),
        text_of(large_fleet(), (120, 40), pane=Pane.PAIRS),
    )
    assert "from \\ to" in small
    assert "1.90 GB/s p" in small
    assert "d direct, p packed" in small
    assert "from \\ to" not in large
    assert "prefill-0>decode-0" in large
    assert "of 1024" in large
    assert "busiest p31>d31 1.02 GB/s" in large
    full = text_of(recorded("overloaded"), (120, 40))
    assert "1.90 GB/s packed  31 ms" in full and "1.16 GB/s mixed   50 ms" in full


def test_long_names_are_not_cut_in_the_matrix() -> None:
    state = json.loads(
        json.dumps(recorded("overloaded"))
        .replace("prefill-", "prefill-node-")
        .replace("decode-", "decode-node-")
    )
    wide, narrow = text_of(state, (140, 40)), text_of(state, (80, 40), pane=Pane.PAIRS)
    assert "from \\ to" in wide
    assert "prefill-node-1 " in wide
    assert "from \\ to" not in narrow, "the names of decode workers would be cut in so small cells"


def test_pairs_sorted_by_rate_are_listed_highest_first() -> None:
    rows = drawn(large_fleet(), (120, 40), pane=Pane.PAIRS, sorts={Pane.PAIRS: 1})
    pairs = [row.split()[0] for row in rows if ">" in row.split()[0]]
    assert pairs[:3] == ["prefill-31>decode-31", "prefill-31>decode-30", "prefill-31>decode-29"]


@pytest.mark.slow
def test_a_large_fleet_is_summed_by_role_and_scrolls() -> None:
    state = large_fleet()
    text = text_of(state, (120, 40))
    assert "workers 64" in text
    assert "1-" in text and "of 64" in text
    (prefill,) = [row for row in text.splitlines() if row.startswith("all 32") and "prefill" in row]
    assert prefill.split()[:5] == ["all", "32", "prefill", "32", "ready"]
    assert "48%" in prefill
    view = view_of(state)
    for _ in range(63):
        view = press("down", view, Snapshot(read_state(state))) or view
    text = "\n".join(rows_of(state, view, (120, 40)))
    assert "decode-31" in text
    assert "-64 of 64" in text


def test_sparklines_keep_peaks_and_blanks() -> None:
    state = recorded("failing")
    state["series"]["ttft_p50_s"] = [0.1] * 40 + [None] * 10 + [0.1] * 9 + [1.0]
    row = next(row for row in drawn(state, (200, 60)) if row.startswith("TTFT"))
    assert "     " in row and "█" in row
    assert "max 1.00 s" in row


def test_a_lost_balancer_is_told_over_its_last_frame() -> None:
    state = recorded("healthy")
    lost = Lost(since_s=state["now_s"] - 72, reason="connection refused", retry_s=4.0)
    for size in [*SIZES, (80, 8)]:
        text = text_of(state, size, lost=lost)
        assert "× no answer" in text
        assert "(72s): connection refused" in text
    assert "next try in 4s; below is its last answer" in text_of(state, lost=lost)
    assert "× no answer" in text_of(state, lost=lost, is_detailed=True)


def test_notes_of_the_launcher_stand_among_the_events() -> None:
    assert "launcher 12:00:01 decode-1 ended" in text_of(
        recorded("healthy"), (80, 24), notes=("12:00:01 decode-1 ended",)
    )


def test_the_recorded_states_are_what_the_schema_knows() -> None:
    """So these tests cannot go on about keys that the balancer has renamed."""
    validator = jsonschema.Draft202012Validator(state_schema())
    errors = [error for name in STATES for error in validator.iter_errors(state_of(name))]
    assert not [error.message for error in errors if error.validator != "required"]


# -- details -----------------------------------------------------------------------------------


def test_a_workers_page_tells_all_of_it() -> None:
    state = recorded("failing")
    view = view_of(state)
    for key in ("down", "down", "down", "enter"):
        view = press(key, view, Snapshot(read_state(state))) or view
    text = "\n".join(rows_of(state, view, (120, 60)))
    for word in (
        "worker decode-1 (decode)  suspect", "http://127.0.0.1:31003", "open, 17",
        "its log ends with: Killed", "fitted step", "promised tokens", "its pairs (2)", "its events",
        "pair_failed", "0 of 48",
    ):  # fmt: skip
        assert word in text, word
    text = text_of(state, (120, 60), is_detailed=True)
    for word in (
        "worker prefill-0",
        "data plane sends  323 MB/s",
        "its mean transfer 7.1 ms",
        "36.8k, 0 failed",
    ):
        assert word in text, word


def test_a_requests_page_draws_its_stages_to_scale() -> None:
    state = recorded("healthy")
    row = state["recent"][-1]
    row |= {"queued_s": 1.0, "prefill_s": 2.0, "transfer_s": 1.0, "first_token_s": 4.0, "done_s": 8.0}
    rows = drawn(state, (120, 40), pane=Pane.REQUESTS, is_detailed=True)
    bars = {
        name: next(r for r in rows if r.startswith(f"  {name}")) for name in ("queued", "prefill", "decode")
    }
    lengths = {name: text.count("█") for name, text in bars.items()}
    assert lengths["prefill"] == pytest.approx(2 * lengths["queued"], abs=2)
    assert lengths["decode"] == pytest.approx(4 * lengths["queued"], abs=4)
    text = "\n".join(rows)
    assert "first token 4.00 s, done 8.00 s after arrival" in text
    assert "cheapest of 2" in text
    assert row["rid"] in text
    assert str(row["room"]) in text


def test_an_opened_request_stays_when_newer_ones_push_it_out() -> None:
    state = recorded("healthy")
    view = press("enter", view_of(state, pane=Pane.REQUESTS), Snapshot(read_state(state)))
    assert view is not None
    opened = state["recent"][-1]["rid"]
    later = state | {"recent": [{**row, "rid": f"new-{i}"} for i, row in enumerate(state["recent"])]}
    text = "\n".join(rows_of(later, view, (120, 40)))
    assert opened in text
    assert "no longer listed" in text


def test_help_explains_every_key_and_the_windows() -> None:
    text = text_of(recorded("healthy"), (120, 60), is_help=True)
    for keys, _ in HELP:
        assert keys in text
    for word in ("TTFT", "ITL", "boot", "KV used", "regime", "over about 10 s"):
        assert word in text


# -- keys --------------------------------------------------------------------------------------


def test_the_selection_follows_its_row_when_the_order_changes() -> None:
    state = recorded("failing")
    view = view_of(state)
    view = press("down", view, Snapshot(read_state(state))) or view
    for _ in ORDERS[Pane.WORKERS]:
        view = press("s", view, Snapshot(read_state(state))) or view
        opened = press("enter", view, Snapshot(read_state(state)))
        assert opened is not None
        assert "worker prefill-1" in "\n".join(rows_of(state, opened, (120, 40)))


def test_scrolling_ends_at_the_last_line() -> None:
    state = recorded("healthy")
    view = view_of(state, is_help=True, scroll=10_000)
    frame = render(read_state(state), view, (80, 24))
    assert 0 < frame.scroll < 60
    above = press("up", replace(view, scroll=frame.scroll), Snapshot(read_state(state)))
    assert above is not None
    assert render(read_state(state), above, (80, 24)).scroll == frame.scroll - 1


# -- anything may come -------------------------------------------------------------------------


def test_an_older_balancer_without_the_new_keys_is_shown() -> None:
    state = recorded("healthy")
    for name in ("now_s", "regime", "rates", "latency", "series"):
        del state[name]
    for worker in state["workers"]:
        for name in ("tokens_s", "kv_usage", "queues", "age_s"):
            del worker[name]
    rows = drawn(state, (120, 40))
    (row,) = [row for row in rows if row.startswith("decode-0")]
    assert row.split()[:4] == ["decode-0", "decode", "●", "ready"]
    assert row.split()[4:] == [*["-"] * 7, "·" * 10, "-", "-", "16", "ok", "0"]
    assert "regime -" in "\n".join(rows)
    assert "arrived" not in "\n".join(rows)


def test_keys_of_a_newer_balancer_are_ignored() -> None:
    state = recorded("healthy")
    state["novelty"] = state["workers"][0]["novelty"] = state["queue"]["novelty"] = {"a": [1]}
    assert drawn(state) == drawn(recorded("healthy"))


HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "[bold red]markup[/bold red]",
    "[/]",
    "a\r\nb\tc\x00d",
    "\u202eright to left\u200b\u2066",
    "e" + "\u0301" * 500,
    "漢字" * 200,
    "👩‍👩‍👧‍👦️" * 50,
    "\ud800 lone",
    "x" * 100_000,
]


@pytest.mark.slow
def test_texts_of_workers_cannot_break_the_frame() -> None:
    for evil in HOSTILE:
        _draw_poisoned(evil)


def _draw_poisoned(evil: str) -> None:
    def poisoned(value: Any) -> Any:
        match value:
            case dict():
                return {key: poisoned(item) for key, item in value.items()}
            case list():
                return [poisoned(item) for item in value]
            case str() if value not in ("prefill", "decode"):
                return evil
        return value

    state = poisoned(recorded("failing"))
    for size in SIZES:
        for pane in Pane:
            drawn(state, size, pane=pane)
            drawn(state, size, pane=pane, is_detailed=True)
    drawn(state, notes=(evil,), url=evil, lost=Lost(0.0, evil))
    assert drawn(state, is_ascii=True)


def test_markup_is_shown_as_it_is() -> None:
    state = recorded("healthy")
    state["model"] = "[bold]m[/bold]"
    assert "[bold]m[/bold]" in text_of(state)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, -1, 1e308, -1e308, 0.5]),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=8,
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, item in items for path in paths(item, (*at, key)))]


FAILING = recorded("failing")
PATHS = paths(FAILING)[1:]


@settings(max_examples=n_examples(120))
@given(
    changes=st.lists(st.tuples(st.sampled_from(PATHS), st.none() | JSON, st.booleans()), max_size=12),
    pane=st.sampled_from(list(Pane)),
    size=st.sampled_from([*SIZES, (30, 7)]),
    sort=st.integers(0, 9),
    is_detailed=st.booleans(),
)
def test_damaged_documents_are_drawn_or_refused(
    changes: list[tuple[tuple[Any, ...], Any, bool]],
    pane: Pane,
    size: tuple[int, int],
    sort: int,
    is_detailed: bool,
) -> None:
    state = json.loads(json.dumps(FAILING))
    for (*way, last), value, is_removed in changes:
        at = state
        try:
            for key in way:
                at = at[key]
            if is_removed:
                del at[last]
            else:
                at[last] = value
        except (TypeError, LookupError):
            continue
    role = "decode" if sort % 2 else ""
    try:
        read_state(state)
    except msgspec.ValidationError:
        return  # StateClient names it: tests/monitor/test_command.py
    drawn(state, size, pane=pane, sorts={pane: sort}, is_detailed=is_detailed, role=role)


@settings(max_examples=n_examples(60))
@given(
    state=st.dictionaries(st.sampled_from([*FAILING, "other"]), JSON, max_size=8),
    keys=st.lists(
        st.sampled_from(["down", "up", "end", "tab", "enter", "s", "r", "?", "esc", "p", "x", ""]), max_size=8
    ),
)
def test_random_documents_and_keys_never_raise(state: dict[str, Any], keys: list[str]) -> None:
    view = ViewState(url=URL, now_s=1.0)
    try:
        read_state(state)
    except msgspec.ValidationError:
        return
    for key in keys:
        view = press(key, view, Snapshot(read_state(state))) or view
        rows_of(state, view, (100, 30))

"""The live monitor in a pseudo-terminal: keys, resizes, signals, a balancer that goes away and comes back."""

from __future__ import annotations

import os
import signal
import termios

import pytest

from tests.support.monitor_terminal import Session, monitored, recorded

pytestmark = pytest.mark.process

DOWN, UP = "\x1b[B", "\x1b[A"
STOPS_ITSELF = """
import sys, threading
from pdserve.monitor.screen import Watch
watch = Watch(sys.argv[1], interval_s=0.1)
thread = threading.Thread(target=lambda: print("code", watch.run()))
thread.start()
watch.note("decode-1 is restarted")
sys.stdin = None
import signal
signal.signal(signal.SIGUSR1, lambda number, frame: watch.stop())
while thread.is_alive():
    thread.join(0.05)
"""
BREAKS = """
import sys
from pdserve.monitor import screen
def broken(*args): raise RuntimeError("a bug")
screen.press = broken
screen.Watch(sys.argv[1]).run()
"""


def ended(session: Session, code: int = 0) -> None:
    session.press("q")
    session.end(code)


def first_worker(text: str) -> str:
    """The name in the first row of the list of workers."""
    rows = text.splitlines()
    heading = next((i for i, row in enumerate(rows) if "worker" in row and "brk" in row), len(rows))
    return "".join(rows[heading + 1 : heading + 2]).partition(" ")[0]


def test_it_shows_the_fleet_and_q_leaves_the_terminal_as_it_was() -> None:
    with monitored(recorded("healthy")) as (session, _):
        session.shows("SmolLM2-135M-Instruct", "prefill-0", "decode-1", "● live", "TTFT", "q quit")
        assert session.screen.is_alternate
        ended(session)
        assert not session.screen.overflows


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name
)
def test_signals_end_it_with_the_terminal_restored(number: signal.Signals) -> None:
    with monitored(recorded("healthy")) as (session, _):
        session.shows("prefill-0")
        session.signal(number)
        session.end(128 + number)


def test_ctrl_c_typed_ends_it() -> None:
    with monitored(recorded("healthy")) as (session, _):
        session.shows("prefill-0")
        local = termios.tcgetattr(session.slave)[3]
        assert local & termios.NOFLSH  # the kernel would drop unread output, in the middle of a sequence
        session.press("\x03")
        session.end(130)


def test_an_exception_restores_the_terminal() -> None:
    with monitored(recorded("healthy"), program=BREAKS) as (session, _):
        session.shows("prefill-0")
        session.press("x")
        session.end(1)
        assert "a bug" in session.screen.text


def test_suspended_and_continued() -> None:
    with monitored(recorded("healthy")) as (session, _):
        session.shows("prefill-0")
        session.press("\x1a")
        session.until(lambda _: not session.screen.is_alternate)
        _, status = os.waitpid(session.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        session.check_restored()
        session.signal(signal.SIGCONT)
        session.until(lambda text: session.screen.is_alternate and "prefill-0" in text)
        ended(session)


def test_help_opens_scrolls_and_closes() -> None:
    with monitored(recorded("healthy"), (80, 24)) as (session, _):
        session.shows("workers 3")
        session.press("?")
        session.until(lambda text: "Keys" in text and "lines 1-" in text and "workers 3" not in text)
        session.press("\x1b[6~")
        session.shows("lines 11-")
        session.press("\x1b[F")
        session.shows("ready, joining or untested")
        session.press("\x1b")
        session.shows("workers 3")
        ended(session)


def test_tab_moves_the_focus_and_enter_opens_what_is_selected() -> None:
    with monitored(recorded("failing"), (120, 40)) as (session, _):
        session.shows("▶ workers", "prefill-0")
        session.press("\t")
        session.shows("▶ pairs")
        session.press("\t")
        session.shows("▶ requests")
        session.press(DOWN + "\r")
        row = recorded("failing")["recent"][-2]
        session.shows(f"request {row['rid']}", "stages", "transfer", "why this pair")
        session.press("\x1b")
        session.shows("▶ requests")
        session.press("\x1b[Z\x1b[Z")
        session.shows("▶ workers")
        session.press(DOWN + DOWN + DOWN + "\r")
        session.shows("worker decode-1", "connection refused", "its pairs")
        ended(session)


def test_selection_is_marked_and_moves() -> None:
    with monitored(recorded("failing"), (100, 30), NO_COLOR="1") as (session, _):
        session.shows("prefill-1")
        session.press("jj\r")
        session.shows("worker decode-0")
        session.press("\x1b")
        session.shows("▶ workers")
        session.press(UP + "\r")
        session.shows("worker prefill-1")
        ended(session)


def test_s_sorts_and_r_filters() -> None:
    with monitored(recorded("failing"), (100, 30)) as (session, _):
        session.shows("by name", "prefill-0")
        session.press("s")
        session.until(lambda text: "by trouble" in text and first_worker(text) == "decode-1")
        session.press("S")
        session.until(lambda text: "by name" in text and first_worker(text) == "prefill-0")
        session.press("r")
        session.shows("prefill only", "workers 2")
        session.press("r")
        session.shows("decode only", "workers 3")
        session.press("r")
        session.shows("workers 5")
        ended(session)


def test_p_freezes_the_frame_and_asks_nothing() -> None:
    with monitored(recorded("healthy")) as (session, server):
        session.shows("workers 3")
        session.press("p")
        session.shows("■ paused")
        server.document = recorded("overloaded")
        session.press("?")
        session.shows("Keys")
        session.press("?")
        session.shows("workers 3", "■ paused")
        session.press("p")
        session.shows("workers 6", "● live")
        ended(session)


def test_new_documents_appear_by_themselves() -> None:
    with monitored(recorded("empty")) as (session, server):
        session.shows("no workers")
        server.document = recorded("healthy")
        session.shows("prefill-0", "nothing needs attention")
        ended(session)


def test_a_resize_is_followed() -> None:
    with monitored(recorded("healthy"), (100, 30)) as (session, _):
        session.shows("▶ workers")
        session.resize(200, 60)
        session.until(lambda text: len(text.splitlines()[0]) > 150 and "queue length" in text)
        assert len(session.screen.rows) == 60
        session.resize(60, 12)
        session.until(lambda text: "p50" in text and "SmolLM2" in text)
        session.resize(80, 24)
        session.shows("▶ workers", "q quit")
        ended(session)
        assert not session.screen.unknown


def test_only_what_changes_is_written() -> None:
    with monitored(recorded("healthy")) as (session, server):
        session.shows("● live")
        before, asked = session.screen.num_bytes, server.num_asked
        session.until(lambda _: server.num_asked > asked + 10)
        per_frame = (session.screen.num_bytes - before) / (server.num_asked - asked)
        assert per_frame < 300, "a frame in which nothing moved costs a few bytes, not a screen"
        ended(session)


def test_ctrl_l_repairs_a_spoiled_screen() -> None:
    with monitored(recorded("healthy")) as (session, _):
        session.shows("▶ workers", "q quit")
        os.write(session.slave, b"\x1b[11;1Hspoiled by another program")
        session.shows("spoiled by another program")
        session.press("\x0c")
        session.until(lambda text: "spoiled" not in text and "▶ workers" in text)
        ended(session)


def test_a_balancer_that_goes_away_keeps_its_last_frame_and_comes_back() -> None:
    with monitored(recorded("healthy")) as (session, server):
        session.shows("● live", "prefill-0")
        server.stop()
        session.shows("× no answer", "no answer since", "Connection refused", "below is its last answer")
        assert "prefill-0" in session.screen.text
        server.document = recorded("overloaded")
        server.start()
        session.shows("● live", "workers 6")
        ended(session)


def test_it_starts_before_the_balancer_does() -> None:
    with monitored(recorded("healthy")) as (session, server):
        server.stop()
        session.shows("no answer since")
        server.start()
        session.shows("prefill-0", "● live")
        ended(session)


def test_a_missing_key_says_what_to_do() -> None:
    with monitored(recorded("healthy"), (140, 30)) as (session, server):
        server.key = "s3cret"
        session.shows("401", "--api-key", "PDSERVE_ADMIN_API_KEY")
        ended(session)


def test_it_works_without_colours_and_in_ascii() -> None:
    with monitored(recorded("failing"), (100, 30), NO_COLOR="1", PYTHONIOENCODING="ascii") as (session, _):
        session.shows("prefill-0", "! suspect", "q quit")
        ended(session)
        assert not session.screen.strange


def test_in_a_thread_it_is_ended_from_outside_and_shows_notes() -> None:
    with monitored(recorded("healthy"), program=STOPS_ITSELF) as (session, _):
        session.shows("prefill-0", "launcher ", "decode-1 is restarted")
        session.resize(120, 40)
        session.until(lambda text: len(text.splitlines()) == 40 and "▶ workers" in text)
        session.press("\x1a")  # the launcher must not be stopped by a key of its monitor
        session.signal(signal.SIGUSR1)
        session.end(0)
        assert "code 0" in session.screen.text


def test_hostile_texts_do_not_reach_the_terminal() -> None:
    document = recorded("failing")
    evil = "\x1b[31m\x1b]0;owned\x07[bold]x[/bold]\r\n\x9b2J\u202e\u200b"
    for worker in document["workers"]:
        worker["worker_id"] = worker["last_error"] = worker["state"] = evil
    for row in document["events"]:
        row["detail"] = row["event"] = evil
    document["model"] = document["version"] = evil
    with monitored(document, (120, 40)) as (session, _):
        session.shows("[bold]x[/bold]")
        session.press("\r")
        session.shows("last error")
        ended(session)
        assert not set("\u202e\u200b\x9b") & session.screen.strange

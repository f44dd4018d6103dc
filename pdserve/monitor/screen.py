"""The live screen: draws what the feed brings, follows keys, resizes and signals, leaves clean.

    keys ────┐
    signals ─┼─ select ──► ViewState ──► render ──► Terminal.paint
    feed ────┘  (a pipe)

``Watch.run`` may be called in any thread; only in the main one it catches signals itself,
elsewhere ``stop`` ends it and the size is looked at four times a second.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from rich.console import Console

from pdserve.errors import PdserveError
from pdserve.monitor.keys import KeyReader, press
from pdserve.monitor.snapshot import Snapshot
from pdserve.monitor.terminal import Terminal
from pdserve.monitor.view import render
from pdserve.monitor.view_state import Lost, ViewState
from pdserve.state.client import StateClient
from pdserve.state.document import StateDocument

REDRAW_S = 1.0
"""Ages on the screen grow even when no document comes."""
LOOK_S = 0.25
"""How often the size is looked at where no signal tells of it."""
ESCAPE_S = 0.05
"""An arrow's bytes follow its escape within this time, also over ssh: they travel in one packet."""
NUM_NOTES = 16
REDRAW_KEY = "\x0c"
"""Ctrl-L: somebody else has written on the screen."""
MAX_WAIT_S = 5.0
"""Longest wait between two tries of a balancer that is away."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Watch:
    """One live monitor on this process's terminal."""

    def __init__(self, url: str, *, api_key: str = "", interval_s: float = 0.5) -> None:
        """Raises ConfigError if ``url`` is no address."""
        client = StateClient(url, api_key)
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._feed = Feed(client, interval_s, lambda: self._tell(b"n"))
        self._view = ViewState(url=client.url)
        self._notes: deque[str] = deque(maxlen=NUM_NOTES)
        self._shown = self._feed.news
        self._code: int | None = None
        self._size = (0, 0)
        self._is_spoiled = False

    def stop(self, code: int = 0) -> None:
        """End ``run`` soon, with this exit status. From any thread or signal handler."""
        self._code = code
        self._tell(b"x")

    def note(self, text: str) -> None:
        """Show a line among the events, with the time of day. From any thread."""
        self._notes.append(f"{time.strftime('%H:%M:%S')} {text}")
        self._tell(b"n")

    def run(self, console: Console | None = None) -> int:
        """Show the fleet until the user leaves; 0, or 128 + the signal that ended it.

        Must not be called twice. The terminal is as before when this returns or raises.
        """
        console = console or Console()
        is_main = threading.current_thread() is threading.main_thread()
        encoding = (console.encoding or "").lower().replace("-", "")
        self._view = replace(self._view, is_ascii=encoding != "utf8")
        terminal = Terminal(console, can_suspend=is_main)
        try:
            with ExitStack() as stack:
                stack.callback(self._feed.stop)
                stack.enter_context(terminal)
                if is_main:
                    stack.enter_context(self._signals())
                self._feed.start()
                self._loop(terminal, has_signals=is_main)
        finally:
            self._close()
        return self._code or 0

    # -- the loop ------------------------------------------------------------------------------

    def _loop(self, terminal: Terminal, *, has_signals: bool) -> None:
        keys = KeyReader()
        self._draw(terminal)
        drawn_s = time.monotonic()
        while self._code is None:
            left_s = REDRAW_S - (time.monotonic() - drawn_s)
            wait_s = ESCAPE_S if keys.is_waiting else left_s if has_signals else min(left_s, LOOK_S)
            ready, _, _ = select.select([terminal.input_fd, self._read_fd], [], [], max(0.0, wait_s))
            is_due = not ready and not keys.is_waiting and wait_s == left_s
            if terminal.input_fd in ready:
                data = terminal.read()
                if not data:
                    self._code = 128 + signal.SIGHUP  # the terminal is gone
                is_due = self._press(keys.feed(data)) or is_due
            elif keys.is_waiting and not ready:
                is_due = self._press(keys.flush())
            if self._read_fd in ready:
                is_due = self._hear(os.read(self._read_fd, 512), terminal) or is_due
            if self._code is None and (is_due or terminal.size() != self._size):
                self._draw(terminal)
                drawn_s = time.monotonic()

    def _press(self, keys: Iterator[str]) -> bool:
        is_changed = False
        for key in keys:
            if key == REDRAW_KEY:
                self._is_spoiled = is_changed = True
                continue
            after = press(key, self._view, Snapshot(self._shown.state, time.time()))
            if after is None:
                self._code = 0
                return False
            if after.is_paused != self._view.is_paused:
                self._feed.pause(after.is_paused)
            is_changed = is_changed or after != self._view
            self._view = after
        return is_changed

    def _hear(self, told: bytes, terminal: Terminal) -> bool:
        """What came through the pipe: news, a resize, a suspension; True if it is to be drawn."""
        if b"z" in told and self._code is None:
            terminal.__exit__(None, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            terminal.__enter__()
        return True

    def _draw(self, terminal: Terminal) -> None:
        view, now_s = self._view, time.time()
        if view.is_paused:
            now_s = view.now_s  # a paused frame shows one moment, its ages too
        else:
            self._shown = self._feed.news
        news = self._shown
        view = replace(
            view, now_s=now_s, received_s=news.received_s, lost=news.lost, notes=tuple(self._notes)
        )
        self._size = terminal.size()
        frame = render(news.state, view, self._size)
        self._view = replace(view, scroll=frame.scroll)
        if self._is_spoiled:
            terminal.forget()
        self._is_spoiled = False
        terminal.paint(frame, self._size)

    # -- signals -------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Catch what ends, resizes or suspends the process; in the main thread only."""

        def end(number: int, frame: FrameType | None) -> None:
            self.stop(128 + number)

        handlers: dict[signal.Signals, Callable[[int, FrameType | None], Any]] = dict.fromkeys(_ENDING, end)
        handlers[signal.SIGWINCH] = lambda number, frame: self._tell(b"w")
        handlers[signal.SIGTSTP] = lambda number, frame: self._tell(b"z")
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _tell(self, what: bytes) -> None:
        try:
            os.write(self._write_fd, what)
        except (BlockingIOError, OSError):
            pass  # full: a wake-up is pending already; closed: the loop has ended

    def _close(self) -> None:
        read_fd, write_fd, self._read_fd, self._write_fd = self._read_fd, self._write_fd, -1, -1
        os.close(write_fd)
        os.close(read_fd)


# -- the feed: asks for the document in a thread of its own --------------------------------------


@dataclass(frozen=True, slots=True)
class News:
    """The last document and when it came (wall clock, None: never); ``lost`` while there is no answer."""

    state: StateDocument
    received_s: float | None = None
    lost: Lost | None = None


class Feed:
    """Fetches every ``interval_s`` in a thread until ``stop``; ``on_news`` is called in that thread."""

    def __init__(self, client: StateClient, interval_s: float, on_news: Callable[[], None]) -> None:
        self._client = client
        self._interval_s = interval_s
        self._on_news = on_news
        self._news = News(StateDocument())
        self._wake = threading.Condition()
        self._is_paused = self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="monitor-feed", daemon=True)

    @property
    def news(self) -> News:
        """What is known now."""
        return self._news

    def start(self) -> None:
        """Begin asking."""
        self._thread.start()

    def pause(self, is_paused: bool) -> None:
        """While paused nothing is asked; afterwards at once."""
        with self._wake:
            self._is_paused = is_paused
            self._wake.notify()

    def stop(self) -> None:
        """End the thread; waits for it a second at most."""
        with self._wake:
            self._is_stopped = True
            self._wake.notify()
        self._client.close()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        failures = 0
        while not self._is_stopped:
            started_s = time.monotonic()
            if not self._is_paused:
                failures = 0 if self._ask(failures) else failures + 1
            spent_s = time.monotonic() - started_s
            wait_s = _backoff_s(failures) if failures else max(0.0, self._interval_s - spent_s)
            with self._wake:
                if self._is_stopped:
                    return
                # Paused: until ``pause(False)``. A pause that began while asking is seen here.
                self._wake.wait(None if self._is_paused else wait_s)

    def _ask(self, failures: int) -> bool:
        before = self._news
        try:
            state = self._client.fetch()
            self._news = News(state, time.time())
        except PdserveError as exc:
            since_s = before.lost.since_s if before.lost else time.time()
            reason = str(exc).removeprefix(f"{self._client.url}: ")
            self._news = News(
                before.state, before.received_s, Lost(since_s, reason, _backoff_s(failures + 1))
            )
        if self._is_stopped:
            return True
        self._on_news()
        return self._news.lost is None


def _backoff_s(failures: int) -> float:
    return float(min(MAX_WAIT_S, 0.25 * 2 ** min(failures, 10)))

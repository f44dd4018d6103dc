"""``pdserve launch --monitor``: the launch's own display until the fleet is ready, then the monitor.

    stage, tick ──► inner display        ready ──► the monitor's thread        close ──► inner again

The monitor runs in a thread, for the launcher's loop owns the main one and its signals.
When the user leaves it, or the launch closes it, lines are printed plainly again.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from pdserve.monitor.screen import Watch
from pdserve.state.client import clean

JOIN_S = 2.0
MAX_HELD = 64


class InnerDisplay(Protocol):
    """What shows the launch itself, as ``cluster.local.Display``."""

    def stage(self, name: str, *, role: str, url: str, stage: str, log_file: str) -> None:
        """A process reached another stage."""
        ...

    def tick(self) -> None:
        """Time has passed."""
        ...

    def ready(self, *, url: str, model: str, log_dir: str) -> None:
        """The fleet takes requests."""
        ...

    def event(self, level: int, text: str) -> None:
        """One line worth telling."""
        ...

    def close(self) -> None:
        """Nothing more will be redrawn."""
        ...


class _LogToNotes(logging.Handler):
    """Warnings of the launcher's own log, which would be written across the screen."""

    def __init__(self, note: Callable[[int, str], None]) -> None:
        super().__init__(logging.WARNING)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        """Show its message as a line."""
        self._note(record.levelno, clean(record.getMessage(), 300))


class MonitorDisplay:
    """Satisfies ``cluster.local.Display``. Call ``close`` before anything is to be read on the terminal."""

    def __init__(self, inner: InnerDisplay, *, api_key: str = "", interval_s: float = 0.5) -> None:
        """``api_key`` is the balancer's admin key, where it has one."""
        self._inner = inner
        self._api_key, self._interval_s = api_key, interval_s
        self._watch: Watch | None = None
        self._thread: threading.Thread | None = None
        self._held: deque[tuple[int, str]] = deque(maxlen=MAX_HELD)
        self._lock = threading.Lock()
        self._is_closing = False

    def stage(self, name: str, *, role: str, url: str, stage: str, log_file: str) -> None:
        """A process reached another stage; while the monitor is open it is a note there."""
        if self._is_open:
            self._note(logging.INFO, f"{name}: {stage}")
        else:
            self._inner.stage(name, role=role, url=url, stage=stage, log_file=log_file)

    def tick(self) -> None:
        """Time has passed."""
        if not self._is_open:
            self._inner.tick()

    def ready(self, *, url: str, model: str, log_dir: str) -> None:
        """Print how to use the fleet, then open the monitor over it."""
        self._inner.ready(url=url, model=model, log_dir=log_dir)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            self._inner.event(logging.WARNING, "--monitor needs a terminal; there is none")
            return
        self._watch = Watch(url, api_key=self._api_key, interval_s=self._interval_s)
        self._thread = threading.Thread(target=self._run, args=(self._watch,), name="monitor", daemon=True)
        self._thread.start()

    def event(self, level: int, text: str) -> None:
        """One line worth telling: printed, or shown by the monitor and printed after it."""
        if self._is_open:
            self._note(level, text)
        else:
            self._inner.event(level, text)

    def close(self) -> None:
        """End the monitor; the terminal is as before when this returns. More calls do no harm."""
        watch, thread = self._watch, self._thread
        if watch is not None and thread is not None and thread is not threading.current_thread():
            self._is_closing = True
            watch.stop()
            thread.join(JOIN_S)
        self._inner.close()

    @property
    def _is_open(self) -> bool:
        return self._watch is not None

    def _note(self, level: int, text: str) -> None:
        with self._lock:
            if self._watch is not None:
                self._held.append((level, text))
                self._watch.note(clean(text, 300))
                return
        self._inner.event(level, text)

    def _run(self, watch: Watch) -> None:
        told = "monitor closed; the service goes on, Ctrl-C stops it"
        handler = _LogToNotes(self._note)
        logging.getLogger().addHandler(handler)
        try:
            if watch.run():
                told = "monitor closed: the terminal is gone; the service goes on"
        except Exception as exc:
            told = f"monitor ended: {clean(repr(exc), 300)}; the service goes on, Ctrl-C stops it"
        finally:
            logging.getLogger().removeHandler(handler)
            with self._lock:
                self._watch = None
                held = list(self._held)
                self._held.clear()
            for level, text in held:
                self._inner.event(level, text)
        if not self._is_closing:
            self._inner.event(logging.INFO, told)

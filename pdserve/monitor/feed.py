"""The state document, asked for again and again in a thread of its own.

    Feed thread ── GET /pdserve/state ──► state, received_s │ lost ──► on_news()
                       after a failure: waits longer each time, up to ``MAX_WAIT_S``

``news`` holds the last document even while the balancer is away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pdserve.errors import PdserveError
from pdserve.monitor.view_state import Lost
from pdserve.state.client import StateClient
from pdserve.state.document import StateDocument

MAX_WAIT_S = 5.0
"""Longest wait between two tries of a balancer that is away."""


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
                # Paused: until told otherwise. A pause that began while asking is seen here.
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

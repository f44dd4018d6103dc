"""The state document over HTTP: asked for once, or again and again in a thread of its own.

    Feed thread ── GET /pdserve/state ──► state, received_s │ lost ──► on_news()
                       after a failure: waits longer each time, up to ``MAX_WAIT_S``

One connection is kept open. Whoever reads ``news`` gets the last document even while
the balancer is away.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, urlsplit

from pdserve.errors import ConfigError, PdserveError, WorkerError, WorkerTimeout, WorkerUnreachable
from pdserve.monitor.document import clean
from pdserve.monitor.view_state import Lost

STATE_PATH = "/pdserve/state"
TIMEOUT_S = 5.0
MAX_WAIT_S = 5.0
"""Longest wait between two tries of a balancer that is away."""
MAX_DOCUMENT_BYTES = 64 * 2**20
"""A document of 64 workers and 1024 pairs has 0.5 MB."""


def parse_url(url: str) -> SplitResult:
    """``host:port`` or ``http(s)://host:port[/prefix]``; a trailing ``/v1`` or slash is dropped.

    Raises:
        ConfigError: if it is no such address.
    """
    whole = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    expected = f"{clean(url, 200)!r} is no address of a balancer; expected one like http://127.0.0.1:30000"
    try:
        parts = urlsplit(whole)
        port = parts.port
    except ValueError as exc:
        raise ConfigError(f"{expected} ({exc})") from exc
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not whole.isprintable():
        raise ConfigError(expected)
    return parts


class StateClient:
    """Asks one balancer for its state document. Not thread safe, but ``close`` may come from anywhere."""

    def __init__(self, url: str, api_key: str = "") -> None:
        """``api_key`` is sent as a bearer token; raises ConfigError for a wrong address or key."""
        self._parts = parse_url(url)
        self.url = self._parts._replace(netloc=self._parts.netloc.rpartition("@")[2]).geturl()
        if not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the API key holds characters that no HTTP header can carry")
        self._headers = {"Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._connection: HTTPConnection | None = None

    def fetch(self) -> dict[str, Any]:
        """The document now.

        Raises:
            WorkerError: unreachable, too slow, an error status, or not a state document.
        """
        is_kept = self._connection is not None
        try:
            status, reason, body = self._exchange()
        except WorkerTimeout:
            raise
        except WorkerUnreachable:
            if not is_kept:
                raise
            status, reason, body = self._exchange()  # the server had closed the kept connection
        if status != 200:
            self.close()
            raise WorkerError(self.url, _refusal(status, reason))
        try:
            document = json.loads(body)
        except (ValueError, RecursionError) as exc:
            raise WorkerError(self.url, f"{STATE_PATH} is not JSON: {clean(str(exc), 200)}") from exc
        if not isinstance(document, dict):
            raise WorkerError(self.url, f"{STATE_PATH} is no object; is this a pdserve balancer?")
        return document

    def close(self) -> None:
        """Close the connection; a ``fetch`` that is under way fails."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        sock = connection.sock  # the fetching thread may drop it at any moment
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it is gone already
        connection.close()

    def _exchange(self) -> tuple[int, str, bytes]:
        parts = self._parts
        try:
            if self._connection is None:
                kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
                self._connection = kind(str(parts.hostname), parts.port, timeout=TIMEOUT_S)
            connection = self._connection
            connection.request("GET", parts.path + STATE_PATH, headers=self._headers)
            response = connection.getresponse()
            body = response.read(MAX_DOCUMENT_BYTES)
            return response.status, response.reason, body
        except TimeoutError as exc:
            self.close()
            raise WorkerTimeout(self.url, f"no answer within {TIMEOUT_S:.0f} s") from exc
        except (OSError, HTTPException, AttributeError, ValueError) as exc:  # the last two: closed meanwhile
            self.close()
            reason = (exc.strerror if isinstance(exc, OSError) else "") or str(exc) or type(exc).__name__
            raise WorkerUnreachable(self.url, clean(reason, 200)) from exc


def _refusal(status: int, reason: str) -> str:
    """What an error status means here and what to do."""
    if status in (401, 403):
        return (
            f"{status}: it asks for a key: give --api-key, or set PDSERVE_ADMIN_API_KEY "
            "(PDSERVE_API_KEY where there is no admin key)"
        )
    if status == 404:
        return f"404: {STATE_PATH} is not there; is this a pdserve balancer?"
    return f"{STATE_PATH} answered {status} {clean(reason, 60)}"


@dataclass(frozen=True, slots=True)
class News:
    """The last document and when it came (wall clock, None: never); ``lost`` while there is no answer."""

    state: Mapping[str, Any]
    received_s: float | None = None
    lost: Lost | None = None


class Feed:
    """Fetches every ``interval_s`` in a thread until ``stop``; ``on_news`` is called in that thread."""

    def __init__(self, client: StateClient, interval_s: float, on_news: Callable[[], None]) -> None:
        self._client = client
        self._interval_s = interval_s
        self._on_news = on_news
        self._news = News({})
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

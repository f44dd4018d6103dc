"""The balancer's HTTP client: kept connections to the workers, nothing that a worker does not need.

    start() ─► idle connection of that worker, else a fresh one ─► UpstreamResponse, fed as bytes arrive

``start`` never blocks: with an idle connection at hand the request has left
when it returns. ``open`` and ``fetch`` are the same for who wants to await.
Failures are WorkerUnreachable (no connection, or it broke) and WorkerTimeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit

from pdserve.errors import ConfigError, WorkerError, WorkerTimeout, WorkerUnreachable
from pdserve.http.client_connection import ClientConnection
from pdserve.http.client_response import Alarm, ClientResponse, Deadlines, Headers, Wakeup

IDLE_S = 4.0
"""SGLang's uvicorn closes a kept connection after 5 s without a request; be first."""
MAX_IDLE = 512
"""Kept connections per worker."""
_HEAD = b"%b %b HTTP/1.1\r\nhost: %b\r\n%bcontent-length: %d\r\n\r\n"
_BRIEF = (b"POST /generate ", b"POST /abort_request ")
"""Posted by the balancer itself; neither stops a scheduler."""


@dataclass(frozen=True, slots=True)
class FetchedResponse:
    """A whole response."""

    status: int
    headers: Headers
    body: bytes


class _Target:
    """One worker's address and its idle connections, last used last."""

    __slots__ = ("_pool", "authority", "host", "idle", "num_heard", "port", "tls", "url")

    def __init__(self, url: str, pool: HttpClient) -> None:
        self.url = url
        self.host, self.port, self.tls, self.authority = _address(url)
        self.idle: deque[ClientConnection] = deque()
        self.num_heard = 0
        self._pool = pool

    def take_idle(self, now_s: float) -> ClientConnection | None:
        """A kept connection that the worker has most likely not closed yet."""
        while self.idle:
            connection = self.idle.pop()
            if connection.is_usable and now_s - connection.idle_since_s < IDLE_S:
                return connection
            connection.drop()
        return None

    def put_back(self, connection: ClientConnection) -> None:
        """Keep it for the next request."""
        if self._pool.is_closed or len(self.idle) >= MAX_IDLE:
            connection.drop()
            return
        connection.idle_since_s = self._pool.deadlines.now()
        self.idle.append(connection)
        self._pool.expect_idle()

    def forget(self, connection: ClientConnection) -> None:
        """It is closed."""
        self._pool.connections.discard(connection)
        with contextlib.suppress(ValueError):
            self.idle.remove(connection)

    def send_again(self, response: ClientResponse) -> None:
        """The kept connection was stale."""
        self._pool.connect_for(self, response)

    def drop_older(self, before_s: float) -> None:
        """Close idle connections last used before that time; the oldest are first."""
        while self.idle and self.idle[0].idle_since_s < before_s:
            self.idle.popleft().drop()


class HttpClient:
    """Connections to every worker, by base URL. One per event loop; ``await close()`` at the end."""

    def __init__(self, connect_s: float = 5.0) -> None:
        self.connect_s = connect_s
        self.deadlines = Deadlines()
        self.connections: set[ClientConnection] = set()
        self.is_closed = False
        self._targets: dict[str, _Target] = {}
        self._connecting: dict[asyncio.Task[None], ClientResponse] = {}
        self._idle_timer: asyncio.TimerHandle | None = None

    def start(
        self,
        url: str,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Iterable[tuple[bytes, bytes]] | bytes = (),
        limits: tuple[float, float],
        wakeup: Alarm | None = None,
        can_resend: bool = True,
    ) -> ClientResponse:
        """Send a request and return its response, still empty.

        Args:
            url: base address of the worker, ``http://host:port``.
            body: sent with its length, also if empty.
            headers: besides ``host`` and ``content-length``; as bytes, lines with their ends.
            limits: seconds to the first byte, and of silence after it.
            wakeup: set at each change, instead of the response's own, on which its methods wait.
            can_resend: a kept connection that breaks at once may be replaced and the request sent
                again; not for prompts, whose room the worker may already have taken.

        Never raises for what the worker does; see ``ClientResponse.error``.
        """
        target = self._targets.get(url)
        if target is None:
            target = self._targets[url] = _Target(url, self)
        lines = headers if isinstance(headers, bytes) else render_headers(headers)
        head = _HEAD % (method.encode(), path.encode(), target.authority, lines, len(body))
        response = ClientResponse(url, head, body, limits, self.deadlines)
        response.wakeup = Wakeup() if wakeup is None else wakeup
        response.can_resend = can_resend
        now_s = self.deadlines.now()
        connection = target.take_idle(now_s)
        if connection is not None:
            connection.send(response, now_s)
        else:
            self.connect_for(target, response)
        return response

    async def open(
        self,
        url: str,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Iterable[tuple[bytes, bytes]] | bytes = (),
        first_byte_s: float,
        silence_s: float,
    ) -> ClientResponse:
        """Send a request and wait for the response head. The caller reads the body or calls ``close``.

        Raises:
            WorkerUnreachable: if there was no connection, or it broke.
            WorkerTimeout: if nothing came within ``first_byte_s``.
        """
        response = self.start(url, method, path, body, headers=headers, limits=(first_byte_s, silence_s))
        try:
            await response.wait_head()
        except BaseException:
            response.close()
            raise
        return response

    async def fetch(
        self,
        url: str,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Iterable[tuple[bytes, bytes]] | bytes = (),
        timeout_s: float,
    ) -> FetchedResponse:
        """One exchange, body read to the end; any status is an answer.

        Raises:
            WorkerUnreachable: if there was no connection, or it broke.
            WorkerTimeout: if it took longer than ``timeout_s`` in all.
        """
        limits = (timeout_s, timeout_s)
        response = self.start(url, method, path, body, headers=headers, limits=limits)
        try:
            async with asyncio.timeout(timeout_s):
                await response.wait_head()
                content = await response.read()
        except TimeoutError:
            raise WorkerTimeout(url, f"no answer to {method} {path} within {timeout_s:g} s") from None
        finally:
            response.close()
        return FetchedResponse(response.status, response.headers, content)

    # -- for the fleet -----------------------------------------------------------------------

    def num_heard(self, url: str) -> int:
        """Grows whenever bytes of an answer to a client's request arrive from that worker."""
        target = self._targets.get(url)
        return target.num_heard if target else 0

    def is_instructed(self, url: str) -> bool:
        """True while some control request, such as a weight update, is under way there."""
        return any(
            response.can_resend
            and response.head.startswith(b"POST ")
            and not response.head.startswith(_BRIEF)
            for response in self._exchanges(url)
        )

    def fail_worker(self, url: str, make_error: Callable[[], WorkerError]) -> int:
        """End every exchange with that worker with an error; returns how many clients' requests were among
        them. Kept connections are closed."""
        exchanges = self._exchanges(url)
        for response in exchanges:
            response.fail(make_error())
            if response.connecting is not None:
                response.connecting.cancel()
        if target := self._targets.get(url):
            target.drop_older(float("inf"))
        return sum(not response.can_resend for response in exchanges)

    def _exchanges(self, url: str) -> list[ClientResponse]:
        return [each for each in (*self.deadlines.open(), *self._connecting.values()) if each.url == url]

    async def close(self) -> None:
        """Break every exchange and close every connection."""
        self.is_closed = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        for response in self.deadlines.close():
            response.fail(WorkerUnreachable(response.url, "the balancer is stopping"))
        for connection in list(self.connections):
            connection.drop()
        tasks = list(self._connecting)
        for task, response in list(self._connecting.items()):
            response.fail(WorkerUnreachable(response.url, "the balancer is stopping"))
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- for targets -------------------------------------------------------------------------

    def connect_for(self, target: _Target, response: ClientResponse) -> None:
        """Send over a fresh connection; the task that opens it is ours."""
        if self.is_closed:
            response.fail(WorkerUnreachable(target.url, "the balancer is stopping"))
            return
        task = asyncio.get_running_loop().create_task(self._connect(target, response))
        response.connecting = task
        self._connecting[task] = response
        task.add_done_callback(self._connecting.pop)

    def expect_idle(self) -> None:
        """Some connection became idle: see to it that it does not stay for ever."""
        if self._idle_timer is None:
            self._idle_timer = asyncio.get_running_loop().call_later(IDLE_S, self._drop_idle)

    def _drop_idle(self) -> None:
        self._idle_timer = None
        before_s = self.deadlines.now() - IDLE_S
        for target in self._targets.values():
            target.drop_older(before_s)
        if any(target.idle for target in self._targets.values()):
            self.expect_idle()

    async def _connect(self, target: _Target, response: ClientResponse) -> None:
        try:
            async with asyncio.timeout(self.connect_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: ClientConnection(target), target.host, target.port, ssl=target.tls
                )
        except TimeoutError as exc:
            response.fail(_unreachable(target.url, f"no connection within {self.connect_s:g} s", exc))
            return
        except (OSError, UnicodeError) as exc:  # UnicodeError: no such host name can exist
            why = getattr(exc, "strerror", None) or exc
            response.fail(_unreachable(target.url, f"cannot connect: {why}", exc))
            return
        response.connecting = None
        self.connections.add(connection)
        if response.has_ended:
            target.put_back(connection)
        elif connection.is_usable:
            connection.send(response, self.deadlines.now())
        else:
            response.fail(WorkerUnreachable(target.url, "closed the connection at once"))


def _unreachable(url: str, message: str, cause: Exception) -> WorkerUnreachable:
    error = WorkerUnreachable(url, message)
    error.__cause__ = cause  # a refusal tells of a dead process, silence of a dead machine
    return error


def render_headers(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Header lines with their ends, for requests that share them."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def _address(url: str) -> tuple[str, int, ssl.SSLContext | None, bytes]:
    """Host, port, TLS context and Host header of a base URL."""
    try:
        parts = urlsplit(url)
        given_port = parts.port
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(url)
    except ValueError:
        raise ConfigError(
            f"a worker's address must be http://host:port or https://host:port, got {url!r}"
        ) from None
    is_tls = parts.scheme == "https"
    port = given_port or (443 if is_tls else 80)
    return parts.hostname, port, _tls_context() if is_tls else None, parts.netloc.rpartition("@")[2].encode()


@cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()

"""The asynchronous HTTP client: kept connections to every server, without redirects, cookies or proxies.

    start() ─► idle connection of that server, else a fresh one ─► ClientResponse, fed as bytes arrive

``start`` never blocks: with an idle connection at hand the request has left
when it returns. ``open`` and ``fetch`` are the same for callers that await.
Failures are WorkerUnreachable (no connection, or it broke) and WorkerTimeout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pdserve.errors import WorkerError, WorkerTimeout, WorkerUnreachable
from pdserve.http.client_connection import IDLE_S, ClientConnection, Origin
from pdserve.http.client_response import ClientResponse, Deadlines, Headers, Wakeup

_HEAD = b"%b %b HTTP/1.1\r\nhost: %b\r\n%bcontent-length: %d\r\n\r\n"
STOPPING = "the HTTP client is stopping"


@dataclass(frozen=True, slots=True)
class FetchedResponse:
    """A whole response."""

    status: int
    headers: Headers
    body: bytes


class HttpClient:
    """Connections to every server, by base URL. One per event loop; ``await close()`` at the end."""

    def __init__(self, connect_s: float = 5.0) -> None:
        self.connect_s = connect_s
        self.deadlines = Deadlines()
        self.connections: set[ClientConnection] = set()
        self.is_closed = False
        self._origins: dict[str, Origin] = {}
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
        on_change: Callable[[], None] | None = None,
    ) -> ClientResponse:
        """Send a request and return its response, still empty; see ``ClientResponse.error`` for failures.

        Args:
            headers: besides ``host`` and ``content-length``; as bytes, lines with their ends.
            limits: seconds to the first byte, and of silence after it.
            on_change: called at each change of the response, whose methods then must not be awaited.

        The caller may set ``can_resend`` and ``label`` of the response before it next awaits.
        """
        origin = self._origins.get(url) or self._new_origin(url)
        lines = headers if isinstance(headers, bytes) else render_headers(headers)
        head = _HEAD % (method.encode(), path.encode(), origin.authority, lines, len(body))
        if on_change is None:
            wakeup = Wakeup()
            response = ClientResponse(url, head, body, limits, self.deadlines, wakeup.set)
            response.wakeup = wakeup
        else:
            response = ClientResponse(url, head, body, limits, self.deadlines, on_change)
        now_s = self.deadlines.now()
        connection = origin.take_idle(now_s)
        if connection is not None:
            connection.send(response, now_s)
        else:
            self._connect_for(origin, response)
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
        label: str = "",
    ) -> FetchedResponse:
        """One exchange, body read to the end; any status is an answer.

        Raises:
            WorkerUnreachable: if there was no connection, or it broke.
            WorkerTimeout: if it took longer than ``timeout_s`` in all.
        """
        limits = (timeout_s, timeout_s)
        response = self.start(url, method, path, body, headers=headers, limits=limits)
        response.label = label
        try:
            async with asyncio.timeout(timeout_s):
                await response.wait_head()
                content = await response.read()
        except TimeoutError:
            raise WorkerTimeout(url, f"no answer to {method} {path} within {timeout_s:g} s") from None
        finally:
            response.close()
        return FetchedResponse(response.status, response.headers, content)

    # -- by server ---------------------------------------------------------------------------

    def num_heard(self, url: str) -> int:
        """Return a count that grows whenever bytes of a response that cannot be resent arrive from there."""
        origin = self._origins.get(url)
        return origin.num_heard if origin else 0

    def is_busy_with(self, url: str, label: str) -> bool:
        """Return True while some request of that label is under way there."""
        return any(response.label == label for response in self._exchanges(url))

    def fail_worker(self, url: str, make_error: Callable[[], WorkerError], *, is_begun: bool = True) -> int:
        """End every exchange with that server with an error and close its kept connections; returns how many
        exchanges were among them that cannot be resent. Not ``is_begun``: only those without a status."""
        exchanges = [each for each in self._exchanges(url) if is_begun or not each.status]
        for response in exchanges:
            response.fail(make_error())
            if response.connecting is not None:
                response.connecting.cancel()
        if origin := self._origins.get(url):
            origin.drop_older(float("inf"))
        return sum(not response.can_resend for response in exchanges)

    def _exchanges(self, url: str) -> list[ClientResponse]:
        return [each for each in (*self.deadlines.open(), *self._connecting.values()) if each.url == url]

    async def close(self) -> None:
        """Break every exchange and close every connection."""
        self.is_closed = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        for response in self.deadlines.close():
            response.fail(WorkerUnreachable(response.url, STOPPING))
        for origin in self._origins.values():
            origin.is_closed = True
        for connection in list(self.connections):
            connection.drop()
        tasks = list(self._connecting)
        for task, response in list(self._connecting.items()):
            response.fail(WorkerUnreachable(response.url, STOPPING))
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- for origins -------------------------------------------------------------------------

    def _new_origin(self, url: str) -> Origin:
        origin = Origin(url, self.deadlines, self.connections, self._connect_for, self._expect_idle)
        self._origins[url] = origin
        return origin

    def _connect_for(self, origin: Origin, response: ClientResponse) -> None:
        """Send over a fresh connection; the task that opens it is ours."""
        if self.is_closed:
            response.fail(WorkerUnreachable(origin.url, STOPPING))
            return
        task = asyncio.get_running_loop().create_task(self._connect(origin, response))
        response.connecting = task
        self._connecting[task] = response
        task.add_done_callback(self._connecting.pop)

    def _expect_idle(self) -> None:
        """See to it that a connection that became idle does not stay for ever."""
        if self._idle_timer is None:
            self._idle_timer = asyncio.get_running_loop().call_later(IDLE_S, self._drop_idle)

    def _drop_idle(self) -> None:
        self._idle_timer = None
        before_s = self.deadlines.now() - IDLE_S
        for origin in self._origins.values():
            origin.drop_older(before_s)
        if any(origin.idle for origin in self._origins.values()):
            self._expect_idle()

    async def _connect(self, origin: Origin, response: ClientResponse) -> None:
        try:
            async with asyncio.timeout(self.connect_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: ClientConnection(origin), origin.host, origin.port, ssl=origin.tls
                )
        except TimeoutError as exc:
            response.fail(_unreachable(origin.url, f"no connection within {self.connect_s:g} s", exc))
            return
        except (OSError, UnicodeError) as exc:  # UnicodeError: no such host name can exist
            why = getattr(exc, "strerror", None) or exc
            response.fail(_unreachable(origin.url, f"cannot connect: {why}", exc))
            return
        response.connecting = None
        origin.connections.add(connection)
        if response.has_ended:
            origin.put_back(connection)
        elif connection.is_usable:
            connection.send(response, self.deadlines.now())
        else:
            response.fail(WorkerUnreachable(origin.url, "closed the connection at once"))


def _unreachable(url: str, message: str, cause: Exception) -> WorkerUnreachable:
    error = WorkerUnreachable(url, message)
    error.was_sent = False
    error.__cause__ = cause  # a refusal tells of a dead process, silence of a dead machine
    return error


def render_headers(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Header lines with their ends, for requests that share them."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])

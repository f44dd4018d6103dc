"""Asks a balancer for its state document over HTTP (blocking, one connection that is kept open) and reads it.

Texts of the result consist of visible characters: no worker's name or error can steer a terminal.
"""

from __future__ import annotations

import socket
import unicodedata
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec

from pdserve.errors import ConfigError, WorkerError, WorkerTimeout, WorkerUnreachable
from pdserve.state.document import StateDocument

MAX_TEXT = 2000
"""Characters kept of one text."""
_PLACEHOLDER = "·"
_STACKING = {"Mn", "Me"}
"""Combining marks: they pile up on the character before them and take no cell of their own."""
STATE_PATH = "/pdserve/state"
TIMEOUT_S = 5.0
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

    def fetch(self) -> StateDocument:
        """The document now, its texts clean.

        Raises:
            WorkerError: as ``fetch_json``, or a field of it has a wrong type.
        """
        document = self.fetch_json()
        try:
            return read_state(document)
        except (msgspec.ValidationError, RecursionError) as exc:
            raise WorkerError(self.url, f"{STATE_PATH} is damaged: {clean(str(exc), 200)}") from exc

    def fetch_json(self) -> dict[str, Any]:
        """The document as it came.

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
            document = msgspec.json.decode(body)
        except (msgspec.DecodeError, ValueError, RecursionError) as exc:
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


# -- reading: texts may come from anyone, so each is made one clean line --------------------------


def clean(text: str, limit: int = MAX_TEXT) -> str:
    """``text`` on one line: no control or format characters, no marks that stack, single spaces."""
    head = text[:limit]
    if head.isascii() and head.isprintable():
        return head
    visible = []
    for character in head:
        if character.isprintable():
            if unicodedata.category(character) not in _STACKING:
                visible.append(character)
        else:
            visible.append(" " if character.isspace() else _PLACEHOLDER)
    return " ".join("".join(visible).split())


def read_state(document: object) -> StateDocument:
    """The struct of a decoded document.

    Raises:
        msgspec.ValidationError: if a field has a wrong type, or a number is out of range.
    """
    return msgspec.convert(_cleaned(document), StateDocument)


def _cleaned(value: Any) -> Any:
    match value:
        case str():
            return clean(value)
        case dict():
            return {clean(name): _cleaned(item) for name, item in value.items()}
        case list():
            return [_cleaned(item) for item in value]
        case int() if not -(2**63) <= value < 2**63:
            raise msgspec.ValidationError("a number is out of range")
    return value

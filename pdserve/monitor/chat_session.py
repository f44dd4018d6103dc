"""A conversation with a running service over ``/v1/chat/completions``; no terminal in here.

``ChatSession.ask`` is a generator of text pieces. Closing it (or Ctrl-C inside it)
closes the connection, which makes the service abort both legs of the request.

    ask() ──POST, stream──►  data: {…"delta": {"content": …}}  ──►  yield piece
                             data: {…"usage": …}               ──►  session.last
                             data: [DONE]                      ──►  history grows by two
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from pdserve.errors import ConfigError, WorkerError, WorkerTimeout, WorkerUnreachable

CONNECT_S = 10.0
SILENCE_S = 600.0
"""Longest silence inside an answer: a long prompt on a busy CPU fleet takes minutes to prefill."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What every request of a conversation carries. ``temperature`` 0 is greedy."""

    system: str = ""
    max_tokens: int = 512
    temperature: float = 0.0
    api_key: str = field(default="", repr=False)
    """Sent as a bearer token; empty: nothing is."""


@dataclass(frozen=True, slots=True)
class AnswerStats:
    """One answer as the client saw it: seconds from sending the request to the first and the last text."""

    completion_tokens: int
    ttft_s: float
    e2e_s: float
    is_counted: bool = True
    """False if the service reported no usage, so that ``completion_tokens`` counts stream pieces."""
    finish: str = ""

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first; 0 for a single token."""
        return (self.e2e_s - self.ttft_s) / max(self.completion_tokens - 1, 1)

    def line(self) -> str:
        """``42 tokens · TTFT 0.21 s · TPOT 95 ms``, and why it ended if not by itself."""
        count = f"{self.completion_tokens} {'tokens' if self.is_counted else 'pieces'}"
        ending = f" · ended by {self.finish}" if self.finish not in ("", "stop") else ""
        return f"{count} · TTFT {self.ttft_s:.2f} s · TPOT {self.tpot_s * 1000:.0f} ms{ending}"


@dataclass(slots=True)
class _Reception:
    """What has arrived of one answer."""

    started_s: float
    pieces: list[str] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int | None = None
    finish: str = ""

    def take(self, event: dict[str, Any]) -> str:
        """Note one stream event; returns its text, maybe empty."""
        if usage := event.get("usage"):
            self.tokens = usage.get("completion_tokens", self.tokens)
        text = ""
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = delta.get("content") or ""
            self.finish = choice.get("finish_reason") or self.finish
            if text or delta.get("reasoning_content"):
                self.last_s = time.monotonic()
                self.first_s = self.first_s or self.last_s
        if text:
            self.pieces.append(text)
        return text

    def stats(self) -> AnswerStats:
        """Sums up; an answer without text has its end as its first token."""
        last = self.last_s or time.monotonic()
        return AnswerStats(
            completion_tokens=len(self.pieces) if self.tokens is None else self.tokens,
            ttft_s=(self.first_s or last) - self.started_s,
            e2e_s=last - self.started_s,
            is_counted=self.tokens is not None,
            finish=self.finish,
        )


class ChatSession:
    """Turns so far and how to ask for the next one. Not thread safe; one answer at a time."""

    def __init__(self, url: str, options: ChatOptions | None = None) -> None:
        """``url`` is the service's root (``http://127.0.0.1:30000``); a trailing ``/v1`` is dropped.

        Raises:
            ConfigError: if it is no HTTP address.
        """
        self.url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError as exc:
            raise ConfigError(f"{url} has no usable port: {exc}") from exc
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url} is not an address like http://127.0.0.1:30000")
        self._is_tls, self._host, self._port, self._prefix = (
            parts.scheme == "https",
            parts.hostname,
            port,
            parts.path,
        )
        self.options = options or ChatOptions()
        self.turns: list[dict[str, str]] = []
        self.last: AnswerStats | None = None
        """Measured on the newest answer that produced text or ended by itself."""
        self._model = ""

    def model(self) -> str:
        """The served model's name, asked once from ``/v1/models``.

        Raises:
            WorkerError: if the service is unreachable, answers an error, or lists no model.
        """
        if not self._model:
            connection, response = self._exchange("GET", "/v1/models")
            try:
                listed = json.loads(response.read()).get("data") or []
                self._model = str(listed[0]["id"])
            except (HTTPException, OSError, ValueError, AttributeError, LookupError, TypeError) as exc:
                raise WorkerError(self.url, "/v1/models lists no model; is this an LLM service?") from exc
            finally:
                connection.close()
        return self._model

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns.clear()

    def ask(self, question: str) -> Generator[str, None, None]:
        """Send the conversation with ``question`` and yield the answer's text as it comes.

        The two turns are kept when the answer ends, and also when it is stopped
        half-way (the part that was shown); after an error the question is dropped.

        Raises:
            WorkerError: unreachable, silent too long, answered an error, or broke off.
        """
        asked = {"role": "user", "content": question}
        body = self._body(asked)
        reception = _Reception(time.monotonic())
        is_failed = False
        connection, response = self._exchange("POST", "/v1/chat/completions", body)
        try:
            for event in self._events(response):
                if text := reception.take(event):
                    yield text
            if not reception.finish:
                raise WorkerUnreachable(self.url, "the connection ended in the middle of the answer")
        except WorkerError:
            is_failed = True
            raise
        finally:
            connection.close()
            if not is_failed and (reception.finish or reception.pieces):
                self.turns += [asked, {"role": "assistant", "content": "".join(reception.pieces)}]
                self.last = reception.stats()

    def _body(self, asked: dict[str, str]) -> bytes:
        system = [{"role": "system", "content": self.options.system}] if self.options.system else []
        request = {
            "model": self.model(),
            "messages": [*system, *self.turns, asked],
            "max_tokens": self.options.max_tokens,
            "temperature": self.options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(request).encode()

    def _exchange(
        self, method: str, path: str, body: bytes | None = None
    ) -> tuple[HTTPConnection, HTTPResponse]:
        """Send one request on a new connection; the caller closes it. Only 200 comes back."""
        kind = HTTPSConnection if self._is_tls else HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
            connection.sock.settimeout(SILENCE_S)
            headers = {"Content-Type": "application/json"} if body else {}
            if key := self.options.api_key:
                headers["Authorization"] = f"Bearer {key}"
            connection.request(method, self._prefix + path, body=body, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                reason = _error_text(response.read(65536)) or response.reason
                raise WorkerError(self.url, f"{path} answered {response.status}: {reason}")
        except BaseException as exc:
            connection.close()
            if isinstance(exc, (OSError, HTTPException)):
                raise self._translated(exc) from exc
            raise
        return connection, response

    def _events(self, response: HTTPResponse) -> Iterator[dict[str, Any]]:
        """Server-sent events as objects, up to ``[DONE]`` or the end of the stream."""
        try:
            while line := response.readline():
                field_name, _, value = line.strip().partition(b":")
                if field_name != b"data":
                    continue
                if value.strip() == b"[DONE]":
                    return
                event = json.loads(value)
                if not isinstance(event, dict):
                    raise WorkerError(self.url, f"sent an event that is no object: {value[:80]!r}")
                if event.get("error"):
                    raise WorkerError(self.url, _error_text(value))
                yield event
        except (OSError, HTTPException) as exc:
            raise self._translated(exc) from exc
        except ValueError as exc:
            raise WorkerError(self.url, f"sent an event that is not JSON: {exc}") from exc

    def _translated(self, exc: Exception) -> WorkerError:
        if isinstance(exc, TimeoutError):
            return WorkerTimeout(
                self.url, f"no answer within {CONNECT_S:.0f} s (connect) or {SILENCE_S:.0f} s"
            )
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc) or type(exc).__name__
        return WorkerUnreachable(self.url, f"{reason}; is the service running? (pdserve launch)")


def _error_text(body: bytes) -> str:
    """The message inside an OpenAI or SGLang error document, else the body itself; one line."""
    text = body.decode(errors="replace")
    try:
        document = json.loads(text)
        error = document.get("error") or document
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:400]

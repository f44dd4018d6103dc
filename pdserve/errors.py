"""Every error pdserve raises on purpose, one class per decision the caller can make.

PdserveError
├── ConfigError               wrong flag, file or environment: fix it and start again
├── StartupError              a process did not come up; carries the tail of its log
├── NoWorkerError             no usable pair now: wait or shed (HTTP 503)
├── RequestAborted            somebody asked for its end while it waited: answer so, do not try again
├── WorkerError               one leg failed: blame that worker, maybe retry on another pair
│   ├── WorkerUnreachable     no connection, or it broke before the response ended
│   ├── WorkerTimeout         connected, but silent for too long
│   └── WorkerRejected        it answered with an HTTP error status; 4xx blames the client
├── TransferError             KV could not be moved
│   ├── RegistrationFailed    memory or backend refused by the transport: fix the set-up
│   ├── PeerLost              the other side is gone: its metadata must be loaded again
│   └── TransferFailed        one room's transfer failed; carries room and reason
├── KVLayoutMismatch          two workers whose KV bytes do not fit: refuse to pair them
└── ProtocolMismatch          peer speaks another version, or SGLang is not the supported one
"""

from __future__ import annotations


class PdserveError(Exception):
    """Root of all deliberate errors; ``str(exc)`` is fit to be shown to a user."""


class ConfigError(PdserveError):
    """A flag, file or environment value is wrong. The message says what was expected and what to do."""


class StartupError(PdserveError):
    """A process of the fleet failed to become ready. ``log_tail`` holds its last log lines."""

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


class NoWorkerError(PdserveError):
    """No pair can take the request now. ``retry_after_s`` is a hint for the client."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestAborted(PdserveError):
    """The request was aborted by name, or with all others, before it had a pair."""


class WorkerError(PdserveError):
    """One worker failed one exchange. ``url`` names it."""

    def __init__(self, url: str, message: str) -> None:
        super().__init__(f"{url}: {message}")
        self.url = url


class WorkerUnreachable(WorkerError):
    """The connection could not be made, or broke before the response was complete.

    ``is_stale``: it was a kept one and broke before any answer; the worker may
    have closed it unused, so nobody is to blame and another try is free.
    ``was_sent``: there was a connection, so the worker may have begun to work on the request.
    """

    is_stale = False
    was_sent = True


class WorkerTimeout(WorkerError):
    """The worker kept silent longer than the limit that the message names."""


class WorkerRejected(WorkerError):
    """The worker answered with an error status; ``body`` is what it said (bytes, maybe JSON).

    ``cause`` is equal for equal requests, which may be at fault themselves; None: not known.
    """

    cause: int | None = None

    def __init__(self, url: str, status: int, body: bytes = b"") -> None:
        super().__init__(url, f"HTTP {status}: {body[:300]!r}")
        self.status = status
        self.body = body


class TransferError(PdserveError):
    """KV could not be moved from a prefill to a decode rank."""


class RegistrationFailed(TransferError):
    """The transport refused memory or a backend; nothing can be sent until the set-up is fixed."""


class PeerLost(TransferError):
    """The transport lost the other side.

    ``may_have_written`` tells whether bytes of the refused write can still land there.
    """

    def __init__(self, message: str, *, may_have_written: bool = False) -> None:
        super().__init__(message)
        self.may_have_written = may_have_written


class TransferFailed(TransferError):
    """One room's transfer failed. ``room`` names the request, ``reason`` is fit for a log."""

    def __init__(self, room: int, reason: str) -> None:
        super().__init__(f"room={room}: {reason}")
        self.room = room
        self.reason = reason


class KVLayoutMismatch(PdserveError):
    """Two workers hold KV of different geometry. The message names each difference."""


class ProtocolMismatch(PdserveError):
    """Different pdserve protocol, or an SGLang release the plugin was not read against."""

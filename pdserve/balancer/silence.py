"""How long a worker has left our questions unanswered, and whether that means it hangs. Pure."""

from __future__ import annotations

import socket

from pdserve.errors import WorkerError, WorkerTimeout

HUNG_S = 8.0
MIN_QUESTIONS = 3
"""Two load polls and a ping that time out take 9 s: then what is in flight there is ended. Both are
asked for: if it was this process that stood still, one question may seem to have waited for long."""


class Silence:
    """Begins with the first question that is not answered, ends with any answer.

    ``wedge_s`` is the limit where questions are refused at once: a server that shuts down
    takes no connection any more and may still finish what it has. 0: no limit then.
    """

    def __init__(self, wedge_s: float) -> None:
        self._refused_s = wedge_s if wedge_s > 0 else float("inf")
        self._since_s: float | None = None
        self._heard = 0
        self._num_asked = 0

    def unanswered(self, asked_s: float, num_heard: int) -> None:
        """A question asked at ``asked_s`` failed; so much was heard of the worker before it."""
        if self._since_s is None:
            self._since_s, self._heard = asked_s, num_heard
        self._num_asked += 1

    def is_over(self, exc: WorkerError, now_s: float, num_heard: int) -> bool:
        """True if the worker hangs: no answer for too long, nor a byte for any client."""
        if self._since_s is None:
            return False
        if num_heard != self._heard:
            self._since_s, self._heard, self._num_asked = now_s, num_heard, 0
            return False
        limit_s = HUNG_S if _is_silence(exc) else max(HUNG_S, self._refused_s)
        return now_s - self._since_s >= limit_s and self._num_asked >= MIN_QUESTIONS

    def restart(self, now_s: float) -> float:
        """Count anew; returns how long it was."""
        since_s, self._since_s = self._since_s, now_s
        self._num_asked = 0
        return now_s - (now_s if since_s is None else since_s)

    def answered(self) -> None:
        """A sign of life."""
        self._since_s, self._num_asked = None, 0


def _is_silence(exc: WorkerError) -> bool:
    """True if nothing at all came back; a refusal shows that the machine is up, a name that cannot be
    resolved shows nothing."""
    cause = exc.__cause__
    if isinstance(exc, WorkerTimeout):
        return True
    return isinstance(cause, OSError) and not isinstance(cause, ConnectionRefusedError | socket.gaierror)

"""Detects a worker that hangs or makes no progress, from SGLang's cumulative counters. Pure.

A worker is stalled while no counter moves, no byte of an answer comes, requests of ours are in
flight, and

- work is listed that waits for nobody else: a running batch; on prefill also requests that have left
  the bootstrap queue (which waits for decode), unless others are being sent and may hold the pool; or
- the load snapshot itself gets older: a scheduler whose loop turns publishes it, every 50 ms even
  if all requests are parked (sglang scheduler.py ``on_idle``), every 15th step while it decodes.

How long is too long depends on the machine: one prefill chunk or 15 decode steps may take a slow
CPU tens of seconds, so the limit grows with the fitted rates.
"""

from __future__ import annotations

import socket

from pdserve.errors import WorkerError, WorkerTimeout
from pdserve.scheduling.policy.view import WorkerView
from pdserve.types import Role, WorkerLoad

PUBLISH_STEPS = 15
"""SGLang's ``--load-snapshot-publish-interval``."""
CHUNK_TOKENS = 16384
"""The largest ``--chunked-prefill-size`` that SGLang chooses by itself."""
SLACK = 4.0
"""A step may take this many times what the fitted rate says."""


class StallDetector:
    """Feed it every sample of one worker; ``stalled_s`` is how long nothing has moved."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self._seen: tuple[object, ...] = ()
        self._since_s = 0.0
        self.stalled_s = 0.0

    def see(self, load: WorkerLoad, covered_s: float, num_heard: int, num_inflight: int) -> float:
        """Take a sample, and how much was heard of the worker so far; returns ``stalled_s``.

        ``covered_s`` is the sample's: its age is ``load.timestamp_s - covered_s``.
        """
        now_s = load.timestamp_s
        seen = (_counters(load), num_heard)
        if seen != self._seen or not num_inflight:
            self._seen, self._since_s = seen, now_s
        self.stalled_s = now_s - self._since_s
        if not _could_progress(self._role, load):
            # Nothing it could do for us: stalled only as far as even the snapshot is old.
            self.stalled_s = min(self.stalled_s, now_s - covered_s)
        return self.stalled_s

    def reset(self) -> None:
        """What was seen before no longer counts: the worker was out of service, or stopped on purpose."""
        self._seen, self.stalled_s = (), 0.0


def patience_s(view: WorkerView, wedge_s: float) -> float:
    """How long this worker may show no progress: ``wedge_s``, or longer where its steps take long."""
    ranks = view.info.dp_size
    if view.info.role is Role.PREFILL:
        chunk_tokens = min(view.queued_tokens, CHUNK_TOKENS)
        return max(wedge_s, SLACK * chunk_tokens / view.prefill_tokens_s)
    step_s = view.step_base_s + view.step_slope_s * view.num_reqs / ranks
    return max(wedge_s, SLACK * PUBLISH_STEPS * step_s)


STREAM_S = 5.0
"""A stream may be silent for so long at least: a scheduler stands still for seconds where it compiles or
takes in KV, and the parser of a tool call holds text back."""
STREAM_STEPS = 50
"""And for so many expected steps of its server."""


def stream_patience_s(view: WorkerView) -> float:
    """How long one stream of this decode worker may be silent before it should go on elsewhere."""
    step_s = view.step_base_s + view.step_slope_s * view.num_reqs / view.info.dp_size
    return max(STREAM_S, STREAM_STEPS * step_s)


def _could_progress(role: Role, load: WorkerLoad) -> bool:
    if load.num_running_reqs > 0:
        return True
    if role is Role.DECODE or load.prefill_inflight_queue_reqs > 0:
        return False
    return load.num_waiting_reqs > load.prefill_bootstrap_queue_reqs


def _counters(load: WorkerLoad) -> tuple[object, ...]:
    return (
        load.decode_moments,
        load.total_prefill_uncached_tokens,
        load.total_prefill_busy_us,
        load.num_running_reqs,
        load.num_waiting_reqs,
        load.num_used_tokens,
        load.num_total_tokens,
        load.prefill_bootstrap_queue_reqs,
        load.prefill_inflight_queue_reqs,
        load.decode_prealloc_queue_reqs,
        load.decode_transfer_queue_reqs,
        load.decode_retracted_queue_reqs,
    )


HUNG_S = 8.0
MIN_QUESTIONS = 3
"""Two load polls and a ping that time out take 9 s: then what is in flight there is ended. Both are
asked for: if it was this process that stood still, one question may seem to have waited for long."""


class HangDetector:
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

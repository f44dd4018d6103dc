"""The state document: every key of ``GET /pdserve/state`` with its meaning and unit.

    balancer/metrics/state.py ──► StateDocument ──► JSON ──► reading.py ──► StateDocument ──► its readers

Readers ignore keys that they do not know and take defaults for those that an older balancer does not write.
``python -m pdserve.state.document`` prints the JSON Schema, which is kept as docs/state.schema.json.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from pdserve.state.workers import PairEntry, RoleCapacity, WorkerEntry, about, count, one_of

NUM_STEPS = 60


def steps(description: str, unit: str) -> msgspec.Meta:
    """A series with one place for each step."""
    return about(description, unit, minItems=NUM_STEPS, maxItems=NUM_STEPS)


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a latency; null where nothing was observed."""

    count: Annotated[int, count("Observations.", "1")] = 0
    p50: Annotated[float | None, about("Median.", "s")] = None
    p95: Annotated[float | None, about("95th percentile.", "s")] = None
    p99: Annotated[float | None, about("99th percentile.", "s")] = None
    mean: Annotated[float | None, about("Mean.", "s")] = None


class Thresholds(msgspec.Struct, frozen=True, kw_only=True):
    """A role is short from high on, until it is below low."""

    high: Annotated[float, about("Upper threshold.", "1")] = 0.0
    low: Annotated[float, about("Lower threshold.", "1")] = 0.0


class RegimeChange(msgspec.Struct, frozen=True, kw_only=True):
    """One change."""

    ago_s: Annotated[float, about("How long ago.", "s")] = 0.0
    from_: Annotated[str, about("The state before.")] = msgspec.field(default="", name="from")
    to: Annotated[str, about("The state after.")] = ""
    prefill_score: Annotated[float, about("Then.", "1")] = 0.0
    decode_score: Annotated[float, about("Then.", "1")] = 0.0


class RegimeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Which role is short of capacity."""

    state: Annotated[
        str,
        one_of("Short of neither, of one role, or of both.", "normal prefill_short decode_short overload"),
    ] = ""
    lasted_s: Annotated[float, about("How long it has been so, up to the last observation.", "s")] = 0.0
    scores: Annotated[
        dict[str, float], about("How full each role is, smoothed; 1: full, with requests waiting.", "1")
    ] = {}
    line: Annotated[float, about("The part of the waiting requests in that, smoothed.", "1")] = 0.0
    workers: Annotated[dict[str, float], about("The score of each worker by itself.", "1")] = {}
    thresholds: Annotated[Thresholds, about("A role is short from high on, until it is below low.")] = (
        Thresholds()
    )
    weights: Annotated[dict[str, float], about("How much each signal counts.", "1")] = {}
    changes: Annotated[list[RegimeChange], about("The last changes, oldest first.")] = []


class LengthBucket(msgspec.Struct, frozen=True, kw_only=True):
    """One bucket."""

    from_tokens: Annotated[int, about("Lower end of the bucket, which reaches to its double.", "tokens")] = 0
    num: Annotated[int, about("Answers in it.", "1")] = 0
    coverage: Annotated[float | None, about("Share inside their interval.", "1")] = None
    accuracy: Annotated[float | None, about("Share forecast in this bucket.", "1")] = None


class LengthFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Forecasts of answers' lengths and what became of them; empty if lengths are not predicted."""

    num_learned: Annotated[int | UnsetType, about("Finished answers learned from.", "1")] = UNSET
    num_keys: Annotated[
        int | UnsetType,
        about(
            "Histories kept: of routes, limits, prompt lengths, users, applications and conversations.", "1"
        ),
    ] = UNSET
    widened: Annotated[
        list[float] | UnsetType,
        about(
            "Factors that move the lower and the upper end of an interval outwards, learned from outcomes.",
            "1",
        ),
    ] = UNSET
    coverage: Annotated[
        float | UnsetType | None,
        about("Share of recent answers inside their interval; 0.8 is aimed at.", "1"),
    ] = UNSET
    accuracy: Annotated[
        float | UnsetType | None,
        about("Share whose forecast mean lay in the bucket (a doubling of length) of the answer.", "1"),
    ] = UNSET
    mean_error_tokens: Annotated[
        float | UnsetType | None, about("Mean distance of forecast and answer.", "tokens")
    ] = UNSET
    relative_error: Annotated[float | UnsetType | None, about("The same over the mean answer.", "1")] = UNSET
    buckets: Annotated[list[LengthBucket] | UnsetType, about("The same by length of the answer.")] = UNSET


class BootstrapFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The bootstrap service."""

    url: Annotated[str, about("Its address without user and password; empty without one.")] = ""
    connected: Annotated[bool, about("It answers.")] = False
    epoch: Annotated[str, about("Its present start; empty before the first answer.")] = ""


class QueueFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The line before the pairs."""

    length: Annotated[int, count("Requests that wait.", "requests")] = 0
    size: Annotated[int, count("How many may.", "requests")] = 0
    oldest_wait_s: Annotated[float, about("How long the first has waited.", "s")] = 0.0
    shed: Annotated[
        dict[str, int], about("Requests refused for want of a pair, by reason, since the start.", "requests")
    ] = {}
    dispatched: Annotated[int, count("Requests that hold a pair.", "requests")] = 0
    max_dispatched: Annotated[int, count("How many may; 0: as many as fit.", "requests")] = 0
    completed_per_s: Annotated[
        float, about("Requests that ended per second, over the last 30 s.", "requests/s")
    ] = 0.0


class EventEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One change."""

    time_s: Annotated[float, about("When, Unix time.", "s")] = 0.0
    event: Annotated[
        str, about("joined, ready, suspect, draining, moved, drained, undrained, gone, pair_failed …")
    ] = ""
    worker: Annotated[str, about("Whose.")] = ""
    detail: Annotated[str, about("In words.")] = ""


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the start: total = inflight + completed + failed + aborted + shed."""

    total: Annotated[int, count("Received.", "requests")] = 0
    inflight: Annotated[int, count("Not ended.", "requests")] = 0
    completed: Annotated[int, count("Ended well.", "requests")] = 0
    failed: Annotated[int, count("Ended with an error.", "requests")] = 0
    aborted: Annotated[int, count("Their client left, or asked for the end.", "requests")] = 0
    shed: Annotated[int, count("Refused for want of a pair.", "requests")] = 0
    retried: Annotated[int, count("Further attempts after a failed one.", "attempts")] = 0
    resumed: Annotated[
        int, count("Streamed answers that went on on another pair after their server had failed.", "answers")
    ] = 0
    moved: Annotated[
        int, count("Streamed answers that went on on another pair by somebody's wish.", "answers")
    ] = 0
    deflected: Annotated[
        int, count("Attempts with a decode server that prefilled the request itself.", "attempts")
    ] = 0


class RequestEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One request that ended. Stages that did not happen, or are not known, are null."""

    rid: Annotated[str, about("Our request id on both workers, of the last attempt.")] = ""
    request_id: Annotated[str, about("The client's own, from its headers; may be empty.")] = ""
    pair: Annotated[str, about("prefill>decode of the last attempt; empty if it got none.")] = ""
    room: Annotated[int, count("Bootstrap room of the last attempt, 0 without one.", "id")] = 0
    route: Annotated[str, about("Path that was asked.")] = ""
    stream: Annotated[bool, about("Its answer was a stream.")] = False
    status: Annotated[int, count("HTTP status; 499: its client had left.", "status")] = 0
    reason: Annotated[str, about("Why the policy chose that pair.")] = ""
    prompt_tokens: Annotated[int, count("As the worker counted them, else an estimate.", "tokens")] = 0
    completion_tokens: Annotated[int, count("Tokens of its answer; 0 if it did not complete.", "tokens")] = 0
    queued_s: Annotated[
        float | None,
        about(
            "From receipt until the pair of the last attempt was held; failed attempts count as waiting.", "s"
        ),
    ] = None
    prefill_s: Annotated[
        float | None,
        about("From then to the end of the prefill leg: its queue, its work and the sending of the KV.", "s"),
    ] = None
    transfer_s: Annotated[float | None, about("From then to decode's first byte. Streams only.", "s")] = None
    first_token_s: Annotated[
        float | None, about("From receipt to decode's first byte. Streams only.", "s")
    ] = None
    done_s: Annotated[float | None, about("From receipt to the end.", "s")] = None
    ttft_s: Annotated[float | None, about("As first_token_s.", "s")] = None
    e2e_s: Annotated[float | None, about("As done_s.", "s")] = None
    tpot_s: Annotated[float | None, about("Mean time per token after the first.", "s")] = None
    resumes: Annotated[int, count("How often its answer went on on another pair after a failure.", "1")] = 0
    moves: Annotated[int, count("How often it did by somebody's wish.", "1")] = 0
    finish: Annotated[str, about("SGLang's finish reason, or how it ended: failed, aborted, shed.")] = ""
    error: Annotated[str, about("What went wrong, for the operator.")] = ""

    @property
    def is_good(self) -> bool:
        """Its client got what it asked for."""
        has_failed = self.status >= 400 or self.finish in ("failed", "shed", "error")
        return not self.error and not has_failed


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Per second, over the window or the time since the start if that is shorter."""

    window_s: Annotated[float, about("The window.", "s")] = 0.0
    requests_s: Annotated[float, about("Requests that arrived.", "requests/s")] = 0.0
    completed_s: Annotated[float, about("Requests that completed.", "requests/s")] = 0.0
    failed_s: Annotated[float, about("Requests that failed.", "requests/s")] = 0.0
    prompt_tokens_s: Annotated[float, about("Prompt tokens of completed requests.", "tokens/s")] = 0.0
    output_tokens_s: Annotated[
        float,
        about(
            "Generated tokens: of streams as they pass by, of other requests when they complete.", "tokens/s"
        ),
    ] = 0.0


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies of the window. Percentiles come from buckets 6 % wide."""

    window_s: Annotated[float, about("The window.", "s")] = 0.0
    ttft_s: Annotated[Latency, about("Receipt to decode's first byte; streams.")] = Latency()
    tpot_s: Annotated[Latency, about("Mean time per token after the first; completed streams.")] = Latency()
    itl_s: Annotated[Latency, about("Time between two events of a stream; every eighth gap is measured.")] = (
        Latency()
    )
    e2e_s: Annotated[Latency, about("Receipt to the end; completed requests.")] = Latency()
    queue_s: Annotated[Latency, about("As queued_s of a recent request.")] = Latency()
    prefill_s: Annotated[Latency, about("As prefill_s of a recent request.")] = Latency()
    transfer_s: Annotated[Latency, about("As transfer_s of a recent request.")] = Latency()
    resume_gap_s: Annotated[
        Latency, about("Last bytes of a failed server to the first of another that goes on with its answer.")
    ] = Latency()
    move_gap_s: Annotated[Latency, about("The same for answers that were moved on purpose.")] = Latency()


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """Five minutes in closed steps, oldest first; null where nothing was observed."""

    step_s: Annotated[float, about("Length of a step.", "s")] = 0.0
    requests_s: Annotated[list[float | None], steps("Requests that arrived.", "requests/s")] = []
    output_tokens_s: Annotated[list[float | None], steps("Generated tokens.", "tokens/s")] = []
    ttft_p50_s: Annotated[list[float | None], steps("Median of the step.", "s")] = []
    ttft_p99_s: Annotated[list[float | None], steps("99th percentile of the step.", "s")] = []
    tpot_p50_s: Annotated[list[float | None], steps("Median of the step.", "s")] = []
    itl_p50_s: Annotated[list[float | None], steps("Median of the step.", "s")] = []
    waiting: Annotated[list[int | None], steps("The longest queue seen in the step.", "requests")] = []


class StateDocument(msgspec.Struct, frozen=True, kw_only=True):
    """GET /pdserve/state of the balancer.

    Times that end in _s are seconds; the monotonic clock is the balancer's own. Additions are compatible:
    readers ignore keys that they do not know.
    """

    version: Annotated[str, about("pdserve's version.")] = ""
    now_s: Annotated[float, about("When this was rendered, Unix time.", "s")] = 0.0
    uptime_s: Annotated[float, about("Since the balancer started.", "s")] = 0.0
    model: Annotated[str, about("The name the fleet serves under.")] = ""
    policy: Annotated[str, about("Name of the policy.")] = ""
    regime: Annotated[RegimeFigures | None, about("Which role is short of capacity.")] = None
    lengths: Annotated[
        LengthFigures,
        about("Forecasts of answers' lengths and what became of them; empty if lengths are not predicted."),
    ] = LengthFigures()
    bootstrap: Annotated[BootstrapFigures | None, about("The bootstrap service.")] = None
    workers: Annotated[
        list[WorkerEntry], about("Members, prefill first, each role in the order of its names.")
    ] = []
    capacity: Annotated[list[RoleCapacity], about("Each role's workers in numbers.")] = []
    pairs: Annotated[list[PairEntry], about("Every prefill x decode pair, in the order of workers.")] = []
    waiting: Annotated[int, count("Requests that wait for a pair.", "requests")] = 0
    queue: Annotated[QueueFigures | None, about("The line before the pairs.")] = None
    events: Annotated[list[EventEntry], about("The last 64 changes of the fleet, oldest first.")] = []
    requests: Annotated[
        RequestCounts | None,
        about("Counts since the start: total = inflight + completed + failed + aborted + shed."),
    ] = None
    recent: Annotated[list[RequestEntry], about("The last 64 requests that ended, oldest first.")] = []
    rates: Annotated[
        Rates | None, about("Per second, over the window or the time since the start if that is shorter.")
    ] = None
    latency: Annotated[
        Latencies | None, about("Latencies of the window. Percentiles come from buckets 6 % wide.")
    ] = None
    series: Annotated[
        Series | None,
        about("Five minutes in closed steps, oldest first; null where nothing was observed."),
    ] = None


def state_schema() -> dict[str, Any]:
    """The JSON Schema of what the balancer writes: every key of the structs, and no other."""
    _, parts = msgspec.json.schema_components([StateDocument])
    for name, part in parts.items():
        part["additionalProperties"] = False
        if name != LengthFigures.__name__:
            part["required"] = list(part["properties"])
        for field in part["properties"].values():
            field.pop("default", None)
    root = parts.pop(StateDocument.__name__)
    for field in root["properties"].values():
        if "anyOf" in field:  # absent from an older balancer's document, but never null
            field |= field.pop("anyOf")[0]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**head, "$id": "https://pdserve/state.schema.json", **root, "$defs": parts}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(state_schema(), indent=2, ensure_ascii=False) + "\n")

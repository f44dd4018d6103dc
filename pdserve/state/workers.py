"""Workers and pairs as the state document describes them; and how a field carries its description and unit.

Values that a newer balancer may extend (states, roles) are plain strings: readers must not refuse them.
"""

from __future__ import annotations

from typing import Annotated

import msgspec


def about(description: str, unit: str = "", **schema: object) -> msgspec.Meta:
    """A field's description, its unit, and further keywords of its JSON Schema."""
    return msgspec.Meta(
        description=description, extra_json_schema={**({"unit": unit} if unit else {}), **schema}
    )


def count(description: str, unit: str) -> msgspec.Meta:
    """A number that is never negative."""
    return about(description, unit, minimum=0)


def one_of(description: str, words: str) -> msgspec.Meta:
    """A text that is one of ``words``, which are separated by single spaces."""
    return about(description, enum=words.split(" "))


class WorkerQueues(msgspec.Struct, frozen=True, kw_only=True):
    """Requests by where they are; null without a sample. A queue of the other role is 0."""

    bootstrap: Annotated[int, count("Prefill: wait for decode's handshake.", "requests")] = 0
    waiting: Annotated[int, count("Wait to be computed.", "requests")] = 0
    inflight_or_transfer: Annotated[
        int, count("Prefill: KV being sent. Decode: KV being received.", "requests")
    ] = 0
    prealloc: Annotated[int, count("Decode: wait for KV pages.", "requests")] = 0
    running: Annotated[int, count("In the running batch.", "requests")] = 0
    retracted: Annotated[int, count("Decode: put back for want of pages.", "requests")] = 0


class KVSentFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What a pdserve worker's data plane counts, asked every five seconds; null for stock SGLang."""

    bytes: Annotated[int, count("KV sent since its start; decode workers send none.", "bytes")] = 0
    bytes_s: Annotated[float, about("The same per second, between the last two answers.", "bytes/s")] = 0.0
    transfers: Annotated[int, count("Transfers that succeeded since its start.", "transfers")] = 0
    failures: Annotated[int, count("Transfers that failed since its start.", "transfers")] = 0
    path: Annotated[
        str,
        one_of(
            "How the last chunks went: page to page, through slabs, or both; empty while unknown.",
            " direct packed mixed",
        ),
    ] = ""
    transfer_s: Annotated[float | None, about("Mean time of a transfer then.", "s")] = None


class LoadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Its last load figures, summed over DP ranks, under SGLang's names; null before the first."""

    timestamp_s: Annotated[float, about("When the sample came, on the balancer's monotonic clock.", "s")] = (
        0.0
    )
    num_running_reqs: Annotated[
        int, count("Requests in the running batch; SGLang's prefill servers tell about 0.", "requests")
    ] = 0
    num_waiting_reqs: Annotated[
        int,
        count(
            "Requests in SGLang's queues: waiting, bootstrap, prealloc, transfer and retracted.", "requests"
        ),
    ] = 0
    num_waiting_uncached_tokens: Annotated[
        int, count("Prompt tokens that wait to be computed.", "tokens")
    ] = 0
    num_used_tokens: Annotated[int, count("KV pool in use.", "tokens")] = 0
    num_total_tokens: Annotated[int, count("KV pool in use, and what waits for room in it.", "tokens")] = 0
    max_total_num_tokens: Annotated[int, count("Size of the KV pool.", "tokens")] = 0
    max_running_requests: Annotated[int, count("Requests that may run at once.", "requests")] = 0
    token_usage: Annotated[float, about("Share of the KV pool in use, of the fullest DP rank.", "ratio")] = (
        0.0
    )
    gen_throughput: Annotated[float, about("Generated tokens per second as SGLang tells it.", "tokens/s")] = (
        0.0
    )
    total_prefill_uncached_tokens: Annotated[
        int, count("Prompt tokens computed since the server's start.", "tokens")
    ] = 0
    total_prefill_busy_us: Annotated[int, count("Time spent on them.", "us")] = 0
    decode_moments: Annotated[
        list[float],
        about(
            "SGLang's sums over decode steps: steps, batch, time, batch^2, batch*time, tokens.",
            "mixed",
        ),
    ] = []
    prefill_bootstrap_queue_reqs: Annotated[
        int, count("Requests that wait for their decode server's handshake.", "requests")
    ] = 0
    prefill_inflight_queue_reqs: Annotated[int, count("Requests whose KV is being sent.", "requests")] = 0
    decode_prealloc_queue_reqs: Annotated[int, count("Requests that wait for KV pages.", "requests")] = 0
    decode_transfer_queue_reqs: Annotated[int, count("Requests whose KV is on its way.", "requests")] = 0
    decode_retracted_queue_reqs: Annotated[
        int, count("Requests that were put back for want of pages.", "requests")
    ] = 0
    kv_transfer_latency_ms: Annotated[
        float, about("SGLang's own figure of a KV transfer; 0 where it tells none.", "ms")
    ] = 0.0
    kv_transfer_speed_gb_s: Annotated[
        float, about("SGLang's own figure of its speed; 0 where it tells none.", "GB/s")
    ] = 0.0


class AdmissionFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What is promised of it, and its limits; a limit of 0 is not known."""

    reqs: Annotated[int, count("Requests there, by the last sample and what was sent since.", "requests")] = 0
    max_reqs: Annotated[int, count("Requests it takes at once.", "requests")] = 0
    promised_tokens: Annotated[int, count("KV that our requests may need there.", "tokens")] = 0
    committed_tokens: Annotated[int, count("KV in use or promised.", "tokens")] = 0
    capacity_tokens: Annotated[int, count("KV it has.", "tokens")] = 0
    queued_s: Annotated[float, about("Expected wait in its queue; 0 for decode.", "s")] = 0.0
    overloaded: Annotated[bool, about("It said so itself, and no sample has come since.")] = False
    held: Annotated[bool, about("Kept for a queued request that needs much room.")] = False


class WedgeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Whether it stands still."""

    stalled_s: Annotated[float, about("How long it has had work and made no progress.", "s")] = 0.0
    wedged: Annotated[int, count("Times it was taken for dead for that.", "times")] = 0


class CreditFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What was sent there that the last sample cannot contain."""

    reqs: Annotated[int, count("Requests.", "requests")] = 0
    prompt_tokens: Annotated[int, count("Their uncached prompt tokens.", "tokens")] = 0


class FittedFigures(msgspec.Struct, frozen=True, kw_only=True):
    """How fast it is, fitted from its counters."""

    prefill_tokens_s: Annotated[float, about("Prompt tokens per busy second.", "tokens/s")] = 0.0
    step_base_s: Annotated[float, about("A decode step with an empty batch.", "s")] = 0.0
    step_slope_s: Annotated[float, about("What each request of the batch adds to it.", "s")] = 0.0


class RoleCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """How many workers of a role there should be, and are."""

    role: Annotated[str, one_of("The role.", "prefill decode")] = ""
    expected: Annotated[int, count("How many there should be; 0 if nobody said.", "workers")] = 0
    present: Annotated[int, count("Members of the fleet.", "workers")] = 0
    ready: Annotated[int, count("Those that take traffic.", "workers")] = 0

    @property
    def missing(self) -> str:
        """``1 of 2 decode workers``; empty if as many take traffic as should."""
        return self._short_of(self.ready)

    @property
    def absent(self) -> str:
        """The same of those that are no members."""
        return self._short_of(self.present)

    def _short_of(self, number: int) -> str:
        lacking = self.expected - number
        return f"{lacking} of {self.expected} {self.role} workers" if lacking > 0 else ""


class WorkerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One instance of a worker."""

    worker_id: Annotated[str, about("The operator's name of it, stable over restarts.")] = ""
    instance_id: Annotated[str, about("This process; another at every start.")] = ""
    role: Annotated[str, one_of("What it does for a request.", "prefill decode")] = ""
    url: Annotated[str, about("Base address of its HTTP server.")] = ""
    state: Annotated[str, one_of("Only ready workers take traffic.", "joining ready suspect draining")] = ""
    age_s: Annotated[
        float | None,
        about("Since it joined the fleet, as this balancer saw it; null if nobody watches.", "s"),
    ] = None
    inflight: Annotated[int, count("Legs of ours there.", "requests")] = 0
    bootstrap_host: Annotated[
        str, about("Where decode servers find this prefill server; empty for decode.")
    ] = ""
    bootstrap_port: Annotated[
        int | None, about("The port to that; null for decode and where it has none.", "port")
    ] = None
    tokens_s: Annotated[
        float | None,
        about(
            "Uncached prompt (prefill) or generated tokens (decode) over ten seconds; null while unknown.",
            "tokens/s",
        ),
    ] = None
    kv_usage: Annotated[
        float | None,
        about("Share of the KV pool in use, 0 to 1; null without a sample.", "ratio", minimum=0, maximum=1),
    ] = None
    queues: Annotated[
        WorkerQueues | None,
        about("Requests by where they are; null without a sample. A queue of the other role is 0."),
    ] = None
    kv_sent: Annotated[
        KVSentFigures | None,
        about("What a pdserve worker's data plane counts, asked every five seconds; null for stock SGLang."),
    ] = None
    load: Annotated[
        LoadFigures | None,
        about("Its last load figures, summed over DP ranks, under SGLang's names; null before the first."),
    ] = None
    load_age_s: Annotated[float | None, about("Age of those.", "s")] = None
    errors: Annotated[int, count("Failures it was blamed for: legs of requests, pings, polls.", "errors")] = 0
    failures: Annotated[
        dict[str, int],
        about(
            "Legs of requests it was blamed for, by kind: unreachable, timeout, overload, rejected, unclear.",
            "legs",
        ),
    ] = {}
    breaker: Annotated[
        str,
        one_of("Closed lets traffic through, half_open only a probe, open nothing.", "closed half_open open"),
    ] = ""
    paused: Annotated[bool, about("Its engine is paused, by whomever.")] = False
    draining: Annotated[bool, about("Takes no new request, by an operator's wish.")] = False
    leaving: Annotated[bool, about("Goes when it is drained.")] = False
    admission: Annotated[
        AdmissionFigures, about("What is promised of it, and its limits; a limit of 0 is not known.")
    ] = AdmissionFigures()
    wedge: Annotated[WedgeFigures, about("Whether it stands still.")] = WedgeFigures()
    mismatch: Annotated[
        str, about("Why it is kept out although it answers: model, role or weights differ; else empty.")
    ] = ""
    last_error: Annotated[str, about("What went wrong last; empty once it is ready again.")] = ""
    credit: Annotated[CreditFigures, about("What was sent there that the last sample cannot contain.")] = (
        CreditFigures()
    )
    fitted: Annotated[FittedFigures, about("How fast it is, fitted from its counters.")] = FittedFigures()

    @property
    def condition(self) -> str:
        """Its state in one word for people: ``leaving`` and ``paused`` too."""
        if self.leaving:
            return "leaving"
        return "paused" if self.paused and self.state == "ready" else self.state

    @property
    def is_troubled(self) -> bool:
        """True if the worker takes no traffic and no operator has drained it."""
        return self.state == "suspect" or self.breaker not in ("closed", "")


class PairEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A prefill and a decode worker."""

    prefill: Annotated[str, about("The prefill worker's worker_id.")] = ""
    decode: Annotated[str, about("The decode worker's worker_id.")] = ""
    state: Annotated[str, one_of("Only ready pairs take traffic.", "untested probing ready failed")] = ""
    probe_s: Annotated[float | None, about("How long its last passed test took; null before.", "s")] = None
    probes: Annotated[int, count("Times it was tested by a real token.", "probes")] = 0
    error: Annotated[str, about("Why it is not ready; empty if it is.")] = ""
    requests: Annotated[int, count("Times it was chosen.", "requests")] = 0
    prompt_tokens: Annotated[int, count("Prompt tokens whose KV went over it.", "tokens")] = 0
    kv_bytes: Annotated[
        int | None,
        about(
            "The same in bytes by the prefill worker's KV layout; null if unknown or nothing was carried.",
            "bytes",
        ),
    ] = None
    kv_bytes_s: Annotated[
        float | None,
        about(
            "Bytes of requests that ended in the last minute; renewed every five seconds.",
            "bytes/s",
        ),
    ] = None
    transfer_p50_s: Annotated[
        float | None,
        about(
            "Median of the last 64 streams, prefill leg's end to decode's first byte; every 5 s.",
            "s",
        ),
    ] = None
    kv_path: Annotated[
        str, one_of("Its prefill worker's kv_sent.path; empty while unknown.", " direct packed mixed")
    ] = ""

    @property
    def label(self) -> str:
        """``prefill-0>decode-1``."""
        return f"{self.prefill}>{self.decode}"

"""One answer of SGLang's ``GET /v1/loads``, read into a WorkerLoad.

Pure: bytes and clock readings in, a Sample out. The answer has one entry per
DP rank; counts are summed, ``token_usage`` is the fullest rank's. Sections
and fields that an older or newer server leaves out read as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec

from pdserve.errors import ProtocolMismatch
from pdserve.types import WorkerLoad

LOADS_PATH = "/v1/loads?include=core,disagg,queues"

ARRIVAL_S = 0.02
"""From our socket to the scheduler's queue (HTTP parse, tokenizer process, ZMQ): a request this
young when the snapshot was taken is not counted on as being in it."""

_Number = float | None


class _Disaggregation(msgspec.Struct):
    prefill_bootstrap_queue_reqs: _Number = 0
    prefill_inflight_queue_reqs: _Number = 0
    decode_prealloc_queue_reqs: _Number = 0
    decode_transfer_queue_reqs: _Number = 0
    decode_retracted_queue_reqs: _Number = 0
    kv_transfer_latency_ms: _Number = 0
    kv_transfer_speed_gb_s: _Number = 0


class _Rank(msgspec.Struct):
    timestamp: _Number = 0
    num_running_reqs: _Number = 0
    num_waiting_reqs: _Number = 0
    num_waiting_uncached_tokens: _Number = 0
    num_used_tokens: _Number = 0
    num_total_tokens: _Number = 0
    max_total_num_tokens: _Number = 0
    max_running_requests: _Number = 0
    token_usage: _Number = 0
    gen_throughput: _Number = 0
    total_prefill_uncached_tokens: _Number = 0
    total_prefill_busy_us: _Number = 0
    decode_moments: list[float] | None = None
    disaggregation: _Disaggregation | None = None


class _Answer(msgspec.Struct):
    loads: list[_Rank]
    timestamp: str = ""


_DECODER = msgspec.json.Decoder(_Answer)
_QUEUES = tuple(name for name in _Disaggregation.__struct_fields__ if name.endswith("_reqs"))
_SUMMED = tuple(
    name
    for name in _Rank.__struct_fields__
    if name not in ("timestamp", "token_usage", "gen_throughput", "decode_moments", "disaggregation")
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A WorkerLoad and how far it reaches.

    Every request sent to the worker before ``covered_s`` (balancer's monotonic
    clock) is part of ``load``; later ones are not, and need in-flight credit.
    """

    load: WorkerLoad
    covered_s: float


def parse_loads(body: bytes, *, sent_s: float, received_s: float) -> Sample:
    """Read one answer to a poll that was sent at ``sent_s`` and answered at ``received_s``.

    The server reads a shared-memory snapshot which may be older than the poll
    (SGLang publishes every 15 decode steps). Its age is the difference of two
    stamps of the server's own clock, so clocks need not agree across machines.

    Raises:
        ProtocolMismatch: if the body is not an answer of ``/v1/loads``.
    """
    try:
        answer = _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ProtocolMismatch(f"unexpected answer of /v1/loads ({exc}): {body[:120]!r}") from exc
    ranks = answer.loads
    sections = [rank.disaggregation for rank in ranks if rank.disaggregation]
    totals = {name: _total(ranks, name) for name in _SUMMED}
    queues = {name: _total(sections, name) for name in _QUEUES}
    transfer = max(sections, key=lambda rank: rank.kv_transfer_latency_ms or 0.0, default=_Disaggregation())
    load = WorkerLoad(
        timestamp_s=received_s,
        token_usage=max((rank.token_usage or 0.0 for rank in ranks), default=0.0),
        gen_throughput=sum(rank.gen_throughput or 0.0 for rank in ranks),
        decode_moments=_sum_moments(ranks),
        kv_transfer_latency_ms=transfer.kv_transfer_latency_ms or 0.0,
        kv_transfer_speed_gb_s=transfer.kv_transfer_speed_gb_s or 0.0,
        **totals,
        **queues,
    )
    return Sample(load, covered_s=sent_s - _age_s(answer) - ARRIVAL_S)


def _total(rows: Sequence[msgspec.Struct], name: str) -> int:
    return int(sum(getattr(row, name) or 0 for row in rows))


def _sum_moments(ranks: list[_Rank]) -> tuple[float, ...]:
    rows = [rank.decode_moments for rank in ranks if rank.decode_moments]
    return tuple(sum(column) for column in zip(*rows, strict=False))


def _age_s(answer: _Answer) -> float:
    """Age of the oldest rank's snapshot when the server answered; 0 if it does not say."""
    stamps = [rank.timestamp for rank in answer.loads if rank.timestamp]
    if not stamps or not answer.timestamp:
        return 0.0
    try:
        answered_s = datetime.fromisoformat(answer.timestamp).timestamp()
    except ValueError:
        return 0.0
    return max(0.0, answered_s - min(stamps))

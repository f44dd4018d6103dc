"""The state document as rows: workers, pairs, requests, events. Pure.

Every figure may be missing (an older balancer, a worker that has not told its load
yet) and is ``None`` then. Each row keeps the object it was read from, for the detail view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pdserve.monitor.document import count, first_number, mapping, number, rows, text

NAME_CHARS = 80


@dataclass(frozen=True)
class WorkerRow:
    """One instance of a worker. Queue figures are numbers of requests, ``tokens_s`` tokens per second."""

    key: str
    name: str
    role: str
    state: str
    age_s: float | None
    bootstrap: int | None
    prealloc: int | None
    waiting: int | None
    transfer: int | None
    running: int | None
    retracted: int | None
    kv_usage: float | None
    tokens_s: float | None
    inflight: int | None
    breaker: str
    errors: int | None
    last_error: str
    source: Mapping[str, Any] = field(repr=False)

    @property
    def entry(self) -> int | None:
        """The queue a request comes into first: bootstrap of prefill, prealloc of decode."""
        return self.prealloc if self.role == "decode" else self.bootstrap

    @property
    def queued(self) -> int:
        """Requests that hold a place but do not run."""
        return sum(
            n or 0 for n in (self.bootstrap, self.prealloc, self.waiting, self.transfer, self.retracted)
        )

    @property
    def is_troubled(self) -> bool:
        """Takes no traffic, or not by an operator's wish."""
        return self.state in ("suspect", "gone") or self.breaker not in ("closed", "")


@dataclass(frozen=True)
class PairRow:
    """A prefill and a decode worker. ``bytes_s``: KV per second; ``transfer_s``: median of a request's."""

    key: str
    prefill: str
    decode: str
    state: str
    bytes_s: float | None
    total_bytes: float | None
    path: str
    transfer_s: float | None
    requests: int | None
    error: str
    source: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class RequestRow:
    """A request that has ended; times in seconds."""

    key: str
    rid: str
    pair: str
    prompt_tokens: int | None
    completion_tokens: int | None
    queued_s: float | None
    prefill_s: float | None
    transfer_s: float | None
    first_token_s: float | None
    done_s: float | None
    tpot_s: float | None
    status: int | None
    finish: str
    error: str
    source: Mapping[str, Any] = field(repr=False)

    @property
    def is_good(self) -> bool:
        """Its client got what it asked for."""
        return (
            not self.error and (self.status or 200) < 400 and self.finish not in ("failed", "shed", "error")
        )


@dataclass(frozen=True)
class EventRow:
    """One change of the fleet; ``ago_s`` before the document was made."""

    key: str
    ago_s: float | None
    event: str
    worker: str
    detail: str
    source: Mapping[str, Any] = field(repr=False)


class Snapshot:
    """Everything one state document tells, read when it is asked for.

    ``now_s``: wall clock, for a balancer that does not tell its own.
    """

    def __init__(self, state: Mapping[str, Any], now_s: float | None = None) -> None:
        self.state = mapping(state)
        self.listed: dict[object, list[Any]] = {}
        """Sorted and filtered rows, kept by whoever made them: a frame needs them more than once."""
        self.now_s = first_number(self.state.get("now_s"), now_s)

    @property
    def model(self) -> str:
        """The name the fleet serves under."""
        return text(self.state.get("model"), NAME_CHARS)

    def section(self, *path: str) -> Mapping[str, Any]:
        """An object inside the document, empty if it is not there."""
        found: Mapping[str, Any] = self.state
        for name in path:
            found = mapping(found.get(name))
        return found

    @cached_property
    def workers(self) -> list[WorkerRow]:
        """In the document's order."""
        return [_worker(row, i) for i, row in enumerate(rows(self.state.get("workers")))]

    @cached_property
    def pairs(self) -> list[PairRow]:
        """In the document's order."""
        return [_pair(row, i) for i, row in enumerate(rows(self.state.get("pairs")))]

    @cached_property
    def pair_roles(self) -> tuple[list[str], list[str]]:
        """The prefill and the decode workers that pairs name."""
        pairs = self.pairs
        return list({pair.prefill: None for pair in pairs}), list({pair.decode: None for pair in pairs})

    @cached_property
    def requests(self) -> list[RequestRow]:
        """The newest first."""
        return [_request(row, i) for i, row in enumerate(rows(self.state.get("recent")))][::-1]

    @cached_property
    def events(self) -> list[EventRow]:
        """Changes of the fleet and of the regime, the newest first."""
        found = [_event(row, self.now_s, i) for i, row in enumerate(rows(self.state.get("events")))]
        found += [_regime_change(row) for row in rows(self.section("regime").get("changes"))]
        found.reverse()
        return sorted(found, key=lambda row: float("inf") if row.ago_s is None else row.ago_s)


def _worker(row: Mapping[str, Any], index: int) -> WorkerRow:
    load, queues = mapping(row.get("load")), mapping(row.get("queues"))
    name = text(row.get("worker_id"), NAME_CHARS) or f"worker {index}"
    role = text(row.get("role"), 16)
    is_prefill = role == "prefill"
    if not queues and load:
        queues = _queues_of(load, is_prefill=is_prefill)
    return WorkerRow(
        key=text(row.get("instance_id"), NAME_CHARS) or f"{name}#{index}",
        name=name,
        role=role,
        state=_worker_state(row),
        age_s=number(row.get("age_s")),
        bootstrap=count(queues.get("bootstrap")) if role != "decode" else None,
        prealloc=count(queues.get("prealloc")) if not is_prefill else None,
        waiting=count(queues.get("waiting")),
        transfer=count(first_number(queues.get("inflight_or_transfer"), queues.get("transfer"))),
        running=count(queues.get("running")),
        retracted=count(queues.get("retracted")),
        kv_usage=first_number(row.get("kv_usage"), load.get("token_usage")),
        tokens_s=first_number(row.get("tokens_s"), None if is_prefill else load.get("gen_throughput")),
        inflight=count(row.get("inflight")),
        breaker=text(row.get("breaker"), 16),
        errors=count(row.get("errors")),
        last_error=text(row.get("last_error")),
        source=row,
    )


def _worker_state(row: Mapping[str, Any]) -> str:
    if row.get("leaving") is True:
        return "leaving"
    return text(row.get("state"), 16)


def _queues_of(load: Mapping[str, Any], *, is_prefill: bool) -> dict[str, object]:
    """The queues of an older balancer, from the load sample; SGLang counts the others into waiting."""
    own = {
        "bootstrap": load.get("prefill_bootstrap_queue_reqs"),
        "prealloc": load.get("decode_prealloc_queue_reqs"),
        "retracted": load.get("decode_retracted_queue_reqs"),
        "running": load.get("num_running_reqs"),
        "inflight_or_transfer": load.get(
            f"{'prefill_inflight' if is_prefill else 'decode_transfer'}_queue_reqs"
        ),
    }
    waiting = number(load.get("num_waiting_reqs"))
    if waiting is None:
        return own
    others = [own["bootstrap"], own["prealloc"], own["retracted"]]
    others += [] if is_prefill else [own["inflight_or_transfer"]]
    return {**own, "waiting": max(0.0, waiting - sum(number(n) or 0.0 for n in others))}


def _pair(row: Mapping[str, Any], index: int) -> PairRow:
    prefill, decode = text(row.get("prefill"), NAME_CHARS), text(row.get("decode"), NAME_CHARS)
    return PairRow(
        key=f"{prefill}>{decode}" if prefill or decode else f"pair {index}",
        prefill=prefill,
        decode=decode,
        state=text(row.get("state"), 16),
        bytes_s=number(row.get("kv_bytes_s")),
        total_bytes=number(row.get("kv_bytes")),
        path=text(row.get("kv_path"), 16),
        transfer_s=number(row.get("transfer_p50_s")),
        requests=count(row.get("requests")),
        error=text(row.get("error")),
        source=row,
    )


def _request(row: Mapping[str, Any], index: int) -> RequestRow:
    rid = text(row.get("rid"), NAME_CHARS)
    return RequestRow(
        key=rid or f"room {text(row.get('room')) or index}",
        rid=rid,
        pair=text(row.get("pair"), 2 * NAME_CHARS),
        prompt_tokens=count(row.get("prompt_tokens")),
        completion_tokens=count(row.get("completion_tokens")),
        queued_s=number(row.get("queued_s")),
        prefill_s=number(row.get("prefill_s")),
        transfer_s=number(row.get("transfer_s")),
        first_token_s=first_number(row.get("first_token_s"), row.get("ttft_s")),
        done_s=first_number(row.get("done_s"), row.get("e2e_s")),
        tpot_s=number(row.get("tpot_s")),
        status=count(row.get("status")),
        finish=text(row.get("finish"), 32),
        error=text(row.get("error")),
        source=row,
    )


def _event(row: Mapping[str, Any], now_s: float | None, index: int) -> EventRow:
    at_s = number(row.get("time_s"))
    event, worker = text(row.get("event"), 32), text(row.get("worker"), NAME_CHARS)
    return EventRow(
        key=f"{at_s if at_s is not None else index}/{event}/{worker}",
        ago_s=None if at_s is None or now_s is None else max(0.0, now_s - at_s),
        event=event,
        worker=worker,
        detail=text(row.get("detail")),
        source=row,
    )


def _regime_change(row: Mapping[str, Any]) -> EventRow:
    before, after = text(row.get("from"), 24), text(row.get("to"), 24)
    scores = ", ".join(
        f"{role} score {score:.2f}"
        for role in ("prefill", "decode")
        if (score := number(row.get(f"{role}_score"))) is not None
    )
    return EventRow(
        key=f"regime/{before}/{after}/{scores}",
        ago_s=number(row.get("ago_s")),
        event="regime",
        worker="",
        detail=f"{before or '?'} → {after or '?'}" + (f" ({scores})" if scores else ""),
        source=row,
    )

"""The nouns both towers share: workers, pairs, loads, KV layouts.

No I/O and no heavy imports. What crosses a wire is a ``msgspec.Struct``; what
stays in one process is a frozen dataclass. Field names keep SGLang's spelling.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NewType

import msgspec

WorkerId = NewType("WorkerId", str)
"""Operator's name of a worker, stable over restarts: ``prefill-0``."""

InstanceId = NewType("InstanceId", str)
"""32 hex digits, new at every start of a worker process: never confuse it with a predecessor."""

Rid = NewType("Rid", str)
"""Request id, the same on both legs; fixed length because SGLang aborts by prefix match."""

MAX_ROOM = 2**63 - 1
"""Rooms are 1..MAX_ROOM: SGLang's metadata gate treats room 0 as 'not written yet' and hangs."""


LOCAL_HOST = "prefill.pdserve.invalid"
"""As ``bootstrap_host`` of a request: the decode server that gets it prefills it itself
(plugin/local_prefill); ``bootstrap_port`` is then how long a pass that it shares with running requests may
take, in milliseconds.

The balancer sets both fields in every request it sends, so that no client can. The name never resolves
(RFC 6761): a server that does not know it fails the request.
"""


class Role(enum.StrEnum):
    """What a worker does for a request."""

    PREFILL = "prefill"
    DECODE = "decode"


class KVLayoutDescriptor(msgspec.Struct, frozen=True, kw_only=True):
    """Byte geometry of one worker's KV pool, as its ranks report it.

    Two workers may be paired on SGLang's stock transfer path only if every field
    is equal; pdserve's data plane converts page sizes. ``token_bytes`` counts K
    and V of one token in one layer over all attention heads of the model, so it
    does not depend on TP.
    """

    page_size: int
    dtype: str
    num_layers: int
    num_kv_heads: int
    token_bytes: int
    kind: str = "mha"
    layout: str = "NHD"
    converts_pages: bool = False
    """This worker's data plane exchanges KV with pools of another page size."""

    def differences(self, other: KVLayoutDescriptor) -> list[str]:
        """Name each field that keeps the two apart, as ``field: ours != theirs``; empty means pairable.

        The page size does not when both sides convert.
        """
        ignored = {"converts_pages"}
        if self.converts_pages and other.converts_pages:
            ignored.add("page_size")
        return [
            f"{name}: {getattr(self, name)} != {getattr(other, name)}"
            for name in self.__struct_fields__
            if name not in ignored and getattr(self, name) != getattr(other, name)
        ]


class PriorityFlags(msgspec.Struct, frozen=True, kw_only=True):
    """SGLang's server arguments about priorities, by their own names; ``/server_info`` has them too."""

    enable_priority_scheduling: bool | None = None
    schedule_low_priority_values_first: bool | None = None
    default_priority_value: int | None = None

    @property
    def low_priority_first(self) -> bool | None:
        """Whether lower values are served first; None if it is not known or priorities are ignored."""
        is_set = bool(self.schedule_low_priority_values_first)
        return is_set if is_set or self.enable_priority_scheduling else None

    @property
    def default_priority(self) -> int | None:
        """What a request without a priority counts as; None if there is no such setting."""
        return self.default_priority_value if self.enable_priority_scheduling else None


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One live SGLang server process. ``bootstrap_*`` are set for prefill only.

    ``url`` is how the balancer reaches the server (``http://127.0.0.1:31001``);
    ``bootstrap_host:bootstrap_port`` is what goes into a request so that the
    decode server finds this very prefill *instance*.
    """

    worker_id: WorkerId
    instance_id: InstanceId
    role: Role
    url: str
    model: str
    served_model_name: str = ""
    bootstrap_host: str = ""
    bootstrap_port: int | None = None
    kv_layout: KVLayoutDescriptor | None = None
    tp_size: int = 1
    dp_size: int = 1
    max_total_num_tokens: int = 0
    sglang_version: str = ""
    pid: int = 0
    keeps_prefixes: bool | None = None
    """Its prefix cache is on, which on a decode worker it is only on request; None: not known."""
    low_priority_first: bool | None = None
    """Its scheduler serves lower priority values first; None: not known, or it ignores priorities."""
    default_priority: int | None = None
    """The priority of requests that come without one; None: they come last."""
    resume_id: str = ""
    """Under this name it tells its tokens and goes on with others' answers (docs/resume.md); empty: it does
    not."""
    prefills_locally: bool = False
    """A decode worker that prefills requests itself where it is asked to (LOCAL_HOST)."""
    is_leaving: bool = False
    """It was told to stop: it finishes the requests it has and is given no other."""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """One sample of ``GET /v1/loads`` summed over DP ranks. Names as SGLang's LoadSnapshot.

    ``timestamp_s`` is the balancer's monotonic clock at receipt. Queue fields
    of the other role are 0. ``decode_moments`` are SGLang's cumulative sums
    (n, batch, time_us, batch^2, batch*time, generated tokens).
    """

    timestamp_s: float
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_waiting_uncached_tokens: int = 0
    num_used_tokens: int = 0
    num_total_tokens: int = 0
    max_total_num_tokens: int = 0
    max_running_requests: int = 0
    token_usage: float = 0.0
    gen_throughput: float = 0.0
    total_prefill_uncached_tokens: int = 0
    total_prefill_busy_us: int = 0
    decode_moments: tuple[float, ...] = ()
    prefill_bootstrap_queue_reqs: int = 0
    prefill_inflight_queue_reqs: int = 0
    decode_prealloc_queue_reqs: int = 0
    decode_transfer_queue_reqs: int = 0
    decode_retracted_queue_reqs: int = 0
    kv_transfer_latency_ms: float = 0.0
    """Of a prefill worker's last transfer: from the end of the prefill until the KV was there, and the
    GiB sent over that time."""
    kv_transfer_speed_gb_s: float = 0.0

    @property
    def is_idle(self) -> bool:
        """True when nothing runs, waits or is in transfer; cached prefixes may still hold pages."""
        return self.queued_reqs == 0 and self.num_running_reqs == 0

    @property
    def queued_reqs(self) -> int:
        """Requests that hold a place but do not run.

        SGLang's ``num_waiting_reqs`` already counts the bootstrap, prealloc,
        transfer and retracted queues, but not prefill's in-flight one.
        """
        return self.num_waiting_reqs + self.prefill_inflight_queue_reqs


class Forecast(msgspec.Struct, frozen=True):
    """How long an answer will be, in tokens, told before it begins (balancer/lengths.py).

    ``low`` and ``high`` enclose four of five answers like it; ``is_learned``: told by finished
    requests, not by the limit alone.
    """

    mean: float
    low: float
    high: float
    is_learned: bool = False


class RequestShape(msgspec.Struct, frozen=True):
    """What a policy may know of a request before it runs.

    ``prompt`` is the prompt's text or ids as they stand in the request, behind a zero byte and what the
    template puts before them, enough to tell common prefixes; empty if nobody asked for it. ``priority``
    is the client's, None without one: whether higher or lower ones go first is the workers' setting.
    In a batch ``prompt_tokens`` is the sum, ``max_new_tokens`` and ``forecast`` are each prompt's.
    ``needs_prefill_worker``: no decode worker could compute the prompt by itself (LOCAL_HOST).
    ``forecast`` is None until the balancer has made one. ``is_resumed``: a client has a part of its answer
    and waits for the rest, so that it goes before all others. ``route`` and ``user`` (the body's field of
    that name) are what answers of like requests are remembered by.
    """

    prompt_tokens: int
    max_new_tokens: int
    prompt: bytes = b""
    priority: int | None = None
    num_prompts: int = 1
    route: str = ""
    user: str = ""
    forecast: Forecast | None = None
    is_resumed: bool = False
    needs_prefill_worker: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """The prefill and the decode worker that serve one request together."""

    prefill: WorkerInfo
    decode: WorkerInfo

    def __str__(self) -> str:
        return self.label

    @property
    def is_alone(self) -> bool:
        """True if a decode worker prefills the request itself: it stands on both sides."""
        return self.prefill is self.decode

    @property
    def label(self) -> str:
        """``prefill-0>decode-1``: short form for logs and the state document; ``decode-1`` alone."""
        if self.is_alone:
            return str(self.decode.worker_id)
        return f"{self.prefill.worker_id}>{self.decode.worker_id}"

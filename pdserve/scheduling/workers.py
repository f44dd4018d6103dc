"""Runtime records of the fleet: one per worker instance, one per pair of them.

Plain mutable state. ``Fleet`` changes it; the keepers (fleet/worker_monitor.py) wait on its
events; ``state.py`` reads it.
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from dataclasses import dataclass, field

from pdserve.scheduling.breaker import Breaker
from pdserve.scheduling.policy.view import WorkerView
from pdserve.types import InstanceId, Pair, Role, WorkerId, WorkerInfo

PairKey = tuple[InstanceId, InstanceId]
"""(prefill, decode) instance ids."""


class WorkerState(enum.StrEnum):
    """Joining and suspect workers take no traffic; draining ones finish what they have."""

    JOINING = "joining"
    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"


class PairState(enum.StrEnum):
    """Only ready pairs take traffic."""

    UNTESTED = "untested"
    PROBING = "probing"
    READY = "ready"
    FAILED = "failed"


class Backoff:
    """Doubling delays between two bounds; ``reset`` after a success."""

    def __init__(self, first_s: float, last_s: float) -> None:
        self._first_s, self._last_s = first_s, last_s
        self._next_s = first_s

    def next_s(self) -> float:
        """The delay before the next try."""
        delay_s = self._next_s
        self._next_s = min(self._last_s, delay_s * 2)
        return delay_s

    def reset(self) -> None:
        """Start again from the first delay."""
        self._next_s = self._first_s


@dataclass(slots=True, eq=False)
class Worker:
    """One instance of a worker. ``info`` is replaced when more is learned of it.

    ``answers`` is set while the worker is believed to answer at all, ``serves``
    while it is not draining; probes of its pairs wait for both. ``wake`` makes its
    keeper look at once. ``num_inflight`` counts legs of ours that have not ended.

    ``is_leaving``: it goes when it is drained; ``has_left``: it is no member any more.

    ``promised_tokens`` is KV that our legs may need here, ``reserved_tokens`` the part
    of it for tokens still to be generated. ``view`` is the load table's.
    ``is_overloaded``: it said so itself, and no sample has come since. ``calm_*``: beyond them some
    request might not fit (kv_room.py). ``held_for`` is the queued request that gets the next room here.
    ``stalled_s`` is how long it has had work and made no progress, as last seen.
    ``failures`` counts its failed legs by kind, for metrics.
    """

    info: WorkerInfo
    is_static: bool = False
    state: WorkerState = WorkerState.JOINING
    breaker: Breaker = field(default_factory=Breaker)
    last_error: str = ""
    needs_ping: bool = False
    is_dozing: bool = False
    is_leaving: bool = False
    has_left: bool = False
    num_probes: int = 0
    num_inflight: int = 0
    promised_tokens: int = 0
    reserved_tokens: int = 0
    is_overloaded: bool = False
    calm_tokens: int = 0
    calm_reqs: int = 0
    calm_queue: float = 0.0
    held_for: object | None = None
    stalled_s: float = 0.0
    num_wedged: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    serves: asyncio.Event = field(default_factory=asyncio.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    view: WorkerView = field(init=False)

    def __post_init__(self) -> None:
        self.view = WorkerView(self.info)
        self.serves.set()

    @property
    def is_draining(self) -> bool:
        """True while it takes no new request by an operator's wish."""
        return self.state is WorkerState.DRAINING

    @property
    def is_over(self) -> bool:
        """True once it has left the fleet and nothing of ours is in flight there."""
        return self.has_left and not self.num_inflight

    @property
    def worker_id(self) -> WorkerId:
        """Operator's name, stable over restarts."""
        return self.info.worker_id

    @property
    def instance_id(self) -> InstanceId:
        """This process, not its predecessor."""
        return self.info.instance_id

    @property
    def role(self) -> Role:
        """Prefill or decode."""
        return self.info.role

    @property
    def url(self) -> str:
        """Base address of its HTTP server."""
        return self.info.url


@dataclass(slots=True, eq=False)
class PairRecord:
    """A prefill and a decode worker, and whether a real token has come through both."""

    prefill: Worker
    decode: Worker
    state: PairState = PairState.UNTESTED
    probe_s: float | None = None
    probes: int = 0
    error: str = ""
    requests: int = 0
    retest: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _pair: Pair | None = None

    @property
    def key(self) -> PairKey:
        """(prefill, decode) instance ids."""
        return self.prefill.instance_id, self.decode.instance_id

    @property
    def pair(self) -> Pair:
        """The two workers as they are described now; the same object until a description changes."""
        pair = self._pair
        if pair is None or pair.prefill is not self.prefill.info or pair.decode is not self.decode.info:
            pair = self._pair = Pair(self.prefill.info, self.decode.info)
        return pair

    @property
    def can_be_probed(self) -> bool:
        """Both workers answer, and neither is draining."""
        return all(w.answers.is_set() and w.serves.is_set() for w in (self.prefill, self.decode))

    @property
    def label(self) -> str:
        """``prefill-0>decode-1``."""
        return f"{self.prefill.worker_id}>{self.decode.worker_id}"

    def mismatch(self) -> str:
        """Why these two can never work together, or an empty string.

        What a worker did not report is not compared.
        """
        prefill, decode = self.prefill.info, self.decode.info
        if prefill.kv_layout and decode.kv_layout:
            differences = prefill.kv_layout.differences(decode.kv_layout)
            if differences:
                return f"KV layouts differ: {'; '.join(differences)}"
        return ""

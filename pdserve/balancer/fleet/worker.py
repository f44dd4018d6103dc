"""A worker and a pair as the fleet sees them: state, health, tasks.

``health.py`` changes states, ``fleet.py`` membership; monitors and probers wait on the events.
What is promised to requests is the scheduler's (``Worker.slots``).
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from dataclasses import dataclass, field

from pdserve.balancer.fleet.breaker import Breaker
from pdserve.balancer.fleet.weights import Weights
from pdserve.scheduling.policy import WorkerView
from pdserve.scheduling.workers import PairKey, WorkerSlots
from pdserve.types import InstanceId, Pair, Role, WorkerId, WorkerInfo

COMMAND = "command"
"""Label of requests that may stop a worker's scheduler, such as a weight update."""


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
    """One instance of a worker. ``slots`` is what the scheduler counts for it.

    ``answers`` is set while the worker is believed to answer at all, ``serves``
    while it is not draining; probes of its pairs wait for both. ``wake`` ends the pause of its
    monitor. ``tasks`` are its background tasks by name.

    ``is_paused``: its engine generates nothing until an operator lets it go on.
    ``weights`` is what was loaded there; ``is_ahead``: an operator has told it more than the fleet;
    ``num_updates`` of such commands are under way. ``start`` tells its process from the next one at that
    address, empty while unknown. ``mismatch`` is why it is kept out although it answers.
    ``is_leaving``: it is removed when it is drained; ``has_left``: it is no member any more. ``is_moving``:
    what it has while it drains is to go on elsewhere.
    ``stalled_s`` is how long it has had work and made no progress, as last seen.
    ``failures`` counts its failed legs by kind, for metrics.
    """

    slots: WorkerSlots
    is_static: bool = False
    state: WorkerState = WorkerState.JOINING
    breaker: Breaker = field(default_factory=Breaker)
    last_error: str = ""
    needs_ping: bool = False
    is_paused: bool = False
    weights: Weights = field(default_factory=Weights)
    is_ahead: bool = False
    num_updates: int = 0
    start: str = ""
    mismatch: str = ""
    is_leaving: bool = False
    is_moving: bool = False
    has_left: bool = False
    num_probes: int = 0
    stalled_s: float = 0.0
    num_wedged: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    serves: asyncio.Event = field(default_factory=asyncio.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.serves.set()

    @property
    def view(self) -> WorkerView:
        """Its load as policies see it."""
        return self.slots.view

    @property
    def info(self) -> WorkerInfo:
        """Its description, replaced when more is learned of it."""
        return self.slots.view.info

    @property
    def num_inflight(self) -> int:
        """Legs of requests that have not ended."""
        return self.slots.num_inflight

    @property
    def is_draining(self) -> bool:
        """True while an operator wants it to take no new request."""
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
    retest: asyncio.Event = field(default_factory=asyncio.Event)
    prober: asyncio.Task[None] | None = None

    @property
    def key(self) -> PairKey:
        """(prefill, decode) instance ids."""
        return self.prefill.instance_id, self.decode.instance_id

    @property
    def pair(self) -> Pair:
        """The two workers as they are described now."""
        return Pair(self.prefill.info, self.decode.info)

    @property
    def can_be_probed(self) -> bool:
        """Both workers answer, and neither is draining."""
        return all(w.answers.is_set() and w.serves.is_set() for w in (self.prefill, self.decode))

    @property
    def is_paused(self) -> bool:
        """A request of this pair would wait for the end of a pause."""
        return self.prefill.is_paused or self.decode.is_paused

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


@dataclass(frozen=True, slots=True)
class ProbePassed:
    """A token came through; ``took_s`` from sending to the decode answer."""

    took_s: float


@dataclass(frozen=True, slots=True)
class ProbeFailed:
    """``role`` is the leg that failed first, None if only time ran out on both.

    ``unreachable``: its connection could not be made or broke.
    """

    role: Role | None
    message: str
    unreachable: bool = False


ProbeResult = ProbePassed | ProbeFailed

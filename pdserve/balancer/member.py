"""Runtime records of the fleet: one per worker instance, one per pair of them.

Plain mutable state. ``Fleet`` changes it; the keepers (keeper.py) wait on its
events; ``state.py`` reads it.
"""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field

from pdserve.balancer.breaker import Breaker
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

    ``answers`` is set while the worker is believed to answer at all; probes of
    its pairs wait for it. ``wake`` makes its keeper look at once. ``num_inflight``
    counts reservations that include it.
    """

    info: WorkerInfo
    is_static: bool = False
    state: WorkerState = WorkerState.JOINING
    breaker: Breaker = field(default_factory=Breaker)
    last_error: str = ""
    needs_ping: bool = False
    is_dozing: bool = False
    num_probes: int = 0
    num_inflight: int = 0
    answers: asyncio.Event = field(default_factory=asyncio.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

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

    @property
    def key(self) -> PairKey:
        """(prefill, decode) instance ids."""
        return self.prefill.instance_id, self.decode.instance_id

    @property
    def pair(self) -> Pair:
        """The two workers as they are described now."""
        return Pair(self.prefill.info, self.decode.info)

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

"""What the scheduler counts for each worker and pair, and which pairs take traffic.

``WorkerSlots`` and ``PairSlots`` are plain mutable state: placement.py promises and takes back,
kv_room.py sets the limits. Health, membership and tasks of a worker are the fleet's (balancer/fleet).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pdserve.scheduling.kv_growth import KvGrowth
from pdserve.scheduling.policy import Candidates, WorkerView
from pdserve.types import InstanceId, Pair, Role, WorkerId

PairKey = tuple[InstanceId, InstanceId]
"""(prefill, decode) instance ids."""


@dataclass(slots=True, eq=False)
class WorkerSlots:
    """Capacity of one worker that is promised to requests. ``view`` is the load table's.

    ``num_inflight`` counts open legs. ``promised_tokens`` is the KV that they may need,
    ``reserved_tokens`` its part for tokens still to be generated, ``growth`` what open answers are
    forecast to need. ``is_overloaded``: the worker answered 503, and no sample has come since.
    Below the ``calm_*`` limits every usual request fits (kv_room.py). ``held_for`` is the waiting
    request that gets the next room here.
    """

    view: WorkerView
    num_inflight: int = 0
    promised_tokens: int = 0
    reserved_tokens: int = 0
    growth: KvGrowth = field(default_factory=KvGrowth)
    is_overloaded: bool = False
    calm_tokens: int = 0
    calm_reqs: int = 0
    calm_queue: float = 0.0
    held_for: object | None = None

    @property
    def worker_id(self) -> WorkerId:
        """Operator's name, stable over restarts."""
        return self.view.info.worker_id

    @property
    def instance_id(self) -> InstanceId:
        """This process, not its predecessor."""
        return self.view.info.instance_id

    @property
    def role(self) -> Role:
        """Prefill or decode."""
        return self.view.info.role


@dataclass(slots=True, eq=False)
class PairSlots:
    """A pair that has been used, and how many requests it was given."""

    prefill: WorkerSlots
    decode: WorkerSlots
    num_requests: int = 0
    _pair: Pair | None = None

    @property
    def pair(self) -> Pair:
        """The two workers as they are described now; the same object until a description changes."""
        pair, prefill, decode = self._pair, self.prefill.view.info, self.decode.view.info
        if pair is None or pair.prefill is not prefill or pair.decode is not decode:
            pair = self._pair = Pair(prefill, decode)
        return pair


class ReadyPairs:
    """The pairs that take traffic, as two rows of workers and the allowed positions of their grid.

    Immutable; built when readiness changes. A whole grid of P x D pairs takes O(P + D) memory.
    ``candidates`` has the workers' live views, so a decision over all ready pairs builds nothing.
    """

    __slots__ = ("_allowed", "_columns", "_rows", "candidates", "decodes", "prefills")

    def __init__(self, pairs: Iterable[tuple[WorkerSlots, WorkerSlots]] = ()) -> None:
        rows: dict[WorkerSlots, int] = {}
        columns: dict[WorkerSlots, int] = {}
        grid = {
            (rows.setdefault(prefill, len(rows)), columns.setdefault(decode, len(columns)))
            for prefill, decode in pairs
        }
        self.prefills, self.decodes = tuple(rows), tuple(columns)
        self._rows = {worker.instance_id: index for worker, index in rows.items()}
        self._columns = {worker.instance_id: index for worker, index in columns.items()}
        self._allowed = None if len(grid) == len(rows) * len(columns) else grid
        allowed = None if self._allowed is None else sorted(grid)
        self.candidates = Candidates(_views(self.prefills), _views(self.decodes), allowed)

    def without(self, exclude: Collection[PairKey]) -> ReadyPairs:
        """The ready pairs but for these; itself if none of them is ready."""
        if not any(key in self for key in exclude):
            return self
        return ReadyPairs(
            (prefill, decode)
            for prefill, decode in self
            if (prefill.instance_id, decode.instance_id) not in exclude
        )

    def where(self, fits: Callable[[WorkerSlots], bool]) -> Candidates | None:
        """The pairs of which both workers fit; None if there is none."""
        prefills = [worker for worker in self.prefills if fits(worker)]
        decodes = [worker for worker in self.decodes if fits(worker)]
        if not prefills or not decodes:
            return None
        if self._allowed is None:
            return Candidates(_views(prefills), _views(decodes))
        kept_prefills, kept_decodes = set(prefills), set(decodes)
        kept = [(p, d) for p, d in self if p in kept_prefills and d in kept_decodes]
        return ReadyPairs(kept).candidates if kept else None

    def __contains__(self, key: PairKey) -> bool:
        row, column = self._rows.get(key[0]), self._columns.get(key[1])
        if row is None or column is None:
            return False
        return self._allowed is None or (row, column) in self._allowed

    def __iter__(self) -> Iterator[tuple[WorkerSlots, WorkerSlots]]:
        """Pairs in row order."""
        if self._allowed is None:
            return ((prefill, decode) for prefill in self.prefills for decode in self.decodes)
        return ((self.prefills[row], self.decodes[column]) for row, column in self.candidates.indices())

    def __len__(self) -> int:
        return len(self.candidates)


def _views(workers: Sequence[WorkerSlots]) -> list[WorkerView]:
    return [worker.view for worker in workers]

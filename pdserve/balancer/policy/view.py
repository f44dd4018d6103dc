"""What a policy sees and what it answers. Immutable, no clock, no sockets.

``Candidates`` is the set of pairs a request may go to. It is kept as two rows
of workers plus, where the grid has holes, the allowed pairs, so that a policy
whose score is separable needs O(P + D) work and not O(P * D).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

from pdserve.types import InstanceId, Pair, RequestShape, WorkerInfo, WorkerLoad


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker at one moment: its last sample corrected by what we dispatched since.

    ``inflight`` counts this balancer's own unfinished requests on the worker
    (a prefill leg counts until its prefill ended); ``queued_tokens`` prompt tokens to compute before a new
    request's (prefill); ``num_reqs`` everything that runs, waits or travels.
    ``kv_tokens``/``kv_capacity`` bound the KV headroom (capacity 0: unknown).
    ``last_turn`` grows with each dispatch of the fleet: smaller is longer unused.
    """

    info: WorkerInfo
    load: WorkerLoad | None = None
    inflight: int = 0
    queued_tokens: float = 0.0
    num_reqs: int = 0
    kv_tokens: int = 0
    kv_capacity: int = 0
    max_running_requests: int = 0
    prefill_tokens_s: float = 10_000.0
    step_base_s: float = 0.02
    step_slope_s: float = 0.0004
    last_turn: int = 0


@dataclass(frozen=True, slots=True)
class PairView:
    """The two legs a request would have."""

    prefill: WorkerView
    decode: WorkerView

    @property
    def pair(self) -> Pair:
        """The same two workers without their loads."""
        return Pair(self.prefill.info, self.decode.info)


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy's answer and, for logs and the state document, why."""

    pair: PairView
    reason: str


class Candidates(Sequence[PairView]):
    """Pairs that may take a request: ``prefills`` x ``decodes``, or a part of that grid.

    ``allowed`` lists index pairs (prefill, decode) in row order; None means the
    whole grid. Every worker in the rows is part of at least one allowed pair.
    """

    __slots__ = ("_grid", "allowed", "decodes", "prefills")

    def __init__(
        self,
        prefills: Sequence[WorkerView],
        decodes: Sequence[WorkerView],
        allowed: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.prefills = prefills
        self.decodes = decodes
        self.allowed = allowed
        self._grid = allowed

    @classmethod
    def of(cls, pairs: Iterable[PairView]) -> Candidates:
        """Build from explicit pairs; workers are told apart by ``instance_id``."""
        prefills: dict[InstanceId, WorkerView] = {}
        decodes: dict[InstanceId, WorkerView] = {}
        keys = []
        for pair in pairs:
            p, d = pair.prefill.info.instance_id, pair.decode.info.instance_id
            prefills.setdefault(p, pair.prefill)
            decodes.setdefault(d, pair.decode)
            keys.append((p, d))
        rows = {key: index for index, key in enumerate(prefills)}
        columns = {key: index for index, key in enumerate(decodes)}
        grid = sorted({(rows[p], columns[d]) for p, d in keys})
        full = len(grid) == len(rows) * len(columns)
        return cls(tuple(prefills.values()), tuple(decodes.values()), None if full else grid)

    def indices(self) -> Sequence[tuple[int, int]]:
        """Every allowed (prefill, decode) index pair, in row order."""
        if self._grid is None:
            self._grid = [(p, d) for p in range(len(self.prefills)) for d in range(len(self.decodes))]
        return self._grid

    def partners(self, prefill: int) -> list[int]:
        """Indices of the decode workers that may follow this prefill worker."""
        if self.allowed is None:
            return list(range(len(self.decodes)))
        return [d for p, d in self.allowed if p == prefill]

    def at(self, prefill: int, decode: int) -> PairView:
        """The pair at a grid position; does not check that it is allowed."""
        return PairView(self.prefills[prefill], self.decodes[decode])

    def __len__(self) -> int:
        if self.allowed is None:
            return len(self.prefills) * len(self.decodes)
        return len(self.allowed)

    @overload
    def __getitem__(self, index: int) -> PairView: ...
    @overload
    def __getitem__(self, index: slice) -> list[PairView]: ...
    def __getitem__(self, index: int | slice) -> PairView | list[PairView]:
        if isinstance(index, slice):
            return [self.at(p, d) for p, d in self.indices()[index]]
        return self.at(*self.indices()[index])

    def __iter__(self) -> Iterator[PairView]:
        return (self.at(p, d) for p, d in self.indices())


class Policy(Protocol):
    """Chooses a pair. Deterministic given its seed and its calls; never mutates what it sees."""

    name: str

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """Pick one of ``candidates``, which is never empty."""
        ...

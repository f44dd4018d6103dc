"""What a policy sees and what it answers. No clock, no sockets.

``Candidates`` is the set of pairs a request may go to. It is kept as two rows
of workers plus, where the grid has holes, the allowed pairs, so that a policy
whose score is separable needs O(P + D) work and not O(P * D).

Views are live: the load table corrects them in place with each dispatch, and
the same rows serve every decision until membership changes. Policies read
them during one ``choose`` and change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

from pdserve.types import InstanceId, Pair, RequestShape, Role, WorkerInfo, WorkerLoad


@dataclass(slots=True, eq=False)
class WorkerView:
    """One worker now: its last sample corrected by what we dispatched since.

    ``inflight`` counts this balancer's own unfinished requests on the worker
    (a prefill leg counts until its prefill ended); ``queued_tokens`` prompt tokens to compute before a new
    request's (prefill); ``num_reqs`` everything that runs, waits or travels.
    ``kv_tokens``/``kv_capacity`` bound the KV headroom (capacity 0: unknown).
    Rates are of one DP rank. ``last_turn`` grows with each dispatch of the
    fleet: smaller is longer unused.

    Not frozen: building one for each of a request's eight changes of load cost more than its choice.
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


LinkCost = Callable[[WorkerView, WorkerView, RequestShape], float]
"""Seconds in which the KV of a request would travel from a prefill to a decode worker."""


@dataclass(slots=True, eq=False)
class PairView:
    """The two legs a request would have, and how long its KV would travel between them (0: unknown)."""

    prefill: WorkerView
    decode: WorkerView
    link_s: float = 0.0

    @property
    def pair(self) -> Pair:
        """The same two workers without their loads."""
        return Pair(self.prefill.info, self.decode.info)


class Reason:
    """Why a policy chose, as text that is put together only when somebody reads it.

    Keep numbers in ``args``, not live views: they change.
    """

    __slots__ = ("_args", "_template")

    def __init__(self, template: str, *args: object) -> None:
        self._template = template
        self._args = args

    def __str__(self) -> str:
        return self._template.format(*self._args)


@dataclass(slots=True, eq=False)
class Choice:
    """A policy's answer and, for logs and the state document, why.

    ``cached_tokens`` of the prompt are expected in the prefill worker's prefix
    cache: it will compute that many less. ``decode_cached_tokens`` need not travel, the decode worker
    has them. ``mark`` is what the policy wants to see again in ``leg_ended``.
    """

    pair: PairView
    why: Reason
    cached_tokens: int = 0
    decode_cached_tokens: int = 0
    mark: object = None

    @property
    def reason(self) -> str:
        """``why`` as text."""
        return str(self.why)


class Candidates(Sequence[PairView]):
    """Pairs that may take a request: ``prefills`` x ``decodes``, or a part of that grid.

    ``allowed`` lists index pairs (prefill, decode) in row order; None means the
    whole grid. Every worker in the rows is part of at least one allowed pair.
    ``link_s`` is None while all links count as alike. ``now_s`` is the moment of the decision, on the
    clock of whoever asks.
    """

    __slots__ = ("_grid", "allowed", "decodes", "link_s", "now_s", "prefills")

    def __init__(
        self,
        prefills: Sequence[WorkerView],
        decodes: Sequence[WorkerView],
        allowed: Sequence[tuple[int, int]] | None = None,
        link_s: LinkCost | None = None,
    ) -> None:
        self.prefills = prefills
        self.decodes = decodes
        self.allowed = allowed
        self.link_s = link_s
        self.now_s = 0.0
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

    def partners(self, prefill: int) -> Sequence[int]:
        """Indices of the decode workers that may follow this prefill worker."""
        if self.allowed is None:
            return range(len(self.decodes))
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
    needs_prompt: bool
    """False: ``RequestShape.prompt`` may stay empty, nobody will look at it."""
    needs_ends: bool
    """False: ``leg_ended`` need not be called."""

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """Pick one of ``candidates``, which is never empty."""
        ...

    def leg_ended(self, choice: Choice, role: Role, *, is_whole: bool, now_s: float) -> None:
        """A leg that this policy placed is over.

        ``is_whole``: it came to a normal end, so that the worker has computed (prefill) or received and
        extended (decode) the KV of all of the prompt. Called once for each leg of each choice.
        """
        ...

    def reach_s(self, request: RequestShape, prefills: Sequence[WorkerView], now_s: float) -> Sequence[float]:
        """By how many seconds each prefill worker's queue may outlast the balancer's limit for this request;
        empty: by none."""
        ...

    def forget(self, instance_id: InstanceId) -> None:
        """Drop what is remembered of a worker that is gone for good."""
        ...


class LegPolicy(Policy, Protocol):
    """A policy that can also choose for one leg alone."""

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """The index in ``views`` (all of that role, never empty) and why."""
        ...

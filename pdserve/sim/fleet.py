"""The balancer's side of a simulation: production admission, load table and records over modelled servers.

Nothing is tested or probed: all pairs are ready from the start, as a fleet is after a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pdserve.config.balancer import BalancerConfig
from pdserve.errors import WorkerError
from pdserve.scheduling.admission import Admission
from pdserve.scheduling.load import LoadTable
from pdserve.scheduling.policy import Policy
from pdserve.scheduling.ready_pairs import ReadyPairs
from pdserve.scheduling.workers import PairKey, PairRecord, PairState, Worker, WorkerState
from pdserve.sim.cost import CostModel
from pdserve.types import InstanceId, RequestShape, Role, WorkerId, WorkerInfo

LAZY_PAIRS = 20_000
"""Above so many pairs their records are made when they are first used: 500 x 500 of them take 0.4 GB."""


class NoJudge:
    """Simulated workers do not fail: nobody is to blame."""

    def pair_ended(
        self,
        record: PairRecord,
        prefill_ok: bool | None,
        decode_ok: bool | None,
        error: str | WorkerError,
    ) -> None:
        """Nothing follows from it."""


class _LazyGrid(dict[PairKey, PairRecord]):
    """Every pair of a whole grid; a record is made at its first use."""

    def __init__(self, prefills: list[Worker], decodes: list[Worker]) -> None:
        super().__init__()
        self._prefills = {worker.instance_id: worker for worker in prefills}
        self._decodes = {worker.instance_id: worker for worker in decodes}

    def __missing__(self, key: PairKey) -> PairRecord:
        record = self[key] = PairRecord(self._prefills[key[0]], self._decodes[key[1]], PairState.READY)
        return record

    def __len__(self) -> int:
        return len(self._prefills) * len(self._decodes)

    def __iter__(self) -> Iterator[PairKey]:
        return ((p, d) for p in self._prefills for d in self._decodes)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and key[0] in self._prefills and key[1] in self._decodes

    def values(self) -> list[PairRecord]:  # type: ignore[override]
        """All of them, made now: only a request that was overtaken often asks for this."""
        return [self[key] for key in self]

    def items(self) -> list[tuple[PairKey, PairRecord]]:  # type: ignore[override]
        """All of them, made now."""
        return [(key, self[key]) for key in self]


def _worker(role: Role, index: int, model: CostModel, table: LoadTable) -> Worker:
    name = f"{role}-{index}"
    pool = model.prefill_pool_tokens if role is Role.PREFILL else model.decode_pool_tokens
    info = WorkerInfo(
        worker_id=WorkerId(name),
        instance_id=InstanceId(f"{role[0]}{index:031d}"),
        role=role,
        url=f"http://{name}",
        model=model.name,
        max_total_num_tokens=pool,
    )
    worker = Worker(info, state=WorkerState.READY)
    table.add(info)
    worker.view = table.view(info.instance_id)
    return worker


class SimulatedFleet:
    """Workers, load table and admission, ready for requests. ``index_of``: a worker's number by its id."""

    def __init__(
        self,
        model: CostModel,
        prefill: int,
        decode: int,
        policy: Policy,
        config: BalancerConfig,
        clock: Callable[[], float],
    ) -> None:
        self.table = LoadTable()
        self.prefills = [_worker(Role.PREFILL, i, model, self.table) for i in range(prefill)]
        self.decodes = [_worker(Role.DECODE, i, model, self.table) for i in range(decode)]
        self.index_of = {
            worker.instance_id: index
            for row in (self.prefills, self.decodes)
            for index, worker in enumerate(row)
        }
        self.admission = Admission(config, self.table, policy, NoJudge(), _no_room, _ignore, clock)
        self._open()

    def _open(self) -> None:
        prefills, decodes = self.prefills, self.decodes
        if len(prefills) * len(decodes) <= LAZY_PAIRS:
            grid = [PairRecord(p, d, PairState.READY) for p in prefills for d in decodes]
            self.admission.readiness_changed(grid)
            return
        # A diagonal names every worker once, so that all that is derived from workers is right; then
        # the ready pairs are made whole.
        rounds = range(max(len(prefills), len(decodes)))
        pairs = {(i % len(prefills), i % len(decodes)) for i in rounds}
        grid = [PairRecord(prefills[p], decodes[d], PairState.READY) for p, d in sorted(pairs)]
        self.admission.readiness_changed(grid)
        whole = ReadyPairs(grid[:1])
        views = [[worker.view for worker in row] for row in (prefills, decodes)]
        whole.records = _LazyGrid(prefills, decodes)
        whole.prefills, whole.decodes = tuple(prefills), tuple(decodes)
        whole.candidates = type(whole.candidates)(views[0], views[1])
        self.admission.placement.ready_pairs = whole


def _no_room(exclude: frozenset[PairKey], shape: RequestShape) -> str:
    return "all workers are full"


def _ignore(worker: Worker) -> None:
    """No simulated worker drains."""

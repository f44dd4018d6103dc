"""The pairs that take traffic now, in the shape policies want; immutable once built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pdserve.scheduling.policy import Candidates, WorkerView
from pdserve.scheduling.workers import PairKey, PairRecord, PairState, Worker


class ReadyPairs:
    """Ready pairs as two rows of workers and the allowed positions of their grid.

    Built when readiness changes. ``candidates`` has the workers' live views, so a
    decision over all ready pairs builds nothing.
    """

    __slots__ = ("_allowed", "candidates", "decodes", "prefills", "records")

    def __init__(self, records: Sequence[PairRecord] = ()) -> None:
        self.records: dict[PairKey, PairRecord] = {record.key: record for record in records}
        self.prefills: tuple[Worker, ...] = tuple(dict.fromkeys(record.prefill for record in records))
        self.decodes: tuple[Worker, ...] = tuple(dict.fromkeys(record.decode for record in records))
        is_whole = len(records) == len(self.prefills) * len(self.decodes)
        rows = {worker: index for index, worker in enumerate(self.prefills)}
        columns = {worker: index for index, worker in enumerate(self.decodes)}
        self._allowed = None if is_whole else sorted((rows[r.prefill], columns[r.decode]) for r in records)
        self.candidates = Candidates(_views(self.prefills), _views(self.decodes), self._allowed)

    @classmethod
    def of(cls, records: Iterable[PairRecord]) -> ReadyPairs:
        """The ready ones of ``records``."""
        return cls([record for record in records if record.state is PairState.READY])

    def without(self, exclude: frozenset[PairKey]) -> ReadyPairs:
        """The ready pairs that leaves these pairs out; itself if none of them is in it."""
        if exclude.isdisjoint(self.records):
            return self
        return ReadyPairs([record for key, record in self.records.items() if key not in exclude])

    def where(self, fits: Callable[[Worker], bool]) -> Candidates | None:
        """The pairs of which both workers fit; None if there is none."""
        prefills = [worker for worker in self.prefills if fits(worker)]
        decodes = [worker for worker in self.decodes if fits(worker)]
        if not prefills or not decodes:
            return None
        if self._allowed is None:
            return Candidates(_views(prefills), _views(decodes))
        kept_prefills, kept_decodes = set(prefills), set(decodes)
        kept = [r for r in self.records.values() if r.prefill in kept_prefills and r.decode in kept_decodes]
        return ReadyPairs(kept).candidates if kept else None

    def __len__(self) -> int:
        return len(self.records)


def _views(workers: Sequence[Worker]) -> list[WorkerView]:
    return [worker.view for worker in workers]

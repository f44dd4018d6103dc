"""The pairs that take traffic now, in the shape policies want; immutable once built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pdserve.balancer.load import LoadTable
from pdserve.balancer.member import PairKey, PairRecord, PairState
from pdserve.balancer.policy import Candidates
from pdserve.types import InstanceId


class Rotation:
    """Ready pairs as two rows of instance ids and the allowed positions of their grid.

    Built when readiness changes, so that a decision only has to look up views.
    """

    __slots__ = ("_allowed", "_decodes", "_prefills", "keys")

    def __init__(self, keys: Sequence[PairKey] = ()) -> None:
        self.keys = keys
        rows = {key: index for index, key in enumerate(dict.fromkeys(p for p, _ in keys))}
        columns = {key: index for index, key in enumerate(dict.fromkeys(d for _, d in keys))}
        self._prefills: tuple[InstanceId, ...] = tuple(rows)
        self._decodes: tuple[InstanceId, ...] = tuple(columns)
        is_whole = len(keys) == len(rows) * len(columns)
        self._allowed = None if is_whole else sorted((rows[p], columns[d]) for p, d in keys)

    @classmethod
    def of(cls, records: Iterable[PairRecord]) -> Rotation:
        """The ready ones of ``records``."""
        return cls([record.key for record in records if record.state is PairState.READY])

    def without(self, exclude: frozenset[PairKey]) -> Rotation:
        """A rotation that leaves these pairs out; itself if none of them is in it."""
        kept = [key for key in self.keys if key not in exclude]
        return self if len(kept) == len(self.keys) else Rotation(kept)

    def candidates(self, table: LoadTable) -> Candidates:
        """The workers' views at this moment."""
        prefills = [table.view(key) for key in self._prefills]
        decodes = [table.view(key) for key in self._decodes]
        return Candidates(prefills, decodes, self._allowed)

    def __len__(self) -> int:
        return len(self.keys)

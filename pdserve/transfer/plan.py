"""How a chunk travels: direct (one descriptor per run and region) or packed (gather, few writes, scatter).

FlowKV's law: a transfer takes ``alpha * descriptors + bytes / bandwidth``. Direct
pays alpha for each run of pages that is consecutive on both sides, times the
regions; packed pays two more copies of the bytes but has few descriptors. Both
laws are fitted live for every peer, so the choice follows the machine.
"""

from __future__ import annotations

import enum
import itertools
import math
from dataclasses import dataclass, field

from pdserve.kv.coalesce import Piece
from pdserve.linear_fit import LinearFit

FORGET = 0.93
"""Weight a sample keeps after each newer one: about 14 samples back matter."""

OUTLIER = 1.5
"""A transfer that takes this many times what was expected counts less."""

EXPLORE_EVERY = 64
"""The other path is taken at most once in so many choices, however close it is."""

HOST_COPY_S = 0.75e-10
"""Seconds a byte of one gather or scatter in host memory (bench/transfer.py)."""

GPU_COPY_S = 1e-12
"""The same on a GPU: half of a modern card's memory rate, as each byte is read and written."""

PIECE_S = 80e-6
"""What a piece costs beyond a descriptor: two launches and the polls between them."""

EXPLORE_SHARE = 0.04
"""The other path is taken once the time on the better one has paid for it at this rate."""

OPTIMISM = 0.7
"""A path with fewer than ``NUM_TRIALS`` samples is thought to take this share of what its law says."""

NUM_TRIALS = 4


class Path(enum.StrEnum):
    """How a chunk's bytes travel."""

    DIRECT = "direct"
    PACKED = "packed"


class LinearCost:
    """``seconds = per_item * items + per_byte * bytes``, fitted by least squares that forget. Never negative.

    Starts from a prior worth ``PRIOR_WEIGHT`` samples at two sizes.
    """

    PRIOR_WEIGHT = 0.2

    def __init__(self, per_item_s: float, per_byte_s: float) -> None:
        self.per_item_s = per_item_s
        self.per_byte_s = per_byte_s
        self._prior = (per_item_s, per_byte_s * 1e6)
        self.num_samples = 0
        self._terms = LinearFit()  # of items and megabytes, which keep the matrix well scaled
        for items, megabytes in ((100.0, 0.1), (1.0, 10.0)):
            self._add(items, megabytes, per_item_s * items + per_byte_s * megabytes * 1e6, self.PRIOR_WEIGHT)

    def predict_s(self, items: int, nbytes: int) -> float:
        """Expected seconds."""
        return self.per_item_s * items + self.per_byte_s * nbytes

    def observe(self, items: int, nbytes: int, seconds: float) -> None:
        """Learn from one finished transfer. Large and small weigh alike: by error relative to the prior."""
        if items <= 0 or nbytes <= 0 or seconds <= 0:
            return
        self.num_samples += 1
        # Bounded influence (Huber): a first touch of memory or a lost time slice takes ten times as
        # long and must not decide; a link that stays slow still does, sample by sample.
        usual_s = OUTLIER * self.predict_s(items, nbytes)
        weight = 1.0 if seconds <= usual_s else max(0.02, usual_s / seconds) ** 2
        self._terms.fade(FORGET)
        self._add(float(items), nbytes / 1e6, seconds, weight)
        self._solve()

    def _add(self, items: float, megabytes: float, seconds: float, weight: float) -> None:
        usual_s = max(1e-9, self._prior[0] * items + self._prior[1] * megabytes)
        self._terms.add(items, megabytes, seconds, weight / usual_s**2)

    def _solve(self) -> None:
        terms = self._terms
        if terms.spread > 1e-9:
            per_item, per_megabyte = terms.solve()
        else:
            per_item, per_megabyte = self.per_item_s, self.per_byte_s * 1e6
            expected = per_item * (terms.uu + terms.uv) + per_megabyte * (terms.uv + terms.vv)
            scale = (terms.uy + terms.vy) / max(1e-30, expected)
            per_item, per_megabyte = per_item * scale, per_megabyte * scale
        if per_item < 0:
            per_item, per_megabyte = 0.0, terms.vy / terms.vv
        elif per_megabyte < 0:
            per_item, per_megabyte = terms.uy / terms.uu, 0.0
        self.per_item_s, self.per_byte_s = per_item, per_megabyte / 1e6


@dataclass(slots=True)
class PathCosts:
    """The two laws of one peer.

    Direct starts as host memory on one machine (bench/transfer.py) and is measured by the
    warm-up. Packed goes over the same link: until it is measured itself, its law is direct's,
    two copies of each byte and ``PIECE_S`` a piece.
    """

    direct: LinearCost = field(default_factory=lambda: LinearCost(3e-6, 1e-10))
    packed: LinearCost | None = None
    copy_s_per_byte: float = HOST_COPY_S
    """One copy of one byte by gather or scatter."""
    _saved_s: float = 0.0

    def packed_law(self) -> LinearCost:
        """Measured, or derived from the link."""
        if self.packed is not None:
            return self.packed
        per_byte_s = self.direct.per_byte_s + 2 * self.copy_s_per_byte
        return LinearCost(self.direct.per_item_s + PIECE_S, per_byte_s)

    def choose(self, nbytes: int, num_descriptors: int, num_pieces: int) -> Path:
        """The path with the lower expected time; the other one when its turn has been paid for."""
        direct_s = _hopeful_s(self.direct, num_descriptors, nbytes)
        packed_s = _hopeful_s(self.packed_law(), num_pieces, nbytes)
        best, other = (Path.DIRECT, Path.PACKED) if direct_s <= packed_s else (Path.PACKED, Path.DIRECT)
        self._saved_s += EXPLORE_SHARE * min(direct_s, packed_s)
        price_s = abs(direct_s - packed_s)
        if self._saved_s < max(price_s, EXPLORE_EVERY * EXPLORE_SHARE * min(direct_s, packed_s)):
            return best
        self._saved_s = 0.0
        return other

    def observe(self, path: Path, items: int, nbytes: int, seconds: float) -> None:
        """Learn from one finished chunk share; ``items`` are descriptors (direct) or pieces (packed)."""
        if path is Path.PACKED:
            self.packed = self.packed_law()
        (self.direct if path is Path.DIRECT else self.packed_law()).observe(items, nbytes, seconds)


def _hopeful_s(law: LinearCost, items: int, nbytes: int) -> float:
    return law.predict_s(items, nbytes) * (OPTIMISM if law.num_samples < NUM_TRIALS else 1.0)


def split_pieces(
    *, num_regions: int, num_tokens: int, slice_offset: int, slice_bytes: int,
    piece_bytes: int, token_unit: int, layer_regions: int = 1,
) -> list[Piece]:  # fmt: skip
    """Cut a chunk into pieces of at most ``piece_bytes``: by layers; by regions or tokens if none fits.

    Args:
        layer_regions: regions of a layer; ``num_regions`` is a multiple of it.
        token_unit: tokens are cut at multiples of this (the page size), so that both
            sides keep copying whole pages; anywhere if not even one unit fits a piece.
    """
    region_bytes = num_tokens * slice_bytes
    if region_bytes <= piece_bytes:
        unit = layer_regions if layer_regions * region_bytes <= piece_bytes else 1
        num_units = num_regions // unit
        # Even pieces pipeline better than full ones and a small rest.
        count = math.ceil(num_units / (piece_bytes // (unit * region_bytes)))
        bounds = [num_units * index // count * unit for index in range(count + 1)]
        return [
            Piece(begin, end - begin, 0, num_tokens, slice_offset, slice_bytes)
            for begin, end in itertools.pairwise(bounds)
        ]
    tokens = max(1, piece_bytes // slice_bytes)
    if tokens > token_unit:
        tokens -= tokens % token_unit
    return [
        Piece(region, 1, start, min(tokens, num_tokens - start), slice_offset, slice_bytes)
        for region in range(num_regions)
        for start in range(0, num_tokens, tokens)
    ]

"""Pieces are whole layers where a layer fits, and a draft model's layers on one side only are left alone."""

from __future__ import annotations

import numpy as np
import pytest

from pdserve.errors import KVLayoutMismatch
from pdserve.transfer.plan import Path, split_pieces
from tests.support.kv_rig import Geometry, Rig
from tests.support.rows import rows


@rows("piece_bytes", [2 * 640, 3 * 640, 5 * 640, 7 * 640, 1 << 20])
def test_pieces_end_at_layer_bounds(piece_bytes: int) -> None:
    pieces = split_pieces(
        num_regions=14, layer_regions=2, num_tokens=10, slice_offset=0, slice_bytes=64,
        piece_bytes=piece_bytes, token_unit=4,
    )  # fmt: skip
    assert all(piece.region_begin % 2 == piece.num_regions % 2 == 0 for piece in pieces)
    assert sum(piece.num_regions for piece in pieces) == 14
    assert all(piece.nbytes <= piece_bytes for piece in pieces)


def test_a_layer_that_does_not_fit_is_cut_by_region() -> None:
    pieces = split_pieces(
        num_regions=4, layer_regions=2, num_tokens=10, slice_offset=0, slice_bytes=64,
        piece_bytes=640, token_unit=4,
    )  # fmt: skip
    assert [(piece.region_begin, piece.num_regions) for piece in pieces] == [(n, 1) for n in range(4)]


def test_a_packed_chunk_is_one_write_a_layer_when_a_piece_holds_one() -> None:
    layer = Geometry(num_regions=8, regions_per_layer=2)
    rig = Rig(source=layer, target=layer, max_piece_bytes=2 * 60 * 48)
    try:
        source, target = rig.send(1, 60, path=Path.PACKED)
        rig.receive(1)
        rig.check(source, target, 60)
        record = rig.prefill.gate.done[0].record
        assert record.num_writes == 4 + 1, "four layers and the metadata row"
    finally:
        rig.close()


@rows("path", [Path.DIRECT, Path.PACKED])
@rows("page_size", [4, 8])
def test_a_draft_models_pool_on_decode_only_is_not_written(path: Path, page_size: int) -> None:
    rig = Rig(target=Geometry(num_regions=6, num_draft_regions=2, page_size=page_size))
    try:
        draft = [region.copy() for region in rig.decode.pool.snapshot()[4:]]
        source, target = rig.send(1, 60, path=path)
        rig.receive(1)
        rig.check(source, target, 60)
        for before, after in zip(draft, rig.decode.pool.snapshot()[4:], strict=True):
            np.testing.assert_array_equal(before, after)
        rig.settle()
    finally:
        rig.close()


def test_a_model_of_more_layers_is_still_refused() -> None:
    for target in (Geometry(num_regions=6), Geometry(num_regions=8, num_draft_regions=2)):
        with pytest.raises(KVLayoutMismatch, match="serve the same model"):
            Rig(target=target)

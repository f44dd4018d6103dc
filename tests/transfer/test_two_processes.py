"""Byte-exact transfers between two processes over real NIXL, with odd strides, offsets and page counts."""

from __future__ import annotations

import time

import numpy as np
import pytest

from pdserve.transfer.plan import Path
from pdserve.transfer.selftest.trial import Trial, TrialGeometry

pytestmark = pytest.mark.process

BASE = TrialGeometry(
    num_layers=3,
    num_pages=67,
    page_size=16,
    num_kv_heads=3,
    head_bytes=40,
    slab_bytes=1 << 18,
    slot_bytes=1 << 14,
)


def _vary(geometry: TrialGeometry, **changes: int) -> TrialGeometry:
    fields = {name: getattr(geometry, name) for name in geometry.__struct_fields__}
    return TrialGeometry(**{**fields, **changes})


CASES = {
    "same": (BASE, _vary(BASE, seed=1), (Path.DIRECT, Path.PACKED, None)),
    "larger-pages": (BASE, _vary(BASE, seed=1, page_size=64, num_pages=20), (None,)),
    "token-pages": (_vary(BASE, page_size=7), _vary(BASE, seed=1, page_size=1, num_pages=600), (None,)),
    "strides": (_vary(BASE, gap_bytes=8), _vary(BASE, seed=1, gap_bytes=24), (None,)),
    "odd-bytes": (_vary(BASE, head_bytes=5), _vary(BASE, seed=1, head_bytes=5, gap_bytes=3), (None,)),
    "half-the-heads": (
        _vary(BASE, num_kv_heads=4),
        _vary(BASE, seed=1, num_kv_heads=2, total_kv_heads=4, tp_size=2, tp_rank=1),
        (None,),
    ),
    "into-more-heads": (
        _vary(BASE, num_kv_heads=2, total_kv_heads=4, tp_size=2, tp_rank=1),
        _vary(BASE, seed=1, num_kv_heads=4),
        (None,),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_arrive_where_asked_and_nowhere_else(name: str) -> None:
    source, target, paths = CASES[name]
    rng = np.random.default_rng(len(name))
    first_source = 2 if name == "half-the-heads" else 0
    first_target = 2 if name == "into-more-heads" else 0
    num_heads = min(source.num_kv_heads, target.num_kv_heads)
    with Trial(source, target, piece_bytes=9000) as trial:
        for turn in range(6):
            num_pages = int(rng.integers(1, 30))
            num_tokens = num_pages * source.page_size
            ours = rng.permutation(np.arange(1, source.num_pages))[:num_pages].astype(np.int32)
            theirs = rng.permutation(np.arange(1, target.num_pages))[: -(-num_tokens // target.page_size)]
            theirs = theirs.astype(np.int32)
            before = trial.digest_target(theirs, num_tokens, first_target, num_heads)
            report = trial.send(
                ours, theirs, path=paths[turn % len(paths)], chunks=min(1 + turn % 3, num_pages)
            )
            after = trial.digest_target(theirs, num_tokens, first_target, num_heads)
            wanted = trial.pool.digest(ours, num_tokens, first_source, num_heads)
            assert after.regions == wanted.regions
            assert after.regions != before.regions
            assert after.untouched == before.untouched
            assert report.record.nbytes == num_tokens * 2 * source.num_layers * num_heads * source.head_bytes
        deadline_s = time.monotonic() + 5
        while trial.num_due:
            assert time.monotonic() < deadline_s, "slab space did not come back"
            time.sleep(0.001)

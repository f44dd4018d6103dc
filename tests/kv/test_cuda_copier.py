"""CudaPageCopier's own lines on a CPU: the kernels' host build on a stream that runs late.

Shows that what a launch reads is held and that a copy is awaited; shows nothing of CUDA itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from pdserve.kv import cuda_copy
from pdserve.kv.cuda_copy import CudaPageCopier, DeviceArray
from pdserve.kv.layout import PagedRegions
from pdserve.transfer.plan import Path
from tests.support import kv_rig
from tests.support.kernel_builds import host_library
from tests.support.kv_rig import Geometry, Rig
from tests.support.late_device import LateKernels, LateRuntime
from tests.support.rows import rows

# cuda/dev, which tests.support.kernel_builds puts on the path
from host import HostKernels  # isort: skip

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH"),
]

TOKENS = (5, 17, 60, 128)


class SideStream(LateRuntime):
    """A mutation: page ids go up another way than the launches, and come behind the first of them."""

    def __init__(self, seed: int = 0) -> None:
        self._is_uploading = False
        self._late: list[Callable[[], None]] = []
        super().__init__(seed)

    def upload(self, values: Any) -> DeviceArray:
        self._is_uploading = values.dtype == np.int32
        try:
            return super().upload(values)
        finally:
            self._is_uploading = False

    def launch(self, work: Callable[[], None]) -> None:
        if self._is_uploading:
            self._late.append(work)
            return
        super().launch(work)
        while self._late:
            super().launch(self._late.pop())


@contextmanager
def device_rig(
    monkeypatch: pytest.MonkeyPatch, runtime_class: type[LateRuntime] = LateRuntime, **kwargs: Any
) -> Iterator[tuple[Rig, list[LateRuntime]]]:
    """A prefill and a decode rank whose pools are "on a GPU" each."""
    runtimes: list[LateRuntime] = []
    library = HostKernels(host_library())

    def make_copier(regions: PagedRegions) -> CudaPageCopier:
        runtime = runtime_class(len(runtimes))
        runtimes.append(runtime)
        kernels: Any = LateKernels(library, runtime, regions.num_pages)
        return CudaPageCopier(regions, kernels, runtime)

    monkeypatch.setattr(kv_rig, "make_copier", make_copier)
    rig = Rig(seed=3, max_piece_bytes=2048, **kwargs)
    try:
        yield rig, runtimes
    finally:
        rig.close()
        for runtime in runtimes:
            runtime.close()


def send_rooms(rig: Rig, runtimes: list[LateRuntime], num_rooms: int, max_tokens: int = 128) -> None:
    """Packed rooms one after the other; AssertionError when a byte is not the one that was sent."""
    for room in range(1, num_rooms + 1):
        tokens = min(TOKENS[room % 4], max_tokens)
        source, target = rig.send(room, tokens, path=Path.PACKED, chunks=1 + room % 2)
        rig.receive(room)
        held = rig.decode.geometry
        first = held.tp_rank * held.num_kv_heads if held.tp_size > 1 else 0
        for region in range(rig.prefill.geometry.num_regions):
            np.testing.assert_array_equal(
                rig.prefill.pool.tokens(region, source, tokens)[:, first : first + held.num_kv_heads],
                rig.decode.pool.tokens(region, target, tokens),
            )
        assert not [found for runtime in runtimes for found in runtime.violations]
    rig.settle()


@rows(
    ("source", "target"),
    [
        (Geometry(), Geometry()),
        (Geometry(), Geometry(page_size=8)),
        (Geometry(), Geometry(page_size=1, num_pages=160)),
        (Geometry(), Geometry(num_kv_heads=1, tp_size=2, tp_rank=1)),
        (Geometry(gap_bytes=8), Geometry(gap_bytes=8)),
    ],
)
@pytest.mark.parametrize("max_tables", [64, 0])
def test_every_byte_arrives_however_late_the_streams_run(
    source: Geometry, target: Geometry, max_tables: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_copy, "MAX_PAGE_TABLES", max_tables)
    with device_rig(monkeypatch, source=source, target=target) as (rig, runtimes):
        send_rooms(rig, runtimes, 12, max_tokens=40 if target.tp_size > 1 else 128)


def test_the_page_ids_of_a_chunk_go_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with device_rig(monkeypatch) as (rig, runtimes):
        before = [runtime.num_uploads for runtime in runtimes]
        rig.send(1, 120, path=Path.PACKED, chunks=2)
        rig.receive(1)
        assert rig.fabric.num_writes > 6
        assert sorted(r.num_uploads - n for r, n in zip(runtimes, before, strict=True)) == [1, 2]


def _drop_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_copy, "MAX_PAGE_TABLES", 0)

    def forget(self: Any, has_passed: Any, held: Any) -> None:
        self._has_passed = has_passed

    monkeypatch.setattr(cuda_copy._EventDone, "__init__", forget)


def _never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_copy._EventDone, "is_done", lambda self: True)


@rows(
    ("mutation", "runtime_class", "is_bad_read"),
    [(_drop_held, LateRuntime, True), (_never_wait, LateRuntime, False), (None, SideStream, True)],
)
def test_the_rig_catches_a_copier_that_frees_or_goes_on_too_early(
    mutation: Any, runtime_class: type[LateRuntime], is_bad_read: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if mutation is not None:
            mutation(patch)
        with device_rig(patch, runtime_class) as (rig, runtimes), pytest.raises(AssertionError):
            send_rooms(rig, runtimes, 12)
        assert any(runtime.violations for runtime in runtimes) is is_bad_read

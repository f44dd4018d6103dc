"""KV page kernels on a GPU: the CPU test's cases, a Llama pool against torch indexing, streams, grids."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdserve.errors import ConfigError
from pdserve.kv.kernels import KernelLibrary

sys.path.insert(0, str(Path(__file__).parents[2] / "cuda" / "dev"))

import cases
import reference

torch = pytest.importorskip("torch", reason="torch is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    torch.cuda.init()
    return KernelLibrary.for_device(tmp_path_factory.mktemp("kernels"), torch.cuda.current_device())


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def test_random_copies_move_the_bytes_of_the_reference(kernels: KernelLibrary) -> None:
    from device import DeviceCase

    for seed in range(300):
        case = cases.random_case(seed)
        inner, slab = [cases.inner(p) for p in case.pools], case.slab.copy()
        on_device = DeviceCase(case)
        reference.gather(case.geometry, inner, case.page_ids, cases.inner(slab))
        kernels.gather(on_device.params, stream())
        assert np.array_equal(on_device.slab.bytes(), slab), f"gather, seed {seed}: {case.geometry}"
        slab[:] = np.random.default_rng(seed).integers(0, 256, len(slab), np.uint8)
        on_device.slab.view.copy_(torch.from_numpy(slab))
        reference.scatter(case.geometry, inner, case.page_ids, cases.inner(slab))
        kernels.scatter(on_device.params, stream())
        for pool, expected in zip(on_device.pools, case.pools, strict=True):
            assert np.array_equal(pool.bytes(), expected), f"scatter, seed {seed}: {case.geometry}"


@pytest.mark.parametrize("heads", [(0, 8), (0, 4), (4, 8), (3, 4)])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 300, 2048])
def test_llama_pool_against_torch_indexing(
    kernels: KernelLibrary, heads: tuple[int, int], num_tokens: int
) -> None:
    from device import llama_copy, verify

    copy = llama_copy(num_tokens, seed=num_tokens + heads[0], heads=heads)
    verify(copy, _launcher(kernels, copy.params), f"{num_tokens} tokens, heads {heads}")


@pytest.mark.parametrize("max_blocks", [1, 7, 132])
def test_a_bounded_grid_copies_everything(kernels: KernelLibrary, max_blocks: int) -> None:
    from device import llama_copy, verify

    copy = llama_copy(1000, seed=5)
    verify(copy, _launcher(kernels, replace(copy.params, max_blocks=max_blocks)), f"{max_blocks} blocks")


def test_more_than_four_gibibytes_use_64_bit_offsets(kernels: KernelLibrary) -> None:
    from device import LlamaCopy, llama_copy, verify

    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    copy: LlamaCopy = llama_copy(40960, seed=7)
    assert copy.num_bytes > 2**32
    verify(copy, _launcher(kernels, copy.params), "5 GiB")


def test_a_copy_waits_for_its_stream_and_only_for_it(kernels: KernelLibrary) -> None:
    from device import llama_copy

    copy, side = llama_copy(256, seed=9), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        copy.pool.zero_()
        kernels.gather(copy.params, int(side.cuda_stream))
        done = torch.cuda.Event()
        done.record(side)
    assert not done.query(), "the call waited for the device"
    side.synchronize()
    assert not copy.slab.any(), "the gather ran before the work ahead of it"


def test_bad_arguments_leave_the_context_usable(kernels: KernelLibrary) -> None:
    from device import llama_copy, verify

    copy = llama_copy(64, seed=11)
    with pytest.raises(ConfigError, match="BAD_PAGE_RANGE"):
        kernels.gather(replace(copy.params, num_tokens=100_000, slab_region_stride=2**30), stream())
    verify(copy, _launcher(kernels, copy.params), "after a refusal")


def _launcher(kernels: KernelLibrary, params: Any) -> Callable[[int], None]:
    def launch(to_slab: int) -> None:
        (kernels.gather if to_slab else kernels.scatter)(params, stream())

    return launch

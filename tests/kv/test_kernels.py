"""KV page kernels without a GPU: indexing through g++, machine code through nvcc.

Proves nothing on races, the GPU's memory model, launch limits or speed: tests/gpu and bench/gpu do, on a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pdserve.errors import ConfigError
from pdserve.kv import kernels
from pdserve.kv.kernels import CopyParams, KernelLibrary, Status
from tests.support.kernel_builds import CUDA, cuda_library, host_library

# cuda/dev, which tests.support.kernel_builds puts on the path
import cases  # isort: skip
import reference  # isort: skip
from host import ORDERS, HostKernels, run_case  # isort: skip

pytestmark = pytest.mark.process

NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")


@pytest.fixture
def host(capfd: pytest.CaptureFixture[str]) -> Iterator[HostKernels]:
    """The host build; the test fails if UBSan (alignment, overflow, shifts) reported anything."""
    library = HostKernels(host_library())
    library.launch_as("forward")
    yield library
    assert "runtime error" not in (report := capfd.readouterr().err), report


@pytest.fixture(scope="session")
def cuda_path() -> Path:
    assert NVCC is not None
    return cuda_library(Path(NVCC))


@needs_gxx
def test_gather_and_scatter_move_the_bytes_of_the_reference(host: HostKernels) -> None:
    for seed in range(400):
        host.launch_as("forward", num_threads=(1, 7, 32, 128)[seed % 4])
        case = cases.random_case(seed)
        before, slab = [p.copy() for p in case.pools], case.slab.copy()
        inner = [cases.inner(p) for p in before]
        reference.gather(case.geometry, inner, case.page_ids, cases.inner(slab))
        run_case(host.gather, case)
        assert np.array_equal(case.slab, slab), f"gather, seed {seed}: {case.geometry}"
        assert all(map(np.array_equal, case.pools, before)), f"gather wrote the pool, seed {seed}"
        case.slab[:] = np.random.default_rng(seed).integers(0, 256, len(slab), np.uint8)
        slab[:] = case.slab
        reference.scatter(case.geometry, inner, case.page_ids, cases.inner(slab))
        run_case(host.scatter, case)
        assert all(map(np.array_equal, case.pools, before)), f"scatter, seed {seed}: {case.geometry}"
        assert np.array_equal(case.slab, slab), f"scatter wrote the slab, seed {seed}"


@needs_gxx
def test_a_slab_can_be_scattered_into_another_page_size(host: HostKernels) -> None:
    for seed in range(60):
        case = cases.random_case(seed)
        rng = np.random.default_rng(seed + 1000)
        g = case.geometry
        page_size = int(rng.integers(1, 65))
        first = int(rng.integers(0, page_size))
        page_ids = rng.permutation(-(-(first + g.num_tokens) // page_size) + 2).astype(np.int32)
        other = replace(g, page_size=page_size, first_token=first, token_stride=g.token_stride + seed % 3)
        size = len(page_ids) * page_size * other.token_stride
        pools = [cases.aligned_bytes(size, case.pool_shift) for _ in case.pools]
        target = replace(case, geometry=other, pools=pools, page_ids=page_ids)
        run_case(host.gather, case)
        run_case(host.scatter, target)
        expected = [np.zeros_like(p) for p in pools]
        slab = np.zeros_like(case.slab)
        reference.gather(g, [cases.inner(p) for p in case.pools], case.page_ids, cases.inner(slab))
        reference.scatter(other, [cases.inner(p) for p in expected], page_ids, cases.inner(slab))
        assert all(map(np.array_equal, pools, expected)), f"seed {seed}: {g} -> {other}"


@needs_gxx
def test_offsets_beyond_4_gib_are_reached(host: HostKernels) -> None:
    """Untouched pages of the mapping cost no memory."""
    no_reserve = 0x4000  # MAP_NORESERVE of Linux, which the module does not name
    with mmap.mmap(-1, 6 * 2**30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve) as memory:
        pool = np.frombuffer(memory, np.uint8)
        page_bytes, row = 16 * 4096, np.arange(4096) % 251
        last = len(pool) // page_bytes - 1
        pool[last * page_bytes : last * page_bytes + 4096] = row
        pointers, page_ids = np.array([pool.ctypes.data], np.uint64), np.array([last], np.int32)
        slab = np.zeros(4096, np.uint8)
        params = replace(
            PARAMS, region_ptrs=pointers.ctypes.data, page_ids=page_ids.ctypes.data, slab=slab.ctypes.data,
            slice_bytes=4096, num_tokens=1, num_regions=1, num_regions_total=1, num_page_ids=1,
        )  # fmt: skip
        host.gather(params, 0)
        assert np.array_equal(slab, row)
        host.gather(replace(params, slice_bytes=2048, slice_offset=2048), 0)
        assert np.array_equal(slab[:2048], row[2048:])
        del pool


@needs_gxx
def test_bytes_do_not_depend_on_the_order_of_lanes(host: HostKernels) -> None:
    for order in ORDERS:
        for seed, verb in itertools.product(range(40), ("gather", "scatter")):
            case, other = cases.random_case(seed), cases.random_case(seed)
            host.launch_as("forward", num_threads=32)
            run_case(getattr(host, verb), case)
            host.launch_as(order, seed, num_threads=32)
            run_case(getattr(host, verb), other)
            assert np.array_equal(case.slab, other.slab), f"{verb}, {order}, seed {seed}"
            assert all(map(np.array_equal, case.pools, other.pools)), f"{verb}, {order}, seed {seed}"


@needs_gxx
def test_no_lane_reads_outside_the_buffers() -> None:
    """AddressSanitizer sees reads that change no byte; it must be in the process from its start."""
    runtime = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    if not Path(runtime.stdout.strip()).is_absolute():
        pytest.skip("g++ has no AddressSanitizer runtime here")
    library = host_library("-fsanitize=address")
    done = subprocess.run(
        [sys.executable, CUDA / "dev" / "host.py", library], capture_output=True, text=True, check=False,
        env={"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0",
             "PYTHONMALLOC": "malloc", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(CUDA.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["100", "cases"]


@needs_gxx
def test_vector_width_is_the_widest_that_every_address_allows(host: HostKernels) -> None:
    rows: list[tuple[dict[str, int], int]] = [
        ({}, 16),
        ({"region_align": 8}, 8),
        ({"slice_offset": 4, "slice_bytes": 2048}, 4),
        ({"token_stride": 4098}, 2),
        ({"slab": 4097}, 1),
        ({"slab_region_stride": 2048 * 100 + 8}, 8),
        ({"slab_region_stride": 2048 * 100 + 8, "num_regions": 1}, 16),
        ({"token_stride": 8, "slice_bytes": 8, "num_tokens": 100, "first_token": 2}, 16),
        ({"token_stride": 8, "slice_bytes": 8, "num_tokens": 100, "first_token": 1}, 8),
    ]
    found = []
    for change, _ in rows:
        params = kernels._copy_struct(replace(PARAMS, **change))
        found.append((change, host.raw.pdserve_host_vector_bytes(ctypes.byref(params))))
    assert found == rows


PARAMS = CopyParams(
    region_ptrs=4096, page_ids=4096, slab=4096, slab_region_stride=2048 * 100, token_stride=4096,
    slice_offset=0, slice_bytes=2048, page_size=16, first_token=0, num_tokens=100, region_begin=0,
    num_regions=4, num_regions_total=64, num_page_ids=7, region_align=256,
)  # fmt: skip
"""Valid numbers with made-up addresses: refused before anything is read."""

REFUSALS: list[tuple[dict[str, int], Status]] = [
    ({"slab": 0}, Status.NULL_POINTER),
    ({"page_ids": 0}, Status.NULL_POINTER),
    ({"region_ptrs": 0}, Status.NULL_POINTER),
    ({"num_tokens": -1}, Status.OUT_OF_RANGE),
    ({"token_stride": 2**41}, Status.OUT_OF_RANGE),
    ({"page_size": 2**30, "num_page_ids": 1}, Status.OUT_OF_RANGE),
    ({"max_blocks": -1}, Status.OUT_OF_RANGE),
    ({"page_size": 0}, Status.BAD_PAGE_SIZE),
    ({"first_token": 16}, Status.BAD_FIRST_TOKEN),
    ({"slice_bytes": 0}, Status.BAD_SLICE),
    ({"slice_offset": 2049}, Status.BAD_SLICE),
    ({"slab_region_stride": 2048 * 100 - 1}, Status.BAD_SLAB_STRIDE),
    ({"region_begin": 61}, Status.BAD_REGION_RANGE),
    ({"num_page_ids": 6}, Status.BAD_PAGE_RANGE),
    ({"first_token": 13}, Status.BAD_PAGE_RANGE),
    ({"region_align": 0}, Status.BAD_REGION_ALIGN),
    ({"region_align": 24}, Status.BAD_REGION_ALIGN),
    ({"page_ids": 4098}, Status.MISALIGNED),
    ({"region_ptrs": 4100}, Status.MISALIGNED),
]


@needs_gxx
def test_bad_copies_are_refused_by_name(host: HostKernels) -> None:
    for change, status in REFUSALS:
        for call in (host.gather, host.scatter):
            with pytest.raises(ConfigError) as refused:
                call(replace(PARAMS, **change), 0)
            assert status.name in str(refused.value), change


@needs_gxx
def test_nothing_to_copy_touches_nothing(host: HostKernels) -> None:
    host.gather(replace(PARAMS, num_tokens=0, slab=0, page_ids=0), 0)
    host.scatter(replace(PARAMS, num_regions=0, region_ptrs=0), 0)


@needs_gxx
def test_every_status_has_a_sentence(host: HostKernels) -> None:
    texts = {host.raw.pdserve_status_text(status) for status in Status}
    assert len(texts) == len(Status) and b"unknown status" not in texts
    in_header = re.findall(r"k\w+ = (-?\d+),", (CUDA / "include/pdserve/check.cuh").read_text())
    assert sorted(map(int, in_header)) == sorted(Status)


@needs_nvcc
def test_nvcc_builds_three_architectures_without_warning_or_spill(cuda_path: Path) -> None:
    assert [p.name for p in cuda_path.parent.iterdir()] == [cuda_path.name]


@needs_nvcc
def test_sm_90_code_moves_16_bytes_per_instruction(cuda_path: Path) -> None:
    folder = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(folder))
    if cuobjdump is None:
        pytest.skip("cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    done = subprocess.run(
        [cuobjdump, "-sass", "-arch", "sm_90", cuda_path], capture_output=True, text=True, check=False,
        env={"PATH": f"{folder}:/usr/local/cuda/bin:/usr/bin:/bin"},
    )  # fmt: skip
    if "nvdisasm" in done.stderr:
        pytest.skip(f"cuobjdump finds no nvdisasm: {done.stderr.strip()}")
    functions = re.split(r"Function : ", done.stdout)[1:]
    wide = [text for text in functions if "copy_kernelI5uint4" in text.split("\n", 1)[0]]
    assert len(wide) == 4, "gather and scatter, flat and by row"
    for text in wide:
        name = text.split("\n", 1)[0]
        loads = [m.start() for m in re.finditer(r"\bLDG\.E\.128", text)]
        stores = [m.start() for m in re.finditer(r"\bSTG\.E\.128", text)]
        assert len(loads) == len(stores) == 4, f"{name}: {len(loads)} loads, {len(stores)} stores"
        assert max(loads) < min(stores), f"{name}: the four loads are not in flight together"
    assert not re.search(r"\b(LD|ST)\.E", done.stdout), "generic loads or stores: the address space was lost"


@needs_nvcc
def test_without_a_driver_calls_say_so_and_bad_arguments_still_come_first(cuda_path: Path) -> None:
    library = KernelLibrary(cuda_path)
    with pytest.raises(ConfigError, match="BAD_PAGE_SIZE"):
        library.gather(replace(PARAMS, page_size=0), 0)
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU: a launch with made-up addresses would harm its context")
    for call in (library.gather, library.scatter):
        with pytest.raises(ConfigError, match="this machine cannot run"):
            call(PARAMS, 0)


@needs_nvcc
def test_a_warning_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CUDA, tmp_path / "cuda")
    with (tmp_path / "cuda" / "coalesce.cu").open("a") as source:
        source.write("\nstatic __global__ void planted() { int unused_number = 1; }\n")
    monkeypatch.setattr(kernels, "find_sources", lambda: tmp_path / "cuda")
    with pytest.raises(ConfigError, match="unused_number"):
        kernels.build(tmp_path / "out", [90], Path(str(NVCC)))
    assert list((tmp_path / "out").iterdir()) == []

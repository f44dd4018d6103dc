"""The CUDA sources without a GPU: the same lines as C++ against numpy, and nvcc's output in machine code."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pdserve.errors import ConfigError
from pdserve.kv import kernels
from pdserve.kv.kernels import CopyParams, Fp8Params, HalfDtype, KernelLibrary, Status
from pdserve.kv.layout import heads_of_rank

CUDA = Path(__file__).parents[2] / "cuda"
ORDERS = {"forward": 0, "reversed": 1, "shuffled": 2}

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


def _has_nvcc() -> bool:
    try:
        kernels.find_nvcc()
    except ConfigError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not _has_nvcc(), reason="no nvcc on this machine")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    """The kernels built by g++ with undefined behaviour as an error."""
    made = tmp_path_factory.mktemp("kernels") / "libhost.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    flags += [
        "-fsanitize=undefined",
        "-fno-sanitize-recover=all",
        "-static-libubsan",
        f"-I{CUDA / 'include'}",
    ]
    subprocess.run(["g++", *flags, str(CUDA / "coalesce_host.cpp"), "-o", str(made)], check=True)
    return KernelLibrary(made)


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels built by nvcc for three generations, warnings and spills as errors."""
    return kernels.build(tmp_path_factory.mktemp("kernels"), [80, 90, 100])


class Case:
    """A random copy: pools in host memory, and the same copy by numpy."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        unit = int(rng.choice([1, 2, 4, 8, 16, 16]))
        row = unit * int(rng.integers(1, 9))
        self.stride = row + unit * int(rng.integers(0, 4))
        self.page_size, self.num_pages = int(rng.integers(1, 65)), int(rng.integers(1, 9))
        total = int(rng.integers(1, 7))
        is_whole = rng.random() < 0.4
        self.offset = 0 if is_whole else unit * int(rng.integers(0, row // unit))
        self.part = (
            self.stride if is_whole else unit * int(rng.integers(1, row // unit - self.offset // unit + 1))
        )
        nbytes = self.num_pages * self.page_size * self.stride
        self.memory = [np.zeros(nbytes + 64, dtype=np.uint8) for _ in range(total)]
        skip = [(-one.ctypes.data) % 16 + (0 if unit == 16 else unit % 16) for one in self.memory]
        self.pools = [one[s : s + nbytes] for one, s in zip(self.memory, skip, strict=True)]
        for pool in self.pools:
            pool[:] = rng.integers(0, 256, nbytes, dtype=np.uint8)
        self.pages = rng.permutation(self.num_pages)[: int(rng.integers(1, self.num_pages + 1))].astype(
            np.int32
        )
        self.first = int(rng.integers(0, self.page_size))
        self.tokens = int(rng.integers(1, len(self.pages) * self.page_size - self.first + 1))
        self.begin = int(rng.integers(0, total))
        self.count = int(rng.integers(1, total - self.begin + 1))
        self.gap = unit * int(rng.integers(0, 3))
        self.region_stride = self.tokens * self.part + self.gap
        self.slab_memory = rng.integers(0, 256, self.count * self.region_stride + 64, dtype=np.uint8)
        start = (-self.slab_memory.ctypes.data) % 16
        self.slab = self.slab_memory[start : start + self.count * self.region_stride]
        self.bases = np.array([pool.ctypes.data for pool in self.pools], dtype=np.uint64)
        align = 16
        while any(int(base) % align for base in self.bases):
            align //= 2
        self.params = CopyParams(
            region_ptrs=self.bases.ctypes.data, page_ids=self.pages.ctypes.data, slab=self.slab.ctypes.data,
            slab_region_stride=self.region_stride, token_stride=self.stride, slice_offset=self.offset,
            slice_bytes=self.part, page_size=self.page_size, first_token=self.first, num_tokens=self.tokens,
            region_begin=self.begin, num_regions=self.count, num_regions_total=total,
            num_page_ids=len(self.pages), region_align=align, max_blocks=int(rng.integers(0, 5)),
        )  # fmt: skip

    def rows(self) -> np.ndarray:
        slots = self.pages.astype(np.int64)[:, None] * self.page_size + np.arange(self.page_size)
        return slots.reshape(-1)[self.first : self.first + self.tokens]

    def view(self, region: int) -> np.ndarray:
        tokens = self.pools[region].reshape(-1, self.stride)
        return tokens[:, self.offset : self.offset + self.part]

    def slab_view(self, region: int) -> np.ndarray:
        flat = self.slab[region * self.region_stride :][: self.tokens * self.part]
        return flat.reshape(self.tokens, self.part)


@needs_gxx
@pytest.mark.parametrize("order", ORDERS)
def test_gather_and_scatter_equal_numpy_in_any_order_of_threads(host: KernelLibrary, order: str) -> None:
    widths = set()
    for seed in range(120):
        host._library.pdserve_host_launch(
            ctypes.c_int64(ORDERS[order]), ctypes.c_int64(seed), ctypes.c_int64([1, 32, 37][seed % 3])
        )
        case = Case(seed)
        widths.add(host._library.pdserve_host_vector_bytes(ctypes.byref(kernels._copy_struct(case.params))))
        slab, pools = case.slab.copy(), [pool.copy() for pool in case.pools]
        host.gather(case.params, 0)
        for region in range(case.count):
            expected = slab[region * case.region_stride :][: case.tokens * case.part].reshape(case.tokens, -1)
            expected[:] = case.view(case.begin + region)[case.rows()]
        np.testing.assert_array_equal(case.slab, slab, err_msg=f"gather seed {seed}")
        for pool, before in zip(case.pools, pools, strict=True):
            np.testing.assert_array_equal(pool, before)
        case.slab[:] = np.random.default_rng(seed).integers(0, 256, len(case.slab), dtype=np.uint8)
        wanted = [pool.copy() for pool in case.pools]
        for region in range(case.count):
            tokens = wanted[case.begin + region].reshape(-1, case.stride)
            tokens[case.rows(), case.offset : case.offset + case.part] = case.slab_view(region)
        host.scatter(case.params, 0)
        for pool, expected in zip(case.pools, wanted, strict=True):
            np.testing.assert_array_equal(pool, expected, err_msg=f"scatter seed {seed}")
    assert {1, 2, 4, 8, 16} <= widths, f"the cases must reach every vector width, got {widths}"


@needs_gxx
def test_pages_of_one_size_go_through_the_slab_into_pages_of_another(host: KernelLibrary) -> None:
    """Two tensor-parallel ranks' halves of the heads, pages of 16, into one pool with pages of 5."""
    rng = np.random.default_rng(0)
    heads, head_bytes, tokens = 4, 32, 45
    target = np.zeros((12 * 5, heads * head_bytes), dtype=np.uint8)
    target_pages = rng.permutation(12)[:9].astype(np.int32)
    halves = []
    for rank in range(2):
        held = heads_of_rank(heads, 2, rank)
        row = len(held) * head_bytes
        source = rng.integers(0, 256, (6 * 16, row), dtype=np.uint8)
        pages = rng.permutation(6)[:3].astype(np.int32)
        slab = np.zeros(tokens * row, dtype=np.uint8)
        for pool, ids, size, offset, is_gather in (
            (source, pages, 16, 0, True),
            (target, target_pages, 5, held.start * head_bytes, False),
        ):
            base = np.array([pool.ctypes.data], dtype=np.uint64)
            params = CopyParams(
                region_ptrs=base.ctypes.data, page_ids=ids.ctypes.data, slab=slab.ctypes.data,
                slab_region_stride=slab.nbytes, token_stride=pool.shape[1], slice_offset=offset,
                slice_bytes=row, page_size=size, first_token=0, num_tokens=tokens, region_begin=0,
                num_regions=1, num_regions_total=1, num_page_ids=len(ids), region_align=1,
            )  # fmt: skip
            (host.gather if is_gather else host.scatter)(params, 0)
        halves.append(source[(pages[:, None] * 16 + np.arange(16)).reshape(-1)[:tokens]])
    slots = (target_pages[:, None] * 5 + np.arange(5)).reshape(-1)[:tokens]
    np.testing.assert_array_equal(target[slots], np.concatenate(halves, axis=1))


@needs_gxx
@pytest.mark.parametrize("dtype", list(HalfDtype))
def test_fp8_slab_is_within_its_format_and_scales_follow_the_largest_value(
    host: KernelLibrary, dtype: HalfDtype
) -> None:
    rng = np.random.default_rng(int(dtype))
    heads, dim, page, tokens = 2, 16, 4, 10
    values = rng.normal(0, 30, (16, heads, dim)).astype(np.float32)
    if dtype is HalfDtype.FLOAT16:
        bits = values.astype(np.float16).view(np.uint16)
        exact = bits.view(np.float16).astype(np.float32)
    else:
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        exact = (bits.astype(np.uint32) << 16).view(np.float32)
    pool, ids = bits.copy(), np.array([2, 0, 3], dtype=np.int32)
    slab = np.zeros(tokens * heads * dim, dtype=np.uint8)
    scales = np.zeros((1, 3, heads), dtype=np.float32)
    base = np.array([pool.ctypes.data], dtype=np.uint64)
    copy = CopyParams(
        region_ptrs=base.ctypes.data, page_ids=ids.ctypes.data, slab=slab.ctypes.data,
        slab_region_stride=slab.nbytes, token_stride=heads * dim * 2, slice_offset=0,
        slice_bytes=heads * dim * 2,
        page_size=page, first_token=0, num_tokens=tokens, region_begin=0, num_regions=1, num_regions_total=1,
        num_page_ids=3, region_align=2,
    )  # fmt: skip
    params = Fp8Params(copy, scales.ctypes.data, dim, dtype, page, 0)
    host.gather_fp8(params, 0)
    slots = (ids[:, None] * page + np.arange(page)).reshape(-1)[:tokens]
    for number in range(3):
        part = np.abs(exact[slots[number * page : (number + 1) * page]]).max(axis=(0, 2))
        np.testing.assert_allclose(scales[0, number], part / 448, rtol=1e-5)
    pool[:] = 0
    host.scatter_fp8(params, 0)
    back = pool.view(np.float16).astype(np.float32) if dtype is HalfDtype.FLOAT16 else (
        pool.astype(np.uint32) << 16
    ).view(np.float32)  # fmt: skip
    bound = np.abs(exact[slots]) / 16 + np.repeat(scales[0], page, axis=0)[:tokens, :, None] * 2**-9
    assert (np.abs(back[slots] - exact[slots]) <= bound * 1.05 + 1e-3).all(), (
        "e4m3 keeps three bits of fraction"
    )
    untouched = np.setdiff1d(np.arange(16), slots)
    assert (pool[untouched] == 0).all()


@needs_gxx
@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"page_size": 0}, Status.BAD_PAGE_SIZE),
        ({"first_token": 64}, Status.BAD_FIRST_TOKEN),
        ({"slice_bytes": 0}, Status.BAD_SLICE),
        ({"slice_offset": 1 << 20}, Status.BAD_SLICE),
        ({"num_regions": 99}, Status.BAD_SLAB_STRIDE),
        ({"region_begin": 99}, Status.BAD_REGION_RANGE),
        ({"num_page_ids": 0}, Status.BAD_PAGE_RANGE),
        ({"region_align": 3}, Status.BAD_REGION_ALIGN),
        ({"slab": 0}, Status.NULL_POINTER),
        ({"num_tokens": -1}, Status.OUT_OF_RANGE),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(
    host: KernelLibrary, changes: dict[str, int], status: Status
) -> None:
    params = replace(Case(3).params, **changes)  # type: ignore[arg-type]
    if "num_regions" in changes:
        params = replace(params, slab_region_stride=0)
    with pytest.raises(ConfigError, match=status.name):
        host.gather(params, 0)


@needs_nvcc
def test_gpu_build_compiles_strictly_and_says_what_a_machine_without_a_driver_lacks(device: Path) -> None:
    library = KernelLibrary(device)
    case = Case(5)
    if _has_driver():
        pytest.skip("this machine has a driver: tests/gpu runs the kernels")
    with pytest.raises(ConfigError, match="cannot run the kernels"):
        library.gather(case.params, 0)
    with pytest.raises(ConfigError, match=r"no NVIDIA driver|knows no GPU"):
        kernels.device_arch()


@needs_nvcc
def test_machine_code_moves_sixteen_bytes_at_a_time(device: Path) -> None:
    tool = shutil.which("cuobjdump") or _pip_tool("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is not installed (pip: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm)")
    dump = subprocess.run(
        [tool, "-sass", "-arch", "sm_90", str(device)], capture_output=True, text=True, check=True
    )
    assert "LDG.E.128" in dump.stdout
    assert "STG.E.128" in dump.stdout


@needs_nvcc
def test_library_is_built_once_per_set_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []

    def build(out_dir: Path, archs: list[int], nvcc: Path | None = None) -> Path:
        built.append(archs)
        out_dir.mkdir(parents=True)
        (out_dir / kernels.LIBRARY_NAME).touch()
        return out_dir / kernels.LIBRARY_NAME

    monkeypatch.setattr(kernels, "build", build)
    first = kernels.build_cached(tmp_path, 90)
    assert kernels.build_cached(tmp_path, 90) == first
    assert kernels.build_cached(tmp_path, 80) != first
    assert built == [[90], [80]]


def test_missing_compiler_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nvcc is not at"):
        kernels.find_nvcc(tmp_path / "nvcc")
    with pytest.raises(ConfigError, match="not a usable library"):
        KernelLibrary(tmp_path / "nothing.so")


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _pip_tool(name: str) -> str | None:
    import sysconfig

    found = sorted(Path(sysconfig.get_paths()["purelib"]).glob(f"nvidia/cu*/bin/{name}"))
    return str(found[-1]) if found else None

"""The CUDA kernels that pack KV pages into a slab and unpack them: find or build the library, and call it.

Owns nvcc, the build cache and the C ABI. Knows addresses and strides, not tensors, pools or requests: the
caller keeps every buffer alive until its stream has passed the call. Loads without a GPU; calls then raise
ConfigError.

    pool region r  [pages][page_size][token_stride bytes]      token row: |..offset..|== slice ==|....|
                        |  gather                  ^
                        v                 scatter  |
    slab region r  [num_tokens][slice_bytes]       packed, slab_region_stride bytes from region to region

A wheel that was built where nvcc is carries the library; else it is built at first use. By hand:
``python -m pdserve.kv.kernels --out DIR --archs 80,90,100``. Kernels: cuda/include/pdserve.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import logging
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from enum import IntEnum
from pathlib import Path

from pdserve.errors import ConfigError, PdserveError

logger = logging.getLogger(__name__)

LIBRARY_NAME = "libpdserve_kv.so"
NVCC_FLAGS = (
    "-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-Wall,-Wextra,-fvisibility=hidden", "-Xptxas",
    "-v,-warn-spills,-warn-lmem-usage", "-cudart", "static", "-shared",
)  # fmt: skip
STRICT_FLAGS = ("-Werror", "all-warnings", "-Xcompiler", "-Werror")
"""Where the kernels are developed. A new compiler's new warning must not stop a server."""

PREBUILT = Path(__file__).parent / "prebuilt" / LIBRARY_NAME
"""The library that the wheel carries, see setup.py."""
PREBUILT_ARCHS = (80, 90, 100, 120)
"""Machine code of each, and PTX of the last for what comes after."""
BUILD_TIMEOUT_S = 600.0
CUDA_ERRORS_OF_THE_MACHINE = frozenset({35, 100, 209})
"""cudaErrorInsufficientDriver, cudaErrorNoDevice, cudaErrorNoKernelImageForDevice: no call will ever work."""

_SPILL = re.compile(r"([1-9]\d*) bytes spill (?:stores|loads)")
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h."""


class Status(IntEnum):
    """What the launchers refuse, as in cuda/include/pdserve/check.cuh. Positive results are CUDA errors."""

    OK = 0
    NULL_PARAMS = -1
    NULL_POINTER = -2
    OUT_OF_RANGE = -3
    BAD_PAGE_SIZE = -4
    BAD_FIRST_TOKEN = -5
    BAD_SLICE = -6
    BAD_SLAB_STRIDE = -7
    BAD_REGION_RANGE = -8
    BAD_PAGE_RANGE = -9
    BAD_REGION_ALIGN = -10
    MISALIGNED = -11


@dataclass(frozen=True, slots=True)
class CopyParams:
    """One copy between a paged pool and a packed slab. Addresses are of the device, sizes in bytes or tokens.

    Pool and slab must not overlap, and page ids must lie inside the pool: neither is checked. For a scatter
    the page ids must be distinct, or which token wins is undefined.
    """

    region_ptrs: int
    """Address of uint64 ``[num_regions_total]``: bases of the regions, in the order of layers."""
    page_ids: int
    """Address of int32 ``[num_page_ids]``: pool pages in token order."""
    slab: int
    """Address of the packed bytes, ``[num_regions][num_tokens][slice_bytes]``."""
    slab_region_stride: int
    """Bytes from one slab region to the next, at least ``num_tokens * slice_bytes``."""
    token_stride: int
    """Bytes from one token to the next in a pool region."""
    slice_offset: int
    """First byte of the head range in a token row."""
    slice_bytes: int
    """Bytes of the head range; equal to token_stride, whole pages are copied as one row each."""
    page_size: int
    """Tokens per page of this pool."""
    first_token: int
    """Place of token 0 in the first page, ``0 .. page_size - 1``."""
    num_tokens: int
    """Tokens to copy; 0 is a no-op."""
    region_begin: int
    """Slab region ``r`` is pool region ``region_begin + r``."""
    num_regions: int
    """Regions to copy; 0 is a no-op."""
    num_regions_total: int
    """Length of region_ptrs."""
    num_page_ids: int
    """Length of page_ids."""
    region_align: int
    """Smallest alignment of the pool regions: a power of two, bytes. 16 or more allows 16-byte vectors."""
    max_blocks: int = 0
    """Upper bound of the grid, to leave SMs to a model that runs meanwhile; 0: none."""


class _CopyStruct(ctypes.Structure):
    _fields_ = [
        (f.name, ctypes.c_uint64 if f.name in ("region_ptrs", "page_ids", "slab") else ctypes.c_int64)
        for f in fields(CopyParams)
    ]


def _copy_struct(params: CopyParams) -> _CopyStruct:
    return _CopyStruct(*astuple(params))


class KernelLibrary:
    """The loaded library. Calls are asynchronous on the given stream, allocate nothing, are thread-safe."""

    def __init__(self, path: Path) -> None:
        """Load a library made by :func:`build` or :func:`build_cached`.

        Raises:
            ConfigError: if ``path`` cannot be loaded or lacks an export.
        """
        self.path = path
        try:
            library = ctypes.CDLL(str(path))
            for name in ("gather", "scatter"):
                export = getattr(library, f"pdserve_{name}")
                export.argtypes, export.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
            library.pdserve_status_text.argtypes = [ctypes.c_int]
            library.pdserve_status_text.restype = ctypes.c_char_p
        except (OSError, AttributeError) as exc:
            raise ConfigError(f"KV kernels: {path} is not a usable library ({exc}); build it again") from exc
        self._library = library

    @classmethod
    def for_device(cls, cache_dir: Path, device: int = 0, nvcc: Path | None = None) -> KernelLibrary:
        """The library for the GPU ``device`` (CUDA's numbering): the wheel's, or built into ``cache_dir``.

        Raises:
            ConfigError: if there is no driver, no such GPU, no nvcc, or the build fails.
        """
        arch = device_arch(device)
        if PREBUILT.is_file() and arch >= min(PREBUILT_ARCHS):
            try:
                return cls(PREBUILT)
            except ConfigError as exc:
                logger.warning("%s", exc)
        return cls(build_cached(cache_dir, arch, nvcc))

    def gather(self, params: CopyParams, stream: int) -> None:
        """Pack pages into the slab: ``slab[r][t] = pool[region_begin + r][token t of page_ids][slice]``.

        Args:
            params: the copy; ``params.slab`` is written, the pool is not modified.
            stream: ``cudaStream_t`` as an integer, 0 for the default stream. Order slab readers after it.
        Raises:
            ConfigError: if a field is out of bounds, or this machine cannot run the kernels.
            PdserveError: if CUDA reports an error of the launch or of earlier work.
        """
        self._call("gather", _copy_struct(params), stream)

    def scatter(self, params: CopyParams, stream: int) -> None:
        """The inverse of :meth:`gather`: only the slice of the named tokens is written to the pool."""
        self._call("scatter", _copy_struct(params), stream)

    def _call(self, name: str, params: ctypes.Structure, stream: int) -> None:
        status: int = getattr(self._library, f"pdserve_{name}")(ctypes.byref(params), ctypes.c_void_p(stream))
        if status == Status.OK:
            return
        text = self._library.pdserve_status_text(status).decode()
        if status < 0:
            raise ConfigError(f"KV {name}: {text} ({Status(status).name})")
        if status in CUDA_ERRORS_OF_THE_MACHINE:
            raise ConfigError(
                f"KV {name}: this machine cannot run {self.path}: {text} (cudaError {status}); "
                "check the driver with nvidia-smi, or turn coalescing off"
            )
        raise PdserveError(f"KV {name}: {text} (cudaError {status})")


def find_sources() -> Path:
    """The folder of coalesce.cu: ``cuda/`` of the checkout, or beside this file in an installed wheel.

    Raises:
        ConfigError: if neither has it.
    """
    here = Path(__file__).resolve()
    candidates = (here.parents[2] / "cuda", here.parent / "cuda")
    for folder in candidates:
        if (folder / "coalesce.cu").is_file():
            return folder
    raise ConfigError(
        f"KV kernels: coalesce.cu is in neither {candidates[0]} nor {candidates[1]}; reinstall pdserve"
    )


def find_nvcc(nvcc: Path | None = None) -> Path:
    """The CUDA compiler: ``nvcc`` if given, else on PATH, in /usr/local/cuda, or the pip package's.

    Raises:
        ConfigError: if there is none.
    """
    if nvcc is not None:
        if nvcc.is_file():
            return nvcc
        raise ConfigError(f"KV kernels: nvcc is not at {nvcc}; correct the setting")
    on_path = shutil.which("nvcc")
    site = Path(sysconfig.get_paths()["purelib"])
    candidates = [Path(on_path)] if on_path else []
    candidates += [Path("/usr/local/cuda/bin/nvcc"), *sorted(site.glob("nvidia/cu*/bin/nvcc"), reverse=True)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(
        "KV kernels: nvcc not found on PATH, in /usr/local/cuda/bin or in the Python environment; "
        "install the CUDA toolkit, or build elsewhere: python -m pdserve.kv.kernels --out DIR"
    )


def device_arch(device: int = 0) -> int:
    """Compute capability of a GPU as nvcc spells it, 90 for 9.0. Asks the driver, makes no CUDA context.

    Raises:
        ConfigError: if there is no driver or no such GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        raise ConfigError("KV kernels: no NVIDIA driver here (libcuda.so.1 is missing)") from exc
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    status = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(handle), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, handle)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, handle)
    )
    if status != 0:
        raise ConfigError(
            f"KV kernels: the driver knows no GPU {device} (CUresult {status}); check nvidia-smi"
        )
    return major.value * 10 + minor.value


def build(out_dir: Path, archs: Sequence[int], nvcc: Path | None = None, *, is_strict: bool = True) -> Path:
    """Compile ``out_dir/libpdserve_kv.so``. Replaces it atomically.

    Args:
        out_dir: made if missing.
        archs: compute capabilities, such as 80, 90, 100: machine code of each, PTX of the highest.
        nvcc: the compiler; None searches.
        is_strict: warnings and spilled registers are errors.
    Raises:
        ConfigError: if there is no nvcc, or it fails; with the end of its output.
    """
    compiler, sources = find_nvcc(nvcc), find_sources()
    if not archs:
        raise ConfigError("KV kernels: no architecture named; expected compute capabilities such as 80,90")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in sorted(set(archs))]
    targets.append(f"-gencode=arch=compute_{max(archs)},code=compute_{max(archs)}")
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix=".build-") as scratch:
        made = Path(scratch) / LIBRARY_NAME
        flags = [*NVCC_FLAGS, *(STRICT_FLAGS if is_strict else ()), *targets, f"-I{sources / 'include'}"]
        output = _run_nvcc(compiler, [*flags, str(sources / "coalesce.cu"), "-o", str(made)])
        if spill := _SPILL.search(output):
            if is_strict:
                raise ConfigError(f"KV kernels: a kernel spills registers ({spill[0]}); see ptxas -v")
            logger.warning("KV kernels: a kernel spills registers (%s): slower, not wrong", spill[0])
        made.replace(out_dir / LIBRARY_NAME)
    return out_dir / LIBRARY_NAME


def build_cached(cache_dir: Path, arch: int, nvcc: Path | None = None) -> Path:
    """The library for one architecture, from ``cache_dir`` if the same sources, flags and nvcc made one.

    Processes that ask at once build once: a file lock lets the others wait. Raises as :func:`build`.
    """
    compiler = find_nvcc(nvcc)
    folder = cache_dir / f"kv-sm{arch}-{_build_key(compiler, find_sources())}"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / LIBRARY_NAME).is_file():
            logger.info("building KV kernels arch=%s into %s", arch, folder)
            build(folder, [arch], compiler, is_strict=False)
    return folder / LIBRARY_NAME


def _build_key(nvcc: Path, sources: Path) -> str:
    """Sixteen hex digits over everything that decides the library's bytes."""
    digest = hashlib.sha256("\0".join(NVCC_FLAGS).encode())
    digest.update(subprocess.run([nvcc, "--version"], capture_output=True, check=False).stdout)
    for path in (sources / "coalesce.cu", *sorted((sources / "include").rglob("*.cuh"))):
        digest.update(str(path.relative_to(sources)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run_nvcc(nvcc: Path, arguments: list[str]) -> str:
    try:
        done = subprocess.run([str(nvcc), *arguments], capture_output=True, text=True, check=False,
                              timeout=BUILD_TIMEOUT_S)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ConfigError(f"KV kernels: {nvcc} did not run to its end: {exc}") from exc
    output = done.stdout + done.stderr
    if done.returncode != 0:
        complaints = [
            line for line in output.splitlines() if not line.startswith(("ptxas info", "    0 bytes"))
        ]
        raise ConfigError(f"KV kernels: {nvcc} failed ({done.returncode}):\n" + "\n".join(complaints[-20:]))
    return output


def main(argv: Sequence[str] | None = None) -> None:
    """Build ahead of time and write the path of the library to stdout."""
    parser = argparse.ArgumentParser(prog="python -m pdserve.kv.kernels", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the library; made if missing")
    parser.add_argument("--archs", default="80,90,100", help="compute capabilities (default 80,90,100)")
    parser.add_argument("--nvcc", type=Path, help="the CUDA compiler (default: searched)")
    args = parser.parse_args(argv)
    try:
        archs = [int(arch) for arch in args.archs.split(",")]
    except ValueError:
        parser.error(f"--archs: expected numbers such as 80,90,100, got {args.archs!r}")
    try:
        sys.stdout.write(f"{build(args.out, archs, args.nvcc)}\n")
    except ConfigError as exc:
        parser.exit(1, f"{exc}\n")


if __name__ == "__main__":
    main()

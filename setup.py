"""Compiles the CUDA kernels into the wheel where there is an nvcc; without one a server does it at first use.

All else is in pyproject.toml. A wheel with kernels is for this platform only.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pdserve.errors import ConfigError
from pdserve.kv import kernels

try:
    NVCC: Path | None = kernels.find_nvcc()
except ConfigError:
    NVCC = None


class BuildWithKernels(build_py):
    """Adds ``pdserve/kv/prebuilt/libpdserve_kv.so``; a checkout that is installed editable needs none."""

    def run(self) -> None:
        super().run()
        if NVCC is not None and not self.editable_mode:
            folder = kernels.PREBUILT.parent.relative_to(Path(__file__).resolve().parent)
            kernels.build(Path(self.build_lib) / folder, kernels.PREBUILT_ARCHS, NVCC, is_strict=False)


class PlatformWheel(bdist_wheel):
    """Any Python, one platform: the library knows nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class WithKernels(Distribution):
    """Belongs to a platform if it carries the library."""

    def has_ext_modules(self) -> bool:
        return NVCC is not None


setup(distclass=WithKernels, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})

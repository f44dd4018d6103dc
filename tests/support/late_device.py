"""A GPU runtime on a CPU that is as unkind as CUDA allows: its stream runs late, freed memory is overwritten.

``LateRuntime`` is a ``DeviceRuntime``, ``LateKernels`` are the kernels' g++ build on its stream.
"""

from __future__ import annotations

import ctypes
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pdserve.kv.cuda_copy import DeviceArray
from pdserve.kv.kernels import CopyParams, KernelLibrary

POISON = 0x5A
"""Every byte of memory that is not yet written, or freed: as a page id far outside any pool."""


class LateRuntime:
    """One stream: a thread that works in order, after random delays, until ``close``."""

    stream = 7

    def __init__(self, seed: int = 0) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._rng = random.Random(seed)
        self._memory: list[npt.NDArray[np.uint8]] = []
        self.num_uploads = 0
        self.violations: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def launch(self, work: Callable[[], None]) -> None:
        """Do ``work`` when the stream gets to it."""
        self._work.put(work)

    def upload(self, values: npt.NDArray[np.generic]) -> DeviceArray:
        """The copy reads pinned memory when its turn comes."""
        self.num_uploads += 1
        pinned = self._allocate(np.frombuffer(values.tobytes(), dtype=np.uint8))
        target = self._allocate(np.full(values.nbytes, POISON, dtype=np.uint8))
        source_bytes, target_bytes = pinned.content, target.content
        self.launch(lambda: target_bytes.__setitem__(slice(None), source_bytes))
        return DeviceArray(target.content.ctypes.data, (pinned, target))

    def record(self) -> Callable[[], bool]:
        """Set by the stream itself."""
        event = threading.Event()
        self.launch(event.set)
        return event.is_set

    def close(self) -> None:
        """Run out of work."""
        self._work.put(None)
        self._thread.join()

    def _allocate(self, content: npt.NDArray[np.uint8]) -> _Memory:
        aligned = np.empty(len(content) + 8, dtype=np.uint8)
        skip = -aligned.ctypes.data % 8
        view = aligned[skip : skip + len(content)]
        view[:] = content
        # The bytes stay mapped after they are freed, as another owner's would be.
        self._memory.append(aligned)
        return _Memory(view)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            time.sleep(self._rng.choice((0, 0, 0.0003, 0.001)))
            work()


class _Memory:
    """Overwritten when freed."""

    def __init__(self, content: npt.NDArray[np.uint8]) -> None:
        self.content = content

    def __del__(self) -> None:
        self.content[:] = POISON


class LateKernels:
    """``KernelLibrary`` whose copies run on a ``LateRuntime``'s stream."""

    def __init__(self, library: KernelLibrary, runtime: LateRuntime, num_pages: int) -> None:
        self._library, self._runtime, self._num_pages = library, runtime, num_pages

    def gather(self, params: CopyParams, stream: int) -> None:
        """Behind the stream's work so far."""
        self._launch(self._library.gather, params, stream)

    def scatter(self, params: CopyParams, stream: int) -> None:
        """Behind the stream's work so far."""
        self._launch(self._library.scatter, params, stream)

    def _launch(self, kernel: Any, params: CopyParams, stream: int) -> None:
        assert stream == self._runtime.stream
        self._runtime.launch(lambda: self._copy(kernel, params))

    def _copy(self, kernel: Any, params: CopyParams) -> None:
        ids = np.ctypeslib.as_array((ctypes.c_int32 * params.num_page_ids).from_address(params.page_ids))
        if ids.min() < 0 or ids.max() >= self._num_pages:
            self._runtime.violations.append("page ids freed before the copy, or not yet uploaded")
            return
        kernel(params, 0)

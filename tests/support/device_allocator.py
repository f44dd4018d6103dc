"""pdserve's page allocator as on a GPU, on a CPU: streams that run late, reads that are counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from pdserve.plugin.kv_pool import PdservePagedAllocator


@dataclass(slots=True)
class LateStream:
    """Work is launched at once and finished when the test says so."""

    num_launched: int = 0
    num_finished: int = 0
    is_instant: bool = False
    on_finish: list[tuple[int, Any]] = field(default_factory=list)

    def launch(self) -> None:
        """One more step runs."""
        self.num_launched += 1

    def finish(self) -> None:
        """All that was launched has run."""
        self.num_finished = self.num_launched
        ready, self.on_finish = self.on_finish, []
        for _, action in ready:
            action()


@dataclass(frozen=True, slots=True)
class LateEvent:
    """Behind everything that a stream had been given when it was recorded."""

    stream: LateStream
    position: int

    def query(self) -> bool:
        """Whether the stream has come so far."""
        return self.stream.is_instant or self.stream.num_finished >= self.position


HOST_READS = (
    torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.numpy, torch.Tensor.__bool__,
    torch.Tensor.__int__, torch.Tensor.__len__,
)  # fmt: skip


class OnDevice(torch.Tensor):
    """A tensor whose contents the host cannot read without waiting; counts who does."""

    num_reads = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS and func is not torch.Tensor.__len__:
            OnDevice.num_reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def on_device(values: Any) -> torch.Tensor:
    """``values`` as int64 on the pretended device."""
    return torch.as_tensor(values, dtype=torch.int64).as_subclass(OnDevice)  # type: ignore[return-value]


class DeviceAllocator(PdservePagedAllocator):
    """Freed pages are read through ``schedule`` and cool behind ``forward_stream``."""

    _is_host = False

    def clear(self) -> None:
        self.forward_stream = LateStream(is_instant=True)
        self.schedule = LateStream(is_instant=True)
        self.waits: list[LateEvent] = []
        super().clear()

    def _start_read(self, pages: Any) -> torch.Tensor:
        source = pages.as_subclass(torch.Tensor)
        if self.schedule.is_instant:
            return source.clone()
        host = torch.full_like(source, -1)
        self.schedule.launch()
        self.schedule.on_finish.append((self.schedule.num_launched, lambda: host.copy_(source)))
        return host

    def _record_event(self, stream: Any) -> Any:
        stream = stream or self.schedule
        return LateEvent(stream, stream.num_launched)

    def _wait_on_device(self, event: Any) -> None:
        self.waits.append(event)

    def _upload(self, pages: Any) -> torch.Tensor:
        return on_device(torch.from_numpy(pages))


def make_allocator(kind: str, num_pages: int, page_size: int, *, need_sort: bool = True) -> Any:
    """``stock`` is SGLang's, ``segment`` pdserve's on host memory, ``device`` pdserve's as on a GPU."""
    classes = {
        "stock": PagedTokenToKVPoolAllocator,
        "segment": PdservePagedAllocator,
        "device": DeviceAllocator,
    }
    return classes[kind](num_pages * page_size, page_size, torch.float16, "cpu", None, need_sort)

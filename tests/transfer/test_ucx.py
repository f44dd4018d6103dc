"""A UCX_TLS that cannot carry KV is named at the start, not by a first transfer that hangs."""

from __future__ import annotations

from pdserve.transfer.engine import MemoryKind
from pdserve.transfer.ucx import transport_problem
from tests.support.rows import rows


@rows("tls", ["", "all", "tcp", "tcp,self", "sm,self", "^cuda_ipc", "rc_x:aux,cuda", "^tcp", "ib"])
def test_usable_settings_pass_for_host_memory(tls: str) -> None:
    assert transport_problem(tls, MemoryKind.DRAM) == ""


@rows("tls", ["self", "cuda_copy", "self,cuda_ipc", "^all"])
def test_settings_without_a_road_to_another_process_are_named(tls: str) -> None:
    problem = transport_problem(tls, MemoryKind.DRAM)
    assert f"UCX_TLS={tls}" in problem
    assert "another process" in problem


@rows(
    ("tls", "is_usable"),
    [("tcp", False), ("tcp,cuda_copy", True), ("rc,cuda", True), ("^cuda", False), ("^tcp", True)],
)
def test_gpu_memory_needs_a_gpu_transport(tls: str, is_usable: bool) -> None:
    assert (transport_problem(tls, MemoryKind.VRAM) == "") is is_usable

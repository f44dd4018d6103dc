"""What a decode server keeps free for others when it makes a pool on the host follows the machine."""

from __future__ import annotations

import pytest

from pdserve.plugin import patches

pytestmark = pytest.mark.slow

GIB = 1 << 30


@pytest.mark.parametrize(("whole", "free", "budget"), [(8, 4, 3.6), (2000, 400, 390), (0, 400, 390)])
def test_a_small_machine_gives_all_but_a_twentieth_and_a_large_one_all_but_10_gib(
    whole: int, free: int, budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.mem_cache.pool_host import base

    monkeypatch.setattr(base, "HICACHE_HOST_MEMORY_RESERVE_BYTES", base.HICACHE_HOST_MEMORY_RESERVE_BYTES)
    monkeypatch.setattr(base, "available_host_memory_bytes", lambda **_: free * GIB)
    monkeypatch.setattr(patches, "whole_memory", lambda: whole * GIB)
    found = patches.budget_of_this_machine(base.host_memory_budget_bytes, 1)
    assert found == pytest.approx(budget * GIB, rel=1e-6)

"""A GPU server that has no kernels serves all the same: page by page, and SGLang's way where bytes differ."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pdserve.errors import ConfigError
from pdserve.kv.coalesce import NoCopier
from pdserve.transfer.engine import MemoryKind
from pdserve.transfer.plan import Path
from tests.support import kv_rig
from tests.support.kv_rig import DecodeRank, Geometry, PrefillRank, Rig
from tests.support.loopback import LoopbackFabric

pytestmark = pytest.mark.slow


def test_rooms_go_page_by_page_even_where_packing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_rig, "make_copier", lambda regions: NoCopier())
    rig = Rig(slab_bytes=0, decode_slab_bytes=0)
    try:
        for room in range(1, 4):
            source, target = rig.send(room, 60, path=Path.PACKED, chunks=room)
            rig.receive(room)
            rig.check(source, target, 60)
        rig.settle()
    finally:
        rig.close()


def _plane(prefill: PrefillRank, served: list[tuple[Any, str]]) -> Any:
    from pdserve.plugin.sending import PrefillPlane
    from pdserve.transfer.slots import Slab

    manager = SimpleNamespace(
        _prefill_unique_rank=lambda: 0, serve_without_offer=lambda info, why: served.append((info, why))
    )
    engine: Any = prefill.engine
    return PrefillPlane(manager, engine, NoCopier(), prefill.own, Slab(0, 0, 0), forced_path=None)


@pytest.mark.parametrize("is_alike", [True, False])
def test_a_decode_rank_that_needs_conversion_is_left_to_sglang(is_alike: bool) -> None:
    rng, fabric, served = np.random.default_rng(0), LoopbackFabric(), []
    target = Geometry() if is_alike else Geometry(num_kv_heads=1, tp_size=2, tp_rank=1)
    decode = DecodeRank(fabric.engine("d"), target, rng, slab_bytes=0)
    prefill = PrefillRank(fabric.engine("p"), Geometry(), rng)
    plane = _plane(prefill, served)
    try:
        info = SimpleNamespace(agent_name="d", agent_metadata=decode.engine.describe())
        plane.connect(info, decode.offer(prefill))
        assert plane.knows("d") is is_alike
        assert [one for one, _ in served] == ([] if is_alike else [info])
    finally:
        plane.outbox.close()


def test_the_log_says_once_why_and_the_server_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pdserve.plugin import transfer_manager as module

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConfigError("KV kernels: nvcc failed (1):\na.cu: error\nb.cu: error")

    monkeypatch.setattr(module, "make_copier", fail)
    manager: Any = object.__new__(module.TransferManager)
    manager._pdserve_env = SimpleNamespace(data_plane=SimpleNamespace(cache_dir=""))
    assert manager._make_copier(None, MemoryKind.VRAM, 0) is None
    (record,) = caplog.records
    assert record.getMessage().endswith("no conversion: KV kernels: nvcc failed (1):")


@pytest.mark.parametrize(("device", "taken_mb"), [("cuda", 256), ("cuda:1", 256), ("cpu", 0)])
def test_the_slab_is_taken_off_before_the_pool_is_sized(
    device: str, taken_mb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pdserve.plugin.patches import leave_room_for_slab

    def size(self: Any, budget_bytes: int, *, cap_tokens: int | None = None) -> tuple[int, int | None]:
        return (1 << 30) - budget_bytes, cap_tokens

    monkeypatch.setenv("PDSERVE_ACTIVE", "1")
    configurator = SimpleNamespace(device=device)
    assert leave_room_for_slab(size, configurator, 1 << 30, cap_tokens=7) == (taken_mb << 20, 7)
    monkeypatch.setenv("PDSERVE_SLAB_MB", "100")
    assert leave_room_for_slab(size, configurator, 1 << 30)[0] == (100 << 20 if taken_mb else 0)
    monkeypatch.setenv("PDSERVE_DATA_PLANE", "off")
    assert leave_room_for_slab(size, configurator, 1 << 30)[0] == 0

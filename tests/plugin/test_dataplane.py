"""What the data plane serves and what it leaves to SGLang."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pdserve.config.launch import LaunchConfig
from pdserve.config.worker_env import DataPlaneConfig, WorkerEnv
from pdserve.errors import ConfigError, KVLayoutMismatch
from pdserve.plugin.dataplane import regions_of, unsupported
from pdserve.transfer.engine import MemoryKind, PeerName
from pdserve.transfer.peer import RankPool, connect_peer
from tests.support.kv_rig import DecodeRank, Geometry, PrefillRank
from tests.support.loopback import LoopbackFabric
from tests.support.rows import rows

ON = WorkerEnv(is_active=True)


def _manager(**changes: Any) -> Any:
    args = {
        "kv_data_mem_kinds": ["DRAM"] * 4, "kv_data_ptrs": [1, 2, 3, 4], "kv_item_lens": [64] * 4,
        "kv_data_lens": [640] * 4, "state_types": [], "page_size": 4, "num_draft_entries": 0,
    }  # fmt: skip
    fields = {
        "pp_size": 1, "attn_cp_size": 1, "dcp_size": 1, "kv_shard_size": 1, "is_hybrid_mla_backend": False,
        "defer_decode_allocation": False, "server_args": SimpleNamespace(enable_pd_role_switch=False),
    }  # fmt: skip
    args |= {
        name: value for name, value in changes.items() if name in args or name == "mla_compression_ratios"
    }
    fields |= {name: value for name, value in changes.items() if name in fields}
    return SimpleNamespace(kv_args=SimpleNamespace(**args), **fields)


def test_plain_attention_pools_are_served() -> None:
    assert unsupported(_manager(), ON) == ""


@rows(
    ("changes", "reason"),
    [
        ({"pp_size": 2}, "pipeline parallelism"),
        ({"attn_cp_size": 2}, "context parallelism"),
        ({"dcp_size": 2}, "context parallelism"),
        ({"kv_shard_size": 2}, "sharded"),
        ({"is_hybrid_mla_backend": True}, "hybrid MLA"),
        ({"state_types": ["mamba"]}, "state pools (mamba)"),
        ({"defer_decode_allocation": True}, "prefill_complete"),
        ({"mla_compression_ratios": [4]}, "compressed"),
        ({"kv_item_lens": [64, 64, 32, 64]}, "different page sizes"),
        ({"kv_data_mem_kinds": ["VRAM", "DRAM", "VRAM", "VRAM"]}, "mixed memory kinds (DRAM, VRAM)"),
        ({"kv_data_ptrs": []}, "no KV regions"),
        ({"server_args": SimpleNamespace(enable_pd_role_switch=True)}, "role switching"),
    ],
)
def test_everything_else_stays_sglangs_and_says_why(changes: dict[str, Any], reason: str) -> None:
    assert reason in unsupported(_manager(**changes), ON)


@rows(
    "env",
    [
        WorkerEnv(is_active=True, stock=True),
        WorkerEnv(is_active=True, data_plane=DataPlaneConfig(is_on=False)),
    ],
)
def test_switched_off_is_off(env: WorkerEnv) -> None:
    assert unsupported(_manager(), env) == "switched off"


def test_regions_come_from_sglangs_arguments() -> None:
    regions = regions_of(_manager().kv_args, is_mla=False, total_kv_heads=8, tp_size=2)
    assert (regions.num_regions, regions.num_pages, regions.row_bytes, regions.num_kv_heads) == (4, 10, 16, 4)
    assert regions.bases == (1, 3, 2, 4), "layer by layer: SGLang registers K1 K2 V1 V2"
    latent = regions_of(_manager().kv_args, is_mla=True, total_kv_heads=1, tp_size=4)
    assert latent.num_kv_heads == 1


@rows(
    ("environ", "message"),
    [
        ({"PDSERVE_DATA_PLANE": "yes"}, "PDSERVE_DATA_PLANE must be on or off"),
        ({"PDSERVE_TRANSFER_PATH": "fast"}, "auto, direct, packed"),
        ({"PDSERVE_SLAB_MB": "-1"}, "PDSERVE_SLAB_MB must be a whole number"),
        ({"PDSERVE_SLAB_MB": "99999999"}, "65536 MiB"),
    ],
)
def test_wrong_settings_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataPlaneConfig.from_environ(environ)


def test_launch_options_reach_the_workers_environment() -> None:
    assert LaunchConfig().data_plane_environment == {}
    config = LaunchConfig(data_plane="off", transfer_path="packed", slab_mb=128)
    assert DataPlaneConfig.from_environ(config.data_plane_environment) == DataPlaneConfig(
        is_on=False, path="packed", slab_mb=128, cache_dir=DataPlaneConfig.from_environ({}).cache_dir
    )
    for wrong in ({"data_plane": "maybe"}, {"transfer_path": "slow"}, {"slab_mb": -3}):
        with pytest.raises(ConfigError):
            LaunchConfig(**wrong)  # type: ignore[arg-type]


@rows(
    ("source", "target", "message"),
    [
        (Geometry(num_regions=4), Geometry(num_regions=6), "6 regions"),
        (Geometry(head_bytes=24), Geometry(head_bytes=12), "of 12 bytes a head"),
    ],
)
def test_pools_that_no_conversion_joins_are_refused_before_a_byte_moves(
    source: Geometry, target: Geometry, message: str
) -> None:
    rng, fabric = np.random.default_rng(0), LoopbackFabric()
    decode = DecodeRank(fabric.engine("d"), target, rng)
    prefill = PrefillRank(fabric.engine("p"), source, rng)
    with pytest.raises(KVLayoutMismatch, match=message):
        prefill.connect(decode)
    assert fabric.num_writes == 0


def test_another_kv_dtype_is_refused_by_name() -> None:
    rng, fabric = np.random.default_rng(0), LoopbackFabric()
    decode, prefill = (
        DecodeRank(fabric.engine("d"), Geometry(), rng),
        PrefillRank(fabric.engine("p"), Geometry(), rng),
    )
    own = RankPool(prefill.pool.regions, 2, 1, 0, MemoryKind.DRAM, 0, "bfloat16")
    with pytest.raises(KVLayoutMismatch, match="same --kv-cache-dtype"):
        connect_peer(
            prefill.engine, PeerName("d"), decode.offer(prefill), own,
            source_blocks=prefill.blocks, max_piece_bytes=4096,
        )  # fmt: skip


def test_another_page_size_without_slab_space_is_refused_with_the_way_out() -> None:
    rng, fabric = np.random.default_rng(0), LoopbackFabric()
    decode = DecodeRank(fabric.engine("d"), Geometry(page_size=8), rng, slab_bytes=0)
    prefill = PrefillRank(fabric.engine("p"), Geometry(), rng)
    link = connect_peer(
        prefill.engine, PeerName("d"), decode.offer(prefill), prefill.own,
        source_blocks=prefill.blocks, max_piece_bytes=4096,
    )  # fmt: skip
    with pytest.raises(KVLayoutMismatch, match="raise PDSERVE_SLAB_MB"):
        link.plan(np.array([1], dtype=np.int32), np.array([1], dtype=np.int32), 0, None)

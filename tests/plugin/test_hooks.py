"""The parts of the plugin that need no SGLang process."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pdserve import SUPPORTED_SGLANG
from pdserve.config.worker_env import WorkerEnv
from pdserve.errors import ConfigError, ProtocolMismatch
from pdserve.plugin.geometry import describe_layout, rank_index
from pdserve.plugin.hooks import check_sglang_version
from pdserve.plugin.imports import is_cpu_server
from pdserve.plugin.stats import TransferStats
from tests.support.rows import rows


def _kv_args(**changes: object) -> SimpleNamespace:
    values: dict[str, object] = {
        "kv_item_lens": [16 * 2 * 16 * 4] * 4,
        "page_size": 16,
        "kv_cache_dtype_str": "float32",
        "kv_layout": None,
        "num_draft_entries": 0,
    }
    return SimpleNamespace(**{**values, **changes})


def test_layout_counts_k_and_v_of_all_heads() -> None:
    layout = describe_layout(_kv_args(), is_mla=False, total_kv_heads=2, tp_size=1, model_dtype="float16")
    assert (layout.num_layers, layout.page_size, layout.num_kv_heads) == (2, 16, 2)
    assert layout.token_bytes == 2 * 2 * 16 * 4  # K and V, heads, head_dim, bytes


def test_auto_dtype_is_the_models_so_that_half_precisions_are_told_apart() -> None:
    auto = _kv_args(kv_cache_dtype_str="auto")
    layout = describe_layout(auto, is_mla=False, total_kv_heads=2, tp_size=1, model_dtype="bfloat16")
    assert layout.dtype == "bfloat16"


def test_layout_of_one_tp_rank_equals_the_whole_models() -> None:
    whole = describe_layout(_kv_args(), is_mla=False, total_kv_heads=2, tp_size=1, model_dtype="float16")
    half = describe_layout(
        _kv_args(kv_item_lens=[16 * 1 * 16 * 4] * 4),
        is_mla=False,
        total_kv_heads=2,
        tp_size=2,
        model_dtype="float16",
    )
    assert half == whole


def test_mla_layout_has_one_region_per_layer() -> None:
    layout = describe_layout(
        _kv_args(kv_item_lens=[64 * 576 * 2] * 3, page_size=64),
        is_mla=True,
        total_kv_heads=1,
        tp_size=4,
        model_dtype="float16",
    )
    assert (layout.kind, layout.num_layers, layout.token_bytes) == ("mla", 3, 576 * 2)


def test_rank_index_follows_sglangs_table_order() -> None:
    manager = SimpleNamespace(
        system_dp_size=1, system_dp_rank=0, attn_dp_size=2, attn_dp_rank=1, attn_cp_size=1,
        attn_cp_rank=0, attn_tp_size=4, attn_tp_rank=3, pp_size=1, pp_rank=0,
    )  # fmt: skip
    assert rank_index(manager) == (7, 8)


@rows(
    ("flags", "is_cpu"),
    [
        (["--device", "cpu", "--port", "1"], True),
        (["--port", "1", "--device=cpu"], True),
        (["--port", "1"], False),
    ],
)
def test_cpu_server_is_told_by_its_flags(flags: list[str], is_cpu: bool) -> None:
    assert is_cpu_server(flags) is is_cpu


@pytest.mark.process
def test_gpu_only_package_is_not_found_afterwards() -> None:
    code = (
        "from pdserve.plugin.imports import skip_gpu_only_packages; skip_gpu_only_packages()\n"
        "import importlib.util; print(importlib.util.find_spec('flashinfer'))\n"
        "import flashinfer\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "None\n"
    assert "ModuleNotFoundError" in done.stderr


def test_other_sglang_release_is_refused_by_name() -> None:
    check_sglang_version(SUPPORTED_SGLANG)
    with pytest.raises(ProtocolMismatch, match=r"SGLang 0\.5\.22 .*install sglang=="):
        check_sglang_version("0.5.22")


def test_plugin_is_inert_without_the_launchers_environment() -> None:
    assert WorkerEnv.from_environ({"PDSERVE_ROLE": "nonsense"}) == WorkerEnv()


def test_malformed_worker_environment_is_named() -> None:
    with pytest.raises(ConfigError, match="PDSERVE_ROLE must be prefill or decode"):
        WorkerEnv.from_environ({"PDSERVE_ACTIVE": "1", "PDSERVE_ROLE": "nonsense"})


@pytest.mark.process
def test_child_process_counts_into_its_parents_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_STATS", "")
    stats = TransferStats.create()
    code = (
        "from pdserve.plugin.stats import TransferStats\n"
        "s = TransferStats.open()\n"
        "s.add(0, kv_bytes=4096, transfers=1)\n"
        "s.add(5, kv_bytes=1, failures=2)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    counted = {name: value for name, value in stats.total().items() if value}
    assert counted == {"kv_bytes": 4097, "transfers": 1, "failures": 2}


@pytest.mark.process
def test_process_whose_parent_is_gone_leaves_at_once() -> None:
    code = (
        "from pdserve.process.parent_death import die_with_parent; "
        f"die_with_parent({os.getpid()}); print('alive')"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.stdout == "alive\n"
    wrong = code.replace(str(os.getpid()), "1")
    orphan = subprocess.run([sys.executable, "-c", wrong], capture_output=True, text=True, check=False)
    assert (orphan.returncode, orphan.stdout) == (1, "")

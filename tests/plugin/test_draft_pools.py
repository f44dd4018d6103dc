"""Regions pair up as SGLang pairs them, with and without a draft model's pool on the decode side."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdserve.plugin.dataplane import regions_of
from pdserve.plugin.geometry import describe_layout
from tests.support.rows import rows

pytestmark = pytest.mark.slow

LAYERS, PAGE_BYTES = 3, 64


def _kv_args(first: int, num_draft_layers: int, regions_per_layer: int = 2) -> Any:
    """SGLang's KVArgs: K and V of the target, then of the draft; addresses tell the entries apart."""
    from sglang.srt.disaggregation.base.conn import KVArgs

    args = KVArgs()
    num_entries = (LAYERS + num_draft_layers) * regions_per_layer
    args.kv_data_ptrs = [first + entry for entry in range(num_entries)]
    args.kv_data_lens = [PAGE_BYTES * 10] * num_entries
    args.kv_item_lens = [PAGE_BYTES] * num_entries
    args.num_draft_entries = num_draft_layers * regions_per_layer
    args.page_size, args.kv_layout, args.kv_cache_dtype_str = 4, None, "bfloat16"
    return args


@rows("num_draft_layers", [(0, 0), (0, 1), (0, 2), (1, 1), (2, 2)])
@rows("is_mla", [False, True])
def test_the_same_entries_are_paired_as_by_sglang(num_draft_layers: tuple[int, int], is_mla: bool) -> None:
    from sglang.srt.disaggregation.utils import build_transfer_entry_pairs

    sides = [
        _kv_args(first, drafts, 1 if is_mla else 2)
        for first, drafts in zip((1000, 2000), num_draft_layers, strict=True)
    ]
    stock = build_transfer_entry_pairs(
        [], [], *(len(side.kv_data_ptrs) for side in sides), allow_positional_fallback=True
    )
    prefill, decode = (regions_of(side, is_mla=is_mla, total_kv_heads=2, tp_size=1).bases for side in sides)
    ours = set(zip(prefill, decode[: len(prefill)], strict=True))
    assert ours == {(1000 + here, 2000 + there) for here, there in stock}


def test_a_draft_model_on_one_side_does_not_keep_a_server_out_of_the_fleet() -> None:
    plain, drafting = (
        describe_layout(
            _kv_args(0, drafts), is_mla=False, total_kv_heads=2, tp_size=1, model_dtype="bfloat16"
        )
        for drafts in (0, 1)
    )
    assert plain.num_layers == LAYERS
    assert not plain.differences(drafting)


def test_metadata_rows_stop_at_the_shorter_list_on_both_sides() -> None:
    from types import SimpleNamespace

    from pdserve.plugin.sending import PrefillPlane

    jobs: list[Any] = []
    plane: Any = object.__new__(PrefillPlane)
    plane._forced_path = None
    plane._own = SimpleNamespace(regions=SimpleNamespace(page_size=4))
    plane.outbox = SimpleNamespace(submit=jobs.append)
    plane._manager = SimpleNamespace(
        kv_args=SimpleNamespace(aux_data_ptrs=[100, 200, 300], aux_item_lens=[8, 16, 4]),
        decode_kv_args_table={"d": SimpleNamespace(dst_aux_ptrs=[1000, 2000])},
    )
    info = SimpleNamespace(agent_name="d", dst_kv_indices=np.array([1]), dst_aux_index=2)
    plane.submit(7, [info], kv_indices=np.array([1]), first_page=0, is_last=True, aux_index=1, events=[])
    (job,) = jobs
    assert job.aux.tolist() == [[108, 8, 0], [216, 16, 0]]
    assert job.targets[0].aux.tolist() == [[1016, 8, 0], [2032, 16, 0]]

"""From SGLang's KVArgs to the layout descriptor the fleet compares. Pure."""

from __future__ import annotations

from typing import Any

from pdserve.types import KVLayoutDescriptor


def describe_layout(
    kv_args: Any,
    *,
    is_mla: bool,
    total_kv_heads: int,
    tp_size: int,
    model_dtype: str,
    num_layers: int | None = None,
    converts_pages: bool = False,
) -> KVLayoutDescriptor:
    """Geometry of this rank's pools, scaled to the whole model.

    ``tp_size`` is the attention TP; with fewer heads than ranks each rank
    holds one head (SGLang: ModelConfig.get_num_kv_heads). ``model_dtype``
    stands in for a KV dtype of ``auto``; ``num_layers`` overrides what the
    regions say.

    MHA registers K regions then V regions, ``2 * num_layers`` in all; MLA one
    region per layer; a draft model's follow, and need not be on both sides.
    ``kv_item_lens`` are bytes of one page of this rank's heads
    (sglang/srt/disaggregation/base/conn.py, KVArgs).
    """
    items = list(kv_args.kv_item_lens)
    page_size = int(kv_args.page_size)
    regions_per_layer = 1 if is_mla else 2
    found_layers = (len(items) - int(kv_args.num_draft_entries)) // regions_per_layer
    total_heads = 1 if is_mla else total_kv_heads
    local_heads = 1 if is_mla else max(1, total_kv_heads // tp_size)
    scale = total_heads // local_heads
    layer_page_bytes = items[0] * regions_per_layer if items else 0
    return KVLayoutDescriptor(
        page_size=page_size,
        dtype=model_dtype if kv_args.kv_cache_dtype_str == "auto" else str(kv_args.kv_cache_dtype_str),
        num_layers=found_layers if num_layers is None else num_layers,
        num_kv_heads=total_heads,
        token_bytes=layer_page_bytes * scale // max(page_size, 1),
        kind="mla" if is_mla else "mha",
        layout=str(kv_args.kv_layout or "NHD"),
        converts_pages=converts_pages,
    )


def rank_index(manager: Any) -> tuple[int, int]:
    """``(rank, num_ranks)`` of a KV manager in [dp][cp][tp][pp] order, as SGLang's bootstrap table."""
    system_dp = int(manager.system_dp_size)
    dp_size = int(manager.attn_dp_size) if system_dp == 1 else system_dp
    dp_rank = int(manager.attn_dp_rank) if system_dp == 1 else int(manager.system_dp_rank)
    rank = dp_rank
    for index, size in (
        (manager.attn_cp_rank, manager.attn_cp_size),
        (manager.attn_tp_rank, manager.attn_tp_size),
        (manager.pp_rank, manager.pp_size),
    ):
        rank = rank * int(size) + int(index)
    total = dp_size * int(manager.attn_cp_size) * int(manager.attn_tp_size) * int(manager.pp_size)
    return rank, total

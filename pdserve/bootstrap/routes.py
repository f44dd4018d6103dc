"""SGLang's bootstrap protocol for one prefill instance, as pure state.

Prefill ranks report rows; a decode server asks first for the topology (all
four indices -1) and then for the ZMQ address of each rank it needs. Field
names and answers follow sglang/srt/disaggregation/common/conn.py (0.5.23),
CommonKVBootstrapServer and PrefillServerInfo.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pdserve.errors import PdserveError

DP_RANK_TTL_S = 120.0
"""SGLang forgets a room's DP rank after this long (BOOTSTRAP_ENTRY_CLEANUP_INTERVAL)."""

_REQUIRED = (
    "attn_tp_size", "attn_tp_rank", "attn_cp_size", "attn_cp_rank", "attn_dp_size", "attn_dp_rank",
    "pp_size", "pp_rank", "system_dp_size", "system_dp_rank", "rank_ip", "rank_port", "page_size",
)  # fmt: skip
_SHARED = (
    "kv_layout", "dsv41_spec_layout", "enable_dsa_cache_layer_split", "enable_kv_cache_sharding",
    "prefill_http_port",
)  # fmt: skip


class RouteError(PdserveError):
    """The question or report cannot be served; ``status`` is the HTTP status SGLang gives for it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RouteTable:
    """Rank rows of one prefill instance, and which DP rank serves which room."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int, int, int], Mapping[str, Any]] = {}
        self._dp_ranks: dict[int, tuple[int, float]] = {}

    @property
    def is_complete(self) -> bool:
        """True once every rank of the topology has reported."""
        if not self._rows:
            return False
        row = next(iter(self._rows.values()))
        expected = _dp_size(row) * int(row["attn_cp_size"]) * int(row["attn_tp_size"]) * int(row["pp_size"])
        return len(self._rows) >= expected

    def put(self, row: Mapping[str, Any]) -> None:
        """Take a rank's row; the same rank reporting again replaces its former row.

        Raises:
            RouteError: 400 if a field is missing or not a number where one is needed.
        """
        missing = [name for name in _REQUIRED if row.get(name) is None]
        if missing:
            raise RouteError(400, f"rank row lacks {', '.join(missing)}")
        try:
            key = (
                int(row["attn_dp_rank"] if int(row["system_dp_size"]) == 1 else row["system_dp_rank"]),
                int(row["attn_cp_rank"]),
                int(row["attn_tp_rank"]),
                int(row["pp_rank"]),
            )
            int(row["rank_port"])
        except (TypeError, ValueError) as exc:
            raise RouteError(400, f"rank row has a field that is not a number: {exc}") from exc
        self._rows[key] = dict(row)

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Start over with these rows."""
        self._rows.clear()
        for row in rows:
            self.put(row)

    def topology(self) -> dict[str, Any]:
        """Answer to the question with all indices -1. Raises RouteError 503 while ranks are missing."""
        self._require_complete()
        row = next(iter(self._rows.values()))
        info: dict[str, Any] = {
            "attn_tp_size": row["attn_tp_size"],
            "attn_cp_size": row["attn_cp_size"],
            "dp_size": _dp_size(row),
            "pp_size": row["pp_size"],
            "page_size": row["page_size"],
            "kv_cache_dtype": row.get("kv_cache_dtype"),
            "follow_bootstrap_room": row.get("load_balance_method", "follow_bootstrap_room")
            == "follow_bootstrap_room",
            "decode_allocation_policy": row.get("decode_allocation_policy", "early"),
        }
        info.update({name: row[name] for name in _SHARED if row.get(name) is not None})
        return info

    def rank(self, dp_rank: int, cp_rank: int, tp_rank: int, pp_rank: int) -> dict[str, Any]:
        """``{"rank_ip", "rank_port"}`` of one rank. Raises RouteError 503 or 404."""
        self._require_complete()
        row = self._rows.get((dp_rank, cp_rank, tp_rank, pp_rank))
        if row is None:
            raise RouteError(
                404, f"no prefill rank with dp={dp_rank} cp={cp_rank} tp={tp_rank} pp={pp_rank} is registered"
            )
        return {"rank_ip": row["rank_ip"], "rank_port": int(row["rank_port"])}

    def register_dp_rank(self, room: int, dp_rank: int, now: float) -> None:
        """Remember which DP rank serves ``room``; forgets entries older than DP_RANK_TTL_S."""
        stale = [key for key, (_, time_s) in self._dp_ranks.items() if now - time_s > DP_RANK_TTL_S]
        for key in stale:
            del self._dp_ranks[key]
        self._dp_ranks[room] = (dp_rank, now)

    def query_dp_ranks(self, rooms: Iterable[int]) -> dict[str, int]:
        """DP rank of each known room, keyed by the room as text (JSON keys are text)."""
        return {str(room): self._dp_ranks[room][0] for room in rooms if room in self._dp_ranks}

    def _require_complete(self) -> None:
        if not self.is_complete:
            raise RouteError(503, f"prefill server is not fully registered yet ({len(self._rows)} ranks)")


def _dp_size(row: Mapping[str, Any]) -> int:
    return int(row["attn_dp_size"] if int(row["system_dp_size"]) == 1 else row["system_dp_size"])

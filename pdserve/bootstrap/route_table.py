"""SGLang's bootstrap protocol for one prefill instance, as pure state.

Prefill ranks report rows; a decode server asks first for the topology (all
four indices -1) and then for the ZMQ address of each rank it needs. Field
names and answers follow sglang/srt/disaggregation/common/conn.py (0.5.23),
CommonKVBootstrapServer and PrefillServerInfo.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec

from pdserve.errors import PdserveError

DP_RANK_TTL_S = 120.0
"""SGLang forgets a room's DP rank after this long (BOOTSTRAP_ENTRY_CLEANUP_INTERVAL)."""

_Size = Annotated[int, msgspec.Meta(ge=1)]
_Index = Annotated[int, msgspec.Meta(ge=0)]
_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]

_AGREEING = (
    "attn_tp_size", "attn_cp_size", "dp_size", "pp_size", "page_size", "dsv41_spec_layout",
    "decode_allocation_policy",
)  # fmt: skip


class RouteError(PdserveError):
    """The question or report cannot be served; ``status`` is the HTTP status SGLang gives for it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RankRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one prefill rank PUTs to ``/route``; names as in ``register_to_bootstrap``."""

    attn_tp_size: _Size
    attn_tp_rank: _Index
    attn_cp_size: _Size
    attn_cp_rank: _Index
    attn_dp_size: _Size
    attn_dp_rank: _Index
    pp_size: _Size
    pp_rank: _Index
    system_dp_size: _Size
    system_dp_rank: _Index
    rank_ip: Annotated[str, msgspec.Meta(min_length=1)]
    rank_port: _Port
    page_size: _Size
    kv_cache_dtype: str | None = None
    kv_layout: str | None = None
    dsv41_spec_layout: dict[str, Any] | None = None
    load_balance_method: str | None = None
    enable_dsa_cache_layer_split: bool | None = None
    enable_kv_cache_sharding: bool | None = None
    prefill_http_port: _Port | None = None
    decode_allocation_policy: str = "early"
    converts_pages: bool = False
    """pdserve's data plane writes into pools of another page size; SGLang itself cannot."""

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> RankRow:
        """The row, checked; numbers may come as text, as SGLang allows.

        Raises:
            RouteError: 400 naming the field that is missing, of another type or out of range.
        """
        missing = [f.name for f in msgspec.structs.fields(cls) if f.required and row.get(f.name) is None]
        if missing:
            raise RouteError(400, f"rank row lacks {', '.join(missing)}")
        try:
            parsed = msgspec.convert(row, cls, strict=False)
        except ValueError as exc:  # of another type or out of range; or text that is not Unicode
            raise RouteError(400, f"rank row is wrong: {exc}") from exc
        for name, rank, size in zip(["dp", "cp", "tp", "pp"], parsed.key, parsed.sizes, strict=True):
            if rank >= size:
                raise RouteError(400, f"rank row is wrong: {name} rank {rank} of {size}")
        return parsed

    @property
    def dp_size(self) -> int:
        """Number of DP groups: of the attention layers, or of the whole system if that is larger than 1."""
        return self.attn_dp_size if self.system_dp_size == 1 else self.system_dp_size

    @property
    def key(self) -> tuple[int, int, int, int]:
        """``(dp, cp, tp, pp)``: place of this rank in the topology."""
        dp_rank = self.attn_dp_rank if self.system_dp_size == 1 else self.system_dp_rank
        return dp_rank, self.attn_cp_rank, self.attn_tp_rank, self.pp_rank

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """``(dp, cp, tp, pp)`` sizes of the topology."""
        return self.dp_size, self.attn_cp_size, self.attn_tp_size, self.pp_size

    @property
    def num_ranks(self) -> int:
        """How many rows a complete table has."""
        dp, cp, tp, pp = self.sizes
        return dp * cp * tp * pp


class RouteTable:
    """Rank rows of one prefill instance, and which DP rank serves which room."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int, int, int], RankRow] = {}
        self._dp_ranks: dict[int, tuple[int, float]] = {}  # oldest first

    @property
    def is_complete(self) -> bool:
        """True once every rank of the topology has reported."""
        return bool(self._rows) and len(self._rows) >= self._first.num_ranks

    def put(self, row: Mapping[str, Any]) -> None:
        """Take a rank's row; the same rank reporting again replaces its former row.

        Raises:
            RouteError: 400 if the row is malformed or contradicts the other ranks.
        """
        parsed = RankRow.parse(row)
        others = {key: other for key, other in self._rows.items() if key != parsed.key}
        _check_agrees(parsed, others)
        self._rows[parsed.key] = parsed

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Start over with these rows; unchanged if one of them is refused. Raises RouteError as ``put``."""
        fresh: dict[tuple[int, int, int, int], RankRow] = {}
        for row in rows:
            parsed = RankRow.parse(row)
            _check_agrees(parsed, fresh)
            fresh[parsed.key] = parsed
        self._rows = fresh

    def topology(self) -> dict[str, Any]:
        """Answer to the question with all indices -1. Raises RouteError 503 while ranks are missing."""
        self._require_complete()
        row = self._first
        method = self._known("load_balance_method") or "follow_bootstrap_room"
        info: dict[str, Any] = {
            "attn_tp_size": row.attn_tp_size,
            "attn_cp_size": row.attn_cp_size,
            "dp_size": row.dp_size,
            "pp_size": row.pp_size,
            # SGLang's decode refuses another page size; None leaves the check to our own layout comparison.
            "page_size": None if row.converts_pages else row.page_size,
            "kv_cache_dtype": self._known("kv_cache_dtype"),
            "follow_bootstrap_room": method == "follow_bootstrap_room",
            "enable_dsa_cache_layer_split": bool(self._known("enable_dsa_cache_layer_split")),
            "enable_kv_cache_sharding": bool(self._known("enable_kv_cache_sharding")),
            "prefill_http_port": self._known("prefill_http_port"),
            "decode_allocation_policy": row.decode_allocation_policy,
        }
        # SGLang leaves these two out when unset, for decode servers older than the fields.
        for name in ("kv_layout", "dsv41_spec_layout"):
            if (value := self._known(name)) is not None:
                info[name] = value
        return info

    def rank(self, dp_rank: int, cp_rank: int, tp_rank: int, pp_rank: int) -> dict[str, Any]:
        """``{"rank_ip", "rank_port"}`` of one rank. Raises RouteError 503 or 404."""
        self._require_complete()
        row = self._rows.get((dp_rank, cp_rank, tp_rank, pp_rank))
        if row is None:
            raise RouteError(
                404, f"no prefill rank with dp={dp_rank} cp={cp_rank} tp={tp_rank} pp={pp_rank} is registered"
            )
        return {"rank_ip": row.rank_ip, "rank_port": row.rank_port}

    def register_dp_rank(self, room: int, dp_rank: int, now: float) -> None:
        """Remember which DP rank serves ``room``, for DP_RANK_TTL_S."""
        self._forget_old_rooms(now)
        self._dp_ranks.pop(room, None)
        self._dp_ranks[room] = (dp_rank, now)

    def query_dp_ranks(self, rooms: Iterable[int], now: float) -> dict[str, int]:
        """DP rank of each known room, keyed by the room as text (JSON keys are text)."""
        self._forget_old_rooms(now)
        return {str(room): self._dp_ranks[room][0] for room in rooms if room in self._dp_ranks}

    def describe_missing(self) -> str:
        """``1 of 2 ranks have reported``, for refusals."""
        expected = self._first.num_ranks if self._rows else "unknown"
        return f"prefill server is not fully registered yet ({len(self._rows)} of {expected} ranks)"

    @property
    def _first(self) -> RankRow:
        return next(iter(self._rows.values()))

    def _known(self, name: str) -> Any:
        """The first rank's value that is set: SGLang keeps the first one it hears, too."""
        return next((value for row in self._rows.values() if (value := getattr(row, name)) is not None), None)

    def _forget_old_rooms(self, now: float) -> None:
        # Oldest first, so this looks at the old ones only: it runs once per request.
        while self._dp_ranks:
            room = next(iter(self._dp_ranks))
            if now - self._dp_ranks[room][1] <= DP_RANK_TTL_S:
                return
            del self._dp_ranks[room]

    def _require_complete(self) -> None:
        if not self.is_complete:
            raise RouteError(503, self.describe_missing())


def _check_agrees(row: RankRow, others: Mapping[tuple[int, int, int, int], RankRow]) -> None:
    for other in others.values():
        for name in _AGREEING:
            ours, theirs = getattr(row, name), getattr(other, name)
            if ours != theirs:
                raise RouteError(400, f"ranks of one prefill server disagree: {name}: {ours} != {theirs}")

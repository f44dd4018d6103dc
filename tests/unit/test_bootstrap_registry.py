"""Membership rules without sockets."""

from __future__ import annotations

import msgspec
import pytest

from pdserve.bootstrap.messages import RankRoute, Register
from pdserve.bootstrap.registry import Refused, Registry
from pdserve.bootstrap.routes import DP_RANK_TTL_S, RouteError, RouteTable
from pdserve.types import InstanceId, KVLayoutDescriptor, Role, WorkerId, WorkerInfo

LAYOUT = KVLayoutDescriptor(page_size=16, dtype="float32", num_layers=2, num_kv_heads=2, token_bytes=256)


def row(tp_rank: int = 0, tp_size: int = 1, port: int = 5000) -> dict[str, object]:
    """What one SGLang prefill rank PUTs."""
    return {
        "attn_tp_size": tp_size, "attn_tp_rank": tp_rank, "attn_cp_size": 1, "attn_cp_rank": 0,
        "attn_dp_size": 1, "attn_dp_rank": 0, "pp_size": 1, "pp_rank": 0, "system_dp_size": 1,
        "system_dp_rank": 0, "rank_ip": "127.0.0.1", "rank_port": port, "page_size": 16,
        "kv_cache_dtype": "float32", "kv_layout": None, "load_balance_method": "follow_bootstrap_room",
        "prefill_http_port": 31000, "dsv41_spec_layout": None, "enable_dsa_cache_layer_split": False,
        "enable_kv_cache_sharding": False, "decode_allocation_policy": "early",
    }  # fmt: skip


def worker(name: str, instance: str, role: Role = Role.PREFILL, model: str = "tiny") -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        instance_id=InstanceId(instance),
        role=role,
        url="http://127.0.0.1:31000",
        model=model,
        served_model_name=model,
    )


def report(role: Role = Role.PREFILL, layout: KVLayoutDescriptor = LAYOUT) -> RankRoute:
    route = row() if role is Role.PREFILL else None
    return RankRoute(role=role, rank=0, num_ranks=1, kv_layout=layout, route=route)


def join(registry: Registry, info: WorkerInfo, now: float = 0.0, **changes: object) -> None:
    layout = msgspec.structs.replace(LAYOUT, **changes)
    registry.report_rank(info.instance_id, report(info.role, layout), now)
    registry.register(Register(worker=info), now)


def test_worker_waits_until_all_its_ranks_have_reported() -> None:
    registry = Registry()
    info = worker("prefill-0", "a")
    with pytest.raises(Refused) as refused:
        registry.register(Register(worker=info), 0.0)
    assert (refused.value.refusal.code, refused.value.status) == ("ranks_pending", 425)

    join(registry, info)
    assert [member.worker_id for member in registry.members()] == ["prefill-0"]
    assert registry.members()[0].kv_layout == LAYOUT


def test_layout_mismatch_names_each_difference_and_the_other_worker() -> None:
    registry = Registry()
    join(registry, worker("prefill-0", "a"))
    with pytest.raises(Refused, match=r"page_size: 32 != 16; dtype: bfloat16 != float32.*prefill-0"):
        join(registry, worker("decode-0", "b", Role.DECODE), page_size=32, dtype="bfloat16")
    assert len(registry.members()) == 1


def test_other_model_is_refused_although_its_layout_fits() -> None:
    registry = Registry()
    join(registry, worker("prefill-0", "a"))
    with pytest.raises(Refused, match="decode-0 cannot join: model: other != tiny"):
        join(registry, worker("decode-0", "b", Role.DECODE, model="other"))


def test_other_protocol_is_refused() -> None:
    registry = Registry()
    with pytest.raises(Refused, match="speaks protocol 99, this service 1"):
        registry.register(Register(worker=worker("p", "a"), protocol=99), 0.0)


def test_restarted_worker_supersedes_its_predecessor_at_once() -> None:
    gone: list[str] = []
    registry = Registry(on_gone=gone.append)
    join(registry, worker("prefill-0", "a"))
    join(registry, worker("prefill-0", "b"))
    assert gone == ["a"]
    assert [member.instance_id for member in registry.members()] == ["b"]


def test_restart_with_new_layout_is_allowed_when_it_is_alone() -> None:
    registry = Registry()
    join(registry, worker("prefill-0", "a"))
    registry.deregister(InstanceId("a"), "stopped")
    join(registry, worker("prefill-0", "b"), page_size=32)
    assert registry.members()[0].instance_id == "b"


def test_lease_expires_unless_renewed() -> None:
    registry = Registry()
    join(registry, worker("prefill-0", "a"))
    registry.heartbeat(InstanceId("a"), 9.0)
    assert registry.expire(18.9) == []
    assert registry.expire(19.0) == ["a"]
    with pytest.raises(Refused) as refused:
        registry.heartbeat(InstanceId("a"), 20.0)
    assert refused.value.status == 404


def test_version_changes_exactly_when_members_do() -> None:
    registry = Registry()
    seen = [registry.version]
    join(registry, worker("prefill-0", "a"))
    seen.append(registry.version)
    registry.heartbeat(InstanceId("a"), 1.0)
    assert registry.version == seen[-1] > seen[0]
    assert registry.deregister(InstanceId("a"), "") is True
    assert registry.deregister(InstanceId("a"), "") is False
    assert registry.version == seen[-1] + 1


def test_route_table_is_complete_when_every_tp_rank_is_there() -> None:
    table = RouteTable()
    table.put(row(tp_rank=1, tp_size=2, port=5001))
    with pytest.raises(RouteError) as error:
        table.topology()
    assert error.value.status == 503
    table.put(row(tp_rank=0, tp_size=2, port=5000))
    assert table.topology()["attn_tp_size"] == 2
    assert table.rank(0, 0, 1, 0) == {"rank_ip": "127.0.0.1", "rank_port": 5001}
    with pytest.raises(RouteError, match="tp=7"):
        table.rank(0, 0, 7, 0)


def test_rank_that_reports_twice_replaces_its_row() -> None:
    table = RouteTable()
    table.put(row(port=5000))
    table.put(row(port=6000))
    assert table.rank(0, 0, 0, 0)["rank_port"] == 6000


def test_incomplete_row_is_refused_by_name() -> None:
    with pytest.raises(RouteError, match="lacks rank_port") as error:
        RouteTable().put({**row(), "rank_port": None})
    assert error.value.status == 400


def test_dp_ranks_are_forgotten_after_their_time() -> None:
    table = RouteTable()
    table.register_dp_rank(7, 1, now=0.0)
    assert table.query_dp_ranks([7, 8]) == {"7": 1}
    table.register_dp_rank(9, 0, now=DP_RANK_TTL_S + 1)
    assert table.query_dp_ranks([7, 9]) == {"9": 0}


@pytest.mark.engine
def test_topology_is_what_sglangs_decode_side_reads() -> None:
    conn = pytest.importorskip("sglang.srt.disaggregation.common.conn", reason="needs sglang")
    table = RouteTable()
    table.put(row())
    info = conn.PrefillServerInfo(**table.topology())
    assert (info.attn_tp_size, info.page_size, info.kv_cache_dtype) == (1, 16, "float32")
    assert info.follow_bootstrap_room is True
    assert info.prefill_http_port == 31000

"""Membership rules without sockets: examples, and invariants over random histories."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from pdserve.bootstrap.messages import RankRoute, Register
from pdserve.bootstrap.registry import MemberRegistry, Refused
from pdserve.types import InstanceId, Role, WorkerInfo
from tests.support.bootstrap_parts import LAYOUT, report, row, worker
from tests.support.examples import n_examples


def join(fleet: MemberRegistry, info: WorkerInfo, now: float = 0.0, **changes: object) -> None:
    layout = msgspec.structs.replace(LAYOUT, **changes)
    fleet.report_rank(info.instance_id, report(info.role, layout), now)
    fleet.register(Register(worker=info), now)


def test_worker_waits_until_all_its_ranks_have_reported() -> None:
    fleet = MemberRegistry()
    info = worker("prefill-0", "a")
    with pytest.raises(Refused) as refused:
        fleet.register(Register(worker=info), 0.0)
    assert (refused.value.refusal.code, refused.value.status) == ("ranks_pending", 425)

    join(fleet, info)
    assert [member.worker_id for member in fleet.members()] == ["prefill-0"]
    assert fleet.members()[0].kv_layout == LAYOUT


def test_layout_mismatch_names_each_difference_and_the_other_worker() -> None:
    fleet = MemberRegistry()
    join(fleet, worker("prefill-0", "a"))
    with pytest.raises(
        Refused, match=r"page_size: 32 != 16; dtype: bfloat16 != float32 \(fleet: prefill-0\)"
    ):
        join(fleet, worker("decode-0", "b", Role.DECODE), page_size=32, dtype="bfloat16")
    assert len(fleet.members()) == 1


def test_other_model_is_refused_although_its_layout_fits() -> None:
    fleet = MemberRegistry()
    join(fleet, worker("prefill-0", "a"))
    with pytest.raises(Refused, match="decode-0 cannot join: model: other != tiny"):
        join(fleet, worker("decode-0", "b", Role.DECODE, model="other"))


def test_other_protocol_is_refused() -> None:
    fleet = MemberRegistry()
    with pytest.raises(Refused, match="speaks protocol 99, this service 1"):
        fleet.register(Register(worker=worker("p", "a"), protocol=99), 0.0)


def test_restarted_worker_supersedes_its_predecessor_at_once() -> None:
    gone: list[str] = []
    fleet = MemberRegistry(on_gone=gone.append)
    join(fleet, worker("prefill-0", "a"))
    join(fleet, worker("prefill-0", "b"))
    assert gone == ["a"]
    assert [member.instance_id for member in fleet.members()] == ["b"]


def test_restart_with_new_layout_is_allowed_when_it_is_alone() -> None:
    fleet = MemberRegistry()
    join(fleet, worker("prefill-0", "a"))
    fleet.deregister(InstanceId("a"), "stopped")
    join(fleet, worker("prefill-0", "b"), page_size=32)
    assert fleet.members()[0].instance_id == "b"


def test_lease_expires_unless_renewed() -> None:
    fleet = MemberRegistry()
    join(fleet, worker("prefill-0", "a"))
    fleet.heartbeat(InstanceId("a"), 9.0)
    assert fleet.expire(18.9) == []
    assert fleet.expire(19.0) == ["a"]
    with pytest.raises(Refused) as refused:
        fleet.heartbeat(InstanceId("a"), 20.0)
    assert refused.value.status == 404


def test_version_changes_exactly_when_members_do() -> None:
    fleet = MemberRegistry()
    seen = [fleet.version]
    join(fleet, worker("prefill-0", "a"))
    seen.append(fleet.version)
    fleet.heartbeat(InstanceId("a"), 1.0)
    assert fleet.version == seen[-1] > seen[0]
    assert fleet.deregister(InstanceId("a"), "") is True
    assert fleet.deregister(InstanceId("a"), "") is False
    assert fleet.version == seen[-1] + 1


def test_mismatch_says_which_flags_to_change() -> None:
    fleet = MemberRegistry()
    join(fleet, worker("prefill-0", "a"))
    with pytest.raises(Refused, match="Start it with the same --kv-cache-dtype and --page-size"):
        join(fleet, worker("decode-0", "b", Role.DECODE), page_size=32, dtype="bfloat16")
    with pytest.raises(Refused, match="Start it with the same model, or stop"):
        join(fleet, worker("decode-0", "c", Role.DECODE), num_layers=3)


def test_model_path_may_differ_when_the_served_name_is_the_same() -> None:
    fleet = MemberRegistry()
    join(fleet, worker("prefill-0", "a"))
    elsewhere = msgspec.structs.replace(worker("decode-0", "b", Role.DECODE), model="/other/machine/tiny")
    join(fleet, elsewhere)
    unnamed = msgspec.structs.replace(worker("decode-1", "c", Role.DECODE, "x"), served_model_name="")
    with pytest.raises(Refused, match="model: x != tiny"):
        join(fleet, unnamed)


def test_replaced_process_cannot_take_its_name_back_while_the_successor_lives() -> None:
    """Two live processes of one name would otherwise replace each other for ever."""
    fleet = MemberRegistry()
    join(fleet, worker("prefill-0", "a"))
    join(fleet, worker("prefill-0", "b"))
    with pytest.raises(Refused, match="prefill-0 was replaced by a newer process") as refused:
        join(fleet, worker("prefill-0", "a"))
    assert (refused.value.refusal.code, refused.value.status) == ("name_taken", 409)
    assert [member.instance_id for member in fleet.members()] == ["b"]

    fleet.deregister(InstanceId("b"), "stopped")
    join(fleet, worker("prefill-0", "a"))
    assert [member.instance_id for member in fleet.members()] == ["a"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rank": 1}, r"rank must be 0..0, got 1"),
        ({"rank": -1}, r"rank must be 0..0, got -1"),
        ({"num_ranks": 0}, "rank must be"),
        ({"route": None}, "prefill rank 0 reports no route"),
        ({"route": {"rank_ip": "127.0.0.1"}}, "rank row lacks attn_tp_size"),
        ({"num_ranks": 2}, "2 ranks, but the topology has 1"),
    ],
)
def test_malformed_report_is_refused_by_name(changes: dict[str, object], text: str) -> None:
    with pytest.raises(Refused, match=text) as refused:
        MemberRegistry().report_rank(InstanceId("a"), msgspec.structs.replace(report(), **changes), 0.0)
    assert refused.value.status == 400


def test_ranks_of_one_server_must_agree() -> None:
    fleet = MemberRegistry()
    ranks = [
        RankRoute(role=Role.PREFILL, rank=i, num_ranks=2, kv_layout=LAYOUT, route=row(i, 2)) for i in (0, 1)
    ]
    fleet.report_rank(InstanceId("a"), ranks[0], 0.0)
    other = msgspec.structs.replace(ranks[1], kv_layout=msgspec.structs.replace(LAYOUT, num_layers=3))
    with pytest.raises(Refused, match="ranks 1 and 0 of one server disagree: num_layers: 3 != 2"):
        fleet.report_rank(InstanceId("a"), other, 0.0)
    with pytest.raises(Refused, match="1 of 2 of its ranks"):
        fleet.register(Register(worker=worker("p", "a")), 0.0)
    fleet.report_rank(InstanceId("a"), ranks[1], 0.0)
    assert len(fleet.register(Register(worker=worker("p", "a")), 0.0).ranks) == 2


def test_role_must_be_that_of_its_ranks() -> None:
    fleet = MemberRegistry()
    fleet.report_rank(InstanceId("a"), report(Role.DECODE), 0.0)
    with pytest.raises(Refused, match="p is prefill, but its ranks are decode"):
        fleet.register(Register(worker=worker("p", "a")), 0.0)


def test_time_in_which_the_service_stood_still_costs_nobody_his_lease() -> None:
    fleet = MemberRegistry()
    join(fleet, worker("prefill-0", "a"))
    fleet.forgive(5.0)
    assert fleet.expire(14.9) == []
    assert fleet.expire(15.0) == ["a"]


class FleetHistory(RuleBasedStateMachine):
    """Whatever joins, dies and comes back: one layout, one model, one instance per name."""

    instances = Bundle("instances")

    def __init__(self) -> None:
        super().__init__()
        self.gone: list[str] = []
        self.fleet = MemberRegistry(on_gone=self.gone.append)
        self.now = 0.0
        self.count = 0
        self.seen: tuple[int, list[WorkerInfo]] = (0, [])

    @rule(target=instances, name=st.sampled_from("pqd"))
    def start(self, name: str) -> WorkerInfo:
        self.count += 1
        return worker(name, f"i{self.count}", Role.DECODE if name == "d" else Role.PREFILL)

    @rule(info=instances, page_size=st.sampled_from([16, 32]), model=st.sampled_from(["tiny", "other"]))
    def joins(self, info: WorkerInfo, page_size: int, model: str) -> None:
        changed = msgspec.structs.replace(info, served_model_name=model)
        try:
            join(self.fleet, changed, self.now, page_size=page_size)
        except Refused as refused:
            assert refused.refusal.code in ("mismatch", "name_taken")
            assert refused.status == 409

    @rule(info=instances)
    def renews(self, info: WorkerInfo) -> None:
        known = info.instance_id in {member.instance_id for member in self.fleet.members()}
        try:
            self.fleet.heartbeat(info.instance_id, self.now)
            assert known
        except Refused:
            assert not known

    @rule(info=instances)
    def leaves(self, info: WorkerInfo) -> None:
        self.fleet.deregister(info.instance_id, "")
        assert self.fleet.get(info.instance_id) is None

    @rule(passed_s=st.floats(0, 30))
    def time_passes(self, passed_s: float) -> None:
        self.now += passed_s
        for instance_id in self.fleet.expire(self.now):
            assert self.fleet.get(instance_id) is None

    @invariant()
    def members_fit_together(self) -> None:
        members = self.fleet.members()
        assert len({member.worker_id for member in members}) == len(members)
        assert len({member.kv_layout for member in members}) <= 1
        assert len({member.served_model_name for member in members}) <= 1

    @invariant()
    def version_tells_every_change(self) -> None:
        version, members = self.seen
        assert self.fleet.version >= version
        if self.fleet.members() != members:
            assert self.fleet.version > version
        self.seen = (self.fleet.version, self.fleet.members())


TestFleetHistory = FleetHistory.TestCase
TestFleetHistory.settings = settings(max_examples=n_examples(40), stateful_step_count=30)

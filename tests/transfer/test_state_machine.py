"""Outbox, inbox, slots, network and forward pass in one thread, in every order that Hypothesis thinks of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from pdserve.kv.staging import SlotPool
from pdserve.transfer.jobs import RankWrites, Step
from pdserve.transfer.peer import PeerLink
from pdserve.transfer.plan import Path
from pdserve.transfer.steps import StepRunner
from tests.support.kv_world import SOURCE, World
from tests.support.rows import rows

INDEX = st.integers(0, 30)
INDICES = st.lists(INDEX, min_size=1, max_size=8)
PREFILL, DECODE = st.integers(0, 1), st.integers(0, 2)


@pytest.fixture(autouse=True)
def _each_region_is_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.transfer.peer.PART_BYTES", 1)


class Machine(RuleBasedStateMachine):
    """Rules are what may happen next; ``World`` holds the invariants."""

    slots = (6, 10)
    """Of a prefill's and of a decode rank's slab."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(*self.slots)

    @rule(prefill=PREFILL, decode=DECODE, sizes=st.lists(st.integers(1, 100), min_size=1, max_size=4),
          num_chunks=st.integers(1, 3), path=st.sampled_from([None, Path.PACKED, Path.DIRECT]),
          is_layered=st.booleans())  # fmt: skip
    def submit(self, prefill: int, decode: int, sizes: list[int], num_chunks: int, path: Path | None,
               is_layered: bool) -> None:  # fmt: skip
        for size in sizes:
            self.world.submit(prefill, decode, size, num_chunks=num_chunks, path=path, is_layered=is_layered)

    @rule(indices=INDICES)
    def forward(self, indices: list[int]) -> None:
        for index in indices:
            self.world.forward(index)

    @rule(indices=INDICES)
    def layer(self, indices: list[int]) -> None:
        for index in indices:
            self.world.forward(index, 1)

    @rule(prefill=PREFILL, count=st.integers(1, 6))
    def turn(self, prefill: int, count: int) -> None:
        for _ in range(count):
            self.world.turn(prefill)

    @rule(decode=DECODE)
    def poll(self, decode: int) -> None:
        self.world.poll(decode)

    @rule(indices=INDICES)
    def copy(self, indices: list[int]) -> None:
        for index in indices:
            self.world.copy(index)

    @rule(indices=INDICES)
    def land(self, indices: list[int]) -> None:
        for index in indices:
            self.world.land(index)

    @rule(indices=INDICES)
    def deliver(self, indices: list[int]) -> None:
        for index in indices:
            self.world.deliver(index)

    @rule(index=INDEX, what=st.sampled_from(["write fails", "message is lost", "abort"]))
    def fault(self, index: int, what: str) -> None:
        if what == "write fails":
            self.world.land(index, fails=True)
        elif what == "message is lost":
            self.world.deliver(index, is_lost=True)
        else:
            self.world.abort(index)

    @rule(count=st.integers(1, 3), may_have_written=st.booleans())
    def refuse(self, count: int, may_have_written: bool) -> None:
        self.world.refuse(count, may_have_written=may_have_written)

    @rule(seconds=st.sampled_from([0.01, 0.6, 6.0, 31.0]))
    def tick(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule(prefill=PREFILL, decode=DECODE, is_new=st.booleans())
    def register(self, prefill: int, decode: int, is_new: bool) -> None:
        if is_new and not self.world.died:
            self.world.restart(prefill)
        else:
            self.world.register_again(prefill, decode)

    @rule(decode=DECODE)
    def hang(self, decode: int) -> None:
        self.world.hung ^= {decode}

    @rule()
    def progress(self) -> None:
        self.world.check_progress()

    def teardown(self) -> None:
        self.world.rest()


def _explore(num_examples: int, num_steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Machine,
        settings=settings(
            max_examples=num_examples, stateful_step_count=num_steps, deadline=None, derandomize=True,
            database=None, report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        ),
    )  # fmt: skip


@pytest.mark.slow
def test_no_order_of_events_breaks_a_room() -> None:
    _explore(30, 50)


@pytest.mark.exhaustive
def test_no_order_of_events_breaks_a_room_in_100_000_steps() -> None:
    _explore(1000, 100)


def _posts_as_settled(self: StepRunner, peer: PeerLink, writes: RankWrites, step: Step) -> None:
    """A1: the time-out ran from the post, done or not."""
    _POST_PIECE(self, peer, writes, step)
    self._settle(writes, step)
    step.is_settled = False


_POST_PIECE = StepRunner._post_piece


def _leaks_source(self: StepRunner, peer: PeerLink | None, writes: RankWrites, step: Step) -> None:
    """A3: as it was after a refused post."""
    if step in writes.in_flight:
        writes.in_flight.remove(step)


def _takes_all(self: SlotPool, holder: object) -> int | None:
    """A4: whoever comes first may have all slots, as in the ring."""
    if not self._free:
        return None
    slot = self._free.pop()
    self._holders[slot] = holder
    self._held[holder] += 1
    return slot


def _reuse_while_in_flight() -> None:
    world = World(16, 8)
    world.hung = {0}
    for _ in range(3):
        world.submit(0, 0, 60, num_chunks=1, path=None)
    world.run(6, 0.01, [1, 2])
    world.tick(31.0)
    world.run(6, 0.6, [1, 2])
    world.hung = set()
    for _ in range(30):
        world.land(-1)  # the newest first, the old write over it
    world.rest()


def _refuse_after_gather() -> None:
    world = World(4, 8)
    world.submit(0, 0, 100, num_chunks=1, path=None)
    world.refuse(1)
    world.run(3, 0.01, [0])
    world.rest()


def _hang() -> None:
    world = World(4, 8)
    world.hung = {0}
    for decode in (0, 0, 0, 1, 1, 1):
        world.submit(0, decode, 60, num_chunks=1, path=None)
    world.check_progress()


def _send_between_layers() -> None:
    world = World(16, 16)
    world.submit(0, 2, 60, num_chunks=1, path=Path.DIRECT, is_layered=True)
    for _ in range(SOURCE.num_regions):
        world.forward(0, 1)
        for _ in range(4):
            world.turn(0)
            world.land(0)
    world.rest()


@rows(
    ("owner", "name", "fault", "events", "finding"),
    [
        (StepRunner, "_post_piece", _posts_as_settled, _reuse_while_in_flight, "wrong bytes"),
        (StepRunner, "give_up", _leaks_source, _refuse_after_gather, "never credited|never freed"),
        (SlotPool, "take", _takes_all, _hang, "is starved|never arrives"),
        (RankWrites, "is_filled", property(lambda _: True), _send_between_layers, "before its forward pass"),
    ],
)
def test_the_simulation_finds_each_of_the_old_faults(
    owner: type, name: str, fault: object, events: Callable[[], None], finding: str
) -> None:
    events()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fault)
        with pytest.raises(AssertionError, match=finding):
            events()

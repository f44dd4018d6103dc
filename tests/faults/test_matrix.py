"""Each way a leg can end, at each stage, over real sockets: what the client gets, and that nothing is left.

After every case: no worker holds KV, no exchange or connection is open but idle kept ones, no task, room
or reservation is left, only the leg that failed was blamed, and the next request is served.
"""

from __future__ import annotations

import json

import pytest

from pdserve.types import Role
from tests.faults.black_hole import BlackHole
from tests.faults.cases import Case, Ending, Stage, covering_set, expected, possible_cases
from tests.faults.site import Site, running_site
from tests.support.sglang_answers import event_of
from tests.support.sglang_pairing import Hold, Point
from tests.support.sglang_run import PROBE_IDS
from tests.support.sglang_server import FakeSGLang, until
from tests.support.wire import Wire, WireReply

SILENCE_S = 0.3
NUM_FAST = 8


def _params() -> list[object]:
    """Every possible case; what the covering set does not hold is for ``make test-all``."""
    covering = covering_set()
    fast = covering[:: len(covering) // NUM_FAST]
    params = []
    for case in possible_cases():
        marks = [] if case in fast else [pytest.mark.slow if case in covering else pytest.mark.exhaustive]
        if case.ending is Ending.ABORTED and case.stage is Stage.ACCEPTED and case.leg is Role.DECODE:
            reason = "decode's complete answer loses against prefill's error of the same turn"
            marks.append(pytest.mark.xfail(strict=True, reason=reason))
        params.append(pytest.param(case, id=str(case), marks=marks))
    return params


@pytest.mark.parametrize("case", _params())
async def test_whatever_ends_a_leg_ends_the_request_well(case: Case) -> None:
    both = 2 if case.spare else 1
    settings = {}
    if case.ending is Ending.SILENCE:
        settings["connect_s" if case.stage is Stage.BEFORE else "request_s"] = SILENCE_S
    async with running_site(both, both, queue_timeout_s=0.2, **settings) as site, Wire.open(site.url) as wire:
        await site.drop_kept()
        run = _Run(site, case, wire)
        wanted = expected(case)
        await run.play()
        outcome = "left" if case.ending is Ending.CLIENT_GONE else await _outcome(wire, case.stream)
        run.let_go()
        assert outcome in wanted.outcomes, (outcome, wire.seen)
        await site.check_clean()
        _check_attempts(site, outcome)
        await site.check_blame(run.blame(wanted.blame))
        await _check_serves(site, run)


class _Run:
    """One case being played."""

    def __init__(self, site: Site, case: Case, wire: Wire) -> None:
        self.site = site
        self.case = case
        self.wire = wire
        self.struck: FakeSGLang | None = None
        self.twin: FakeSGLang | None = None
        self._holds: dict[Role, Hold] = {}

    async def play(self) -> None:
        """Bring the request to the stage, then end the leg."""
        if self.case.stage is Stage.BEFORE:
            await self._play_before()
            return
        self._place_holds()
        self.wire.send_json("/generate", {"text": "hi", "stream": self.case.stream})
        await self._reach()
        twin_role = Role.DECODE if self.case.leg is Role.PREFILL else Role.PREFILL
        self.struck, self.twin = self._server_of(self.case.leg), self._server_of(twin_role)
        await self._strike()

    def let_go(self) -> None:
        """Release whatever is still held, as time would."""
        for hold in self._holds.values():
            hold.release()

    def blame(self, whom: str) -> list[dict[str, int]]:
        """Failures by worker, each of these will do; empty: not to be checked."""
        assert self.struck is not None
        leg = {self.struck.name: 1}
        both = {**leg, self.twin.name: 1} if self.twin is not None else leg
        return {"leg": [leg], "both": [both], "leg or both": [leg, both], "nobody": [{}]}.get(whom, [])

    # -- stages ------------------------------------------------------------------------------

    def _place_holds(self) -> None:
        case, site = self.case, self.site
        points = {
            Stage.ACCEPTED: {Role.PREFILL: Point.ADMITTED, Role.DECODE: Point.ADMITTED},
            Stage.PREFILLED: {Role.DECODE: Point.RECEIVED},
            Stage.STREAMING: {Role.DECODE: Point.STREAMING},
            Stage.DECODED: {Role.PREFILL: Point.ANSWERING},
        }[case.stage]
        if case.stage is Stage.STREAMING and case.leg is Role.PREFILL:
            points[Role.PREFILL] = Point.ANSWERING
        self._holds = {role: site.hold(role, point) for role, point in points.items()}

    async def _reach(self) -> None:
        for role, hold in self._holds.items():
            await until(lambda hold=hold: hold.is_reached, f"{role} at {hold.point.value}")
        if Role.PREFILL not in self._holds:
            table, prefill = self.site.balancer.fleet.scheduler.table, self._server_of(Role.PREFILL).info
            await until(lambda: not table.inflight(prefill.instance_id), "prefill's answer taken in")
        if self.case.stage is Stage.STREAMING and self.case.stream:
            await self.wire.until_sight_of(b"\n\n")
        if self.case.stage is Stage.DECODED:
            await self.wire.reply()

    def _server_of(self, role: Role) -> FakeSGLang:
        return next(fake for fake in self.site.of(role) if fake.requests)

    async def _strike(self) -> None:
        case, hold = self.case, self._holds.get(self.case.leg)
        assert self.struck is not None
        if case.ending is Ending.CLIENT_GONE:
            self.wire.leave()
            if case.stage is not Stage.DECODED:
                await until(lambda: self.site.counts["aborted"] == 1, "the request aborted")
        elif case.ending is Ending.REMOVED:
            self.site.remove(self.struck)
            await until(lambda: not self.site.is_member(self.struck), "the removal")
            self.let_go()
        elif hold is None:
            self.struck.kill()
            self.let_go()
        else:
            hold.release(case.ending.way)
            if not self._must_wait():
                self.let_go_twin()

    def _must_wait(self) -> bool:
        """A whole answer of decode must not come before the failure of prefill does."""
        return self.case.stage is Stage.STREAMING and not self.case.stream

    def let_go_twin(self) -> None:
        """The other leg goes on as it can."""
        for role, hold in self._holds.items():
            if role is not self.case.leg:
                hold.release()

    # -- before anything is sent -------------------------------------------------------------

    async def _play_before(self) -> None:
        case, site = self.case, self.site
        struck = self.struck = site.of(case.leg)[0]
        body = {"text": "hi", "stream": case.stream}
        match case.ending:
            case Ending.REFUSED:
                struck.kill()
            case Ending.RESET_BEFORE_HEAD:
                struck.drop_idle()
                await until(lambda: not struck.num_connections, "no kept connection")
                struck.reset_on_accept = 1
            case Ending.KILLED:
                struck.kill_at_request = True
            case Ending.REMOVED | Ending.CLIENT_GONE:
                site.remove(struck)
                await until(lambda: not site.is_member(struck), "the removal")
            case Ending.SILENCE:
                struck.kill()
                with BlackHole(struck.port):
                    self.wire.send_json("/generate", body)
                    await _outcome(self.wire, case.stream)
                return
        self.wire.send_json("/generate", body)
        if case.ending is Ending.CLIENT_GONE:
            await until(lambda: site.balancer.fleet.scheduler.num_waiting == 1, "the request in line")
            self.wire.leave()
            await until(lambda: site.balancer.fleet.scheduler.num_waiting == 0, "the request out of line")


async def _outcome(wire: Wire, stream: bool) -> str:
    """What the client got; fails unless it is well-formed."""
    reply = await wire.reply()
    if reply.status != 200:
        message = reply.json["error"]["message"]
        assert message, reply.body
        return str(reply.status)
    if not stream:
        if reply.json["meta_info"]["finish_reason"]["type"] == "abort":
            return "aborted"
        assert reply.json == event_of("/generate", reply.json["meta_info"]["id"], 3)
        return "ok"
    return _stream_outcome(reply)


def _stream_outcome(reply: WireReply) -> str:
    *events, last = reply.events
    assert reply.body.endswith(b"\n\n")
    if events and json.loads(events[-1]).get("meta_info", {}).get("finish_reason", {})["type"] == "abort":
        return "aborted"
    tokens = [json.loads(event)["meta_info"]["completion_tokens"] for event in events]
    if last == b"[DONE]":
        assert tokens == [1, 2, 3]
        return "ok"
    error = json.loads(last)["error"]
    assert error["code"] in (502, 504) and error["message"] and error["type"], error
    assert tokens == [1]
    return "error-event"


def _check_attempts(site: Site, outcome: str) -> None:
    """Each attempt has a room and a rid of its own, and there are two at most."""
    sent = {
        (request["rid"], request["bootstrap_room"])
        for fake in site.fakes
        for request in fake.requests
        if request.get("input_ids") != PROBE_IDS
    }
    assert len(sent) == len({rid for rid, _ in sent}) == len({room for _, room in sent}) <= 2
    assert site.counts["retried"] <= 1
    if outcome not in ("ok", "left", "aborted"):
        assert site.counts["failed"] + site.counts["shed"] == 1


async def _check_serves(site: Site, run: _Run) -> None:
    """The next request is served, by whoever is left."""
    gone = tuple(fake for fake in site.fakes if fake.is_dead or not site.is_member(fake))
    if any(all(fake in gone for fake in site.of(role)) for role in Role):
        return
    await site.until_healed(dead=gone)
    async with Wire.open(site.url) as wire:
        wire.send_json("/generate", {"text": "hi"})
        assert await _outcome(wire, stream=False) == "ok"
    await site.check_clean()

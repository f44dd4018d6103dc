"""The simulation of bench/reschedule.py: which running requests move, and what a move costs.

plan ─► who, to which decode worker ─► MovingSimulation: prefill again, KV travels, decode goes on
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify
from statistics import mean
from typing import Any

import msgspec

from pdserve.scheduling.policy import WorkerView
from pdserve.scheduling.scheduler import NO_EXCLUDE
from pdserve.sim.decode_server import DecodeServer
from pdserve.sim.engine import SimRequest
from pdserve.sim.simulator import Simulation

PERIOD_S, MOST, MOVES, QUEUE_S, LOOK_S, FACTOR, WORSE = 0.5, 4, 2, 1.0, 5.0, 2.0, 1.1


# -- the policy: pure ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A request on a decode worker, as the balancer sees it. ``left``: tokens expected to come;
    ``again``: tokens to compute for a move. ``is_silent``: retracted."""

    key: int
    worker: int
    kv: int
    left: float
    again: int
    is_silent: bool = False


def step_s(view: WorkerView, more: int = 0) -> float:
    """Seconds a token takes there with so many requests more."""
    return view.step_base_s + view.step_slope_s * max(1, view.num_reqs + more)


def lacks_kv(view: WorkerView) -> bool:
    """It has retracted requests, or its batch fills what is free within LOOK_S."""
    load = view.load
    if load is None or view.kv_capacity <= 0:
        return False
    growth = load.num_running_reqs * LOOK_S / step_s(view)
    return load.decode_retracted_queue_reqs > 0 or load.num_used_tokens + growth > view.kv_capacity


def plan(
    views: list[WorkerView], running: list[Running], rate: float, *, kv: bool, tpot: bool
) -> Iterator[tuple[Running, int]]:
    """Moves worth making, the best first: who, and to which worker."""
    rows = []
    lacking = [lacks_kv(view) for view in views]
    for each in running:
        source, gap_s = views[each.worker], each.again / rate
        for target, view in enumerate(views):
            if target == each.worker or lacking[target]:
                continue
            saved_s = each.left * (step_s(source) - step_s(view, 1))
            saved_s += each.left * (
                source.step_slope_s * (source.num_reqs - 1) - view.step_slope_s * view.num_reqs
            )
            if kv and lacking[each.worker]:
                rows.append((1 + each.is_silent, each.left / (each.again + 1), each, target))
            elif tpot and saved_s > FACTOR * gap_s and step_s(source) > WORSE * step_s(view, 1):
                rows.append((0, saved_s - FACTOR * gap_s, each, target))
    rows.sort(key=lambda row: row[:2], reverse=True)
    seen: set[int] = set()
    for _, _, each, target in rows:
        if each.key not in seen:
            seen.add(each.key)
            yield each, target


# -- the simulation with moves ------------------------------------------------------------------------


class MovingDecode(DecodeServer):
    """A decode worker from which requests may be taken at the end of a step."""

    doomed: dict[int, Any]

    def take_out(self, request: SimRequest, then: Any) -> None:
        """End it at the end of the running step; ``then(request)`` unless it is over by then."""
        self.doomed[request.index] = then
        if request in self._retracted:
            self._retracted.remove(request)
            self.doomed.pop(request.index)
            then(request)
            return
        steps = self._steps_by(self._clock.now_s, is_up=True)
        if self._running and steps < self._num_planned:
            self._schedule(steps)

    def _boundary(self, steps: int) -> None:
        super()._boundary(steps)
        if not self.doomed:
            return
        doomed, self.doomed = self.doomed, {}
        gone = [row for row in self._running if row[2].index in doomed]
        for row in gone:
            self._running.remove(row)
            request = row[2]
            request.num_generated = request.output_tokens - (row[0] - self._step)
            kept = request.prompt_tokens + request.num_generated - 1
            self._context -= kept
            self.used_tokens -= kept - request.decode_cached_tokens
        heapify(self._running)
        if gone and self._running:
            self._schedule(max(1, min(self._running[0][0] - self._step, self._free() // len(self._running))))
        elif gone:
            self._plan += 1
        for row in gone:
            doomed.pop(row[2].index)(row[2])
        if gone:
            self._give_pages()
        for then in doomed.values():
            then(None)

    def present(self) -> Iterator[tuple[SimRequest, int, bool]]:
        """Requests that run or were retracted, with the tokens that are out."""
        steps = self._steps_by(self._clock.now_s) if self._running else 0
        for finish, _, request in self._running:
            yield request, request.output_tokens - (finish - self._step) + steps, False
        for request in self._retracted:
            yield request, request.num_generated, True


class MovingSimulation(Simulation):
    """Requests that run are moved as ``row`` says."""

    def __init__(self, row: str, joins: bool, *args: Any) -> None:
        super().__init__(*args)
        self.row = row
        self.num_moves = self.under_way = 0
        self.gaps_s: list[float] = []
        self.whole: dict[int, tuple[int, int]] = {}
        self.counts: dict[int, int] = {}
        self.left_s: dict[int, float] = {}
        self.on: dict[int, SimRequest] = {}
        for server in self.decodes:
            server.__class__ = MovingDecode
            server.doomed = {}
        if joins:
            self._join_later()
        if row != "default":
            self.clock.at(self._trace[0].arrival_s + PERIOD_S, self._look, None)

    def _join_later(self) -> None:
        pairs = [(p.instance_id, d.instance_id) for p, d in self.scheduler.admission.placement.ready_pairs]
        last = self.workers[-1].instance_id
        self.scheduler.set_ready_pairs(pair for pair in pairs if pair[1] != last)
        middle_s = self._trace[len(self._trace) // 2].arrival_s
        self.clock.at(middle_s, lambda _: self.scheduler.set_ready_pairs(pairs), None)

    def _look(self, _: object) -> None:
        if self._num_open:
            self.clock.at(self.clock.now_s + PERIOD_S, self._look, None)
        slots = self.workers[len(self.prefills) :]
        prefills = [worker.view for worker in self.workers[: len(self.prefills)]]
        rate = mean(view.prefill_tokens_s for view in prefills)
        if min(view.queued_tokens for view in prefills) / rate > QUEUE_S:
            return
        views = [worker.view for worker in slots]
        steps = [step_s(view) for view in views]
        if not any(map(lacks_kv, views)) and max(steps) < WORSE * min(steps):
            return
        requests, running = {}, []
        for index, server in enumerate(self.decodes):
            for request, out, is_silent in server.present():
                if self.counts.get(request.index, 0) >= MOVES or request.index in server.doomed:
                    continue
                if request.reservation is None or request.reservation.is_prefilling:
                    continue
                requests[request.index] = request
                running.append(self._seen(request, index, out, is_silent))
        kv, tpot = self.row in ("kv", "both", "free"), self.row in ("tpot", "both", "free")
        for each, target in plan(views, running, rate, kv=kv, tpot=tpot):
            if self.under_way >= MOST:
                return
            self._move(requests[each.key], each, slots[target].instance_id)

    def _seen(self, request: SimRequest, index: int, out: int, is_silent: bool) -> Running:
        forecast = request.shape.forecast
        expected = forecast.mean if forecast is not None else float(request.shape.max_new_tokens)
        before = self.whole[request.index][0] if request.index in self.whole else request.prompt_tokens
        done = request.prompt_tokens + out - before
        left = expected - done if done < expected else float(done)  # outlived: half done, as kv_growth.py
        kv = request.prompt_tokens + out
        known = max(s.cache.match(request.block_ids)[1] for s in self.prefills) if request.block_ids else 0
        return Running(request.index, index, kv, max(1.0, left), max(1, kv - known), is_silent)

    def _move(self, request: SimRequest, each: Running, target: str) -> None:
        shape = msgspec.structs.replace(
            request.shape, prompt_tokens=each.kv, is_resumed=True,
            max_new_tokens=max(1, request.shape.max_new_tokens - (each.kv - request.prompt_tokens)),
            forecast=None if request.shape.forecast is None else msgspec.structs.replace(
                request.shape.forecast, mean=each.left, low=min(each.left, request.shape.forecast.low),
                high=max(each.left, request.shape.forecast.high)),
        )  # fmt: skip
        pairs = self.scheduler.admission.placement.ready_pairs
        others = frozenset((p.instance_id, d.instance_id) for p, d in pairs if d.instance_id != target)
        held = self.scheduler.try_now(shape, others or NO_EXCLUDE)
        if held is None:
            return
        self.under_way += 1

        def go_on(gone: SimRequest | None) -> None:
            self._go_on(request, gone, held)

        self.decodes[request.decode].take_out(request, go_on)

    def _go_on(self, request: SimRequest, gone: SimRequest | None, held: Any) -> None:
        if gone is None:  # it ended first
            self.under_way -= 1
            self.scheduler.end(held, prefill_ok=None, decode_ok=None)
            self.scheduler.serve()
            return
        self.decodes[request.decode].cache.unpin(request.pins[1])
        old, request.reservation = request.reservation, None
        self.scheduler.end(old, prefill_ok=None, decode_ok=None)
        self.whole.setdefault(request.index, (request.prompt_tokens, request.output_tokens))
        made = request.num_generated
        request.prompt_tokens += made - 1
        request.output_tokens -= made - 1
        request.num_generated = 1
        request.pins = [(), ()]
        request.cached_tokens = request.decode_cached_tokens = 0
        request.done_tokens = request.sent_tokens = request.waiting_tokens = 0
        self.num_moves += 1
        self.counts[request.index] = self.counts.get(request.index, 0) + 1
        self.left_s[request.index] = self.clock.now_s
        if self.row == "free":
            request.reservation, request.decode = held, int(held.pair.decode.instance_id[1:])
            request.prefill = int(held.pair.prefill.instance_id[1:])
            server = self.decodes[request.decode]
            server._take(request.prompt_tokens)
            server._num_travelling += 1
            server._travelling_tokens += request.prompt_tokens
            self.clock.at(self.clock.now_s, self._kv_arrived, request)
        else:
            self._start(request, held)
        self.scheduler.serve()

    def _kv_arrived(self, request: SimRequest) -> None:
        if (since_s := self.left_s.pop(request.index, None)) is not None:
            self.under_way -= 1
            self.gaps_s.append(self.clock.now_s - since_s)
        super()._kv_arrived(request)

    def _end(self, request: SimRequest) -> None:
        if (whole := self.whole.pop(request.index, None)) is not None:
            request.prompt_tokens, request.output_tokens = whole
        super()._end(request)


# -- the bench ----------------------------------------------------------------------------------------

"""A discrete-event run of the production balancer over modelled servers.

    trace ─► Scheduler (policy, loads, forecasts) ─► decode gives pages ─► prefill ─► link ─► decode steps
                └────────── samples each load_poll_s, ends of legs ◄──────────────────────────────┘

    simulate(trace, model, policy_name, prefill, decode, config, options) -> SimReport

Everything runs under one virtual clock and is a function of its arguments: no wall clock, and no
randomness but the policy's own, which ``seed`` fixes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp

from pdserve.balancer.fleet.worker_monitor import IDLE_FACTOR
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError, NoWorkerError
from pdserve.scheduling.lengths import Lengths
from pdserve.scheduling.load_sample import ARRIVAL_S, Sample
from pdserve.scheduling.policy import Policy, policy_of
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.scheduler import NO_EXCLUDE, Scheduler
from pdserve.scheduling.workers import WorkerSlots
from pdserve.sim.baselines import SIMULATED_MAKERS
from pdserve.sim.cost import CostModel
from pdserve.sim.decode_server import GAP_BINS, DecodeServer
from pdserve.sim.engine import Clock, SimRequest
from pdserve.sim.forecasts import LENGTHS, OracleLengths, make_lengths
from pdserve.sim.link import Port
from pdserve.sim.local_decode import LocalDecodeServer
from pdserve.sim.prefill_server import PrefillServer
from pdserve.sim.report import SimReport, SimulatedRequest, UseReport, WorkerUse
from pdserve.types import InstanceId, RequestShape, Role, WorkerId, WorkerInfo
from pdserve.workload import TracedRequest, prompt_bytes

ROUTE = "/v1/completions"
NOBODY = -1
"""``prefill`` of a request that a decode server prefilled itself."""


@dataclass(frozen=True, slots=True)
class SimOptions:
    """What a run may differ in besides its arguments.

    ``lengths``: which forecasts of answers' lengths: ``learned`` (production), ``oracle``, ``useless`` or
    ``none``. ``max_new_tokens``: the limit a client sets where the trace has none. ``seed``: of the
    policy's random choices; different arrivals are made by ``workload.rearrived``.
    """

    lengths: str = "learned"
    max_new_tokens: int = 2048
    seed: int = 0


def simulate(
    trace: Sequence[TracedRequest],
    model: CostModel,
    policy_name: str,
    prefill: int,
    decode: int,
    config: BalancerConfig | None = None,
    options: SimOptions | None = None,
) -> SimReport:
    """Run a trace through ``prefill`` and ``decode`` workers of that model under a policy.

    Args:
        policy_name: as ``--policy`` takes it; both legs' policies of ``config`` are left out of account.
        config: the balancer's settings: queue, poll period, SLOs; None: the defaults.

    Raises:
        ConfigError: for an unknown policy or ``options.lengths``, no worker of a role or an empty trace.
    """
    config, options = config or BalancerConfig(), options or SimOptions()
    if not trace:
        raise ConfigError("simulate: the trace is empty")
    if prefill < 1 or decode < 1:
        raise ConfigError(f"simulate: expected at least one worker of each role, got {prefill}P{decode}D")
    if options.lengths not in LENGTHS:
        raise ConfigError(f"lengths: expected one of {', '.join(LENGTHS)}, got {options.lengths!r}")
    config = replace(config, policy=policy_name, prefill_policy="", decode_policy="")
    policy = policy_of(config, options.seed, SIMULATED_MAKERS)
    lengths = make_lengths(options.lengths if config.predict_lengths else "none")
    return Simulation(trace, model.check(), policy, (prefill, decode), config, lengths, options).run()


@dataclass(slots=True, eq=False)
class _Polled:
    """A worker whose load is asked for in turn; ``num_idle`` looks in a row found nothing to do there."""

    worker: WorkerSlots
    server: PrefillServer | DecodeServer
    num_idle: int = 0


class _Grant:
    """Receives the outcome of a wait and acts on it in a later event, not within the queue."""

    __slots__ = ("_is_done", "_request", "_simulation")

    def __init__(self, simulation: Simulation, request: SimRequest) -> None:
        self._simulation = simulation
        self._request = request
        self._is_done = False

    def done(self) -> bool:
        return self._is_done

    def set_result(self, result: Reservation, /) -> None:
        self._is_done = True
        self._simulation.granted(self._request, result)

    def set_exception(self, exception: Exception, /) -> None:
        self._is_done = True
        self._simulation.refused(self._request, exception)


class Simulation:
    """One run. Nothing is probed: all pairs are ready from the start, as a fleet's are after a minute.

    ``scheduler``, ``workers``, ``prefills`` and ``decodes`` may be read when it is over.
    """

    def __init__(
        self,
        trace: Sequence[TracedRequest],
        model: CostModel,
        policy: Policy,
        size: tuple[int, int],
        config: BalancerConfig,
        lengths: Lengths,
        options: SimOptions,
    ) -> None:
        self.clock = clock = Clock()
        self.policy = policy
        self.scheduler = Scheduler(
            config, lambda: "no worker", policy=policy, lengths=lengths, clock=clock.time
        )
        prefills, decodes = (
            [_describe(role, index, model) for index in range(number)]
            for role, number in zip(Role, size, strict=True)
        )
        self.workers = [self.scheduler.add_worker(info) for info in (*prefills, *decodes)]
        self.scheduler.set_ready_pairs((p.instance_id, d.instance_id) for p in prefills for d in decodes)
        self._model = model
        self._config = config
        self._oracle = lengths if isinstance(lengths, OracleLengths) else None
        self._options = options
        self._trace = trace
        self._num_open = len(trace)
        self._records: list[SimulatedRequest] = []
        self.decodes = [self._decode_server(index) for index in range(size[1])]
        self.scheduler.set_alone(info.instance_id for info in decodes)
        ports: list[Port] = [server.port for server in self.decodes]
        self.prefills = [
            PrefillServer(index, model, clock, ports, self._kv_arrived) for index in range(size[0])
        ]

    def _decode_server(self, index: int) -> DecodeServer:
        deflection = self.scheduler.admission.deflection
        if deflection is None:
            return DecodeServer(index, self._model, self.clock, self._has_pages, self._finished)
        calls = self._has_pages, self._finished, self._prefilled_alone
        return LocalDecodeServer(index, self._model, self.clock, calls, deflection.budget_s)

    def run(self) -> SimReport:
        """All requests to their ends."""
        clock = self.clock
        clock.at(self._trace[0].arrival_s, self._arrive, 0)
        workers = self.workers
        servers: list[PrefillServer | DecodeServer] = [*self.prefills, *self.decodes]
        for index, (worker, server) in enumerate(zip(workers, servers, strict=True)):
            clock.at(self._config.load_poll_s * index / len(workers), self._poll, _Polled(worker, server))
        clock.run()
        assert self._num_open == 0, f"{self._num_open} requests never ended"
        return self._report()

    # -- a request's way ---------------------------------------------------------------------

    def _arrive(self, index: int) -> None:
        trace = self._trace
        if index + 1 < len(trace):
            self.clock.at(trace[index + 1].arrival_s, self._arrive, index + 1)
        request = SimRequest(index, trace[index], self._shape(trace[index]))
        reservation = self.scheduler.try_now(request.shape)
        if reservation is not None:
            self._start(request, reservation)
            return
        try:
            request.waiter = self.scheduler.enqueue(request.shape, NO_EXCLUDE, _Grant(self, request))
        except NoWorkerError as error:
            self._fail(request, str(error))
            return
        timeout_s = self._config.queue_timeout_s
        self.clock.at(self.clock.now_s + timeout_s, self._time_out, request)

    def _shape(self, traced: TracedRequest) -> RequestShape:
        shape = RequestShape(
            prompt_tokens=traced.input_tokens,
            max_new_tokens=max(traced.max_new_tokens or self._options.max_new_tokens, traced.output_tokens),
            prompt=prompt_bytes(traced) if self.policy.needs_prompt else b"",
            route=ROUTE,
            user=traced.user,
        )
        if self._oracle is not None:
            self._oracle.next_tokens = traced.output_tokens
        return self.scheduler.foresee(shape)

    def granted(self, request: SimRequest, reservation: Reservation) -> None:
        """The queue has given it a pair; it goes on in a turn of its own, as an awaiting task would."""
        request.reservation = reservation
        self.clock.at(self.clock.now_s, self._leave_queue, request)

    def refused(self, request: SimRequest, error: Exception) -> None:
        """The queue has ended its wait without one."""
        request.error = str(error)
        self.clock.at(self.clock.now_s, self._leave_queue, request)

    def _leave_queue(self, request: SimRequest) -> None:
        waiter, request.waiter = request.waiter, None
        if waiter is not None:
            self.scheduler.leave(waiter)
        if request.reservation is not None:
            self._start(request, request.reservation)
        else:
            self._fail(request, request.error)

    def _time_out(self, request: SimRequest) -> None:
        waiter = request.waiter
        if waiter is None or waiter.grant.done():
            return
        error = self.scheduler.timed_out(waiter, self._config.queue_timeout_s)
        self.scheduler.leave(waiter)
        request.waiter = None
        self._fail(request, str(error))

    def _start(self, request: SimRequest, reservation: Reservation) -> None:
        request.reservation = reservation
        request.paired_s = self.clock.now_s
        request.prefill = NOBODY if reservation.is_alone else _index(reservation.pair.prefill)
        request.decode = _index(reservation.pair.decode)
        self.clock.at(self.clock.now_s + self._model.request_s, self._reach, request)

    def _reach(self, request: SimRequest) -> None:
        """Both legs are in their servers' queues."""
        model = self._model
        whole = request.prompt_tokens + request.output_tokens
        if request.prompt_tokens > model.prefill_pool_tokens or whole > model.decode_pool_tokens:
            self._release(request, is_ok=None)
            self._fail(request, "longer than the KV pool")
            return
        decode = self.decodes[request.decode]
        if request.prefill == NOBODY and isinstance(decode, LocalDecodeServer):
            decode.arrive_alone(request)
            return
        self.prefills[request.prefill].num_bootstrapping += 1
        self.decodes[request.decode].arrive(request)

    def _has_pages(self, request: SimRequest) -> None:
        looked_s = self.decodes[request.decode].boundary_s()
        self.clock.at(looked_s + self._model.handshake_s, self.prefills[request.prefill].submit, request)

    def _prefilled_alone(self, request: SimRequest) -> None:
        if request.reservation is not None:
            self.scheduler.prefill_finished(request.reservation)

    def _kv_arrived(self, request: SimRequest) -> None:
        assert request.reservation is not None
        self.scheduler.prefill_finished(request.reservation)
        self.decodes[request.decode].receive(request)

    def _finished(self, request: SimRequest) -> None:
        request.finished_s = self.clock.now_s + self._model.response_s
        self.clock.at(request.finished_s, self._end, request)

    def _end(self, request: SimRequest) -> None:
        self._release(request, is_ok=True)
        is_cut = request.output_tokens >= request.shape.max_new_tokens
        self.scheduler.learn(request.shape, request.output_tokens, is_cut=is_cut)
        self._close(request)

    def _release(self, request: SimRequest, *, is_ok: bool | None) -> None:
        reservation, request.reservation = request.reservation, None
        assert reservation is not None
        self.scheduler.end(reservation, prefill_ok=is_ok, decode_ok=is_ok)
        self.scheduler.serve()

    def _fail(self, request: SimRequest, error: str) -> None:
        request.error = error
        request.finished_s = self.clock.now_s
        self._close(request)

    def _close(self, request: SimRequest) -> None:
        self._num_open -= 1
        self._records.append(SimulatedRequest.of(request, self._model.response_s))

    # -- samples -----------------------------------------------------------------------------

    def _poll(self, subject: _Polled) -> None:
        worker, server = subject.worker, subject.server
        now_s = self.clock.now_s
        is_idle = server.is_idle and not worker.num_inflight
        subject.num_idle = subject.num_idle + 1 if is_idle else 0
        # As monitors do: idle workers are asked more seldom.
        if not subject.num_idle or subject.num_idle % IDLE_FACTOR == 1:
            sample = Sample(server.load(now_s), now_s - ARRIVAL_S)
            self.scheduler.sampled(worker, sample)
        if self._num_open:
            self.clock.at(now_s + self._config.load_poll_s, self._poll, subject)

    # -- the outcome -------------------------------------------------------------------------

    def _report(self) -> SimReport:
        records = sorted(self._records, key=lambda record: record.index)
        span_s = max(self.clock.now_s, 1e-9)
        prefills = [
            WorkerUse(s.busy_s / span_s, s.port.busy_s / span_s, s.computed_tokens, s.matched_tokens)
            for s in self.prefills
        ]
        decodes = [
            WorkerUse(s.busy_s / span_s, s.port.busy_s / span_s, s.received_tokens, s.matched_tokens)
            for s in self.decodes
        ]
        gaps: Counter[int] = Counter()
        for server in self.decodes:
            gaps.update(server.gaps)
        spread = [(exp(place / GAP_BINS), gaps[place]) for place in sorted(gaps)]
        use = UseReport(prefills, decodes, sum(s.num_retractions for s in self.decodes), spread)
        return SimReport(
            policy=self._config.policy,
            model=self._model.name,
            records=records,
            use=use,
            span_s=self.clock.now_s,
            num_events=self.clock.num_events,
            shed=dict(self.scheduler.admission.shed),
        )


def _describe(role: Role, index: int, model: CostModel) -> WorkerInfo:
    name = f"{role}-{index}"
    return WorkerInfo(
        worker_id=WorkerId(name),
        instance_id=InstanceId(f"{role[0]}{index:031d}"),
        role=role,
        url=f"http://{name}",
        model=model.name,
        max_total_num_tokens=model.prefill_pool_tokens if role is Role.PREFILL else model.decode_pool_tokens,
    )


def _index(info: WorkerInfo) -> int:
    return int(info.instance_id[1:])

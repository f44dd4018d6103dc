"""Admission over workers on a virtual clock: no sockets, no event loop, no sleeping.

``Desk`` is the client side: requests ``ask``, hold what they get, ``end``. Samples come when a test says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pdserve.config.balancer import BalancerConfig
from pdserve.errors import NoWorkerError
from pdserve.scheduling.load_sample import Sample
from pdserve.scheduling.policy import make_policy
from pdserve.scheduling.queue import Waiter
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.scheduler import Scheduler
from pdserve.scheduling.workers import PairKey, WorkerSlots
from pdserve.types import Forecast, InstanceId, RequestShape, Role, WorkerId, WorkerInfo, WorkerLoad


@dataclass(eq=False)
class Asked:
    """One request: a grant that counts its outcomes."""

    name: str
    shape: RequestShape
    at_s: float
    outcomes: list[Reservation | Exception] = field(default_factory=list)
    served_s: float = -1.0
    has_left: bool = False
    waiter: Waiter | None = None
    desk: Desk | None = None

    def done(self) -> bool:
        return bool(self.outcomes) or self.has_left

    def set_result(self, result: Reservation) -> None:
        self.outcomes.append(result)
        assert self.desk is not None
        self.served_s = self.desk.now_s
        self.desk.served.append(self.name)

    def set_exception(self, exception: Exception) -> None:
        self.outcomes.append(exception)

    @property
    def reservation(self) -> Reservation:
        (outcome,) = self.outcomes
        assert isinstance(outcome, Reservation)
        return outcome

    @property
    def refusal(self) -> NoWorkerError:
        (outcome,) = self.outcomes
        assert isinstance(outcome, NoWorkerError)
        return outcome


class Desk:
    """Workers that take traffic, and who asks for them. ``rate``: each prefill server's tokens a second."""

    def __init__(
        self,
        num_prefill: int = 1,
        num_decode: int = 1,
        *,
        capacity: int = 0,
        max_running: int = 0,
        rate: float = 10_000.0,
        policy: str = "least_load",
        **config: object,
    ) -> None:
        self.now_s = 1000.0
        self.scheduler = Scheduler(
            BalancerConfig(**config),  # type: ignore[arg-type]
            lambda: "no worker",
            policy=make_policy(policy, 1),
            clock=lambda: self.now_s,
        )
        self.admission = self.scheduler.admission
        self.workers = [self._worker(Role.PREFILL, index, 0) for index in range(num_prefill)]
        self.workers += [self._worker(Role.DECODE, index, capacity) for index in range(num_decode)]
        self.prefills, self.decodes = self.workers[:num_prefill], self.workers[num_prefill:]
        for worker in self.prefills:
            worker.view.prefill_tokens_s = rate
        for worker in self.decodes:
            worker.view.max_running_requests = max_running
        self.max_running = max_running
        self.served: list[str] = []
        self.scheduler.set_ready_pairs(
            [(p.instance_id, d.instance_id) for p in self.prefills for d in self.decodes]
        )

    def ask(
        self, name: str, shape: RequestShape, exclude: frozenset[PairKey] = frozenset(), *, waits: bool = True
    ) -> Asked:
        """A request comes: served, refused or in line afterwards."""
        asked = Asked(name, shape, self.now_s, desk=self)
        reservation = self.admission.try_now(shape, exclude)
        if reservation is not None:
            asked.set_result(reservation)
        elif waits:
            try:
                asked.waiter = self.admission.enqueue(shape, exclude, asked)
            except NoWorkerError as exc:
                asked.set_exception(exc)
        return asked

    def leave(self, asked: Asked) -> None:
        """Its client goes while it waits."""
        asked.has_left = True
        if asked.waiter is not None:
            self.admission.leave(asked.waiter)

    def end(self, asked: Asked) -> None:
        """Its answer is over."""
        self.prefilled(asked)
        self.release(asked, decode_ok=True)

    def prefilled(self, asked: Asked) -> None:
        """Its prefill leg is over."""
        self.scheduler.prefill_finished(asked.reservation)

    def release(self, asked: Asked, *, decode_ok: bool) -> None:
        """Its decode leg is over, and with it the request."""
        self.scheduler.end(asked.reservation, prefill_ok=decode_ok or None, decode_ok=decode_ok)
        self.scheduler.serve()

    def sample(self, worker: WorkerSlots, **figures: object) -> None:
        """A sample of all that was sent until now."""
        told = {"max_running_requests": self.max_running, **figures}
        load = WorkerLoad(timestamp_s=self.now_s, **told)  # type: ignore[arg-type]
        self.scheduler.sampled(worker, Sample(load, covered_s=self.now_s))

    def tick(self, seconds: float = 0.25) -> None:
        """Time passes; nobody's sample says anything new, but it is a moment to look at the line."""
        self.now_s += seconds
        for worker in self.workers:
            self.admission.sampled(worker)

    @property
    def is_clear(self) -> bool:
        """Nothing is promised to anybody."""
        sums = [
            (w.num_inflight, w.promised_tokens, w.reserved_tokens, w.growth.tokens, w.held_for)
            for w in self.workers
        ]
        return (
            set(sums) == {(0, 0, 0, 0, None)}
            and not self.admission.placement.num_open
            and not len(self.admission.queue)
        )

    def _worker(self, role: Role, index: int, capacity: int) -> WorkerSlots:
        name = f"{role}-{index}"
        info = WorkerInfo(
            worker_id=WorkerId(name),
            instance_id=InstanceId(name),
            role=role,
            url="http://" + name,
            model="m",
            max_total_num_tokens=capacity,
        )
        worker = self.scheduler.add_worker(info)
        worker.view.kv_capacity = capacity
        return worker


def shape(
    prompt_tokens: int = 100,
    answer: float = 100,
    *,
    spread: float = 0.0,
    limit: int = 8192,
    priority: int = 0,
) -> RequestShape:
    """A request whose answer is forecast at ``answer`` tokens, give or take ``spread``."""
    told = Forecast(answer, max(1.0, answer - spread), min(float(limit), answer + spread), True)
    return RequestShape(prompt_tokens, limit, priority=priority, forecast=told)

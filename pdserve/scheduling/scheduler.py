"""The scheduler: which request is served, when, and by which pair of workers.

    fleet:    add_worker · set_ready_pairs · sampled ─┐
                                                      ├─► LoadTable · Admission ─► Placement ─► Policy
    requests: foresee · try_now · wait ───────────────┤
              prefill_finished · end · serve · learn ─┘

The balancer and the simulator run exactly this object. It opens no socket and reads only the clock
it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from pdserve.config.balancer import BalancerConfig
from pdserve.scheduling.admission import Admission
from pdserve.scheduling.kv_room import committed_tokens
from pdserve.scheduling.lengths import LengthPredictor, Lengths
from pdserve.scheduling.load import LoadTable
from pdserve.scheduling.load_sample import Sample
from pdserve.scheduling.policy import PairCost, Policy, policy_of
from pdserve.scheduling.queue import PriorityOrder
from pdserve.scheduling.workers import PairKey, WorkerSlots
from pdserve.types import InstanceId, RequestShape, Role, WorkerInfo

NO_EXCLUDE: frozenset[PairKey] = frozenset()
NUM_NAMED = 4
"""Full workers described one by one; of more, only the number is given."""


class Scheduler:
    """Workers and their loads in, reservations out.

    Args:
        why_none_ready: one sentence for the client while no pair takes traffic.
        policy: instead of the configured one.
        lengths: instead of the predictor that ``config.predict_lengths`` asks for.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        config: BalancerConfig,
        why_none_ready: Callable[[], str],
        *,
        policy: Policy | None = None,
        lengths: Lengths | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.table = LoadTable()
        self.policy = policy if policy is not None else policy_of(config)
        self.lengths = lengths or (LengthPredictor() if config.predict_lengths else None)
        self.admission = admission = Admission(config, self.table, self.policy, self.explain, clock)
        # The admission's own methods, which it documents: every request calls them, so no call lies between.
        self.try_now, self.wait, self.serve = admission.try_now, admission.wait, admission.serve
        self.prefill_finished, self.end = admission.prefill_finished, admission.end
        self.abort = admission.abort
        self.set_alone = admission.set_alone
        self.enqueue, self.leave, self.timed_out = admission.enqueue, admission.leave, admission.timed_out
        self._why_none_ready = why_none_ready
        self._infos: dict[InstanceId, WorkerInfo] = {}
        self._max_open = config.max_concurrent_requests
        self._is_stopping = False

    # -- workers -----------------------------------------------------------------------------

    def add_worker(self, info: WorkerInfo) -> WorkerSlots:
        """Know a worker; it is used once a pair of it is set ready."""
        self._know(info)
        return self.admission.placement.add_worker(info)

    def update_worker(self, info: WorkerInfo) -> None:
        """The description of a known worker has changed."""
        self._know(info)

    def _know(self, info: WorkerInfo) -> None:
        self.table.add(info)
        self._infos[info.instance_id] = info
        self.admission.set_priorities(PriorityOrder.of(self._infos.values()))

    def remove_worker(self, instance_id: InstanceId) -> None:
        """Forget a worker, which is in no ready pair any more; its reservations may still end."""
        self.table.remove(instance_id)
        self._infos.pop(instance_id, None)
        self.admission.set_priorities(PriorityOrder.of(self._infos.values()))
        self.policy.forget(instance_id)
        self.admission.placement.remove_worker(instance_id)

    def set_ready_pairs(self, keys: Iterable[PairKey]) -> None:
        """Only these pairs take traffic from now on."""
        self.admission.set_ready_pairs(keys)

    def sampled(self, worker: WorkerSlots, sample: Sample) -> None:
        """A poll of the worker was answered."""
        self.table.record(worker.instance_id, sample)
        self.admission.placement.set_overloaded(worker, False)
        self.admission.sampled(worker)

    def set_overloaded(self, worker: WorkerSlots) -> None:
        """The worker refused a request because it is full: give it none until its next sample.

        Does nothing before its first sample, as the next may never come.
        """
        if self.table.load(worker.instance_id) is not None:
            self.admission.placement.set_overloaded(worker, True)

    def cache_flushed(self, instance_id: InstanceId) -> None:
        """The worker's prefix cache was emptied."""
        if isinstance(self.policy, PairCost):
            self.policy.tree.flush(instance_id)
        else:
            self.policy.forget(instance_id)

    # -- requests ----------------------------------------------------------------------------

    def foresee(self, shape: RequestShape) -> RequestShape:
        """The same request with a forecast of its answer's length, if lengths are predicted."""
        if self.lengths is None:
            return shape
        return msgspec.structs.replace(shape, forecast=self.lengths.forecast(shape))

    def learn(self, shape: RequestShape, output_tokens: int, *, is_cut: bool) -> None:
        """An answer (of a batch: the mean of its answers) is over; ``is_cut``: it did not end by itself."""
        if self.lengths is not None:
            self.lengths.learn(shape, output_tokens, is_cut)

    def stop(self) -> None:
        """Refuse waiting requests, and all that come; open reservations may still end."""
        self._is_stopping = True
        self.admission.stop()

    # -- what others read --------------------------------------------------------------------

    @property
    def has_ready_pair(self) -> bool:
        """True if some pair, or decode worker alone, takes traffic; it may be full."""
        deflection = self.admission.deflection
        return len(self.admission.placement.ready_pairs) > 0 or bool(deflection and deflection.workers)

    @property
    def alone(self) -> set[PairKey]:
        """The decode workers that serve requests alone, as pairs with themselves."""
        deflection = self.admission.deflection
        workers = () if deflection is None else deflection.workers
        return {(worker.instance_id, worker.instance_id) for worker in workers}

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a pair."""
        return len(self.admission.queue)

    def num_requests(self, key: PairKey) -> int:
        """Requests that a pair was given."""
        return self.admission.placement.num_requests(key)

    def explain(self, exclude: frozenset[PairKey] = NO_EXCLUDE, shape: RequestShape | None = None) -> str:
        """Why no pair can be reserved now (by this request), in one sentence for client and operator."""
        if self._is_stopping:
            return "the balancer is stopping"
        ready_pairs = self.admission.placement.ready_pairs
        if not len(ready_pairs):
            return self._why_none_ready()
        usable = ready_pairs.without(exclude)
        if not len(usable):
            labels = ", ".join(f"{prefill.worker_id}>{decode.worker_id}" for prefill, decode in ready_pairs)
            return f"every ready pair has already failed this request: {labels}"
        placement = self.admission.placement
        if 0 < self._max_open <= placement.num_open:
            return (
                f"{placement.num_open} requests are under way, which is the limit (max_concurrent_requests)"
            )
        for role, row in ((Role.DECODE, usable.decodes), (Role.PREFILL, usable.prefills)):
            if all(placement.lacks_room(worker, shape) for worker in row):
                return f"all {len(row)} usable {role} servers are full: {_describe_full(row)}"
        return "others are first in line"


def _describe_full(workers: Sequence[WorkerSlots]) -> str:
    return "; ".join(_fullness(worker) for worker in workers[:NUM_NAMED])


def _fullness(worker: WorkerSlots) -> str:
    view = worker.view
    if worker.is_overloaded:
        return f"{worker.worker_id} says so"
    parts = [f"{view.num_reqs} of {view.max_running_requests or 'any number of'} requests"]
    if view.kv_capacity:
        parts.append(f"{committed_tokens(worker)} of {view.kv_capacity} KV tokens promised")
    if worker.role is Role.PREFILL:
        parts = [f"{view.queued_tokens:.0f} tokens queued at {view.prefill_tokens_s:.0f}/s", *parts[1:]]
    return f"{worker.worker_id}: {', '.join(parts)}"

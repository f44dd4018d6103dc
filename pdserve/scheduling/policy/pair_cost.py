"""The pair on which a request costs the fleet least, in seconds.

    wait on P + own work * (1 + others it delays)     prefill_time.py: queue, context-aware work
  + KV that must travel over that link                links.py: alpha + bytes * beta, fitted
  + wait for room on D + own answer + the others' loss   decode_batch.py: step time, forecasts

The prompt tree tells what each worker already holds: on P that is compute saved, on D (where it
keeps a radix cache) transfer saved. MemServe's rule, to follow a cached prefix only while the
queue before it is shorter than computing it elsewhere, is the sum itself and no rule of its own.

With SLOs set, a pair that is expected to keep both goes before all that are not. The policy knows what it
sent where: it counts its own legs exactly, and takes a worker's word only for what others sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pdserve.scheduling.policy.decode_batch import Batches, DecodeBatch, decode_costs_s, forecast_of
from pdserve.scheduling.policy.links import FittedLinks, token_bytes
from pdserve.scheduling.policy.pair_search import Extra, PairSearch
from pdserve.scheduling.policy.prefill_time import PrefillCurve, PrefillLeg, PrefillQueue
from pdserve.scheduling.policy.score import REQUEST_TOKENS, headroom_s, most_cached
from pdserve.scheduling.policy.view import Candidates, Choice, PairView, Reason, WorkerView
from pdserve.types import Forecast, InstanceId, RequestShape, Role

MISS_S = 1000.0
"""A pair that breaks an SLO costs this much more than one that does not: any that keeps it goes first."""
BUSY_DECISIONS = 64
"""Over so many decisions the share of busy prefill workers is taken: some seconds of a busy fleet."""
KEPT_PREFIXES = 64
"""Prompts of waiting requests that are kept cut; they are looked at at each event."""

_WHY = (
    "pair_cost {} wait {:.3f}s + work {:.3f}s ({} of {} tokens cached), link {:.3f}s, "
    "{} {:.3f}s ({} reqs, {:.0f} tokens expected)"
)


class PrefixIndex(Protocol):
    """What is asked of the prompt tree (prefix/tree.py)."""

    def read(self, prompt: bytes) -> Any: ...
    def match(self, prefix: Any, instance_ids: Sequence[InstanceId], now_s: float) -> Sequence[float]: ...
    def match_coming(
        self, prefix: Any, instance_ids: Sequence[InstanceId], now_s: float
    ) -> Sequence[float]: ...
    def send(self, prefix: Any, instance_id: InstanceId, now_s: float) -> object: ...
    def arrive(self, mark: Any, now_s: float) -> None: ...
    def lose(self, mark: Any) -> None: ...
    def forget(self, instance_id: InstanceId) -> None: ...
    def resize(self, instance_id: InstanceId, kv_tokens: int) -> None: ...


@dataclass(frozen=True, slots=True)
class PairCostParams:
    """Settings of ``pair_cost``. SLOs in seconds, 0: none.

    ``delay_weight``: what a second of own prefill work counts at most beyond itself, for the requests that
    will stand behind it.
    """

    slo_ttft_s: float = 0.0
    slo_tpot_s: float = 0.0
    delay_weight: float = 16.0


@dataclass(slots=True, eq=False)
class _Placed:
    """What ``leg_ended`` has to take back."""

    queue: PrefillQueue
    leg: PrefillLeg
    batch: DecodeBatch
    forecast: Forecast
    on_prefill: object
    on_decode: object


class PairCost:
    """Least joint cost in seconds; ties go to fewest in flight, then to the longest unused.

    As a policy for one leg alone (``pick``) it has no memory: it scores what the workers tell.
    """

    name = "pair_cost"
    needs_prompt = True
    needs_ends = True

    def __init__(self, params: PairCostParams | None = None, tree: PrefixIndex | None = None) -> None:
        self.params = params or PairCostParams()
        self.tree = tree
        self.links = FittedLinks()
        self.curve = PrefillCurve()
        self._queues: dict[InstanceId, PrefillQueue] = {}
        self._batches: Batches = {}
        self._sizes: dict[InstanceId, int] = {}
        self._loads: dict[InstanceId, object] = {}
        self._prefixes: dict[int, tuple[bytes, Any]] = {}
        self._rows: tuple[Sequence[WorkerView], Sequence[WorkerView]] = (), ()
        self._hosts: tuple[list[str], list[str]] = [], []
        self._present: set[str] = set()
        self._sizes_d: list[int] = []
        self._busy = 0.0
        self._search = PairSearch()

    # -- decisions ---------------------------------------------------------------------------

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """O(P + D) while links count as alike on a whole grid, else best first."""
        prefills, decodes, now_s = candidates.prefills, candidates.decodes, candidates.now_s
        prefix = self._prefix_of(request)
        cached, held = self._cached(request, prefix, candidates)
        waits_s, works_s = self._prefill_s(request, prefills, cached, now_s)
        self._watch(waits_s)
        prefill_s = self._weigh(request, prefills, waits_s, works_s)
        decode_s = decode_costs_s(request, decodes, self._batches, self.params.slo_tpot_s, MISS_S)
        extra, links_s = self._links_s(request, candidates, held)
        if links_s:
            decode_s = [cost + link for cost, link in zip(decode_s, links_s, strict=True)]
        p, d = self._search.choose(prefill_s, decode_s, candidates, extra)
        prefill, decode = prefills[p], decodes[d]
        link_s = (links_s[d] if links_s else 0.0) + (extra(p, d) if extra else 0.0)
        num_cached = cached[p] if cached else 0
        forecast = forecast_of(request)
        why = Reason(
            _WHY,
            prefill.info.worker_id,
            waits_s[p],
            works_s[p],
            num_cached,
            request.prompt_tokens,
            link_s,
            decode.info.worker_id,
            decode_s[d],
            decode.num_reqs,
            forecast.mean,
        )
        leg = PrefillLeg(works_s[p], float(max(0, request.prompt_tokens - num_cached)), float(num_cached))
        mark = self._place(prefill, decode, leg, forecast, now_s)
        if prefix is not None and self.tree is not None:
            if prefill.info.keeps_prefixes is not False:
                mark.on_prefill = self.tree.send(prefix, prefill.info.instance_id, now_s)
            if decode.info.keeps_prefixes:
                mark.on_decode = self.tree.send(prefix, decode.info.instance_id, now_s)
        return Choice(PairView(prefill, decode, link_s), why, num_cached, held[d] if held else 0, mark)

    def reach_s(self, request: RequestShape, prefills: Sequence[WorkerView], now_s: float) -> Sequence[float]:
        """By how many seconds each prefill worker's queue may outlast the balancer's limit for this request,
        because its prefix is there; empty: by none.

        Where queues are kept short, whoever is first in the balancer's line takes the first worker with
        room, and seldom finds its prefix there. Waiting for the right one is worth what it saves.
        """
        prefix = self._prefix_of(request, is_waiting=True)
        if prefix is None or self.tree is None:
            return ()
        shares = self.tree.match_coming(prefix, [view.info.instance_id for view in prefills], now_s)
        if not any(shares):
            return ()
        weight, tokens, curve = 1.0 + self.delay_weight, request.prompt_tokens, self.curve
        whole = curve.work(tokens, 0.0)
        reaches_s = []
        for view, share in zip(prefills, shares, strict=True):
            past = most_cached(request, share)
            saved = (whole - curve.work(tokens - past, past)) / curve.mix
            reaches_s.append(weight * saved / (view.prefill_tokens_s * view.info.dp_size))
        return reaches_s

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """The worker where this leg costs least, by what the workers tell of themselves."""
        if role is Role.DECODE:
            costs = decode_costs_s(request, views, {}, self.params.slo_tpot_s, MISS_S)
        else:
            waits_s, works_s = self._prefill_s(request, views, (), 0.0)
            costs = self._weigh(request, views, waits_s, works_s)
        best = min(range(len(views)), key=lambda i: (costs[i], views[i].inflight, views[i].last_turn))
        return best, Reason("{:.3f}s", costs[best])

    def leg_ended(self, choice: Choice, role: Role, *, is_whole: bool, now_s: float) -> None:
        """Takes the leg off what its worker still has to do; a whole one's prompt is in its cache now."""
        placed = choice.mark
        if not isinstance(placed, _Placed):
            return
        if role is Role.PREFILL:
            placed.queue.end(placed.leg, now_s, is_whole=is_whole)
            tree_mark, placed.on_prefill = placed.on_prefill, None
        else:
            placed.batch.end(placed.forecast)
            tree_mark, placed.on_decode = placed.on_decode, None
        if tree_mark is not None and self.tree is not None:
            if is_whole:
                self.tree.arrive(tree_mark, now_s)
            else:
                self.tree.lose(tree_mark)

    def forget(self, instance_id: InstanceId) -> None:
        """Drop what is known of the worker."""
        for table in (self._queues, self._batches, self._sizes, self._loads):
            table.pop(instance_id, None)
        self.links.forget(instance_id)
        if self.tree is not None:
            self.tree.forget(instance_id)

    def _prefix_of(self, request: RequestShape, *, is_waiting: bool = False) -> Any:
        """The prompt cut into blocks, once for all questions about it while it waits; None if empty."""
        prompt, known = request.prompt, self._prefixes
        if self.tree is None or not prompt:
            return None
        kept = known.get(id(prompt)) if is_waiting else known.pop(id(prompt), None)
        if kept is not None:
            return kept[1]
        prefix = self.tree.read(prompt)
        if is_waiting:
            if len(known) >= KEPT_PREFIXES:
                known.clear()
            known[id(prompt)] = prompt, prefix  # with the prompt, or its id is another's one day
        return prefix

    @property
    def delay_weight(self) -> float:
        """Requests that will stand behind this one's work: of a queue that is busy for a share r of the time,
        each second of work delays r / (1 - r) later ones until it is empty again. Work saved is worth
        little to an idle fleet and much to a busy one."""
        busy = self._busy
        return min(self.params.delay_weight, busy / (1.0 - busy)) if busy < 1.0 else self.params.delay_weight

    def _watch(self, waits_s: Sequence[float]) -> None:
        """Arrivals see the share of time in which workers are busy. Those without room are."""
        idle = sum(1 for wait_s in waits_s if wait_s <= 0.0)
        self._busy += (1.0 - idle / max(len(waits_s), len(self._queues)) - self._busy) / BUSY_DECISIONS

    # -- terms -------------------------------------------------------------------------------

    def _cached(
        self, request: RequestShape, prefix: object, candidates: Candidates
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Prompt tokens each prefill worker will have cached, and each decode worker has; either may be
        empty. What is still on its way counts on P, which serves in order, and not on D."""
        if prefix is None or self.tree is None:
            return (), ()
        now_s = candidates.now_s
        shares = self.tree.match_coming(prefix, [v.info.instance_id for v in candidates.prefills], now_s)
        cached = [most_cached(request, share) for share in shares] if any(shares) else ()
        if not any(view.info.keeps_prefixes for view in candidates.decodes):
            return cached, ()
        shares = self.tree.match(prefix, [v.info.instance_id for v in candidates.decodes], now_s)
        held = [int(request.prompt_tokens * share) for share in shares] if any(shares) else ()
        return cached, held

    def _prefill_s(
        self, request: RequestShape, views: Sequence[WorkerView], cached: Sequence[int], now_s: float
    ) -> tuple[list[float], list[float]]:
        """Seconds each worker is busy before this prompt, and with it."""
        tokens, queues, curve = request.prompt_tokens, self._queues, self.curve
        mix = curve.mix
        whole = max(REQUEST_TOKENS, curve.work(tokens, 0.0) / mix)
        waits_s, works_s = [], []
        for index, view in enumerate(views):
            rate = view.prefill_tokens_s * view.info.dp_size
            queue = queues.get(view.info.instance_id)
            if queue is None or view.num_reqs > view.inflight:
                # Others than us use this worker, or nobody: it knows best.
                wait_s = view.queued_tokens / rate
                if queue is not None:
                    wait_s = max(wait_s, queue.wait_s(now_s))
            else:
                wait_s = queue.wait_s(now_s)
            waits_s.append(wait_s)
            past = cached[index] if cached else 0
            work = max(REQUEST_TOKENS, curve.work(tokens - past, past) / mix) if past else whole
            works_s.append(work / rate)
        return waits_s, works_s

    def _weigh(
        self,
        request: RequestShape,
        views: Sequence[WorkerView],
        waits_s: Sequence[float],
        works_s: Sequence[float],
    ) -> list[float]:
        """The cost of each prefill worker."""
        weight, slo_s, tokens = 1.0 + self.delay_weight, self.params.slo_ttft_s, request.prompt_tokens
        costs = [wait_s + weight * work_s for wait_s, work_s in zip(waits_s, works_s, strict=True)]
        for index, view in enumerate(views):
            if view.kv_capacity:
                costs[index] += headroom_s(view, tokens)
        if slo_s <= 0.0:
            return costs
        is_late = [wait_s + work_s > slo_s for wait_s, work_s in zip(waits_s, works_s, strict=True)]
        if all(is_late):
            return costs
        return [cost + MISS_S if late else cost for cost, late in zip(costs, is_late, strict=True)]

    def _links_s(
        self, request: RequestShape, candidates: Candidates, held: Sequence[int]
    ) -> tuple[Extra | None, Sequence[float]]:
        """Transfer seconds: what every pair of a decode worker costs, and what some pairs cost beyond."""
        prefills, decodes = candidates.prefills, candidates.decodes
        told = candidates.link_s
        if told is not None:
            return (lambda p, d: max(0.0, told(prefills[p], decodes[d], request))), ()
        tokens, same, other = request.prompt_tokens, self.links.same_host, self.links.other_host
        if self._rows[0] is not prefills or self._rows[1] is not decodes:
            self._rows = prefills, decodes
            self._hosts = self.links.hosts(prefills), self.links.hosts(decodes)
            self._present = set(self._hosts[0])
            self._sizes_d = [token_bytes(view) for view in decodes]
        (here, there), present = self._hosts, self._present
        if held:
            sizes = [(tokens - have) * size for size, have in zip(self._sizes_d, held, strict=True)]
        else:
            sizes = [tokens * size for size in self._sizes_d]
        if len(present) == 1 and present.issuperset(there):
            if sizes.count(sizes[0]) == len(sizes):
                return None, [same.seconds(sizes[0])] * len(sizes)
            return None, [same.seconds(size) for size in sizes]
        far_s = [other.seconds(size) for size in sizes]
        if present.isdisjoint(there):
            return None, far_s
        near_s = [same.seconds(size) for size in sizes]
        floor_s = [
            min(near, far) if host in present else far
            for near, far, host in zip(near_s, far_s, there, strict=True)
        ]

        def extra(p: int, d: int) -> float:
            return (near_s[d] if here[p] == there[d] else far_s[d]) - floor_s[d]

        return extra, floor_s

    # -- memory ------------------------------------------------------------------------------

    def _place(
        self, prefill: WorkerView, decode: WorkerView, leg: PrefillLeg, forecast: Forecast, now_s: float
    ) -> _Placed:
        prefill_id, decode_id = prefill.info.instance_id, decode.info.instance_id
        queue = self._queues.get(prefill_id)
        if queue is None:
            queue = self._queues[prefill_id] = PrefillQueue(self.curve)
        batch = self._batches.get(decode_id)
        if batch is None:
            batch = self._batches[decode_id] = DecodeBatch()
        queue.send(leg, now_s)
        batch.send(forecast)
        if prefill.load is not None and prefill.load is not self._loads.get(prefill_id):
            self._loads[prefill_id] = prefill.load
            self.links.learn(prefill_id, prefill.load)
        here, there = self.links.hosts((prefill, decode))
        self.links.sent(prefill.info, is_same_host=here == there)
        for view in (prefill, decode):
            size, instance_id = view.kv_capacity, view.info.instance_id
            if self.tree is not None and size and self._sizes.get(instance_id) != size:
                self._sizes[instance_id] = size
                self.tree.resize(instance_id, size)
        return _Placed(queue, leg, batch, forecast, None, None)

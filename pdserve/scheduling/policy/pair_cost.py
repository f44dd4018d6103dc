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

from pdserve.scheduling.policy.decode_batch import Batches, DecodeBatch, decode_costs_s, forecast_of
from pdserve.scheduling.policy.links import FittedLinks
from pdserve.scheduling.policy.pair_search import PairSearch
from pdserve.scheduling.policy.prefill_time import PrefillLeg, PrefillQueue, PrefillQueues
from pdserve.scheduling.policy.score import headroom_s, most_cached
from pdserve.scheduling.policy.view import Candidates, Choice, PairView, Reason, WorkerView
from pdserve.scheduling.prefix.tree import Mark, Prefix, PromptTree
from pdserve.types import Forecast, InstanceId, RequestShape, Role

MISS_S = 1000.0
"""A pair that breaks an SLO costs this much more than one that does not: any that keeps it goes first."""
MAX_WAITING_PREFIXES = 64
"""Prompts of waiting requests that are kept cut; they are looked at at each event."""

_WHY = (
    "pair_cost {} wait {:.3f}s + work {:.3f}s ({} of {} tokens cached), link {:.3f}s, "
    "{} {:.3f}s ({} reqs, {:.0f} tokens expected)"
)


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
    """One placed request: what ``leg_ended`` has to take back."""

    queue: PrefillQueue
    leg: PrefillLeg
    batch: DecodeBatch
    forecast: Forecast
    on_prefill: Mark | None
    on_decode: Mark | None


class PairCost:
    """Least joint cost in seconds; ties go to fewest in flight, then to the longest unused.

    As a policy for one leg alone (``pick``) it has no memory: it scores what the workers tell.
    """

    name = "pair_cost"
    needs_prompt = True
    needs_ends = True

    def __init__(self, params: PairCostParams | None = None, tree: PromptTree | None = None) -> None:
        self.params = params or PairCostParams()
        self.tree = PromptTree() if tree is None else tree
        self.links = FittedLinks()
        self._queues = PrefillQueues()
        self._batches: Batches = {}
        self._waiting: dict[bytes, Prefix] = {}
        self._search = PairSearch()

    # -- decisions ---------------------------------------------------------------------------

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """O(P + D) while links count as alike on a whole grid, else best first."""
        prefills, decodes, now_s = candidates.prefills, candidates.decodes, candidates.now_s
        prefix = self._prefix_of(request.prompt)
        cached, held = self._cached(request, prefix, candidates)
        waits_s, works_s = self._queues.times_s(request, prefills, cached, now_s)
        self._queues.watch(waits_s)
        prefill_s = self._weigh(request, prefills, waits_s, works_s)
        links = self.links.times(request, candidates, held)
        decode_s = decode_costs_s(request, decodes, self._batches, self.params.slo_tpot_s, MISS_S)
        decode_s = [cost + link for cost, link in zip(decode_s, links.floor_s, strict=True)]
        p, d = self._search.choose(prefill_s, decode_s, candidates, links.extra)
        prefill, decode, link_s = prefills[p], decodes[d], links.seconds(p, d)
        num_cached, forecast = cached[p] if cached else 0, forecast_of(request)
        why = Reason(
            _WHY,
            *(prefill.info.worker_id, waits_s[p], works_s[p], num_cached, request.prompt_tokens, link_s),
            *(decode.info.worker_id, decode_s[d], decode.num_reqs, forecast.mean),
        )
        leg = PrefillLeg(works_s[p], float(max(0, request.prompt_tokens - num_cached)), float(num_cached))
        placed = self._place(prefill, decode, leg, forecast, now_s)
        if prefix is not None:
            if prefill.info.keeps_prefixes is not False:
                placed.on_prefill = self.tree.send(prefix, prefill.info.instance_id, now_s)
            if decode.info.keeps_prefixes:
                placed.on_decode = self.tree.send(prefix, decode.info.instance_id, now_s)
        return Choice(PairView(prefill, decode, link_s), why, num_cached, held[d] if held else 0, placed)

    def reach_s(self, request: RequestShape, prefills: Sequence[WorkerView], now_s: float) -> Sequence[float]:
        """By how many seconds each prefill worker's queue may outlast the balancer's limit for this request,
        because its prefix is there; empty: by none.

        Where queues are kept short, whoever is first in the balancer's line takes the first worker with
        room, and seldom finds its prefix there. Waiting for the right one is worth what it saves.
        """
        prefix = self._prefix_of(request.prompt, is_waiting=True)
        if prefix is None:
            return ()
        shares = self.tree.match_coming(prefix, [view.info.instance_id for view in prefills], now_s)
        if not any(shares):
            return ()
        weight, tokens, saved_s = 1.0 + self.delay_weight, request.prompt_tokens, self._queues.saved_s
        return [
            weight * saved_s(tokens, most_cached(request, share), view)
            for view, share in zip(prefills, shares, strict=True)
        ]

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """The worker where this leg costs least, by what the workers tell of themselves."""
        if role is Role.DECODE:
            costs = decode_costs_s(request, views, {}, self.params.slo_tpot_s, MISS_S)
        else:
            waits_s, works_s = self._queues.times_s(request, views, (), 0.0)
            costs = self._weigh(request, views, waits_s, works_s)
        best = min(range(len(views)), key=lambda i: (costs[i], views[i].inflight, views[i].last_turn))
        return best, Reason("{:.3f}s", costs[best])

    @property
    def delay_weight(self) -> float:
        """Requests that will stand behind this one's work. Work saved is worth little to an idle fleet and
        much to a busy one."""
        return self._queues.num_delayed(self.params.delay_weight)

    # -- ends ----------------------------------------------------------------------------------

    def leg_ended(self, choice: Choice, role: Role, *, is_whole: bool, now_s: float) -> None:
        """Takes the leg off what its worker still has to do; a whole one's prompt is in its cache now."""
        placed = choice.mark
        if not isinstance(placed, _Placed):
            return
        if role is Role.PREFILL:
            placed.queue.end(placed.leg, now_s, is_whole=is_whole)
            mark, placed.on_prefill = placed.on_prefill, None
        else:
            placed.batch.end(placed.forecast)
            mark, placed.on_decode = placed.on_decode, None
        if mark is None:
            return
        if is_whole:
            self.tree.arrive(mark, now_s)
        else:
            self.tree.lose(mark)

    def forget(self, instance_id: InstanceId) -> None:
        """Drop what is known of the worker."""
        self._batches.pop(instance_id, None)
        self._queues.forget(instance_id)
        self.links.forget(instance_id)
        self.tree.forget(instance_id)

    # -- parts of a decision -------------------------------------------------------------------

    def _prefix_of(self, prompt: bytes, *, is_waiting: bool = False) -> Prefix | None:
        """The prompt cut into blocks, once for all questions about it while it waits; None if empty."""
        if not prompt:
            return None
        waiting = self._waiting
        if not is_waiting:
            # Nobody waits as a rule, and then the prompt need not be hashed for a look.
            kept = waiting.pop(prompt, None) if waiting else None
            return kept or self.tree.read(prompt)
        prefix = waiting.get(prompt)
        if prefix is None:
            if len(waiting) >= MAX_WAITING_PREFIXES:
                waiting.clear()
            prefix = waiting[prompt] = self.tree.read(prompt)
        return prefix

    def _cached(
        self, request: RequestShape, prefix: Prefix | None, candidates: Candidates
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Prompt tokens each prefill worker will have cached, and each decode worker has; either may be
        empty. What is still on its way counts on P, which serves in order, and not on D."""
        if prefix is None:
            return (), ()
        now_s, decodes = candidates.now_s, candidates.decodes
        shares = self.tree.match_coming(prefix, [v.info.instance_id for v in candidates.prefills], now_s)
        cached = [most_cached(request, share) for share in shares] if any(shares) else ()
        if not any(view.info.keeps_prefixes for view in decodes):
            return cached, ()
        shares = self.tree.match(prefix, [view.info.instance_id for view in decodes], now_s)
        held = [int(request.prompt_tokens * share) for share in shares] if any(shares) else ()
        return cached, held

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

    def _place(
        self, prefill: WorkerView, decode: WorkerView, leg: PrefillLeg, forecast: Forecast, now_s: float
    ) -> _Placed:
        queue = self._queues.of(prefill.info.instance_id)
        batch = self._batches.get(decode.info.instance_id)
        if batch is None:
            batch = self._batches[decode.info.instance_id] = DecodeBatch()
        queue.send(leg, now_s)
        batch.send(forecast)
        self.links.placed(prefill, decode)
        for view in (prefill, decode):
            if view.kv_capacity:
                self.tree.resize(view.info.instance_id, view.kv_capacity)
        return _Placed(queue, leg, batch, forecast, None, None)

"""Other systems' policies, written from what they publish, for simulations and benches only.

Sources: their documentation and the score formulas quoted in the docstrings; no code is theirs. Each class
names its assumptions. All of them read our load table, with exact in-flight credit and samples every
0.25 s: better knowledge than in their own systems (smg polls every 10 s). sglang-router's ``random``,
``round_robin`` and ``cache_aware`` are policies of the balancer itself.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from pdserve.scheduling.policy import MAKERS, Maker
from pdserve.scheduling.policy.score import HEADROOM_S, MAX_HEADROOM_S, most_cached
from pdserve.scheduling.policy.simple import LegByLeg
from pdserve.scheduling.policy.view import Candidates, Choice, PairView, Reason, WorkerView
from pdserve.scheduling.prefix.tree import Mark, Prefix, PromptTree
from pdserve.types import InstanceId, RequestShape, Role

DYNAMO_BLOCK_TOKENS = 64
"""Dynamo's SGLang recipes run with ``--page-size 64``. Only rounding depends on it."""
AIBRIX_SPREAD_REQS = 16
"""Assumed, its documentation was not at hand: the imbalance, in requests between fullest and emptiest,
from which AIBrix's fast paths go to the emptiest."""


class RouterPowerOfTwo(LegByLeg):
    """sglang-router 0.3.2's ``power_of_two``: of two random workers the one with less load.

    Its load is the worker's count of requests in flight, refreshed from ``/get_load`` by a monitor where
    that runs; ours is the count of our own unfinished legs, exact. Tokens play no part.
    """

    name = "router_power_of_two"

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """The one with fewer in flight of two that were drawn; the first drawn if equal."""
        drawn = self._random.sample(range(len(views)), min(2, len(views)))
        best = min(drawn, key=lambda index: views[index].inflight)
        return best, Reason("{} in flight, the fewer of {}", views[best].inflight, len(drawn))


class SmgLeastLoad(LegByLeg):
    """smg 1.13's ``least_load``, each leg for itself:

    ``(queued_tokens + inflight_tokens_since_last_poll) / throughput + 0.15 * k / (1 - k)``, k = KV use.

    Assumed: throughput is the fitted prefill rate on P and the reported generation rate on D (its base
    step's if none is reported yet); the prompt itself is not in the score; the first of equals is taken.
    """

    name = "smg_least_load"

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """The least expected wait."""
        costs = [self._score(role, view) for view in views]
        best = costs.index(min(costs))
        return best, Reason("{:.3f}s ({:.0f} tokens queued)", costs[best], views[best].queued_tokens)

    @staticmethod
    def _score(role: Role, view: WorkerView) -> float:
        if role is Role.PREFILL:
            throughput = view.prefill_tokens_s * view.info.dp_size
        else:
            reported = view.load.gen_throughput if view.load else 0.0
            throughput = reported or 1.0 / max(1e-6, view.step_base_s + view.step_slope_s)
        wait_s = view.queued_tokens / throughput
        if view.kv_capacity <= 0:
            return wait_s
        used = view.kv_tokens / view.kv_capacity
        return wait_s + (HEADROOM_S * used / (1.0 - used) if used < 0.99 else MAX_HEADROOM_S)


class _TreeBaseline:
    """Base of the policies that follow a prompt tree of what has arrived on prefill workers."""

    needs_prompt = True
    needs_ends = True

    def __init__(self, tree: PromptTree) -> None:
        self.tree = tree

    def leg_ended(self, choice: Choice, role: Role, *, is_whole: bool, now_s: float) -> None:
        """Tell the tree whether the prompt is in the prefill worker's cache."""
        if role is Role.DECODE or not isinstance(choice.mark, Mark):
            return
        if is_whole:
            self.tree.arrive(choice.mark, now_s)
        else:
            self.tree.lose(choice.mark)

    def reach_s(self, request: RequestShape, prefills: Sequence[WorkerView], now_s: float) -> Sequence[float]:
        """No queue may outlast the balancer's limit."""
        return ()

    def forget(self, instance_id: InstanceId) -> None:
        """Drop what the tree has of the worker."""
        self.tree.forget(instance_id)

    def _read(
        self, request: RequestShape, prefills: Sequence[WorkerView], now_s: float
    ) -> tuple[Prefix | None, Sequence[float]]:
        """The prompt cut into blocks, and each worker's share of it; neither of an empty prompt."""
        if not request.prompt:
            return None, ()
        prefix = self.tree.read(request.prompt)
        return prefix, self.tree.match(prefix, [view.info.instance_id for view in prefills], now_s)

    def _send(self, prefix: Prefix | None, prefill: WorkerView, now_s: float) -> Mark | None:
        return None if prefix is None else self.tree.send(prefix, prefill.info.instance_id, now_s)


class DynamoKV(_TreeBaseline):
    """Dynamo's KV router, lowest cost wins (``--router-temperature 0``, its default):

    ``prefill_load_scale * max(active_prefill_blocks + incoming_blocks - overlap_credit_blocks, 0)
    + (active_decode_blocks + incoming_blocks)``; in decode routing no overlap and no prefill term.

    ``prefill_load_scale`` 1, device overlap credit 1, both its defaults; overlap from the same prompt tree
    as ``pair_cost``, of what has arrived. Assumed: active prefill blocks are the tokens queued on the
    worker, active decode blocks the KV in use there; equals are drawn at random.
    """

    name = "dynamo_kv"

    def __init__(self, tree: PromptTree, seed: int | None = None) -> None:
        super().__init__(tree)
        self._random = random.Random(seed)

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """The prefill worker first, then one of its decode partners."""
        prefills, now_s = candidates.prefills, candidates.now_s
        prefix, shares = self._read(request, prefills, now_s)
        p, prefill_cost = self._least(Role.PREFILL, request, prefills, shares)
        partners = candidates.partners(p)
        index, decode_cost = self._least(Role.DECODE, request, [candidates.decodes[d] for d in partners], ())
        pair = candidates.at(p, partners[index])
        cached = most_cached(request, shares[p]) if shares else 0
        why = Reason("dynamo_kv {:.0f} and {:.0f} blocks, {} cached", prefill_cost, decode_cost, cached)
        return Choice(pair, why, cached, 0, self._send(prefix, pair.prefill, now_s))

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """The least cost without overlap: alone for one leg it has no memory."""
        best, cost = self._least(role, request, views, ())
        return best, Reason("{:.0f} blocks", cost)

    def _least(
        self, role: Role, request: RequestShape, views: Sequence[WorkerView], shares: Sequence[float]
    ) -> tuple[int, float]:
        incoming = -(-request.prompt_tokens // DYNAMO_BLOCK_TOKENS)
        costs = []
        for index, view in enumerate(views):
            cost = view.kv_tokens / DYNAMO_BLOCK_TOKENS + incoming
            if role is Role.PREFILL:
                overlap = shares[index] * request.prompt_tokens // DYNAMO_BLOCK_TOKENS if shares else 0
                cost += max(view.queued_tokens / DYNAMO_BLOCK_TOKENS + incoming - overlap, 0.0)
            costs.append(cost)
        least = min(costs)
        equal = [index for index, cost in enumerate(costs) if cost == least]
        return (self._random.choice(equal) if len(equal) > 1 else equal[0]), least


class Aibrix(_TreeBaseline):
    """AIBrix's pair score: least sum of the normalised scores of both legs, over all allowed pairs.

    Prefill ``(100 - match%) * 0.1 + reqs / max_reqs``; decode ``(w1 * reqs + w2 * (1 - throughput share)) /
    free``; each divided by its row's largest. A row whose fullest worker has over 16 requests more
    than its emptiest takes the emptiest (the documented fast path). Its PendingDecodeTracker, against
    thundering herds, is our exact credit.

    Assumed: w1 = w2 = 1, reqs in w1 as share of the row's most, throughput as reported by the last sample,
    free = share of the KV pool not in use (it says ``free_gpu``), prefix match as it has arrived.
    """

    name = "aibrix"

    def choose(self, request: RequestShape, candidates: Candidates) -> Choice:
        """The least sum; on a whole grid that is the least of each row."""
        prefills, decodes, now_s = candidates.prefills, candidates.decodes, candidates.now_s
        prefix, shares = self._read(request, prefills, now_s)
        left, right = _prefill_scores(prefills, shares), _decode_scores(decodes)
        if candidates.allowed is None:
            p, d = left.index(min(left)), right.index(min(right))
        else:
            p, d = min(candidates.allowed, key=lambda at: left[at[0]] + right[at[1]])
        pair = PairView(prefills[p], decodes[d])
        cached = most_cached(request, shares[p]) if shares else 0
        why = Reason("aibrix {:.3f} + {:.3f}, {} cached", left[p], right[d], cached)
        return Choice(pair, why, cached, 0, self._send(prefix, pair.prefill, now_s))

    def pick(self, role: Role, request: RequestShape, views: Sequence[WorkerView]) -> tuple[int, Reason]:
        """The least score of that row, without prefix match."""
        scores = _prefill_scores(views, ()) if role is Role.PREFILL else _decode_scores(views)
        best = scores.index(min(scores))
        return best, Reason("{:.3f}", scores[best])


def _prefill_scores(views: Sequence[WorkerView], shares: Sequence[float]) -> list[float]:
    counts = [view.num_reqs for view in views]
    most = max(counts)
    if most - min(counts) > AIBRIX_SPREAD_REQS:
        return _normalised([float(count) for count in counts])
    scores = []
    for index, count in enumerate(counts):
        match = 100.0 * shares[index] if shares else 0.0
        scores.append((100.0 - match) * 0.1 + count / max(1, most))
    return _normalised(scores)


def _decode_scores(views: Sequence[WorkerView]) -> list[float]:
    counts = [view.num_reqs for view in views]
    most = max(counts)
    if most - min(counts) > AIBRIX_SPREAD_REQS:
        return _normalised([float(count) for count in counts])
    rates = [view.load.gen_throughput if view.load else 0.0 for view in views]
    fastest = max(rates) or 1.0
    scores = []
    for view, count, rate in zip(views, counts, rates, strict=True):
        used = view.kv_tokens / view.kv_capacity if view.kv_capacity > 0 else 0.0
        scores.append((count / max(1, most) + 1.0 - rate / fastest) / max(0.01, 1.0 - used))
    return _normalised(scores)


def _normalised(scores: Sequence[float]) -> list[float]:
    largest = max(scores)
    return [score / largest for score in scores] if largest > 0 else [0.0] * len(scores)


BASELINES: Mapping[str, Maker] = {
    "router_power_of_two": lambda seed, params: RouterPowerOfTwo(seed),
    "smg_least_load": lambda seed, params: SmgLeastLoad(),
    "dynamo_kv": lambda seed, params: DynamoKV(params.tree(), seed),
    "aibrix": lambda seed, params: Aibrix(params.tree()),
}
"""Other systems' policies by name."""

SIMULATED_MAKERS: Mapping[str, Maker] = {**MAKERS, **BASELINES}
"""Every policy that ``pdserve simulate`` and the benches take: the balancer's own, then the others'."""

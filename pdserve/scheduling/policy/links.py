"""How long a request's KV travels: ``alpha + bytes * beta``, for each class of link.

Two classes: both workers on one host, or on two. SGLang tells of a prefill worker's last
transfer how long it took after the prefill was done and how large it was (``/v1/loads``
section ``disaggregation``: ``kv_transfer_latency_ms``, ``kv_transfer_speed_gb_s``), not whom it
went to; it counts for a class only if all that this worker sent of late was of that class.

A class starts from a prior and moves as it is measured. Pure; holds no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pdserve.linear_fit import LinearFit
from pdserve.scheduling.policy.pair_search import Extra
from pdserve.scheduling.policy.view import Candidates, WorkerView
from pdserve.types import InstanceId, RequestShape, WorkerInfo, WorkerLoad

GIB = float(2**30)
UNKNOWN_TOKEN_BYTES = 131_072
"""KV of one token of Llama-3.1-8B in 16 bit: 2 * 32 layers * 8 heads * 128 * 2 bytes."""
PRIOR_ALPHA_S = 0.005
"""2 * 32 layers * some twenty runs of pages, at 3 to 4 us a NIXL descriptor (vLLM issues 34054 and
50913: 129 ms for 40,064 descriptors, 6.7 ms for 1,785)."""
PRIOR_SAME_HOST_GB_S = 20.0
"""FlowKV's table of one L20 server goes from 15 to 24 GB/s; a PCIe 4 x16 link."""
PRIOR_OTHER_HOST_GB_S = 10.0
"""Half of a 200 Gb/s card: Mooncake's engine gets 87 GB/s out of four of them."""
PRIOR_WEIGHT = 4.0
"""Measured transfers that count as much as the prior."""
PRIOR_SIZES = (2.0**26, 2.0**30)
"""Bytes at which the prior is put down as two pseudo-measurements."""
MAX_WEIGHT = 200.0
"""Older measurements fade."""
MIN_SPEED_GB_S = 1e-4


@dataclass(slots=True, eq=False)
class LinkFit:
    """Least squares over measured transfers of one class. A transfer weighs by what the prior expects of
    its size, squared: errors grow with the time, and small and large ones are to count alike."""

    prior_gb_s: float
    alpha_s: float = PRIOR_ALPHA_S
    beta_s: float = field(init=False)
    """Seconds per byte."""
    _line: LinearFit = field(default_factory=LinearFit)

    def __post_init__(self) -> None:
        self.beta_s = 1.0 / (self.prior_gb_s * GIB)
        for size in PRIOR_SIZES:
            self._add(size, self.seconds(size), PRIOR_WEIGHT / len(PRIOR_SIZES))

    def seconds(self, num_bytes: float) -> float:
        """Expected time of so many bytes; nothing to send costs nothing."""
        return self.alpha_s + num_bytes * self.beta_s if num_bytes > 0 else 0.0

    def observe(self, num_bytes: float, took_s: float) -> None:
        """A transfer was measured."""
        if num_bytes <= 0 or took_s <= 0:
            return
        self._add(num_bytes, took_s, 1.0)
        line = self._line
        slope = line.solve()[1] if line.spread > 0.0 else 0.0
        slope = min(max(slope, 0.0), line.uy / line.uv)  # neither term below zero
        self.beta_s, self.alpha_s = slope, max(0.0, (line.uy - slope * line.uv) / line.uu)

    def _add(self, num_bytes: float, took_s: float, count: float) -> None:
        weight = count / (PRIOR_ALPHA_S + num_bytes / (self.prior_gb_s * GIB)) ** 2
        if self._line.uu > 0.0:
            self._line.fade(MAX_WEIGHT / (MAX_WEIGHT + count))
        self._line.add(1.0, num_bytes, took_s, weight)


@dataclass(frozen=True, slots=True)
class LinkTimes:
    """Transfer seconds of every pair: its decode worker's ``floor_s``, and what the pair takes beyond it.

    ``extra`` is None if no pair takes more than the floor.
    """

    floor_s: Sequence[float]
    extra: Extra | None = None

    def seconds(self, prefill: int, decode: int) -> float:
        """Transfer seconds of the pair at these indices."""
        return self.floor_s[decode] + (self.extra(prefill, decode) if self.extra else 0.0)


@dataclass(slots=True)
class _Sender:
    """What a prefill worker told last: its sample, and latency and speed of the transfer in it."""

    sample: WorkerLoad | None = None
    last: tuple[float, float] = (0.0, 0.0)
    is_same_host: bool | None = None


class _Row:
    """Hosts and KV bytes per token of the workers in one row; made anew when the row changes."""

    __slots__ = ("hosts", "present", "sizes", "views")

    def __init__(self, views: Sequence[WorkerView], hosts: list[str]) -> None:
        self.views = views
        self.hosts = hosts
        self.present = set(hosts)
        self.sizes = [token_bytes(view) for view in views]


class FittedLinks:
    """The two classes, and what each prefill worker tells of them."""

    def __init__(self) -> None:
        self.same_host = LinkFit(PRIOR_SAME_HOST_GB_S)
        self.other_host = LinkFit(PRIOR_OTHER_HOST_GB_S)
        self._hosts: dict[str, str] = {}
        self._senders: dict[InstanceId, _Sender] = {}
        self._prefills = self._decodes = _Row((), [])

    def times(self, request: RequestShape, candidates: Candidates, held: Sequence[int]) -> LinkTimes:
        """Transfer seconds of all pairs. ``held``: prompt tokens that each decode worker has; empty: none."""
        prefills, decodes, told = candidates.prefills, candidates.decodes, candidates.link_s
        if told is not None:
            floor_s = [0.0] * len(decodes)
            return LinkTimes(floor_s, lambda p, d: max(0.0, told(prefills[p], decodes[d], request)))
        if self._prefills.views is not prefills:
            self._prefills = _Row(prefills, self.hosts(prefills))
        if self._decodes.views is not decodes:
            self._decodes = _Row(decodes, self.hosts(decodes))
        tokens, sizes = request.prompt_tokens, self._decodes.sizes
        if held:
            num_bytes = [(tokens - have) * size for size, have in zip(sizes, held, strict=True)]
        else:
            num_bytes = [tokens * size for size in sizes]
        return self._fitted(num_bytes)

    def _fitted(self, num_bytes: list[int]) -> LinkTimes:
        here, present, there = self._prefills.hosts, self._prefills.present, self._decodes.hosts
        same, other = self.same_host, self.other_host
        if len(present) == 1 and present.issuperset(there):
            if num_bytes.count(num_bytes[0]) == len(num_bytes):
                return LinkTimes([same.seconds(num_bytes[0])] * len(num_bytes))
            return LinkTimes([same.seconds(count) for count in num_bytes])
        far_s = [other.seconds(count) for count in num_bytes]
        if present.isdisjoint(there):
            return LinkTimes(far_s)
        near_s = [same.seconds(count) for count in num_bytes]
        floor_s = [
            min(near, far) if host in present else far
            for near, far, host in zip(near_s, far_s, there, strict=True)
        ]

        def extra(p: int, d: int) -> float:
            return (near_s[d] if here[p] == there[d] else far_s[d]) - floor_s[d]

        return LinkTimes(floor_s, extra)

    def hosts(self, views: Sequence[WorkerView]) -> list[str]:
        """Where each worker runs."""
        known, hosts = self._hosts, []
        for view in views:
            url = view.info.url
            host = known.get(url)
            if host is None:
                if len(known) > 4 * len(views) + 1024:
                    known.clear()
                host = known[url] = urlsplit(url).hostname or url
            hosts.append(host)
        return hosts

    def placed(self, prefill: WorkerView, decode: WorkerView) -> None:
        """A request was placed on this pair."""
        if prefill.load is not None:
            self.learn(prefill.info.instance_id, prefill.load)
        here, there = self.hosts((prefill, decode))
        self.sent(prefill.info, is_same_host=here == there)

    def sent(self, prefill: WorkerInfo, *, is_same_host: bool) -> None:
        """The prefill worker sends a request's KV over a link of this class."""
        sender = self._senders.setdefault(prefill.instance_id, _Sender())
        if sender.is_same_host is not is_same_host:
            # What is on its way may be either: the next measurement counts for nobody.
            sender.is_same_host = is_same_host
            sender.last = (-1.0, -1.0)

    def learn(self, instance_id: InstanceId, load: WorkerLoad) -> None:
        """A sample of a prefill worker: one transfer, if it tells of another one than the last did."""
        sender = self._senders.setdefault(instance_id, _Sender())
        if load is sender.sample:
            return
        sender.sample = load
        latency_s = load.kv_transfer_latency_ms / 1e3
        speed = load.kv_transfer_speed_gb_s
        if sender.is_same_host is None or latency_s <= 0 or speed < MIN_SPEED_GB_S:
            return
        before, sender.last = sender.last, (latency_s, speed)
        if before == sender.last or before[0] < 0:
            return
        fit = self.same_host if sender.is_same_host else self.other_host
        fit.observe(latency_s * speed * GIB, latency_s)

    def forget(self, instance_id: InstanceId) -> None:
        """The worker is gone."""
        self._senders.pop(instance_id, None)


def token_bytes(view: WorkerView) -> int:
    """KV bytes of one token over all layers; that of an 8B model if the worker does not tell."""
    layout = view.info.kv_layout
    return layout.token_bytes * layout.num_layers if layout else UNKNOWN_TOKEN_BYTES

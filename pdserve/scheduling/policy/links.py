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

from pdserve.scheduling.policy.view import WorkerView
from pdserve.types import InstanceId, WorkerInfo, WorkerLoad

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
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)

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
        weight, size, square, time_s, cross = self._sums
        mean, mean_s = size / weight, time_s / weight
        variance = square / weight - mean * mean
        slope = (cross / weight - mean * mean_s) / variance if variance > 0 else 0.0
        slope = min(max(slope, 0.0), mean_s / mean)  # neither term below zero
        self.beta_s, self.alpha_s = slope, max(0.0, mean_s - slope * mean)

    def _add(self, num_bytes: float, took_s: float, count: float) -> None:
        weight = count / (PRIOR_ALPHA_S + num_bytes / (self.prior_gb_s * GIB)) ** 2
        keep = 1.0 if self._sums[0] <= 0 else MAX_WEIGHT / (MAX_WEIGHT + count)
        added = (1.0, num_bytes, num_bytes * num_bytes, took_s, took_s * num_bytes)
        self._sums = [old * keep + weight * value for old, value in zip(self._sums, added, strict=True)]


@dataclass(slots=True)
class _Sender:
    last: tuple[float, float] = (0.0, 0.0)
    is_same_host: bool | None = None


class FittedLinks:
    """The two classes, and what each prefill worker tells of them."""

    def __init__(self) -> None:
        self.same_host = LinkFit(PRIOR_SAME_HOST_GB_S)
        self.other_host = LinkFit(PRIOR_OTHER_HOST_GB_S)
        self._hosts: dict[str, str] = {}
        self._senders: dict[InstanceId, _Sender] = {}

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

    def sent(self, prefill: WorkerInfo, *, is_same_host: bool) -> None:
        """A request was placed on this pair class."""
        sender = self._senders.setdefault(prefill.instance_id, _Sender())
        if sender.is_same_host is not is_same_host:
            # What is on its way may be either: the next measurement counts for nobody.
            sender.is_same_host = is_same_host
            sender.last = (-1.0, -1.0)

    def learn(self, instance_id: InstanceId, load: WorkerLoad) -> None:
        """A sample of a prefill worker: one transfer, if it tells of another one than the last did."""
        latency_s = load.kv_transfer_latency_ms / 1e3
        speed = load.kv_transfer_speed_gb_s
        sender = self._senders.get(instance_id)
        if sender is None or latency_s <= 0 or speed < MIN_SPEED_GB_S:
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

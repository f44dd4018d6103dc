"""The link between two workers: each has one port, which serves one transfer after the other.

A transfer of n bytes occupies both ports for n * beta and arrives alpha later. Serial service is
what SGLang's transfer threads do to one destination; the last of several transfers ends
as it would under a fair share.
"""

from __future__ import annotations

from pdserve.sim.cost import CostModel


class Port:
    """A worker's network: free again at ``free_s``; ``busy_s`` in all."""

    __slots__ = ("busy_s", "free_s")

    def __init__(self) -> None:
        self.free_s = 0.0
        self.busy_s = 0.0


def send(model: CostModel, source: Port, target: Port, tokens: int, now_s: float) -> float:
    """Book the transfer of so many tokens' KV; returns when it has arrived."""
    start_s = max(now_s, source.free_s, target.free_s)
    took_s = tokens * model.kv_bytes_per_token * model.link_beta_s
    source.free_s = target.free_s = start_s + took_s
    source.busy_s += took_s
    target.busy_s += took_s
    return start_s + took_s + model.link_alpha_s

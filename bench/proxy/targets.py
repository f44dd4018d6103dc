"""What pdserve is to reach, and whether it did: pure, from rows to verdicts.

Against each gateway, the faster of its variants that ran, at each number of
connections; where the load core was saturated pdserve might have done more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from proxy.parts import DIRECT, MemoryReport, StreamsReport
from proxy.rounds import Row

RIVALS = ("smg", "sglang-router")
REQUESTS_FACTOR = 2.0
CPU_FACTOR = 0.5
ADDED_MS = 0.5
LEAST_JUDGED = 200_000
"""Fewer requests do not tell whether memory is flat."""
GROWTH_SHARE = 0.02
"""Growth of memory over the last four fifths of the requests that still counts as flat."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target: what was wanted, what came out."""

    target: str
    found: str
    is_met: bool

    def format(self) -> str:
        """A line of the table."""
        return f"  {'met   ' if self.is_met else 'MISSED'}  {self.target:62} {self.found}"


def health(parts: Mapping[str, list[Row]]) -> list[Verdict]:
    """Every target that these parts are about."""
    verdicts: list[Verdict] = []
    for title, rows in parts.items():
        part = title.split(" ")[0]
        for connections in sorted({row.connections for row in rows}):
            here = {row.label: row for row in rows if row.connections == connections and row.rounds}
            if ours := here.get("pdserve"):
                verdicts += _judge_one(part, f"{title} at {connections}", ours, here)
    return verdicts


def _judge_one(part: str, where: str, ours: Row, here: Mapping[str, Row]) -> Iterable[Verdict]:
    if ours.num_wrong:
        yield Verdict(f"{where}: every request answered", f"{ours.num_wrong} were not", False)
    if part == "latency":
        added_ms = added(ours, here[DIRECT], "p50") / 1e3
        yield Verdict(f"{where}: added p50 <= {ADDED_MS} ms", f"{added_ms:.3f} ms", added_ms <= ADDED_MS)
        return
    for rival in RIVALS:
        rows = [row for label, row in here.items() if label.partition(":")[0] == rival and not row.num_wrong]
        if rows:
            yield from _judge_against(part, f"{where}: ", ours, rival, rows)


def _judge_against(part: str, where: str, ours: Row, rival: str, rows: list[Row]) -> Iterable[Verdict]:
    if part == "throughput":
        best = max(row.middle("requests_s") for row in rows)
        factor = ours.middle("requests_s") / best
        yield Verdict(
            f"{where}>= {REQUESTS_FACTOR:g} x {rival}'s requests/s",
            f"{factor:.2f} x",
            factor >= REQUESTS_FACTOR,
        )
    field = "cpu_us_request" if part == "throughput" else "cpu_us_event"
    least = min(row.middle(field) for row in rows)
    share = ours.middle(field) / least if least else float("inf")
    unit = "a request" if part == "throughput" else "an event"
    yield Verdict(f"{where}<= {CPU_FACTOR:g} x {rival}'s CPU {unit}", f"{share:.2f} x", share <= CPU_FACTOR)


def added(row: Row, direct: Row, figure: str) -> float:
    """Microseconds more than without a balancer, of a percentile of the latency."""
    return row.middle("latency_us", figure) - direct.middle("latency_us", figure)


def judge_memory(report: MemoryReport) -> Verdict:
    """Flat, and every answer right. After few requests caches still fill, and only the answers are judged."""
    allowed = max(1.0, report.rss_mib[-1] * GROWTH_SHARE)
    is_long = report.requests >= LEAST_JUDGED
    limit = f"<= {allowed:.1f} MiB more" if is_long else f"not judged below {LEAST_JUDGED}"
    found = f"{report.growth_mib:+.1f} MiB from 20 % to 100 %, {report.num_wrong} wrong"
    is_met = not report.num_wrong and (not is_long or report.growth_mib <= allowed)
    return Verdict(f"memory flat over {report.requests} requests ({limit})", found, is_met)


def judge_streams(report: StreamsReport) -> Verdict:
    """All at once, and all complete."""
    wrong = report.round.num_wrong
    return Verdict(
        f"{report.streams} streams held at once, all complete", f"{report.peak} at once, {wrong} wrong",
        report.peak >= report.streams and not wrong,
    )  # fmt: skip

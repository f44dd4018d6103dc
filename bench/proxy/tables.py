"""Rows as text. Pure."""

from __future__ import annotations

from proxy.parts import DIRECT, MemoryReport, StreamsReport
from proxy.rounds import Row
from proxy.targets import added

LEGEND = (
    "bal core, load core: share of its core the balancer used, and load and workers together used.\n"
    "L: load and workers were the bottleneck, the balancer might do more; d: the balancer was ready but\n"
    "others had its core, 5 % of the time or more; o: others used the load core, 20 % or more.\n"
    "x req/s, x CPU: pdserve's figure divided by this one's. added: to the direct way.\n"
    "ev p50, p99: an event's way from worker to client."
)


def format_rows(title: str, rows: list[Row]) -> str:
    """A table of one part: by connections, then by balancer."""
    is_stream = not title.startswith(("throughput", "latency"))
    lines = [f"== {title}", _heading(is_stream)]
    last = 0
    measured = [row for row in rows if row.rounds]
    for row in measured:
        here = {other.label: other for other in measured if other.connections == row.connections}
        if last and row.connections != last:
            lines.append("")
        last = row.connections
        lines.append(_line(row, here, is_stream))
    lines += [f"  {r.label} at {r.connections} failed: {r.failure}" for r in rows if r.failure]
    lines += [f"  wrong answers of {r.label} at {r.connections}: {_example(r)}" for r in rows if r.num_wrong]
    return "\n".join(lines)


def _heading(is_stream: bool) -> str:
    common = f"{'conns':>5} {'balancer':22} {'req/s':>9} {'us CPU/req':>10}"
    if is_stream:
        middle = f"{'events/s':>9} {'us CPU/ev':>9} {'first p50':>9} {'ev p50 ms':>9} {'ev p99 ms':>9}"
    else:
        middle = f"{'p50 ms':>8} {'p99 ms':>8} {'added p50':>9} {'added p99':>9}"
    return f"{common} {middle} {'bal core':>8} {'load core':>9} {'x req/s':>8} {'x CPU':>6}  marks"


def _line(row: Row, here: dict[str, Row], is_stream: bool) -> str:
    is_direct = row.label == DIRECT
    cpu = "" if is_direct else f"{row.middle('cpu_us_request'):.0f}"
    text = f"{row.connections:5} {row.label:22} {row.middle('requests_s'):9.0f} {cpu:>10} "
    text += _stream_columns(row, is_direct) if is_stream else _whole_columns(row, here[DIRECT], is_direct)
    core = "" if is_direct else f"{row.middle('balancer_share'):.0%}"
    text += f" {core:>8} {row.middle('ours_share'):9.0%}"
    ours = here.get("pdserve")
    if ours is not None and not is_direct and row is not ours and row.middle("requests_s"):
        field = "cpu_us_event" if is_stream else "cpu_us_request"
        cpu_ratio = ours.middle(field) / row.middle(field) if row.middle(field) else 0.0
        text += f" {ours.middle('requests_s') / row.middle('requests_s'):8.2f} {cpu_ratio:6.2f}"
    else:
        text += " " * 16
    return f"{text}  {'' if is_direct else row.marks}{' WRONG' if row.num_wrong else ''}".rstrip()


def _whole_columns(row: Row, direct: Row, is_direct: bool) -> str:
    text = f"{row.middle('latency_us', 'p50') / 1e3:8.3f} {row.middle('latency_us', 'p99') / 1e3:8.3f}"
    if is_direct:
        return text + " " * 20
    return text + f" {added(row, direct, 'p50') / 1e3:9.3f} {added(row, direct, 'p99') / 1e3:9.3f}"


def _stream_columns(row: Row, is_direct: bool) -> str:
    cpu = "" if is_direct else f"{row.middle('cpu_us_event'):.2f}"
    return (
        f"{row.middle('events_s'):9.0f} {cpu:>9} {row.middle('first_us', 'p50') / 1e3:9.2f} "
        f"{row.middle('delay_us', 'p50') / 1e3:9.3f} {row.middle('delay_us', 'p99') / 1e3:9.3f}"
    )


def _example(row: Row) -> str:
    examples = [one.example for one in row.rounds if one.example]
    return (
        f"{row.num_wrong}, {examples[0] if examples else 'rooms one side never saw, or broken connections'}"
    )


def format_memory(report: MemoryReport) -> str:
    """Memory along the way."""
    return (
        f"== memory: {report.requests} requests in {report.seconds:g} s, {report.num_wrong} wrong\n"
        f"  resident MiB: {' '.join(f'{mib:g}' for mib in report.rss_mib)}"
    )


def format_streams(report: StreamsReport) -> str:
    """What holding the streams took."""
    one = report.round
    first, way = one.first_us, one.delay_us
    return (
        f"== streams: {report.streams} asked, {report.peak} at once, {one.num_wrong} wrong, "
        f"{report.seconds:g} s\n"
        f"  {one.events_s:.0f} events/s, {one.cpu_us_event:.1f} us CPU an event, {report.cpu_s:g} s CPU\n"
        f"  first event p50 {first['p50'] / 1e3:.0f} ms p99 {first['p99'] / 1e3:.0f} ms; worker to client "
        f"p50 {way['p50'] / 1e3:.2f} ms p99 {way['p99'] / 1e3:.2f} ms\n"
        f"  resident {report.rss_before_mib:g} -> {report.rss_after_mib:g} MiB, balancer core "
        f"{one.balancer_share:.0%}, load core {one.ours_share:.0%}"
    )

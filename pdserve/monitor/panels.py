"""The upper part of the screen: whose fleet it is, what needs attention, traffic, latencies. Pure.

Every block is a list of lines for a given width; the window of each figure stands in its heading.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from msgspec import structs

from pdserve.monitor.figures import (
    format_age,
    format_count,
    format_rate,
    format_seconds,
    sparkline,
)
from pdserve.monitor.lines import Line, beside, fit
from pdserve.monitor.snapshot import Snapshot
from pdserve.monitor.view_state import ViewState
from pdserve.state.client import clean
from pdserve.state.document import Latencies, Latency, Series, StateDocument
from pdserve.state.problems import find_problems

GOOD, WARN, BAD, DIM = "cyan", "bold yellow", "bold magenta", "dim"
"""Blue and yellow keep apart for every kind of colour blindness; words and symbols say it too."""
_REGIMES = {
    "normal": "normal",
    "prefill_short": "short of prefill",
    "decode_short": "short of decode",
    "overload": "overload",
}
Part = tuple[str, str, int]
"""Text, style, rank: of parts that do not fit together the highest rank goes first."""


def joined(parts: Sequence[Part], width: int, separator: str = " · ") -> Line:
    """The parts that fit into ``width`` cells, in their order; rank 0 stays whatever happens."""
    kept = [part for part in parts if part[0]]
    while kept:
        line = Line()
        for text_, style, _ in kept:
            line.add(separator if line.width else "", DIM).add(text_, style)
        highest = max(range(len(kept)), key=lambda i: (kept[i][2], i))
        if line.width <= width or kept[highest][2] == 0:
            return line
        del kept[highest]
    return Line()


def title(snapshot: Snapshot, view: ViewState, width: int) -> Line:
    """Whose fleet it is, how long it has been up, and whether what is shown is current."""
    state = snapshot.state
    status, style = _status(view)
    parts: list[Part] = [
        ("pdserve monitor", "bold", 4),
        (state.model[:80] or "no model yet", "bold", 0),
        (clean(view.url, 120), "", 3),
        (f"v{state.version[:24]}" if state.version else "", "", 2),
        (f"up {format_age(state.uptime_s)}" if state.version else "", "", 1),
    ]
    room = max(0, width - len(status) - 2)
    return joined(parts, room).fitted(room).add("  ").add(status, style)


def _status(view: ViewState) -> tuple[str, str]:
    if view.is_paused:
        return "■ paused", WARN
    if view.lost is not None:
        return "× no answer", BAD
    return ("○ connecting", WARN) if view.received_s is None else ("● live", GOOD)


def condition(snapshot: Snapshot, width: int) -> Line:
    """Regime, queue, what was shed, what is in flight, policy, membership."""
    state = snapshot.state
    queue, requests, regime = state.queue, state.requests, state.regime
    parts: list[Part] = [(*_regime(state), 0)]
    if queue is not None:
        waiting = f"queue {format_count(queue.length)}/{format_count(queue.size)}"
        if queue.length:
            waiting += f", oldest {format_seconds(queue.oldest_wait_s)}"
        shed = ", ".join(f"{why[:24]} {format_count(n)}" for why, n in list(queue.shed.items())[:3])
        total = requests.shed if requests is not None else sum(queue.shed.values())
        style = WARN if total else ""
        parts += [(waiting, WARN if queue.length else "", 0), (f"shed {format_count(total)}", style, 0)]
        parts.append((f"by {shed}" if shed else "", style, 2))
    if requests is not None:
        parts.append((f"in flight {format_count(requests.inflight)}", "", 1))
    if regime is not None:
        told = ", ".join(f"{role[:24]} {score:.2f}" for role, score in list(regime.scores.items())[:2])
        parts.append((f"load scores {told}" if told else "", "", 4))
    parts.append((f"policy {state.policy[:40]}" if state.policy else "", "", 3))
    if queue is not None and queue.max_dispatched:
        limit = format_count(queue.max_dispatched)
        parts.append((f"dispatched {format_count(queue.dispatched)} of {limit}", "", 4))
    if requests is not None:
        parts.append((f"retried {format_count(requests.retried)}", "", 4))
        parts.append((f"resumed {format_count(requests.resumed)}" if requests.resumed else "", "", 4))
        parts.append((f"moved {format_count(requests.moved)}" if requests.moved else "", "", 4))
        if requests.deflected:
            parts.append((f"by decode alone {format_count(requests.deflected)}", "", 3))
    return joined([*parts, _membership(state)], width)


def _membership(state: StateDocument) -> Part:
    if state.bootstrap is None or not state.bootstrap.url:
        return "workers named by hand", "", 5
    if not state.bootstrap.connected:
        return "× bootstrap lost", BAD, 1
    return "bootstrap connected", "", 5


def _regime(state: StateDocument) -> tuple[str, str]:
    """Which role is short, and for how long it has been so."""
    regime = state.regime
    if regime is None or not regime.state:
        return "regime -", ""
    name = regime.state[:24]
    style = "" if name == "normal" else WARN
    return f"regime {_REGIMES.get(name, name)} {format_age(regime.lasted_s)}", style


def attention(snapshot: Snapshot, view: ViewState, width: int, num_lines: int = 1) -> list[Line]:
    """What an operator should look at first, the worst first: one to ``num_lines`` lines."""
    if view.lost is not None:
        return [_loss(view, width)]
    if view.received_s is None:
        return [Line("○ no answer of the balancer yet", DIM)]
    if not snapshot.state.workers:
        return [
            Line("○ no workers: start some with pdserve launch, or pdserve prefill and decode --join", WARN)
        ]
    problems = _problems(snapshot)
    if not problems:
        return [Line("● nothing needs attention", GOOD)]
    lines = [Line(*problem) for problem in problems[: num_lines - 1]]
    rest: list[Part] = [(*problem, rank) for rank, problem in enumerate(problems[num_lines - 1 :])]
    if rest:
        last = joined(rest, width - 10)
        num_left = sum(problem not in last.plain for problem, _, _ in rest)
        lines.append(last.add(f" · {num_left} more" if num_left else "", DIM))
    return lines


def _loss(view: ViewState, width: int) -> Line:
    assert view.lost is not None
    since_s = view.lost.since_s
    at = time.strftime("%H:%M:%S", time.localtime(max(0.0, min(since_s, 4e9))))
    what = f"× no answer since {at} ({format_age(view.now_s - since_s)}): {clean(view.lost.reason, 300)}"
    parts: list[Part] = [
        (what, BAD, 0),
        (f"next try in {format_age(view.lost.retry_s)}", BAD, 2),
        ("below is its last answer" if view.received_s is not None else "", BAD, 1),
    ]
    return joined(parts, width, "; ")


def _problems(snapshot: Snapshot) -> list[tuple[str, str]]:
    return [
        (f"▲ {problem.subject} {problem.what[:160]}", BAD if problem.is_error else WARN)
        for problem in find_problems(snapshot.state)
    ]


def traffic(snapshot: Snapshot, width: int) -> Line:
    """Totals since the start and rates over their window, one line."""
    requests, rates = snapshot.state.requests, snapshot.state.rates
    parts: list[Part] = []
    if rates is not None:
        failed_style = WARN if rates.failed_s else ""
        parts = [
            (f"last {_window(rates.window_s)}: arrived {format_rate(rates.requests_s)}/s", "", 0),
            (f"done {format_rate(rates.completed_s)}/s", "", 3),
            (f"failed {format_rate(rates.failed_s)}/s", failed_style, 2),
            (f"prompt tok {format_rate(rates.prompt_tokens_s)}/s", "", 1),
            (f"output tok {format_rate(rates.output_tokens_s)}/s", "", 0),
        ]
    if requests is not None:
        counts = [("completed", requests.completed), ("failed", requests.failed)]
        counts += [(name, n) for name, n in (("aborted", requests.aborted), ("shed", requests.shed)) if n]
        ended = ", ".join(f"{format_count(n)} {name}" for name, n in counts)
        parts.append((f"since start: {format_count(requests.total)} requests ({ended})", "", 4))
    return joined(parts, width)


def latencies(snapshot: Snapshot, width: int) -> list[Line]:
    """TTFT, TPOT, ITL and arrivals with sparklines; where there is room, stages and fleet beside it."""
    if width < 112:
        return _latency_block(snapshot, width)
    stages, stages_width = _stage_block(snapshot), 38
    if width < 170:
        return beside(_latency_block(snapshot, width - stages_width - 3), stages, width - stages_width - 3)
    trend_width = (width - stages_width - 6) // 2 - 7
    left_width = width - stages_width - trend_width - 6
    left = beside(_latency_block(snapshot, left_width), stages, left_width)
    return beside(left, _trend_block(snapshot, trend_width), left_width + stages_width + 3)


def latency_line(snapshot: Snapshot, width: int) -> Line:
    """The same in one line, for a low screen."""
    latency = snapshot.state.latency or Latencies()
    found: list[Part] = []
    rows = (("TTFT", latency.ttft_s), ("TPOT", latency.tpot_s), ("ITL", latency.itl_s))
    for rank, (name, row) in enumerate(rows):
        p50, p95, p99 = map(format_seconds, (row.p50, row.p95, row.p99))
        found.append((f"{name} p50 {p50} p95 {p95} p99 {p99}", "", rank))
    return joined([*found, (f"over {_window(latency.window_s)}", DIM, 4)], width)


def _window(window_s: float) -> str:
    if not window_s:
        return "minutes"
    return f"{window_s / 60:.0f} min" if window_s >= 120 and window_s % 60 == 0 else f"{window_s:.0f} s"


def _num_steps(series: Series) -> int:
    return max(len(value) for value in structs.astuple(series) if isinstance(value, list))


def _span(series: Series) -> str:
    """What the sparklines span."""
    num = _num_steps(series)
    return f"last {_window(series.step_s * num)}" if series.step_s and num else "recent"


def _figures(row: Latency) -> Line:
    line = Line()
    for value in (row.p50, row.p95, row.p99):
        line.add(fit(format_seconds(value), 7, is_right=True))
    return line


def _latency_block(snapshot: Snapshot, width: int) -> list[Line]:
    state = snapshot.state
    latency, series, rates = state.latency or Latencies(), state.series or Series(), state.rates
    spark_width = _spark_cells(series, width - 28 - 14)
    heading = Line(f"{'':5}{'p50':>7}{'p95':>7}{'p99':>7}  ", "bold")
    heading.add(fit(f"p50, {_span(series)}, oldest left", spark_width), DIM)
    heading.add(f"  {format_count(latency.ttft_s.count)} in {_window(latency.window_s)}", DIM)
    lines = [heading]
    for name, row, values in (
        ("TTFT", latency.ttft_s, series.ttft_p50_s),
        ("TPOT", latency.tpot_s, series.tpot_p50_s),
        ("ITL", latency.itl_s, series.itl_p50_s),
    ):
        line = Line(fit(name, 5), "bold").extend(_figures(row))
        lines.append(_with_spark(line, values, spark_width, format_seconds))
    rate = format_rate(rates.requests_s if rates else None)
    line = Line("req/s", "bold").add(fit(rate, 7, is_right=True))
    line.add(fit(f" over {_window(rates.window_s if rates else 0.0)}", 14), DIM)
    return [*lines, _with_spark(line, series.requests_s, spark_width, format_rate)]


def _spark_cells(series: Series, room: int) -> int:
    """Cells for sparklines of these series: each stands for the same whole number of steps."""
    num_steps = _num_steps(series) or 60
    room = max(1, min(room, num_steps, 120))
    return -(-num_steps // -(-num_steps // room))


def _with_spark(
    line: Line, values: Sequence[float | None], width: int, figure: Callable[[float], str]
) -> Line:
    known = [value for value in values if value is not None]
    line.add("  ").add(sparkline(values, width), GOOD)
    return line.add(f"  max {figure(max(known))}", DIM) if known else line


def _stage_block(snapshot: Snapshot) -> list[Line]:
    latency = snapshot.state.latency or Latencies()
    lines = [Line(f"{'stage':<13}{'p50':>7}{'p95':>7}{'p99':>7}", "bold")]
    for name, row in (
        ("queue", latency.queue_s),
        ("prefill", latency.prefill_s),
        ("KV transfer", latency.transfer_s),
        ("whole", latency.e2e_s),
    ):
        lines.append(Line(fit(name, 13)).extend(_figures(row)))
    return lines


def _trend_block(snapshot: Snapshot, width: int) -> list[Line]:
    """Output tokens and the queue over the last minutes; tails of TTFT."""
    series = snapshot.state.series or Series()
    spark_width = _spark_cells(series, width - 14 - 14)
    lines = [Line(fit(f"{'':14}{_span(series)}", width), DIM)]
    trends: tuple[tuple[str, Sequence[float | None], Callable[[float], str]], ...] = (
        ("TTFT p99", series.ttft_p99_s, format_seconds),
        ("output tok/s", series.output_tokens_s, format_rate),
        ("queue length", series.waiting, format_count),
    )
    for name, values, figure in trends:
        lines.append(_with_spark(Line(fit(name, 12), "bold"), values, spark_width, figure))
    return lines

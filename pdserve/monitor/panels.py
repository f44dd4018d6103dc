"""The upper part of the screen: whose fleet it is, what needs attention, traffic, latencies. Pure.

Every block is a list of lines for a given width; the window of each figure stands in its heading.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from pdserve.monitor.document import count, first_number, mapping, number, numbers, text
from pdserve.monitor.figures import (
    format_age,
    format_count,
    format_percent,
    format_rate,
    format_seconds,
    sparkline,
)
from pdserve.monitor.lines import Line, beside, fit
from pdserve.monitor.snapshot import Snapshot
from pdserve.monitor.view_state import ROLES, ViewState

GOOD, WARN, BAD, DIM = "cyan", "bold yellow", "bold magenta", "dim"
"""Blue and yellow keep apart for every kind of colour blindness; words and symbols say it too."""
KV_FULL = 0.9
STALLED_S = 10.0
_REGIMES = {
    "normal": "normal",
    "prefill_short": "short of prefill",
    "decode_short": "short of decode",
    "overload": "overload",
}
_LATENCIES = (("TTFT", "ttft"), ("TPOT", "tpot"), ("ITL", "itl"))
_STAGES = (("queue", "queue_s"), ("prefill", "prefill_s"), ("KV transfer", "transfer_s"), ("whole", "e2e_s"))
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
    version, uptime_s = text(state.get("version"), 24), number(state.get("uptime_s"))
    parts: list[Part] = [
        ("pdserve monitor", "bold", 4),
        (snapshot.model or "no model yet", "bold", 0),
        (text(view.url, 120), "", 3),
        (f"v{version}" if version else "", "", 2),
        ("" if uptime_s is None else f"up {format_age(uptime_s)}", "", 1),
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
    queue, requests = snapshot.section("queue"), snapshot.section("requests")
    length = first_number(queue.get("length"), snapshot.state.get("waiting"))
    oldest_s, size = number(queue.get("oldest_wait_s")), count(queue.get("size"))
    waiting = f"queue {format_count(length)}" + (f"/{format_count(size)}" if size is not None else "")
    if length and oldest_s is not None:
        waiting += f", oldest {format_seconds(oldest_s)}"
    parts: list[Part] = [(*_regime(snapshot), 0), (waiting, WARN if length else "", 0), *_shed(snapshot)]
    parts.append((f"in flight {format_count(number(requests.get('inflight')))}", "", 1))
    scores = snapshot.section("regime", "scores")
    told = ", ".join(
        f"{role} {score:.2f}" for role in ROLES[1:] if (score := number(scores.get(role))) is not None
    )
    parts.append((f"load scores {told}" if told else "", "", 4))
    policy = text(snapshot.state.get("policy"), 40)
    parts.append((f"policy {policy}" if policy else "", "", 3))
    limit = number(queue.get("max_dispatched"))
    if limit:
        parts.append(
            (f"dispatched {format_count(number(queue.get('dispatched')))} of {format_count(limit)}", "", 4)
        )
    parts.append((f"retried {format_count(number(requests.get('retried')))}", "", 4))
    return joined([*parts, _membership(snapshot)], width)


def _shed(snapshot: Snapshot) -> list[Part]:
    reasons = snapshot.section("queue", "shed")
    counted = sum(number(n) or 0 for n in reasons.values())
    total = first_number(snapshot.section("requests").get("shed"), counted)
    named = ", ".join(f"{text(why, 24)} {format_count(number(n))}" for why, n in list(reasons.items())[:3])
    style = WARN if total else ""
    return [(f"shed {format_count(total)}", style, 0), (f"by {named}" if named else "", style, 2)]


def _membership(snapshot: Snapshot) -> Part:
    bootstrap = snapshot.section("bootstrap")
    if not bootstrap.get("url"):
        return "workers named by hand", "", 5
    if bootstrap.get("connected") is False:
        return "× bootstrap lost", BAD, 1
    return "bootstrap connected", "", 5


def _regime(snapshot: Snapshot) -> tuple[str, str]:
    """Which role is short, and for how long it has been so."""
    regime = snapshot.section("regime")
    name = text(regime.get("state") or regime.get("regime"), 24)
    if not name:
        return "regime -", ""
    lasted_s = first_number(regime.get("lasted_s"))
    lasted = "" if lasted_s is None else f" {format_age(lasted_s)}"
    return f"regime {_REGIMES.get(name, name)}{lasted}", "" if name == "normal" else WARN


def attention(snapshot: Snapshot, view: ViewState, width: int, num_lines: int = 1) -> list[Line]:
    """What an operator should look at first, the worst first: one to ``num_lines`` lines."""
    if view.lost is not None:
        return [_loss(view, width)]
    if view.received_s is None and not snapshot.state:
        return [Line("○ no answer of the balancer yet", DIM)]
    if not snapshot.workers:
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
    what = f"× no answer since {at} ({format_age(view.now_s - since_s)}): {text(view.lost.reason, 300)}"
    parts: list[Part] = [
        (what, BAD, 0),
        (f"next try in {format_age(view.lost.retry_s)}", BAD, 2),
        ("below is its last answer" if view.received_s is not None else "", BAD, 1),
    ]
    return joined(parts, width, "; ")


def _problems(snapshot: Snapshot) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for worker in snapshot.workers:
        if worker.is_troubled:
            why = f": {worker.last_error[:100]}" if worker.last_error else ""
            what = worker.state if worker.state in ("suspect", "gone") else f"breaker {worker.breaker}"
            found.append((f"▲ {worker.name} {what}{why}", BAD))
    for role in ("prefill", "decode"):
        if not any(worker.role == role for worker in snapshot.workers):
            found.append((f"▲ no {role} worker", BAD))
    bootstrap = snapshot.section("bootstrap")
    if bootstrap.get("url") and bootstrap.get("connected") is False:
        found.append(("× bootstrap service lost: nobody can join", BAD))
    failed = [pair for pair in snapshot.pairs if pair.state == "failed"]
    if failed:
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        found.append((f"× pair {failed[0].key}{others} failed: {failed[0].error[:80]}", BAD))
    for worker in snapshot.workers:
        stalled_s = number(mapping(worker.source.get("wedge")).get("stalled_s"))
        if stalled_s is not None and stalled_s >= STALLED_S:
            found.append((f"▲ {worker.name} makes no progress for {format_age(stalled_s)}", BAD))
    found += _pressure(snapshot)
    return found


def _pressure(snapshot: Snapshot) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    length = number(snapshot.section("queue").get("length"))
    if length:
        found.append((f"▲ {format_count(length)} requests wait for a pair", WARN))
    failed_s = number(snapshot.section("rates").get("failed_s"))
    if failed_s:
        found.append((f"▲ {format_rate(failed_s)} requests/s fail", WARN))
    full = [worker for worker in snapshot.workers if (worker.kv_usage or 0.0) >= KV_FULL]
    if full:
        most = max(full, key=lambda worker: worker.kv_usage or 0.0)
        others = f" and {len(full) - 1} more" if len(full) > 1 else ""
        found.append((f"▲ {most.name}{others}: KV pool {format_percent(most.kv_usage)} used", WARN))
    return found


def traffic(snapshot: Snapshot, width: int) -> Line:
    """Totals since the start and rates over their window, one line."""
    requests, rates = snapshot.section("requests"), snapshot.section("rates")
    window = _window(number(rates.get("window_s")))
    ended = ", ".join(
        f"{format_count(number(requests.get(name)))} {name}"
        for name in ("completed", "failed", "aborted", "shed")
        if number(requests.get(name)) or name in ("completed", "failed")
    )
    per_s = [
        (f"{title} {format_rate(number(rates.get(name)))}/s")
        for title, name in (
            ("done", "completed_s"),
            ("failed", "failed_s"),
            ("prompt tok", "prompt_tokens_s"),
            ("output tok", "output_tokens_s"),
        )
    ]
    parts: list[Part] = [
        (f"last {window}: arrived {format_rate(number(rates.get('requests_s')))}/s", "", 0),
        (per_s[0], "", 3),
        (per_s[1], WARN if number(rates.get("failed_s")) else "", 2),
        (per_s[2], "", 1),
        (per_s[3], "", 0),
        (f"since start: {format_count(number(requests.get('total')))} requests ({ended})", "", 4),
    ]
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
    found: list[Part] = []
    for rank, (title, name) in enumerate(_LATENCIES):
        row = snapshot.section("latency", f"{name}_s")
        p50, p95 = format_seconds(number(row.get("p50"))), format_seconds(number(row.get("p95")))
        found.append((f"{title} p50 {p50} p95 {p95} p99 {format_seconds(number(row.get('p99')))}", "", rank))
    window = _window(number(snapshot.section("latency").get("window_s")))
    return joined([*found, (f"over {window}", DIM, 4)], width)


def _window(window_s: float | None) -> str:
    if window_s is None:
        return "minutes"
    return f"{window_s / 60:.0f} min" if window_s >= 120 and window_s % 60 == 0 else f"{window_s:.0f} s"


def _span(snapshot: Snapshot) -> str:
    """What the sparklines span."""
    series = snapshot.section("series")
    step_s = number(series.get("step_s"))
    lengths = [len(value) for value in series.values() if isinstance(value, list)]
    return f"last {_window(step_s * max(lengths))}" if step_s and lengths else "recent"


def _figures(row: object, names: Sequence[str]) -> Line:
    line = Line()
    for name in names:
        line.add(
            fit(format_seconds(number(row.get(name)) if hasattr(row, "get") else None), 7, is_right=True)
        )
    return line


def _latency_block(snapshot: Snapshot, width: int) -> list[Line]:
    latency, series = snapshot.section("latency"), snapshot.section("series")
    spark_width = _spark_cells(series, width - 28 - 14)
    counted = format_count(number(snapshot.section("latency", "ttft_s").get("count")))
    heading = Line(f"{'':5}{'p50':>7}{'p95':>7}{'p99':>7}  ", "bold")
    heading.add(fit(f"p50, {_span(snapshot)}, oldest left", spark_width), DIM)
    heading.add(f"  {counted} in {_window(number(latency.get('window_s')))}", DIM)
    lines = [heading]
    for title, name in _LATENCIES:
        values = numbers(series.get(f"{name}_p50_s"))
        line = Line(fit(title, 5), "bold")
        line.extend(_figures(snapshot.section("latency", f"{name}_s"), ("p50", "p95", "p99")))
        lines.append(_with_spark(line, values, spark_width, format_seconds))
    rates = snapshot.section("rates")
    line = Line(fit("req/s", 5), "bold").add(
        fit(format_rate(number(rates.get("requests_s"))), 7, is_right=True)
    )
    line.add(fit(f" over {_window(number(rates.get('window_s')))}", 14), DIM)
    return [*lines, _with_spark(line, numbers(series.get("requests_s")), spark_width, format_rate)]


def _spark_cells(series: Mapping[str, object], room: int) -> int:
    """Cells for sparklines of these series: each stands for the same whole number of steps."""
    num_steps = max((len(value) for value in series.values() if isinstance(value, list)), default=60) or 60
    room = max(1, min(room, num_steps, 120))
    return -(-num_steps // -(-num_steps // room))


def _with_spark(line: Line, values: list[float | None], width: int, figure: Callable[[float], str]) -> Line:
    known = [value for value in values if value is not None]
    line.add("  ").add(sparkline(values, width), GOOD)
    return line.add(f"  max {figure(max(known))}", DIM) if known else line


def _stage_block(snapshot: Snapshot) -> list[Line]:
    lines = [Line(f"{'stage':<13}{'p50':>7}{'p95':>7}{'p99':>7}", "bold")]
    for title, name in _STAGES:
        lines.append(
            Line(fit(title, 13)).extend(_figures(snapshot.section("latency", name), ("p50", "p95", "p99")))
        )
    return lines


def _trend_block(snapshot: Snapshot, width: int) -> list[Line]:
    """Output tokens and the queue over the last minutes; tails of TTFT."""
    series = snapshot.section("series")
    spark_width = _spark_cells(series, width - 14 - 14)
    lines = [Line(fit(f"{'':14}{_span(snapshot)}", width), DIM)]
    for title, name, figure in (
        ("TTFT p99", "ttft_p99_s", format_seconds),
        ("output tok/s", "output_tokens_s", format_rate),
        ("queue length", "waiting", format_count),
    ):
        lines.append(
            _with_spark(Line(fit(title, 12), "bold"), numbers(series.get(name)), spark_width, figure)
        )
    return lines

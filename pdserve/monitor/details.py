"""Everything known of one worker, pair, request or event, and the page of help. Pure.

A page is a list of lines for a width; the screen shows a part of it and scrolls.
"""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.monitor.figures import (
    bar,
    format_age,
    format_bytes,
    format_count,
    format_percent,
    format_rate,
    format_seconds,
)
from pdserve.monitor.keys import HELP
from pdserve.monitor.lines import Line, fit, wrapped
from pdserve.monitor.panels import BAD, DIM, GOOD, WARN
from pdserve.monitor.snapshot import EventRow, Snapshot, key_of
from pdserve.monitor.view_state import ViewState, detailed_row
from pdserve.state.document import RequestEntry
from pdserve.state.workers import KVSentFigures, PairEntry, WorkerEntry

LABEL = 18
Fact = tuple[str, str]
_GLOSSARY = (
    ("arrived, done /s", "requests per second over the window that stands before them"),
    ("TTFT", "from a request's arrival at the balancer to the first byte of its answer (streams)"),
    ("TPOT", "mean time per output token after the first, of completed requests"),
    ("ITL", "time between two events of a stream, every gap counted"),
    ("p50 p95 p99", "half, 95 %, 99 % of the window's requests were at most that slow"),
    ("sparkline", "from 0 to the maximum beside it; each cell shows the highest of its steps"),
    ("queued", "arrival until a pair was found; failed attempts count as waiting"),
    ("prefill", "from then until prefill answered: its queue, its work, the sending of the KV"),
    ("transfer", "from then to decode's first byte: arrival of the KV and decode's start"),
    ("first tok, done", "since arrival; whole is the same as done"),
    ("boot", "requests in prefill's bootstrap queue, or in decode's prealloc queue (preall)"),
    ("wait xfer run retr", "requests waiting, in KV transfer, running, retracted, as SGLang counts them"),
    ("KV used", "share of the worker's KV pool that is in use"),
    ("tok/s", "over about 10 s: uncached prompt tokens of prefill, generated tokens of decode"),
    ("infl", "legs of this balancer's requests that are open at the worker"),
    ("brk", "circuit breaker: ok (closed), half (probing), open (no traffic)"),
    ("err", "failures the worker was blamed for since it joined"),
    ("KV rate, KV sent", "of a pair: prompt tokens by the KV bytes of one; the rate is over a minute"),
    ("path", "how prefill's data plane sends KV: direct, from page to page, or packed into slabs"),
    ("median transfer", "of a pair's last 64 streams, as transfer above"),
    ("regime", "which role is short of capacity: normal, prefill, decode, or overload (both)"),
    ("load scores", "how full each role is, smoothed: 1 is full with requests waiting"),
    ("shed", "requests refused since the start, by reason"),
    ("● ○ ◐ ▲ ▽ ×", "ready, joining or untested, probing, suspect, draining, leaving or paused, failed"),
)


def help_page(width: int) -> list[Line]:
    """Keys, and what every figure means."""
    lines = [Line("Keys", "bold")]
    lines += [Line(f"  {fit(keys, 22)}", GOOD).add(what) for keys, what in HELP]
    lines += [Line(), Line("Figures", "bold")]
    for name, meaning in _GLOSSARY:
        pieces = wrapped(meaning, width - 24)
        lines.append(Line(f"  {fit(name, 22)}", GOOD).add(pieces[0]))
        lines += [Line(" " * 24 + piece) for piece in pieces[1:]]
    return lines


def details_page(snapshot: Snapshot, view: ViewState, width: int) -> list[Line]:
    """The page of the row whose details are open."""
    row, is_listed = detailed_row(snapshot, view)
    match row:
        case WorkerEntry():
            page = _worker_page(row, snapshot, width)
        case PairEntry():
            page = _pair_page(row, snapshot, width)
        case RequestEntry():
            page = _request_page(row, width)
        case EventRow():
            page = _event_page(row, width)
        case _:
            return [Line("nothing is selected", DIM)]
    if not is_listed:
        page.insert(1, Line("  no longer listed by the balancer; as it was when it was opened", WARN))
    return page


# -- pages -------------------------------------------------------------------------------------


def _worker_page(row: WorkerEntry, snapshot: Snapshot, width: int) -> list[Line]:
    lines = [Line(f"worker {row.worker_id}", "bold").add(f" ({row.role or '?'})")]
    lines[0].add(f"  {row.condition}", "bold")
    lines += _facts(_worker_facts(row), width)
    lines += _paragraph("last error", row.last_error, width, BAD)
    pairs = [pair for pair in snapshot.state.pairs if row.worker_id in (pair.prefill, pair.decode)]
    lines += _section(f"its pairs ({len(pairs)})", [_pair_line(pair) for pair in pairs[:16]])
    ours = [r for r in snapshot.requests if row.worker_id in r.pair.split(">")]
    lines += _section(f"its requests among the last ({len(ours)})", [_request_line(r) for r in ours[:8]])
    events = [event for event in snapshot.events if event.worker == row.worker_id]
    return lines + _section(f"its events ({len(events)})", [_event_line(event) for event in events[:8]])


def _worker_facts(row: WorkerEntry) -> list[Fact]:
    queues, load, promised, fitted = row.queues, row.load, row.admission, row.fitted
    lengths: list[Fact] = [("running", "-")]
    if queues is not None:
        lengths = [
            ("bootstrap queue" if row.role != "decode" else "", format_count(queues.bootstrap)),
            ("prealloc queue" if row.role != "prefill" else "", format_count(queues.prealloc)),
            ("waiting", format_count(queues.waiting)),
            ("in KV transfer", format_count(queues.inflight_or_transfer)),
            ("running", _of(queues.running, promised.max_reqs)),
            ("retracted", format_count(queues.retracted)),
        ]
    step_s, slope_s = format_seconds(fitted.step_base_s), format_seconds(fitted.step_slope_s)
    port = "" if row.bootstrap_port is None else row.bootstrap_port
    return [
        ("url", row.url),
        ("instance", row.instance_id),
        ("age", format_age(row.age_s)),
        ("breaker, errors", f"{row.breaker or '-'}, {format_count(row.errors)}"),
        ("in flight", format_count(row.inflight)),
        *lengths,
        ("KV used", f"{bar(row.kv_usage, 10)} {format_percent(row.kv_usage)}"),
        ("KV tokens", _of(load.num_used_tokens, load.max_total_num_tokens) if load else "-"),
        ("promised tokens", _of(promised.promised_tokens, promised.capacity_tokens)),
        ("tok/s, last 10 s", format_rate(row.tokens_s)),
        *(_data_plane(row.kv_sent) if row.kv_sent else ()),
        ("fitted prefill", f"{format_rate(fitted.prefill_tokens_s)} tok/s"),
        ("fitted step", f"{step_s} + {slope_s} a request"),
        ("load sample", f"{format_age(row.load_age_s)} old"),
        ("no progress for", format_age(row.wedge.stalled_s)),
        ("bootstrap at", f"{row.bootstrap_host}:{port}".strip(":")),
        ("overloaded, held", f"{_yes(promised.overloaded)}, {_yes(promised.held)}"),
    ]


def _data_plane(sent: KVSentFigures) -> list[Fact]:
    """What the worker's own data plane counts."""
    return [
        ("data plane sends", format_bytes(sent.bytes_s, "B/s")),
        ("its path", sent.path or "-"),
        ("its mean transfer", format_seconds(sent.transfer_s)),
        ("its transfers", f"{format_count(sent.transfers)}, {format_count(sent.failures)} failed"),
    ]


def _pair_page(row: PairEntry, snapshot: Snapshot, width: int) -> list[Line]:
    lines = [Line(f"pair {row.label}", "bold").add(f"  {row.state}", "bold")]
    facts = [
        ("KV rate, last min", format_bytes(row.kv_bytes_s, "B/s")),
        ("KV sent", format_bytes(row.kv_bytes)),
        ("prompt tokens", format_count(row.prompt_tokens)),
        ("path", row.kv_path or "-"),
        ("median transfer", format_seconds(row.transfer_p50_s)),
        ("requests", format_count(row.requests)),
        ("probes", format_count(row.probes)),
        ("last probe took", format_seconds(row.probe_s)),
    ]
    lines += _facts(facts, width)
    lines += _paragraph("error", row.error, width, BAD)
    ours = [r for r in snapshot.requests if r.pair == row.label]
    return lines + _section(
        f"its requests among the last ({len(ours)})", [_request_line(r) for r in ours[:20]]
    )


def _request_page(row: RequestEntry, width: int) -> list[Line]:
    style = "" if row.is_good else BAD
    lines = [Line(f"request {key_of(row)}", "bold").add(f"  {row.finish or '-'}", style)]
    facts = [
        ("client's id", row.request_id),
        ("pair", row.pair or "none"),
        ("route", row.route),
        ("stream", _yes(row.stream)),
        ("status", str(row.status or "-")),
        ("room", str(row.room or "-")),
        ("prompt tokens", format_count(row.prompt_tokens)),
        ("output tokens", format_count(row.completion_tokens)),
        ("TPOT", format_seconds(row.tpot_s)),
    ]
    lines += _facts(facts, width)
    lines += _section("stages", _stage_bars(row, width))
    lines += _paragraph("why this pair", row.reason, width, "")
    return lines + _paragraph("error", row.error, width, BAD)


def _stage_bars(row: RequestEntry, width: int) -> list[Line]:
    """Each stage as a bar on the request's own time line, with its length and its end since arrival."""
    stages = [("queued", row.queued_s), ("prefill", row.prefill_s), ("transfer", row.transfer_s)]
    known = sum(value or 0.0 for _, value in stages)
    first_s = row.first_token_s
    rest_s = None if row.done_s is None else max(0.0, row.done_s - (known if first_s is None else first_s))
    stages.append(("decode" if first_s is not None else "rest", rest_s))
    whole_s = max(row.done_s or 0.0, known, 1e-9)
    room = max(8, min(60, width - 46))
    lines, at_s = [], 0.0
    for name, value in stages:
        end_s = at_s + max(0.0, value or 0.0)
        begin, end = (min(room, round(room * at / whole_s)) for at in (at_s, end_s))
        filled = max(end - begin, 1 if value else 0)
        begin = min(begin, room - filled)
        track = "·" * begin + "█" * filled + "·" * (room - begin - filled)
        line = Line(f"  {name:<9}").add(track, GOOD).add(f" {format_seconds(value):>7}")
        if value is not None:
            line.add(f"  until {format_seconds(end_s)} after arrival", DIM)
        lines.append(line)
        at_s = end_s
    lines.append(
        Line(f"  first token {format_seconds(first_s)}, done {format_seconds(row.done_s)} after arrival")
    )
    return lines


def _event_page(row: EventRow, width: int) -> list[Line]:
    lines = [Line(f"event {row.event or '-'}", "bold").add(f"  {row.worker}")]
    ago = "" if row.ago_s is None else f"{format_age(row.ago_s)} ago"
    return [*lines, *_facts([("when", ago)], width), *_paragraph("detail", row.detail, width, "")]


# -- parts -------------------------------------------------------------------------------------


def _facts(facts: Sequence[Fact], width: int) -> list[Line]:
    """Labels and values in as many columns as fit, read downwards."""
    shown = [(label, value) for label, value in facts if label and value]
    num_columns = max(1, min(3, width // 48))
    height = -(-len(shown) // num_columns)
    column_width = width // num_columns
    lines = []
    for i in range(height):
        line = Line()
        for label, value in shown[i::height]:
            line.add(f"  {fit(label, LABEL)}", DIM).add(fit(value, column_width - LABEL - 3)).add(" ")
        lines.append(line)
    return lines


def _paragraph(title: str, told: str, width: int, style: str) -> list[Line]:
    return _section(title, [Line(f"  {piece}", style) for piece in wrapped(told, width - 3)] if told else [])


def _section(title: str, body: Sequence[Line]) -> list[Line]:
    return [Line(), Line(title, "bold"), *body] if body else []


def _pair_line(pair: PairEntry) -> Line:
    line = Line(f"  {fit(pair.label, 28)} {fit(pair.state, 9)}")
    line.add(f" {format_bytes(pair.kv_bytes_s, 'B/s'):>9}")
    line.add(f" {pair.kv_path or '-':<7} {format_seconds(pair.transfer_p50_s):>7}")
    return line.add(f"  {pair.error}", BAD)


def _request_line(row: RequestEntry) -> Line:
    line = Line(f"  {fit(row.rid[-8:], 9)}{fit(row.pair, 24)} queued {format_seconds(row.queued_s):>7}")
    line.add(f" prefill {format_seconds(row.prefill_s):>7} transfer {format_seconds(row.transfer_s):>7}")
    return line.add(f" done {format_seconds(row.done_s):>7} {row.finish}", "" if row.is_good else BAD)


def _event_line(row: EventRow) -> Line:
    ago = "-" if row.ago_s is None else f"{format_age(row.ago_s)} ago"
    return Line(f"  {ago:>9}  {fit(row.event, 12)} {row.detail}")


def _of(value: float, limit: float) -> str:
    """``3 of 48``; a limit of 0 is not known."""
    return format_count(value) + (f" of {format_count(limit)}" if limit else "")


def _yes(value: bool) -> str:
    return "yes" if value else "no"

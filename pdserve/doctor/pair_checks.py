"""Judges the pairs of a fleet: do their KV layouts fit, did a real token come through. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from pdserve.balancer.fleet.worker import ProbeFailed, ProbePassed
from pdserve.doctor.finding import Finding, error, note, ok, warning
from pdserve.doctor.fleet_facts import FleetFacts, PairLook, WorkerLook
from pdserve.types import KVLayoutDescriptor, Role

LAYOUTS, STATES, TOKENS = "KV layouts", "pairs", "a token"
MAX_NAMED = 4
"""Pairs named in one finding; the rest is counted."""

_INFO_FIELDS = ("page_size", "kv_cache_dtype", "model_path")
"""What /server_info tells where nobody reported a layout."""

Mismatches = Mapping[str, str]
"""Pair label → what differs."""


def layout_mismatches(facts: FleetFacts) -> dict[str, str]:
    """Pairs whose KV does not fit, and which the data plane does not convert either."""
    found = {}
    for prefill, decode in _pairs(facts):
        label = f"{prefill.name}>{decode.name}"
        if text := _difference(facts, prefill, decode, label):
            found[label] = text
    return found


def converted_pairs(facts: FleetFacts) -> dict[str, str]:
    """Pairs of different page sizes that the data plane converts between."""
    found = {}
    for prefill, decode in _pairs(facts):
        ours, theirs = _layout(facts, prefill), _layout(facts, decode)
        if ours and theirs and not ours.differences(theirs) and ours.page_size != theirs.page_size:
            found[f"{prefill.name}>{decode.name}"] = f"page_size: {ours.page_size} != {theirs.page_size}"
    return found


def _pairs(facts: FleetFacts) -> Iterator[tuple[WorkerLook, WorkerLook]]:
    decodes = [look for look in facts.workers if look.role is Role.DECODE]
    return ((p, d) for p in facts.workers if p.role is Role.PREFILL for d in decodes)


def _layout(facts: FleetFacts, look: WorkerLook) -> KVLayoutDescriptor | None:
    info = facts.view.get(str(look.row.get("instance_id")))
    return info.kv_layout if info else None


def _difference(facts: FleetFacts, prefill: WorkerLook, decode: WorkerLook, label: str) -> str:
    ours, theirs = _layout(facts, prefill), _layout(facts, decode)
    if ours and theirs:
        return "; ".join(ours.differences(theirs))
    row = _pair_row(facts, label)
    if row.get("state") == "ready":
        return ""  # a real token came through: whatever differs in name does not keep them apart
    if str(row.get("error", "")).startswith("KV layouts differ: "):
        return str(row["error"]).removeprefix("KV layouts differ: ")
    told = [(name, prefill.info.get(name), decode.info.get(name)) for name in _INFO_FIELDS]
    return "; ".join(
        f"{name}: {one} != {other}" for name, one, other in told if None not in (one, other) and one != other
    )


def _pair_row(facts: FleetFacts, label: str) -> Mapping[str, object]:
    rows = facts.balancer.state.get("pairs") or ()
    return next((row for row in rows if f"{row.get('prefill')}>{row.get('decode')}" == label), {})


def judge_layouts(facts: FleetFacts) -> list[Finding]:
    """Every prefill server's KV against every decode server's."""
    mismatches, converted = layout_mismatches(facts), converted_pairs(facts)
    findings = [
        error(
            LAYOUTS,
            f"{difference} (prefill != decode) in {_named(labels)}",
            "KV pages of one do not fit the other: these pairs never take traffic",
            _remedy(difference),
            pairs=sorted(labels),
        )
        for difference, labels in _grouped(mismatches).items()
    ]
    for difference, labels in _grouped(converted).items():
        why = "KV is repacked on the way, which costs a copy on each side"
        todo = "give both roles the same --page-size unless you mean it"
        findings.append(note(LAYOUTS, f"{difference}, converted, in {_named(labels)}", why, todo))
    known = [layout for look in facts.workers if (layout := _layout(facts, look))]
    if not findings and known:
        one = known[0]
        text = (
            f"equal on {len(known)} workers: {one.num_layers} layers, {one.num_kv_heads} heads, {one.dtype}, "
        )
        findings.append(ok(LAYOUTS, f"{text}pages of {one.page_size} tokens, {one.layout}"))
    elif not findings and facts.workers:
        findings.append(ok(LAYOUTS, "nothing differs in what the workers tell (page size, dtype, model)"))
    return findings


def _remedy(difference: str) -> str:
    if difference.startswith("page_size"):
        return "start both roles with the same --page-size (after --), or with pdserve's data plane on"
    if "model" in difference:
        return "serve the same model from every worker of a fleet"
    return "start both roles with the same model, --dtype and --kv-cache-dtype"


def judge_pair_states(facts: FleetFacts) -> list[Finding]:
    """Pairs that the balancer does not use although both workers are there."""
    ready = {look.name for look in facts.workers if look.is_reached and look.row.get("state") == "ready"}
    misfits = layout_mismatches(facts)
    kept_out: dict[str, str] = {}
    for row in facts.balancer.state.get("pairs") or ():
        label = f"{row.get('prefill')}>{row.get('decode')}"
        is_judged = label in misfits or not {row.get("prefill"), row.get("decode")} <= ready
        if row.get("state") != "ready" and not is_judged:
            kept_out[label] = f"{row.get('state')}: {row.get('error') or 'no token yet'}"
    return [
        warning(
            STATES,
            f"the balancer does not use {_named(labels)}: {reason}",
            "it sends requests only where its own token came through; other pairs carry the load",
            "it tries again by itself; if the token below passes, wait a moment",
        )
        for reason, labels in _grouped(kept_out).items()
    ]


def judge_pairs(looks: Iterable[PairLook]) -> list[Finding]:
    """Did a token come through every pair."""
    looks = sorted(looks, key=lambda look: look.label)
    if not looks:
        return []
    findings = [_failed(look, look.result) for look in looks if isinstance(look.result, ProbeFailed)]
    times = {look.label: look.result.took_s for look in looks if isinstance(look.result, ProbePassed)}
    if times:
        worst = max(times, key=lambda label: times[label])
        text = f"came through {len(times)} of {len(looks)} pairs, the slowest {worst} in {times[worst]:.2f} s"
        whole = ok if len(times) == len(looks) else note
        findings.append(whole(TOKENS, text, took_s=times))
    untried = {look.label: look.untried for look in looks if look.untried}
    for reason, labels in _grouped(untried).items():
        findings.append(note(TOKENS, f"not tried through {_named(labels)}: {reason}"))
    return findings


def _failed(look: PairLook, failure: ProbeFailed) -> Finding:
    return error(
        TOKENS,
        f"none came through {look.label}: {failure.message}",
        "requests on this pair would fail or hang",
        f"look at the log of {_culprit(look, failure)}; "
        "if every pair fails, see KV transfer above (UCX_TLS, UCX_NET_DEVICES, firewall)",
        pair=look.label,
    )


def _culprit(look: PairLook, failure: ProbeFailed) -> str:
    if failure.role is None:
        return f"{look.prefill} and {look.decode}"
    return look.prefill if failure.role is Role.PREFILL else look.decode


def _grouped(texts: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for label, text in texts.items():
        groups.setdefault(text, []).append(label)
    return groups


def _named(labels: list[str]) -> str:
    more = f" and {len(labels) - MAX_NAMED} more" if len(labels) > MAX_NAMED else ""
    return ", ".join(sorted(labels)[:MAX_NAMED]) + more

"""Judges a running fleet by what it says of itself: members, versions, KV layouts, clocks, load. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pdserve import SUPPORTED_SGLANG, __version__
from pdserve.doctor.finding import Finding, error, note, ok, warning
from pdserve.doctor.fleet_facts import FleetFacts, WorkerLook
from pdserve.types import Role

BALANCER, BOOTSTRAP, WORKERS, VERSIONS, CLOCKS, LOAD, QUEUE = (
    "balancer", "bootstrap", "workers", "versions", "clocks", "load", "queue",
)  # fmt: skip
MAX_SKEW_S = 1.0
FULL, ALMOST_FULL = 0.97, 0.85
STUCK_S = 30.0
RECENT_S = 900.0
REMOVED = "removed by an operator"

Judge = Callable[[FleetFacts], list[Finding]]


def judge_balancer(facts: FleetFacts) -> list[Finding]:
    """Does it answer, as what, and does it hear the bootstrap service."""
    look = facts.balancer
    if look.trouble:
        return [_no_state(facts)]
    state = look.state
    text = f"pdserve {state.get('version')} serves {state.get('model') or 'no model yet'}, policy "
    text += f"{state.get('policy')}, answers in {look.took_s * 1e3:.0f} ms"
    findings = [ok(BALANCER, text, version=state.get("version"), answer_s=look.took_s)]
    service = state.get("bootstrap") or {}
    if not service.get("url"):
        findings.append(note(BOOTSTRAP, "none: workers are named to the balancer one by one"))
    elif service.get("connected"):
        findings.append(ok(BOOTSTRAP, f"connected, {service['url']}"))
    else:
        findings.append(
            error(
                BOOTSTRAP,
                f"the balancer has lost the bootstrap service at {service['url']}",
                "workers that die or join go unnoticed, and decode servers find no new prefill server",
                "start it again: `pdserve bootstrap` with the same address; workers register by themselves",
            )
        )
    return findings


def _no_state(facts: FleetFacts) -> Finding:
    look = facts.balancer
    trouble = look.trouble.removeprefix(f"{facts.url}: ")
    what, why = f"{facts.url}: {trouble}", "everything about the fleet is asked there"
    if look.status in (401, 403):
        todo = "give the admin key: --api-key, PDSERVE_ADMIN_API_KEY or PDSERVE_API_KEY"
    elif look.status:
        todo = "name a pdserve balancer: workers and other routers have no /pdserve/state"
    else:
        todo = "start it (`pdserve launch`, `pdserve balance`), or correct the address"
    return error(BALANCER, what, why, todo, status=look.status)


def judge_workers(facts: FleetFacts) -> list[Finding]:
    """Is each one there, well, and itself; did any leave."""
    findings = [_judge_worker(look, facts) for look in facts.workers]
    for role in Role:
        if not any(look.role is role for look in facts.workers):
            findings.append(
                error(
                    WORKERS,
                    f"no {role} server in the fleet",
                    "every request needs one of each role",
                    f"start one: `pdserve {role} --join HOST:PORT`, or look at its log",
                )
            )
    return [*findings, *_judge_departures(facts)]


def _judge_worker(look: WorkerLook, facts: FleetFacts) -> Finding:
    row = look.row
    state, breaker = row.get("state", "?"), row.get("breaker", "?")
    told = f"{state}, breaker {breaker}"
    if look.is_hidden:
        return note(
            look.name,
            f"{told}; {row.get('url')} cannot be reached from this machine",
            "it listens on the loopback of the balancer's machine",
            "run the doctor there to look at it and its pairs",
        )
    if look.health or look.info_trouble:
        return _silent(look, told)
    if stranger := _stranger(look, facts):
        return stranger
    if state != "ready" or breaker not in ("closed", "?"):
        last = f", last error: {row['last_error']}" if row.get("last_error") else ""
        return _not_serving(look, told + last)
    kind = "pdserve" if look.instance.get("worker_id") else "stock SGLang"
    what = f"{told}, {kind}, {row.get('inflight', 0)} in flight"
    return ok(look.name, what, state=state, breaker=breaker)


def _stranger(look: WorkerLook, facts: FleetFacts) -> Finding | None:
    """Somebody else, or a server of another kind, answers at a member's address."""
    mode = look.info.get("disaggregation_mode")
    if mode and mode != look.role:
        return error(
            look.name,
            f"{look.row.get('url')} is listed as {look.role}, but runs in disaggregation mode {mode}",
            "prompts sent there are answered wrongly or never",
            f"start it with --disaggregation-mode {look.role}, or name it in its own role",
        )
    instance, listed = look.instance.get("instance_id"), str(look.row.get("instance_id"))
    # The balancer makes up an instance for a worker that it was told of by hand.
    if not instance or instance == listed or listed not in facts.view:
        return None
    who = f"{look.instance.get('worker_id')} ({instance[:8]}…)"
    return error(
        look.name,
        f"another server answers at {look.row.get('url')}: {who}",
        "the balancer would send it requests meant for a process that is gone",
        "wait until the old lease runs out (10 s); if it stays, remove the worker (DELETE /workers)",
    )


def _silent(look: WorkerLook, told: str) -> Finding:
    """The HTTP server, or the scheduler behind it, does not answer."""
    if look.health:
        what = f"{look.row.get('url')} does not answer: {look.health} ({told})"
        why = "requests for it fail or wait; its pairs take no traffic"
        todo = f"look at its log; start it again: `pdserve {look.row.get('role')} --join HOST:PORT`"
    else:
        what = f"its HTTP server answers, its scheduler does not: {look.info_trouble} ({told})"
        why = "the process behind the HTTP server hangs or is gone; requests would never end"
        todo = "look at its log and restart it"
    return error(look.name, what, why, todo, state=look.row.get("state"))


def _not_serving(look: WorkerLook, told: str) -> Finding:
    values: dict[str, Any] = dict(state=look.row.get("state"), breaker=look.row.get("breaker"))
    if look.row.get("draining"):
        what = f"draining, {look.row.get('inflight', 0)} requests in flight"
        return note(look.name, what, "an operator has taken it out of service", **values)
    return warning(
        look.name,
        f"answers, but takes no traffic: {told}",
        "the other workers have its share of the load",
        "see its last error and its pairs below; the balancer tries it again by itself",
        **values,
    )


def _judge_departures(facts: FleetFacts) -> Iterator[Finding]:
    state = facts.balancer.state
    events: list[dict[str, Any]] = [e for e in state.get("events") or () if e.get("event") == "gone"]
    now_s = state.get("now_s") or max((e.get("time_s", 0.0) for e in state.get("events") or ()), default=0.0)
    present = {look.name for look in facts.workers}
    for event in {str(e.get("worker")): e for e in events}.values():
        name, why, age_s = (
            str(event.get("worker")),
            str(event.get("detail")),
            now_s - event.get("time_s", 0.0),
        )
        if age_s > RECENT_S:
            continue
        if name in present:
            yield note(name, f"this is a new process: the one before went {age_s:.0f} s ago")
        elif why != REMOVED:
            yield warning(
                name,
                f"left the fleet {age_s:.0f} s ago: {why}",
                "its process died, or lost the bootstrap service for longer than its lease",
                "look at its log; the launcher restarts what it started",
            )


def judge_versions(facts: FleetFacts) -> list[Finding]:
    """Of SGLang on every worker, and of pdserve."""
    found: dict[str, list[str]] = {}
    ours: dict[str, list[str]] = {}
    for look in facts.workers:
        info = facts.view.get(str(look.row.get("instance_id")))
        version = str(look.info.get("version") or (info.sglang_version if info else ""))
        if version:
            found.setdefault(version, []).append(look.name)
        if look.instance.get("version"):
            ours.setdefault(str(look.instance["version"]), []).append(look.name)
    ours.setdefault(str(facts.balancer.state.get("version")), []).append("the balancer")
    ours.setdefault(__version__, []).append("this doctor")
    return [*_judge_sglang_versions(found), *_judge_own_versions(ours)]


def _judge_sglang_versions(found: dict[str, list[str]]) -> Iterator[Finding]:
    if len(found) > 1:
        yield warning(
            VERSIONS,
            f"SGLang differs: {_by_version(found)}",
            "the P/D protocol changes between releases: answers may be wrong or never come",
            f"run SGLang {SUPPORTED_SGLANG} everywhere",
            sglang={version: sorted(names) for version, names in found.items()},
        )
    elif found:
        version = next(iter(found))
        if version == SUPPORTED_SGLANG:
            yield ok(VERSIONS, f"SGLang {version} on every worker", sglang=version)
        else:
            why = f"this pdserve was read against and tested on {SUPPORTED_SGLANG}"
            todo = f"run SGLang {SUPPORTED_SGLANG}"
            yield warning(VERSIONS, f"SGLang {version} on every worker", why, todo, sglang=version)


def _judge_own_versions(ours: dict[str, list[str]]) -> Iterator[Finding]:
    if len(ours) > 1:
        yield warning(
            VERSIONS,
            f"pdserve differs: {_by_version(ours)}",
            "messages between services and workers may differ",
            "install the same pdserve everywhere",
        )


def _by_version(found: dict[str, list[str]]) -> str:
    return "; ".join(f"{version} on {', '.join(names)}" for version, names in sorted(found.items()))


def judge_clocks(facts: FleetFacts) -> list[Finding]:
    """Wall clocks of balancer and workers against this machine's."""
    skews = {look.name: look.skew_s for look in facts.workers if look.skew_s is not None}
    if facts.balancer.skew_s is not None:
        skews["the balancer"] = facts.balancer.skew_s
    far = {name: skew for name, skew in skews.items() if abs(skew) > MAX_SKEW_S}
    if far:
        named = ", ".join(f"{name} {skew:+.1f} s" for name, skew in sorted(far.items()))
        return [
            warning(
                CLOCKS,
                f"away from this machine's: {named}",
                "logs, traces and events of the fleet cannot be put in order; leases do not depend on it",
                "run chrony or systemd-timesyncd on every machine",
                skew_s=skews,
            )
        ]
    if not skews:
        return []
    worst = max(skews.values(), key=abs)
    return [ok(CLOCKS, f"within {abs(worst) * 1e3:.0f} ms of this machine's", skew_s=skews)]


def judge_load(facts: FleetFacts) -> list[Finding]:
    """KV headroom, requests that do not move, the queue."""
    state = facts.balancer.state
    findings = [finding for look in facts.workers for finding in _judge_worker_load(look)]
    queue = state.get("queue") or {}
    oldest_s = float(queue.get("oldest_wait_s") or 0.0)
    length, size = int(queue.get("length") or 0), int(queue.get("size") or 0)
    text = f"{length} of {size} places taken, the oldest waits {oldest_s:.1f} s"
    shed = {reason: count for reason, count in (queue.get("shed") or {}).items() if count}
    if oldest_s > STUCK_S or (size and length >= size):
        findings.append(
            warning(
                QUEUE,
                text,
                "requests wait longer than clients do, or are refused with 503",
                "add workers of the role that is full (see the regime in /pdserve/state), or send less",
                length=length,
            )
        )
    else:
        findings.append(ok(QUEUE, text, length=length, oldest_wait_s=oldest_s))
    if shed:
        named = ", ".join(f"{count} {reason}" for reason, count in sorted(shed.items()))
        findings.append(note(QUEUE, f"refused since the start: {named}", shed=shed))
    return findings


def _judge_worker_load(look: WorkerLook) -> Iterator[Finding]:
    ranks = [rank for rank in look.loads.get("loads") or () if isinstance(rank, dict)]
    usage = max((float(rank.get("token_usage") or 0.0) for rank in ranks), default=0.0)
    stalled_s = float((look.row.get("wedge") or {}).get("stalled_s") or 0.0)
    if stalled_s > STUCK_S:
        yield error(
            look.name,
            f"has had requests for {stalled_s:.0f} s and makes no progress",
            "its scheduler or a transfer hangs; the balancer takes it for dead after wedge_s",
            "look at its log and restart it",
            stalled_s=stalled_s,
        )
    if usage > FULL:
        yield warning(
            look.name,
            f"{usage:.0%} of its KV pool is in use",
            "decode servers then retract running requests, prefill servers stop taking new ones",
            "add servers of that role, raise --mem-fraction-static or --max-total-tokens, or send less",
            kv_usage=usage,
        )
    elif usage > ALMOST_FULL:
        yield note(look.name, f"{usage:.0%} of its KV pool is in use", kv_usage=usage)
    retracted = sum(_retracted(rank) for rank in ranks)
    if retracted:
        yield warning(
            look.name,
            f"{retracted} requests were taken back for lack of KV room",
            "they are computed again later",
            "add decode servers, or raise their KV pool",
            retracted=retracted,
        )


def _retracted(rank: dict[str, Any]) -> int:
    return int((rank.get("disaggregation") or {}).get("decode_retracted_queue_reqs") or 0)

"""The checks of a running fleet: what its balancer's state document says, and what in it needs an operator.

The balancer itself sends a real token through every pair and pings every worker: no worker is asked here.
"""

from __future__ import annotations

import time

from pdserve import __version__
from pdserve.config.worker_env import keys_from_environment
from pdserve.doctor.finding import Finding, error, note, ok, warning
from pdserve.doctor.runner import Check, Group
from pdserve.errors import WorkerError, WorkerUnreachable
from pdserve.state.client import TIMEOUT_S, StateClient
from pdserve.state.document import StateDocument
from pdserve.state.problems import find_problems
from pdserve.state.workers import WorkerEntry

MAX_SKEW_S = 1.0


def fleet_groups(url: str, api_key: str) -> list[Group]:
    """Every check of the fleet whose balancer is at ``url``.

    ``api_key`` wins over PDSERVE_ADMIN_API_KEY and PDSERVE_API_KEY.

    Raises:
        ConfigError: if ``url`` is no address.
    """
    keys = keys_from_environment()
    client = StateClient(url, api_key or keys.get("admin_api_key", "") or keys.get("api_key", ""))
    return [Group(f"Fleet at {client.url}", (Check("balancer", lambda: _look(client), 3 * TIMEOUT_S),))]


def _look(client: StateClient) -> list[Finding]:
    begun_s, wall_s = time.monotonic(), time.time()
    try:
        state = client.fetch()
    except WorkerError as exc:
        return [_no_state(exc)]
    finally:
        client.close()
    took_s = time.monotonic() - begun_s
    return judge_fleet(state, took_s, state.now_s - (wall_s + took_s / 2))


def _no_state(exc: WorkerError) -> Finding:
    todo = "name a pdserve balancer (workers and other routers have no /pdserve/state), with its admin key"
    if isinstance(exc, WorkerUnreachable):
        todo = "start it (`pdserve launch`, `pdserve balance`), or correct the address"
    return error("balancer", str(exc), "everything about the fleet is asked there", todo)


def judge_fleet(state: StateDocument, took_s: float, skew_s: float) -> list[Finding]:
    """Findings of a state document that came after ``took_s``.

    ``skew_s``: the balancer's wall clock minus this machine's.
    """
    problems = find_problems(state)
    troubled = {problem.subject for problem in problems}
    findings = [*_balancer(state, took_s, skew_s)]
    findings += [_worker(worker) for worker in state.workers if worker.worker_id not in troubled]
    ready = [pair for pair in state.pairs if pair.state == "ready"]
    if ready:
        text = f"a real token came through {len(ready)} of {len(state.pairs)} pairs"
        whole = ok if len(ready) == len(state.pairs) else note
        findings.append(whole("pairs", text, took_s={pair.label: pair.probe_s for pair in ready}))
    for problem in problems:
        level = error if problem.is_error else warning
        findings.append(level(problem.subject, problem.what, problem.why, problem.what_to_do))
    if state.queue is not None and (shed := {why: n for why, n in state.queue.shed.items() if n}):
        named = ", ".join(f"{count} {reason}" for reason, count in sorted(shed.items()))
        findings.append(note("queue", f"refused since the start: {named}", shed=shed))
    return findings


def _balancer(state: StateDocument, took_s: float, skew_s: float) -> list[Finding]:
    text = f"pdserve {state.version} serves {state.model or 'no model yet'}, policy {state.policy}"
    text += f", answers in {took_s * 1e3:.0f} ms"
    findings = [ok("balancer", text, version=state.version, answer_s=took_s)]
    if state.version != __version__:
        findings.append(
            warning(
                "versions",
                f"pdserve differs: {state.version} on the balancer, {__version__} here",
                "messages between services and workers may differ",
                "install the same pdserve everywhere",
            )
        )
    if state.now_s and abs(skew_s) > MAX_SKEW_S:
        findings.append(
            warning(
                "clocks",
                f"the balancer's is {skew_s:+.1f} s away from this machine's",
                "logs, traces and events of the fleet cannot be put in order; leases do not depend on it",
                "run chrony or systemd-timesyncd on every machine",
                skew_s=skew_s,
            )
        )
    service = state.bootstrap
    if service is None or not service.url:
        findings.append(note("bootstrap", "none: workers are named to the balancer one by one"))
    elif service.connected:
        findings.append(ok("bootstrap", f"connected, {service.url}"))
    return findings


def _worker(worker: WorkerEntry) -> Finding:
    if worker.draining:
        what = f"draining, {worker.inflight} requests in flight"
        return note(worker.worker_id, what, "an operator has taken it out of service")
    level = ok if worker.state == "ready" else note
    what = f"{worker.state}, breaker {worker.breaker}, {worker.inflight} in flight"
    return level(worker.worker_id, what, state=worker.state, breaker=worker.breaker)

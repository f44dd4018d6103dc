"""Are the ports free that a launch would take, and who has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pdserve.cluster.machine import FIRST_WORKER_PORT
from pdserve.cluster.ports import SystemPorts, port_owner
from pdserve.doctor.finding import Finding, error, note, ok
from pdserve.errors import ConfigError
from pdserve.process.scratch import live_workers

PORT, WORKERS, BOOTSTRAP, RUNNING = "port", "worker ports", "bootstrap ports", "servers"
LOOPBACK = "127.0.0.1"
NUM_BOOTSTRAP = 1
"""The service itself; it opens one more for each prefill server."""


@dataclass(frozen=True, slots=True)
class PortFacts:
    """``refusal`` is why ``port`` cannot be listened on, empty if it can; ``owner`` (pid, command) who
    has it, None if nobody or it cannot be seen. ``workers``: the ports that servers would get."""

    port: int
    refusal: str = ""
    owner: tuple[int, str] | None = None
    workers: tuple[int, ...] = ()
    bootstrap: int = 0
    running: tuple[int, ...] = ()
    """Process ids of pdserve's servers that run here already."""
    ephemeral: tuple[int, int] = (0, 0)
    """First and last port that the kernel gives to outgoing connections."""


def gather_ports(port: int, num_servers: int, num_prefill: int) -> PortFacts:
    """Try to bind them."""
    refusal = ""
    with SystemPorts() as ports:
        try:
            ports.claim(LOOPBACK, port, "--port")
        except ConfigError as exc:
            refusal = str(exc)
        workers, first = [], FIRST_WORKER_PORT
        for _ in range(num_servers):
            first = ports.pick(LOOPBACK, first)
            workers.append(first)
        bootstrap = [ports.pick(LOOPBACK, 0) for _ in range(NUM_BOOTSTRAP + num_prefill)]
    return PortFacts(
        port=port,
        refusal=refusal,
        owner=port_owner(port) if refusal else None,
        workers=tuple(workers),
        bootstrap=len(bootstrap),
        running=tuple(live_workers()),
        ephemeral=_ephemeral(),
    )


def _ephemeral() -> tuple[int, int]:
    try:
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except (OSError, ValueError):
        return 0, 0
    return int(first), int(last)


def judge_ports(facts: PortFacts) -> list[Finding]:
    """The service's port must be free; servers take the next free ones."""
    findings = [_judge_port(facts), _judge_workers(facts.workers)]
    findings.append(ok(BOOTSTRAP, f"{facts.bootstrap} more are free for the bootstrap service"))
    if facts.running:
        pids = ", ".join(map(str, facts.running))
        why = "they take cores and memory that a new service would need"
        findings.append(note(RUNNING, f"{len(facts.running)} of pdserve's run here already: pid {pids}", why))
    taken = [
        port for port in (facts.port, *facts.workers) if facts.ephemeral[0] <= port <= facts.ephemeral[1]
    ]
    if taken and facts.ephemeral[1]:
        findings.append(
            note(
                PORT,
                f"{', '.join(map(str, taken))} lie among the kernel's ports for outgoing connections "
                f"({facts.ephemeral[0]}-{facts.ephemeral[1]})",
                "any program may happen to hold one when the service starts",
                "sysctl net.ipv4.ip_local_port_range, or other ports",
            )
        )
    return findings


def _judge_port(facts: PortFacts) -> Finding:
    if not facts.refusal:
        return ok(PORT, f"{facts.port} is free", port=facts.port)
    is_ours = facts.owner is not None and "pdserve" in facts.owner[1]
    others = "end that program or choose another port with --port"
    ours = f"a service seems to run already: `pdserve doctor http://{LOOPBACK}:{facts.port}` looks at it"
    return error(
        PORT,
        facts.refusal.partition(";")[0],
        "the service cannot listen there",
        f"{ours}; else {others}" if is_ours else others,
        port=facts.port,
        owner_pid=facts.owner[0] if facts.owner else 0,
    )


def _judge_workers(workers: Sequence[int]) -> Finding:
    text = f"servers would listen on {', '.join(map(str, workers))}"
    skipped = workers[-1] - FIRST_WORKER_PORT + 1 - len(workers) if workers else 0
    if skipped:
        return note(WORKERS, f"{text}; {skipped} in between are taken")
    return ok(WORKERS, text)

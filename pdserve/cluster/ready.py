"""How far a starting fleet is: each worker's log tells its stage, the balancer's state document the rest.

log lines ──► LogStage ──┐
GET /pdserve/state ──────┴──► one stage per process, all pairs ready or what is missing
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pdserve.cluster.spec import ProcessKind
from pdserve.cluster.supervise import State, Supervised
from pdserve.config.worker_env import keys_from_environment
from pdserve.types import Role

GET_S = 2.0
READY = "ready"
_MAX_READ = 1 << 20

LOG_STAGES = (
    ("Load weight begin", "loading weights"),
    ("Load weight end", "weights loaded"),
    ("KV Cache is allocated", "KV pool allocated"),
    ("max_total_num_tokens=", "KV pool allocated"),
    ("fired up", "server up"),
)
"""Text in SGLang's log and the stage that it proves, in the order of a start."""


@dataclass(slots=True)
class LogStage:
    """Follows one log file; ``stage`` is the furthest that the current run has reached."""

    path: Path
    offset: int = 0
    stage: str = ""

    def restart(self, offset: int) -> None:
        """A new run begins at ``offset``."""
        self.offset, self.stage = offset, ""

    def read(self) -> None:
        """Take in what was written since; a line cut in two is read again with its rest."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(_MAX_READ)
        except OSError:
            return
        complete = data[: data.rfind(b"\n") + 1]
        self.offset += len(complete) if len(data) < _MAX_READ else max(len(complete), 1)
        for text, stage in LOG_STAGES:
            if text.encode() in complete:
                self.stage = stage


@dataclass(slots=True)
class FleetState:
    """The parts of the balancer's state document that a start depends on; empty if it does not answer."""

    is_reached: bool = False
    is_connected: bool = False
    model: str = ""
    workers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """By worker id; an older instance of the same worker is overwritten by a later entry."""
    pairs: list[Mapping[str, Any]] = field(default_factory=list)

    @classmethod
    def parse(cls, document: Mapping[str, Any] | None) -> FleetState:
        """From the decoded JSON; None is an unreachable balancer."""
        if document is None:
            return cls()
        return cls(
            is_reached=True,
            is_connected=bool(document.get("bootstrap", {}).get("connected", True)),
            model=str(document.get("model", "")),
            workers={str(w["worker_id"]): w for w in document.get("workers", [])},
            pairs=list(document.get("pairs", [])),
        )

    def is_ready(self, num_pairs: int) -> bool:
        """True when ``num_pairs`` different pairs take traffic."""
        ready = {(p["prefill"], p["decode"]) for p in self.pairs if p["state"] == READY}
        return len(ready) >= num_pairs

    def has_joined(self, process: Supervised) -> bool:
        """True if the balancer knows this very run of the worker."""
        worker = self.workers.get(process.name)
        return worker is not None and worker.get("instance_id") == process.instance_id

    def serves(self, process: Supervised) -> bool:
        """True if this very run of the process can do its work."""
        if process.spec.kind is ProcessKind.BALANCER:
            return self.is_reached
        if process.spec.kind is ProcessKind.BOOTSTRAP:
            return self.is_connected
        return self.has_joined(process) and self.workers[process.name].get("state") == READY

    def pair_trouble(self, process: Supervised) -> str:
        """Why a pair of this worker is not ready, if its last test failed."""
        side = "prefill" if process.spec.role is Role.PREFILL else "decode"
        failed = (p for p in self.pairs if p[side] == process.name and p["state"] == "failed")
        return next((f"{p['prefill']}>{p['decode']}: {p.get('error') or 'failed'}" for p in failed), "")


async def get_json(url: str, timeout_s: float = GET_S) -> Mapping[str, Any] | None:
    """GET ``url`` without a thread; None if it does not answer 200 with a JSON object in time."""
    parts = urlsplit(url)
    request = f"GET {parts.path or '/'} HTTP/1.0\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
    keys = keys_from_environment()
    if key := keys.get("admin_api_key") or keys.get("api_key"):  # the balancer's, which inherits them
        request += f"Authorization: Bearer {key}\r\n"
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
            try:
                writer.write(request.encode() + b"\r\n")
                head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    if b" 200 " not in head.partition(b"\r\n")[0] + b" ":
        return None
    try:
        value = json.loads(body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def stage_of(process: Supervised, state: FleetState, log: LogStage) -> str:
    """Where one process is, in words."""
    if process.state in (State.BACKING_OFF, State.FAILED, State.STOPPED):
        return process.state.value
    if state.serves(process):
        return READY
    if not process.is_worker:
        return "connecting" if state.is_reached else "starting"
    if process.state is State.STARTING:
        return "waiting for the forkserver"
    if not state.has_joined(process):
        return log.stage or "starting"
    trouble = state.pair_trouble(process)
    return f"pair test failed, {trouble}" if trouble else "joined, testing pairs"


def describe_missing(stages: Mapping[str, str], state: FleetState, workers: Sequence[Supervised]) -> str:
    """What keeps the fleet from being ready: ``prefill-0 (loading weights); pair … (untested)``."""
    missing = [f"{name} ({stage})" for name, stage in stages.items() if stage != READY]
    waiting = (p for p in state.pairs if p["state"] != READY)
    missing += [f"pair {p['prefill']}>{p['decode']} ({p.get('error') or p['state']})" for p in waiting]
    if not missing:
        missing = [f"pairs of {worker.name}" for worker in workers]
    return "; ".join(missing)

"""How far a starting fleet is: each worker's log tells its stage, the balancer's state document the rest.

log lines ──► LogStage ──┐
GET /pdserve/state ──────┴──► one stage per process, all pairs ready or what is missing
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pdserve.cluster.spec import ProcessKind
from pdserve.cluster.supervise import State, Supervised
from pdserve.config.worker_env import keys_from_environment
from pdserve.state.document import StateDocument
from pdserve.state.workers import PairEntry, WorkerEntry
from pdserve.types import Role

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, slots=True)
class FleetState:
    """What the balancer's state document says of a start; ``document`` is None if it does not answer."""

    document: StateDocument | None = None

    @classmethod
    def parse(cls, document: Mapping[str, Any] | None) -> FleetState:
        """From the decoded JSON; None, or one that cannot be read, is an unreachable balancer."""
        try:
            return cls(None if document is None else msgspec.convert(document, StateDocument))
        except msgspec.ValidationError as exc:
            logger.warning("the balancer's state document cannot be read: %s", exc)
            return cls()

    @property
    def is_reached(self) -> bool:
        """True if the balancer answers."""
        return self.document is not None

    @property
    def model(self) -> str:
        """The name the fleet serves under."""
        return "" if self.document is None else self.document.model

    @property
    def pairs(self) -> list[PairEntry]:
        """Every pair that the balancer knows."""
        return [] if self.document is None else self.document.pairs

    def is_ready(self, num_pairs: int) -> bool:
        """True when ``num_pairs`` different pairs take traffic."""
        return len({pair.label for pair in self.pairs if pair.state == READY}) >= num_pairs

    def worker(self, process: Supervised) -> WorkerEntry | None:
        """The balancer's entry of this very run of the worker; None if it has not joined."""
        workers = [] if self.document is None else self.document.workers
        own = (w for w in workers if (w.worker_id, w.instance_id) == (process.name, process.instance_id))
        return next(own, None)

    def serves(self, process: Supervised) -> bool:
        """True if this very run of the process can do its work."""
        if self.document is None or process.spec.kind is ProcessKind.BALANCER:
            return self.is_reached
        if process.spec.kind is ProcessKind.BOOTSTRAP:
            return self.document.bootstrap is None or self.document.bootstrap.connected
        worker = self.worker(process)
        return worker is not None and worker.state == READY

    def pair_trouble(self, process: Supervised) -> str:
        """Why a pair of this worker is not ready, if its last test failed."""
        is_prefill = process.spec.role is Role.PREFILL
        for pair in self.pairs:
            name = pair.prefill if is_prefill else pair.decode
            if name == process.name and pair.state == "failed":
                return f"{pair.label}: {pair.error or 'failed'}"
        return ""


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
    if state.worker(process) is None:
        return log.stage or "starting"
    trouble = state.pair_trouble(process)
    return f"pair test failed, {trouble}" if trouble else "joined, testing pairs"


def describe_missing(stages: Mapping[str, str], state: FleetState, workers: Sequence[Supervised]) -> str:
    """What keeps the fleet from being ready: ``prefill-0 (loading weights); pair … (untested)``."""
    missing = [f"{name} ({stage})" for name, stage in stages.items() if stage != READY]
    waiting = (pair for pair in state.pairs if pair.state != READY)
    missing += [f"pair {pair.label} ({pair.error or pair.state})" for pair in waiting]
    if not missing:
        missing = [f"pairs of {worker.name}" for worker in workers]
    return "; ".join(missing)

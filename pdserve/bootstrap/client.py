"""How a worker joins and stays: a synchronous client and the thread that keeps the lease.

Used inside SGLang's processes and by the launcher, so standard library only.
The watching side of the protocol is ``watch.FleetWatcher``.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from pdserve.bootstrap.messages import Deregister, Heartbeat, Lease, RankRoute, Refusal, Register
from pdserve.errors import (
    ConfigError,
    KVLayoutMismatch,
    PdserveError,
    ProtocolMismatch,
    WorkerRejected,
    WorkerUnreachable,
)
from pdserve.types import InstanceId, WorkerInfo

logger = logging.getLogger(__name__)

CALL_S = 5.0
STOP_S = 1.0
"""``LeaseKeeper.stop`` waits this long for a call in progress, and again for its own."""
FIRST_PAUSE_S = 0.1
MAX_BACKOFF_S = 2.0
RANK_REPORT_S = 120.0
"""How long a rank tries to report: the service may be restarting, or may not be up yet."""

T = TypeVar("T")


class LeaseClient:
    """One call each; a new connection per call, so a restarted service is no special case."""

    def __init__(self, url: str, timeout_s: float = CALL_S) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise ValueError(f"bootstrap service URL must be http://host:port, got {url!r}")
        self.url = url
        self._host, self._port, self._timeout_s = parts.hostname, parts.port or 80, timeout_s

    def register(self, request: Register) -> Lease:
        """Offer this worker.

        Raises:
            KVLayoutMismatch, ProtocolMismatch: refused for good.
            ConfigError: refused for good, another live process has this worker's name.
            WorkerRejected: refused for now (425: ranks have not all reported; 503: no port is free).
            WorkerUnreachable: the service does not answer.
        """
        return self._call("POST", "/fleet/register", request, Lease)

    def report_rank(self, instance_id: InstanceId, report: RankRoute) -> None:
        """One scheduler rank reports itself; raises as ``register``."""
        self._call("PUT", f"/fleet/instances/{quote(instance_id, safe='')}/ranks", report, dict)

    def report_rank_patiently(self, instance_id: InstanceId, report: RankRoute) -> None:
        """As ``report_rank``, but waits up to RANK_REPORT_S for a service that does not answer."""
        deadline, pause_s = time.monotonic() + RANK_REPORT_S, FIRST_PAUSE_S
        while True:
            try:
                return self.report_rank(instance_id, report)
            except WorkerUnreachable:
                if time.monotonic() > deadline:
                    raise
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, MAX_BACKOFF_S)

    def report_dp_rank(self, instance_id: InstanceId, room: int, dp_rank: int) -> None:
        """Say which DP rank serves ``room``."""
        path = f"/fleet/instances/{quote(instance_id, safe='')}/dp_rank"
        self._call("POST", path, {"bootstrap_room": room, "dp_rank": dp_rank}, dict)

    def heartbeat(self, instance_id: InstanceId, *, is_leaving: bool = False) -> Lease:
        """Renew; WorkerRejected with status 404 means: register again.

        ``is_leaving`` tells the fleet that this instance will stop: it is given no new requests.
        """
        beat = Heartbeat(instance_id=instance_id, is_leaving=is_leaving)
        return self._call("POST", "/fleet/heartbeat", beat, Lease)

    def deregister(self, instance_id: InstanceId, reason: str) -> None:
        """Leave, or say that somebody is gone."""
        self._call("POST", "/fleet/deregister", Deregister(instance_id=instance_id, reason=reason), dict)

    def is_healthy(self) -> bool:
        """True if the service answers."""
        try:
            self._call("GET", "/health", None, dict)
        except PdserveError:
            return False
        return True

    def _call(self, method: str, path: str, body: object, answer: type[T]) -> T:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        payload = None if body is None else msgspec.json.encode(body)
        try:
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as exc:
            raise WorkerUnreachable(self.url, f"bootstrap service does not answer: {exc}") from exc
        finally:
            connection.close()
        if response.status != 200:
            raise _refusal_error(self.url, response.status, data)
        try:
            return msgspec.json.decode(data, type=answer)
        except ValueError as exc:  # somebody else listens there now
            raise WorkerRejected(self.url, response.status, data) from exc


def _refusal_error(url: str, status: int, data: bytes) -> PdserveError:
    try:
        refusal = msgspec.json.decode(data, type=Refusal)
    except ValueError:
        return WorkerRejected(url, status, data)
    if refusal.code == "mismatch":
        return KVLayoutMismatch(refusal.message)
    if refusal.code == "protocol":
        return ProtocolMismatch(refusal.message)
    if refusal.code == "name_taken":
        return ConfigError(refusal.message)
    return WorkerRejected(url, status, refusal.message.encode())


class LeaseKeeper:
    """The named thread ``pdserve-lease``: registers, renews, and registers again when it must.

    ``on_refused`` is called once, from that thread, if the fleet refuses the
    worker for good; the thread then ends.
    """

    def __init__(
        self, url: str, worker: WorkerInfo, on_refused: Callable[[Exception], None], lease_s: float = 10.0
    ) -> None:
        self.lease: Lease | None = None
        self._client = LeaseClient(url)
        self._worker = worker
        self._on_refused = on_refused
        self._lease_s = lease_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pdserve-lease", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Leave the fleet and end the thread; never raises for a service that is gone."""
        if not self._thread.is_alive() and self.lease is None:
            return  # never started, or refused before it was a member
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=STOP_S)
        try:
            LeaseClient(self._client.url, timeout_s=STOP_S).deregister(
                self._worker.instance_id, "worker stopped"
            )
        except PdserveError as exc:
            logger.info("could not deregister, the lease will run out: %s", exc)

    def _run(self) -> None:
        pause_s, needs_register, was_lost = 0.0, True, False
        while not self._stop.wait(pause_s):
            try:
                self.lease = self._register() if needs_register else self._renew()
            except (KVLayoutMismatch, ProtocolMismatch, ConfigError) as exc:
                self._on_refused(exc)
                return
            except WorkerRejected as exc:
                # 404: a restarted service does not know us. 425: our ranks are still starting.
                needs_register = True
                if exc.status in (404, 425):
                    pause_s = FIRST_PAUSE_S
                else:
                    logger.warning("lease refused, trying again: %s", exc)
                    pause_s = MAX_BACKOFF_S
                continue
            except PdserveError as exc:
                if not was_lost:
                    logger.warning("bootstrap service lost, serving on: %s", exc)
                    pause_s = FIRST_PAUSE_S / 2
                was_lost = True
                pause_s = min(pause_s * 2, MAX_BACKOFF_S / 2)
                continue
            if was_lost:
                logger.info("bootstrap service is back url=%s", self._client.url)
            needs_register, was_lost = False, False
            pause_s = self.lease.lease_s / 4

    def _renew(self) -> Lease:
        return self._client.heartbeat(self._worker.instance_id)

    def _register(self) -> Lease:
        former = self.lease
        request = Register(
            worker=self._worker if former is None else former.worker,
            ranks=[] if former is None else former.ranks,
            lease_s=self._lease_s,
        )
        lease = self._client.register(request)
        worker = lease.worker
        logger.info(
            "joined the fleet worker=%s instance=%s bootstrap=%s:%s",
            worker.worker_id, worker.instance_id, worker.bootstrap_host, worker.bootstrap_port,
        )  # fmt: skip
        return lease

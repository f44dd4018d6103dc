"""Adding and removing workers at run time: sglang-router's ``/workers`` family and its older names.

    POST   /workers        {"url", "worker_type", "bootstrap_port"?}   202, probed from now on
    GET    /workers        all of them          GET /workers/{id}      one
    PUT    /workers/{id}   {"draining": bool, "move": bool?}   202; PATCH is the same
    DELETE /workers/{id}                        202, drained, then forgotten

``{id}`` is the worker's id or its URL. Errors are ``{"error", "code"}``, as
sglang-router's. Only addresses of ``worker_hosts`` can be registered (worker_url.py).
"""

from __future__ import annotations

import hmac
import uuid
from typing import Any
from urllib.parse import parse_qsl, quote

import msgspec

from pdserve.balancer.api.forward import ControlRefused, WorkerAsker, fields_of
from pdserve.balancer.api.worker_url import AllowedHosts, BadWorkerUrl, HostNotAllowed, WorkerUrl
from pdserve.balancer.fleet.worker import Worker, WorkerState
from pdserve.errors import ConfigError
from pdserve.http.answer import Answer, json_answer
from pdserve.http.incoming import IncomingRequest
from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo

WORKERS = "/workers/"

_ROLES = f"worker_type must be {' or '.join(Role)}: this balancer serves every request by a pair of them"
_NO_MEANING = ("cost", "labels", "model_id", "priority")
"""sglang-router's fields that change nothing here; the answer names those that were given."""


class _NewWorker(msgspec.Struct):
    """Body of ``POST /workers``. Fields that are not named here are ignored, as sglang-router does."""

    url: str
    worker_type: str = ""
    bootstrap_port: int | None = None
    api_key: str | None = None


class _Changes(msgspec.Struct):
    """Body of ``PUT /workers/{id}``."""

    draining: bool | None = None
    move: bool = False


class _Failure(ControlRefused):
    """A refusal with sglang-router's ``code``."""

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message, status, json_answer({"error": message, "code": code}, status))


class WorkersControl:
    """The registry as HTTP."""

    def __init__(self, asker: WorkerAsker) -> None:
        self._asker = asker
        self._fleet = asker.fleet
        self._allowed = AllowedHosts(asker.config)

    # -- looking -----------------------------------------------------------------------------

    async def list_all(self, client: IncomingRequest, body: bytes) -> Answer:
        """The members as sglang-router lists them."""
        workers = self._fleet.workers()
        counts = {role: sum(worker.role is role for worker in workers) for role in Role}
        stats = {
            "prefill_count": counts[Role.PREFILL],
            "decode_count": counts[Role.DECODE],
            "regular_count": 0,
        }
        rows = [worker_row(worker) for worker in workers]
        return json_answer({"workers": rows, "total": len(rows), "stats": stats})

    async def show(self, client: IncomingRequest, body: bytes) -> Answer:
        """One member."""
        return json_answer(worker_row(self._named(client)))

    async def list_urls(self, client: IncomingRequest, body: bytes) -> Answer:
        """``/list_workers`` of old routers: the addresses, perhaps of one ``?role=``."""
        asked = _role(_parameters(client), required=False)
        urls = [worker.url for worker in self._fleet.workers() if asked in (None, worker.role)]
        return json_answer({"urls": urls})

    # -- changing ----------------------------------------------------------------------------

    async def add(self, client: IncomingRequest, body: bytes) -> Answer:
        """Register a worker; it takes traffic once a token came through one of its pairs."""
        given = _decoded(body, _NewWorker)
        ignored = [name for name in _NO_MEANING if fields_of(body).get(name)]
        note = f"; without meaning here: {', '.join(ignored)}" if ignored else ""
        return self._add(given, note)

    async def add_by_query(self, client: IncomingRequest, body: bytes) -> Answer:
        """``/add_worker?url=…&role=…`` of old routers, with ``bootstrap_port`` and ``api_key``."""
        parameters = _parameters(client)
        port = parameters.get("bootstrap_port", "")
        if port and not (port.isascii() and port.isdigit()):
            raise _Failure("bootstrap_port must be a number", 400, "BAD_REQUEST")
        new = _NewWorker(
            url=parameters.get("url", ""),
            worker_type=str(_role(parameters, required=True)),
            bootstrap_port=int(port) if port else None,
            api_key=parameters.get("api_key"),
        )
        return self._add(new, "")

    async def change(self, client: IncomingRequest, body: bytes) -> Answer:
        """Begin or end a drain: a draining worker finishes what it has, or with ``move`` what cannot go on
        elsewhere, and gets nothing new."""
        worker = self._named(client)
        changes = _decoded(body, _Changes)
        if changes.draining is None:
            raise _Failure('nothing to change: {"draining": true or false} is', 400, "BAD_REQUEST")
        if changes.draining:
            self._fleet.drain(worker.worker_id, move=changes.move)
        else:
            self._fleet.undrain(worker.worker_id)
        return _accepted(worker, "Worker is draining" if changes.draining else "Worker takes traffic")

    async def remove(self, client: IncomingRequest, body: bytes) -> Answer:
        """Drain, then forget; at once 202."""
        return self._remove(self._named(client))

    async def remove_by_query(self, client: IncomingRequest, body: bytes) -> Answer:
        """``/remove_worker?url=…`` of old routers."""
        return self._remove(self._find(_parameters(client).get("url", "")))

    # -- how ---------------------------------------------------------------------------------

    def _add(self, new: _NewWorker, note: str) -> Answer:
        role = _role({"worker_type": new.worker_type}, required=True)
        assert role is not None
        port = new.bootstrap_port
        if port is not None and (role is Role.DECODE or not 0 < port <= 65535):
            raise _Failure("bootstrap_port must be 1..65535, and only prefill has one", 400, "BAD_REQUEST")
        self._check_key(new.api_key)
        info = _describe(self._check_url(new.url), role, port)
        try:
            worker = self._fleet.add_worker(info)
        except ConfigError as exc:
            raise _Failure(str(exc), 409, "WORKER_EXISTS") from exc
        return _accepted(worker, f"Worker is probed and will be used when a token comes through it{note}")

    def _check_url(self, text: str) -> WorkerUrl:
        try:
            return self._allowed.check(text)
        except BadWorkerUrl as exc:
            raise _Failure(str(exc), 400, "INVALID_URL") from exc
        except HostNotAllowed as exc:
            raise _Failure(str(exc), 403, "HOST_NOT_ALLOWED") from exc

    def _check_key(self, key: str | None) -> None:
        """Workers share one key; another would be lost silently, and requests then fail with 401."""
        ours = self._asker.config.worker_key
        if key and not hmac.compare_digest(key.encode(), ours.encode()):
            raise _Failure(
                "workers have one key in common, set it as PDSERVE_WORKER_API_KEY (worker_api_key); "
                "a key for this worker alone is not supported",
                400,
                "BAD_REQUEST",
            )

    def _remove(self, worker: Worker) -> Answer:
        self._fleet.remove_worker(worker.worker_id)
        return _accepted(worker, "Worker is removed once its requests have ended")

    def _named(self, client: IncomingRequest) -> Worker:
        return self._find(client.path.removeprefix(WORKERS))

    def _find(self, name: str) -> Worker:
        try:
            return self._asker.find(name)
        except ControlRefused as exc:
            raise _Failure(str(exc), 404, "WORKER_NOT_FOUND") from exc


def worker_row(worker: Worker) -> dict[str, object]:
    """A member as sglang-router shows it; ``state`` is ours."""
    info = worker.info
    row: dict[str, object] = {
        "id": info.worker_id,
        "url": info.url,
        "model_id": info.served_model_name or info.model or "unknown",
        "worker_type": str(info.role),
        "is_healthy": worker.state is WorkerState.READY,
        "load": worker.num_inflight,
        "connection_mode": "http",
        "state": str(worker.state),
    }
    if info.role is Role.PREFILL:
        row["bootstrap_host"], row["bootstrap_port"] = info.bootstrap_host, info.bootstrap_port
    return row


def _describe(url: WorkerUrl, role: Role, bootstrap_port: int | None) -> WorkerInfo:
    """Its model is unknown until it is asked. Named by its address: a fleet's own names stay free."""
    host = f"[{url.host}]" if ":" in url.host else url.host
    return WorkerInfo(
        worker_id=WorkerId(f"{role}-{host}:{url.port}"),
        instance_id=InstanceId(uuid.uuid4().hex),
        role=role,
        url=url.url,
        model="",
        bootstrap_host=url.host if role is Role.PREFILL else "",
        bootstrap_port=bootstrap_port,
    )


def _accepted(worker: Worker, message: str) -> Answer:
    location = WORKERS + quote(worker.worker_id, safe="")
    row = {"status": "accepted", "worker_id": worker.worker_id, "id": worker.worker_id, "url": worker.url}
    answer = json_answer({**row, "location": location, "message": message}, 202)
    return answer.with_headers((b"location", location.encode()))


def _role(parameters: dict[str, str], *, required: bool) -> Role | None:
    """``worker_type`` or ``role``."""
    said = parameters.get("worker_type") or parameters.get("role") or ""
    if not said and not required:
        return None
    try:
        return Role(said.lower())
    except ValueError:
        raise _Failure(_ROLES, 400, "BAD_REQUEST") from None


def _parameters(client: IncomingRequest) -> dict[str, str]:
    return dict(parse_qsl(client.query.decode("latin-1"), keep_blank_values=True))


def _decoded(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise _Failure(f"the request body does not fit: {exc}", 400, "BAD_REQUEST") from exc

"""Workers named on the command line: for fleets without a bootstrap service."""

from __future__ import annotations

import uuid
from urllib.parse import urlsplit

from pdserve.config import BalancerConfig
from pdserve.errors import ConfigError
from pdserve.types import InstanceId, Role, WorkerId, WorkerInfo


def static_workers(config: BalancerConfig) -> list[WorkerInfo]:
    """Describe ``config.prefill`` and ``config.decode`` as ``prefill-0``, ``decode-0`` ….

    A prefill server's bootstrap host is the host of its URL, as SGLang's own
    router takes it. What only the server knows (model) stays empty.

    Raises:
        ConfigError: for an address that is not ``http://host:port`` or ``https://host:port``.
    """
    prefills = [_worker(Role.PREFILL, index, url, port) for index, (url, port) in enumerate(config.prefill)]
    return prefills + [_worker(Role.DECODE, index, url, None) for index, url in enumerate(config.decode)]


def _worker(role: Role, index: int, url: str, bootstrap_port: int | None) -> WorkerInfo:
    parts = urlsplit(url if "//" in url else f"http://{url}")
    try:
        is_usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        is_usable = is_usable and not parts.username and not parts.password
    except ValueError:
        is_usable = False
    if not is_usable:
        raise ConfigError(
            f"--{role} expects http://host:port or https://host:port, got {_without_user(url)!r}"
        )
    return WorkerInfo(
        worker_id=WorkerId(f"{role}-{index}"),
        instance_id=InstanceId(uuid.uuid4().hex),
        role=role,
        url=f"{parts.scheme}://{parts.netloc}",
        model="",
        bootstrap_host=(parts.hostname or "") if role is Role.PREFILL else "",
        bootstrap_port=bootstrap_port,
    )


def _without_user(url: str) -> str:
    """A password in a refused address must not reach the log."""
    head, at, tail = url.rpartition("@")
    return f"{head.rpartition('//')[0]}//…@{tail}" if at else url

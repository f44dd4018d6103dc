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
        ConfigError: for an address that is not ``http://host:port``.
    """
    prefills = [_worker(Role.PREFILL, index, url, port) for index, (url, port) in enumerate(config.prefill)]
    return prefills + [_worker(Role.DECODE, index, url, None) for index, url in enumerate(config.decode)]


def _worker(role: Role, index: int, url: str, bootstrap_port: int | None) -> WorkerInfo:
    parts = urlsplit(url if "//" in url else f"http://{url}")
    try:
        is_usable = parts.scheme == "http" and parts.hostname and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise ConfigError(f"--{role} expects http://host:port, got {url!r}")
    return WorkerInfo(
        worker_id=WorkerId(f"{role}-{index}"),
        instance_id=InstanceId(uuid.uuid4().hex),
        role=role,
        url=f"http://{parts.netloc}",
        model="",
        bootstrap_host=(parts.hostname or "") if role is Role.PREFILL else "",
        bootstrap_port=bootstrap_port,
    )

"""Which addresses may be registered as workers: an allow-list of hosts, compared literally. Pure.

    text ─ parse_worker_url ─► WorkerUrl(scheme, host, port) ─ AllowedHosts.check ─► its one spelling

Clients' prompts and keys go to a registered worker, and the balancer speaks to
it from inside the network, so an address has exactly one spelling here: what is
checked is what is connected to. Names are compared as names and never resolved.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError, PdserveError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_URL = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z._-]+):([0-9]{1,5})/?", re.ASCII)
_NAME = re.compile(r"(?!-)[0-9a-z_-]{1,63}(?<!-)(\.(?!-)[0-9a-z_-]{1,63}(?<!-))*", re.ASCII)
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
"""As the last label of a host, libc and browsers take it for (part of) an IPv4 address: 127.1, 0x7f000001."""

_LOOPBACK_NETWORKS: tuple[Network, ...] = (
    ipaddress.IPv4Network("127.0.0.0/8"),
    ipaddress.IPv6Network("::1/128"),
)


class BadWorkerUrl(PdserveError):
    """Not an address that a worker can have here; the message says what is expected."""


class HostNotAllowed(PdserveError):
    """A well-formed address whose host nobody has allowed; the message says what to configure."""


@dataclass(frozen=True, slots=True)
class WorkerUrl:
    """A worker's address in its one spelling; ``host`` is lower-case and without brackets."""

    scheme: str
    host: str
    port: int

    @property
    def url(self) -> str:
        """``http://host:port``, IPv6 in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse_worker_url(text: str) -> WorkerUrl:
    """Read ``http(s)://host:port``; nothing else may stand in it, one slash at the end aside.

    Raises:
        BadWorkerUrl: for userinfo, path, query, fragment, a missing port, an odd
            spelling of an address, or an address that no server can have.
    """
    match = _URL.fullmatch(text)
    if match is None:
        raise BadWorkerUrl(
            "a worker's url must be http://host:port or https://host:port, without user, path or query"
        )
    scheme, host, digits = match.groups()
    port = int(digits)
    if not 0 < port <= 65535:
        raise BadWorkerUrl(f"a worker's port must be 1..65535, got {digits}")
    return WorkerUrl(scheme, canonical_host(host), port)


def canonical_host(host: str) -> str:
    """The one spelling of a host: an address as ``ipaddress`` writes it, a name in lower case.

    Raises:
        BadWorkerUrl: for anything that some resolver may take for another address.
    """
    lowered = host.lower()
    if lowered.startswith("[") or ":" in lowered:
        return str(_usable(_address(lowered.removeprefix("[").removesuffix("]"), host)))
    if _NUMERIC_LABEL.fullmatch(lowered.rpartition(".")[2]):
        return str(_usable(_address(lowered, host)))
    if len(lowered) > 253 or not _NAME.fullmatch(lowered):
        raise BadWorkerUrl(f"{host!r} is not a host name; write other scripts as punycode")
    return lowered


def _address(text: str, said: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise BadWorkerUrl(f"{said!r} is not an IP address in its usual spelling") from None


def _usable(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv6Address) and (address.ipv4_mapped or address.scope_id):
        raise BadWorkerUrl(f"write {address} as a plain address: no IPv4-mapped form, no scope")
    if address.is_unspecified or address.is_multicast:
        raise BadWorkerUrl(f"no server has the address {address}")
    return address


class AllowedHosts:
    """The hosts that may be registered: loopback, those of ``prefill`` and ``decode``, ``worker_hosts``.

    Raises:
        ConfigError: for an entry of ``worker_hosts`` that is neither a name, an address nor a network.
    """

    def __init__(self, config: BalancerConfig) -> None:
        self._names = {"localhost"}
        self._networks: list[Network] = list(_LOOPBACK_NETWORKS)
        for entry in config.worker_hosts:
            self._allow(entry)
        for host in _hosts_of([*(url for url, _ in config.prefill), *config.decode]):
            self._allow(host)

    def check(self, text: str) -> WorkerUrl:
        """The address in its one spelling.

        Raises:
            BadWorkerUrl: if it is not an address.
            HostNotAllowed: if its host is not allowed.
        """
        worker_url = parse_worker_url(text)
        if not self._allows(worker_url.host):
            raise HostNotAllowed(
                f"{worker_url.host} may not be registered: allow it with --worker-hosts {worker_url.host} "
                "(or worker_hosts in the config file)"
            )
        return worker_url

    def _allows(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host in self._names
        return any(address.version == network.version and address in network for network in self._networks)

    def _allow(self, entry: str) -> None:
        try:
            self._networks.append(ipaddress.ip_network(entry.strip("[]")))
            return
        except ValueError as exc:
            why = str(exc)
        try:
            self._names.add(canonical_host(entry))
        except BadWorkerUrl:
            raise ConfigError(
                f"worker_hosts takes names, addresses and networks such as 10.0.0.0/8, got {entry!r}: {why}"
            ) from None


def _hosts_of(urls: Iterable[str]) -> list[str]:
    """The hosts of the static workers; a URL that cannot be read is reported where workers are made."""
    hosts = []
    for url in urls:
        try:
            host = urlsplit(url if "//" in url else f"http://{url}").hostname
            hosts.append(canonical_host(host or ""))
        except (ValueError, BadWorkerUrl):
            continue
    return hosts

"""Which addresses can be registered as workers, and that no spelling gets another one in."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdserve.balancer.api.worker_url import AllowedHosts, BadWorkerUrl, HostNotAllowed, parse_worker_url
from pdserve.config.balancer import BalancerConfig
from pdserve.errors import ConfigError
from tests.support.examples import n_examples

CONFIG = BalancerConfig(
    prefill=(("http://Static-P:30001", 8998), ("10.1.1.1:30001", None)),
    decode=("http://[fd00::1]:30002",),
    worker_hosts=("10.2.0.0/16", "node-1.example.com", "fd01::/64", "192.0.2.7"),
)
ALLOWED = AllowedHosts(CONFIG)
NAMES = {"localhost", "static-p", "node-1.example.com"}
NETWORKS = [
    ipaddress.ip_network(text)
    for text in (
        "127.0.0.0/8",
        "::1/128",
        "10.1.1.1/32",
        "fd00::1/128",
        "10.2.0.0/16",
        "fd01::/64",
        "192.0.2.7/32",
    )
]


@pytest.mark.parametrize(
    ("text", "url"),
    [
        *(
            (f"http://{host}:1", f"http://{host}:1")
            for host in ("127.0.0.1", "127.9.9.9", "[::1]", "10.2.255.1")
        ),
        *(
            (f"https://{host}:65535", f"https://{host}:65535")
            for host in ("10.1.1.1", "static-p", "[fd01::2]")
        ),
        ("http://NODE-1.Example.com:30000/", "http://node-1.example.com:30000"),
        ("http://[FD00:0:0::1]:80", "http://[fd00::1]:80"),
        ("http://localhost:0080", "http://localhost:80"),
    ],
)
def test_allowed_addresses_get_their_one_spelling(text: str, url: str) -> None:
    assert ALLOWED.check(text).url == url


@pytest.mark.parametrize(
    "host",
    [
        *(
            "10.3.0.1",
            "169.254.169.254",
            "192.0.2.8",
            "example.com",
            "x.node-1.example.com",
            "node-1.example.co",
        ),
        *(
            "[fd02::1]",
            "[::127.0.0.1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "localhost.localdomain",
            "static-p2",
        ),
    ],
)
def test_others_are_refused_with_what_to_configure(host: str) -> None:
    with pytest.raises(HostNotAllowed, match=r"--worker-hosts .* worker_hosts in the config file"):
        ALLOWED.check(f"http://{host}:80")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "127.0.0.1:80",
            "//127.0.0.1:80",
            "ftp://127.0.0.1:80",
            "HTTP://127.0.0.1:80",
            "file:///etc/passwd",
        ),
        *(
            "http://127.0.0.1",
            "http://127.0.0.1:",
            "http://127.0.0.1:0",
            "http://127.0.0.1:65536",
            "http://:80",
        ),
        *("http://127.0.0.1:80/x", "http://127.0.0.1:80?x", "http://127.0.0.1:80#x", "http://127.0.0.1:80//"),
        *(
            "http://u@127.0.0.1:80",
            "http://u:p@127.0.0.1:80",
            "http://127.0.0.1:80@evil:80",
            "http://127.0.0.1:+80",
        ),
        *(
            "http://127.0.0.1:80\n",
            " http://127.0.0.1:80",
            "http://127.0.0.1\t:80",
            "http://127.0.0.1\\@evil:80",
        ),
        *(
            "http://2130706433:80",
            "http://0x7f000001:80",
            "http://0177.0.0.1:80",
            "http://127.1:80",
            "http://0:80",
        ),
        *(
            "http://127.0.0.1.:80",
            "http://localhost.:80",
            "http://0x7f.0.0.0x1:80",
            "http://127.0.0.1.0x1:80",
        ),
        *("http://[::ffff:127.0.0.1]:80", "http://[::ffff:a02:1]:80", "http://[::1%lo]:80", "http://[::1:80"),
        *("http://0.0.0.0:80", "http://[::]:80", "http://224.0.0.1:80", "http://[ff02::1]:80"),
        *("http://127.0.0.1:８０", "http://１２７.0.0.1:80", "http://ⓛocalhost:80", "http://loc%61lhost:80"),
        *("http://local\u00adhost:80", "http://-a:80", "http://a-:80", "http://a..b:80", "http://.a:80"),
    ],
)
def test_anything_but_a_plain_address_is_refused(text: str) -> None:
    with pytest.raises(BadWorkerUrl):
        ALLOWED.check(text)


# -- evasion -----------------------------------------------------------------------------------

SECRET = ipaddress.IPv4Address("169.254.169.254")
OCTETS = st.lists(st.integers(0, 255), min_size=4, max_size=4)


@st.composite
def spelled_ipv4(draw: st.DrawFn) -> str:
    """An IPv4 address as some resolver would still read it."""
    a, b, c, d = draw(
        st.one_of(st.just(list(SECRET.packed)), OCTETS, st.just([127, 0, 0, 1]), st.just([10, 2, 0, 1]))
    )
    number = int.from_bytes(bytes([a, b, c, d]))
    number_formats = (str, hex, lambda n: f"0{n:o}", lambda n: f"0X{n:X}", lambda n: f"{n:04d}")
    write = [draw(st.sampled_from(number_formats)) for _ in range(4)]
    dotted = ".".join(w(n) for w, n in zip(write, (a, b, c, d), strict=True))
    short = f"{write[0](a)}.{write[1](number & 0xFFFFFF)}"
    mapped = [f"[::ffff:{a}.{b}.{c}.{d}]", f"[::ffff:{a << 8 | b:x}:{c << 8 | d:x}]", f"[::{a}.{b}.{c}.{d}]"]
    return draw(st.sampled_from([dotted, short, write[0](number), f"{a}.{b}.{c}.{d}", *mapped]))


HOSTS = st.one_of(
    spelled_ipv4(),
    st.ip_addresses().map(lambda ip: f"[{ip}]" if ip.version == 6 else str(ip)),
    st.sampled_from(
        [*NAMES, "LOCALHOST", "evil.example.com", "169.254.169.254.nip.io", "localhost.evil.example"]
    ),
    st.text("abc.-_0x19:[]%@/\\#?\u3002\uff10\u0130 \t\n", max_size=20),
)
GLUE = st.sampled_from(
    ["", "", "", "@", "\\", "#", "?", "/", "%00", "\t", "\n", " ", ".", ":80@", "%40", "#@", "\r\n"]
)
TEXTS = st.one_of(
    st.builds(
        lambda scheme, one, glue, two, port, tail: f"{scheme}://{one}{glue}{two}:{port}{tail}",
        st.sampled_from(["http", "https", "HTTP", "gopher", "http\n"]),
        HOSTS,
        GLUE,
        st.one_of(st.just(""), HOSTS),
        st.one_of(st.integers(-1, 70000).map(str), st.just("80:80")),
        st.sampled_from(["", "/", "/.", "?", "#", "/../", "\n"]),
    ),
    HOSTS.map(lambda host: f"http://{host}:80"),
    st.text(max_size=40),
)


@settings(max_examples=n_examples(2000))
@given(TEXTS)
@example("http://169.254.169.254:80")
@example("http://127.0.0.1:80")
def test_whatever_passes_leads_to_an_allowed_host_for_every_reader(text: str) -> None:
    """``inet_aton`` reads numbers as libc does, ``urlsplit`` is what opens connections: they must agree."""
    try:
        url = ALLOWED.check(text).url
    except (BadWorkerUrl, HostNotAllowed):
        return
    parts = urlsplit(url)
    host = parts.hostname or ""
    assert url == f"{parts.scheme}://{parts.netloc}"
    assert parts.scheme in ("http", "https")
    assert parts.username is parts.password is None
    assert parts.port
    address = numeric(host)
    if address is None:
        assert host in NAMES
    else:
        assert any(address in network for network in NETWORKS), url
    assert ALLOWED.check(url).url == url


def numeric(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that libc takes ``host`` for without asking a name server."""
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        pass
    try:
        found = ipaddress.IPv6Address(socket.inet_pton(socket.AF_INET6, host))
    except OSError:
        return None
    return found.ipv4_mapped or found


@given(st.ip_addresses(v=4))
def test_every_usual_spelling_is_read(address: ipaddress.IPv4Address) -> None:
    if not (address.is_unspecified or address.is_multicast):
        assert parse_worker_url(f"http://{address}:80").host == str(address)


# -- configuration -----------------------------------------------------------------------------


def test_nothing_but_loopback_without_configuration() -> None:
    bare = AllowedHosts(BalancerConfig())
    assert bare.check("http://localhost:1").url == "http://localhost:1"
    with pytest.raises(HostNotAllowed):
        bare.check("http://10.2.0.1:1")


@pytest.mark.parametrize(
    "entry", ["", "10.0.0.0/33", "10.0.0.1/8", "*.example.com", "a b", "http://a", "a:80", "127.1"]
)
def test_a_wrong_entry_is_a_config_error(entry: str) -> None:
    with pytest.raises(ConfigError, match="worker_hosts takes names, addresses and networks"):
        AllowedHosts(BalancerConfig(worker_hosts=(entry,)))


def test_bracketed_and_upper_case_entries_are_read() -> None:
    hosts = AllowedHosts(BalancerConfig(worker_hosts=("[fd09::1]", "Node-9")))
    assert hosts.check("http://[fd09:0::1]:1").host == "fd09::1"
    assert hosts.check("http://node-9:1").host == "node-9"

"""The HTTP server by itself: framing, limits, time-outs, slow and vanishing clients, TLS."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pdserve.balancer.api.errors import error_answer
from pdserve.balancer.app import bind, tls_context
from pdserve.errors import ConfigError
from pdserve.http import server as listener_module
from pdserve.http.answer import Answer, json_answer
from pdserve.http.incoming import IncomingRequest
from pdserve.http.limits import ServerLimits
from pdserve.http.server import HttpServer
from tests.support.sglang_server import until

DEADLINE_S = 60.0
GET = b"GET /echo HTTP/1.1\r\nhost: t\r\n\r\n"


class Echo:
    """Answers with what it got; ``/big`` streams until told to stop, ``/hold`` waits for ``gate``."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.seen: list[IncomingRequest] = []
        self.left: list[IncomingRequest] = []
        self.pushed_bytes = 0

    def refuse(self, client: IncomingRequest) -> Answer | None:
        return error_answer(404, "no") if client.path == "/none" else None

    def error(self, client: IncomingRequest | None, status: int, message: str) -> Answer:
        return error_answer(status, message)

    async def serve(self, client: IncomingRequest) -> None:
        self.seen.append(client)
        client.on_left = lambda: self.left.append(client)
        match client.path:
            case "/hold":
                await self.gate.wait()
            case "/big":
                await self._stream(client)
                return
            case "/broken":
                raise RuntimeError("a bug")
            case "/stops":
                client.begin(200, ())
                client.push(b"half")
                return
        body = {"method": client.method, "path": client.path, "query": client.query.decode()}
        await client.answer(json_answer({**body, "body": client.body.decode("latin-1")}))

    async def _stream(self, client: IncomingRequest) -> None:
        client.begin(200, ((b"content-type", b"text/plain"),))
        while not client.has_left and not self.gate.is_set():
            self.pushed_bytes += 65536
            await client.write(b"x" * 65536)
        await client.finish()


@asynccontextmanager
async def running(
    tls: ssl.SSLContext | None = None, **limits: float
) -> AsyncIterator[tuple[Echo, HttpServer, int]]:
    echo = Echo()
    bounds = dict(max_body_bytes=1000, max_header_bytes=2000, header_s=60, body_s=60, write_s=60)
    socket = bind("127.0.0.1", 0)
    server = HttpServer(echo, ServerLimits(**{**bounds, "max_connections": 100, **limits}), tls)  # type: ignore[arg-type]
    await server.start(socket)
    try:
        yield echo, server, socket.getsockname()[1]
    finally:
        await server.close(0.0)


async def talk(port: int, *pieces: bytes, tls: ssl.SSLContext | None = None) -> bytes:
    """Send the pieces, one at a time, and read until the server closes."""
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        try:
            return await reader.read()
        finally:
            writer.close()


def post(body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in (*headers, b"content-length: %d" % len(body)))
    return b"POST /echo HTTP/1.1\r\nhost: t\r\n" + lines + b"\r\n" + body


CLOSE = b"connection: close"


async def test_path_query_and_body_arrive_in_any_fragmentation() -> None:
    request = post(b"hello", CLOSE).replace(b"/echo", b"/e%63ho?a=b%20c&d")
    async with running() as (_, _, port):
        whole = await talk(port, request)
        bytewise = await talk(port, *(bytes([byte]) for byte in request))
    assert b'"path":"/echo","query":"a=b%20c&d","body":"hello"' in whole
    assert bytewise.partition(b"\r\n\r\n")[2] == whole.partition(b"\r\n\r\n")[2]


async def test_chunked_bodies_are_put_together() -> None:
    head = b"POST /echo HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    async with running() as (_, _, port):
        answer = await talk(port, head + b"3\r\nabc\r\n", b"2;x=y\r\nde\r\n0\r\ntrailer: 1\r\n\r\n")
    assert b'"body":"abcde"' in answer


async def test_pipelined_requests_are_answered_in_their_order() -> None:
    async with running() as (echo, _, port):
        hold = GET.replace(b"/echo", b"/hold")
        talking = asyncio.create_task(talk(port, hold + GET + post(b"x") + post(b"last", CLOSE)))
        await until(lambda: echo.seen)
        await asyncio.sleep(0.02)
        assert len(echo.seen) == 1, "the second must wait for the first one's answer"
        echo.gate.set()
        answer = await talking
    paths = [part.split(b'"')[0] for part in answer.split(b'"path":"')[1:]]
    bodies = [part.split(b'"')[0] for part in answer.split(b'"body":"')[1:]]
    assert (paths, bodies) == ([b"/hold", b"/echo", b"/echo", b"/echo"], [b"", b"", b"x", b"last"])


async def test_expecting_client_is_told_to_continue_before_its_body() -> None:
    async with running() as (_, _, port), asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        request = post(b"hello", CLOSE, b"expect: 100-continue")
        writer.write(request[:-5])
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(request[-5:])
        assert b'"body":"hello"' in await reader.read()
        writer.close()


async def test_http_1_0_gets_its_answer_and_the_end_of_the_connection() -> None:
    async with running() as (echo, _, port):
        whole = await talk(port, b"GET /echo HTTP/1.0\r\n\r\n")
        echo.gate.set()
        stream = await talk(port, b"GET /big HTTP/1.0\r\n\r\n")
    assert whole.startswith(b"HTTP/1.1 200") and b"connection: close" in whole
    assert b"transfer-encoding" not in stream and b"connection: close" in stream


async def test_head_has_the_length_and_no_body() -> None:
    async with running() as (_, _, port):
        answer = await talk(port, b"HEAD /echo HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-length: 53" in head and body == b""


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /echo HTTP/1.1\r\nhost: t\r\nbroken\x00header: 1\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd", 400),
        (post(b"x" * 1001), 413),
        (b"POST /echo HTTP/1.1\r\ncontent-length: 99999999999999999\r\n\r\n", 413),
        (b"POST /echo HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n400\r\n" + b"x" * 1024 + b"\r\n", 413),
        (b"GET /echo HTTP/1.1\r\nx: " + b"y" * 3000 + b"\r\n\r\n", 431),
        (b"GET /" + b"y" * 3000, 431),
        (b"POST /none HTTP/1.1\r\ncontent-length: 5\r\n\r\n", 404),
    ],
)
async def test_what_is_wrong_is_refused_with_json_and_the_connection_closed(
    request_bytes: bytes, status: int
) -> None:
    async with running() as (echo, server, port):
        answer = await talk(port, request_bytes)
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        assert b"application/json" in answer and b'{"error":{"message":"' in answer
        assert echo.seen == []
        await until(lambda: server.num_connections == 0)


async def test_a_refusal_without_body_keeps_the_connection() -> None:
    async with running() as (_, _, port):
        answer = await talk(port, GET.replace(b"/echo", b"/none") + post(b"next", CLOSE))
    assert answer.startswith(b"HTTP/1.1 404") and b'"body":"next"' in answer


async def test_a_refused_client_that_goes_on_sending_still_reads_the_answer() -> None:
    async with running() as (_, _, port), asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /none HTTP/1.1\r\ncontent-length: 100000000\r\n\r\n")
        for _ in range(50):
            writer.write(b"x" * 20000)
            await asyncio.sleep(0)
        assert (await reader.read()).startswith(b"HTTP/1.1 404")
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET /ec", b"POST /echo HTTP/1.1\r\ncontent-length: 5\r\n\r\nab"])
async def test_a_client_that_never_finishes_its_request_is_cut_off(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "SWEEP_S", 0.01)
    async with running(header_s=0.05, body_s=0.05) as (_, server, port):
        answer = await talk(port, sent)
        assert answer.startswith(b"HTTP/1.1 408") if sent else answer == b""
        await until(lambda: server.num_connections == 0)


async def test_a_client_that_does_not_read_is_not_buffered_for_and_then_cut_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listener_module, "SWEEP_S", 0.01)
    async with running(write_s=0.3) as (echo, server, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(GET.replace(b"/echo", b"/big"))
        await until(lambda: echo.pushed_bytes > 0)
        await until(lambda: echo.left, "the client is given up")
        assert echo.pushed_bytes < 64 * 2**20
        await until(lambda: server.num_connections == 0 and server.num_serving == 0)
        writer.close()


async def test_a_slow_reader_that_does_read_gets_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "SWEEP_S", 0.01)
    async with running(write_s=0.2) as (echo, _, port), asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(GET.replace(b"/echo", b"/big").replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        got = 0
        for _ in range(20):
            got += len(await reader.read(2**20))
            await asyncio.sleep(0.02)
        echo.gate.set()
        while piece := await reader.read(2**20):
            got += len(piece)
        assert got > echo.pushed_bytes
        writer.close()


async def test_the_application_hears_that_a_client_left() -> None:
    async with running() as (echo, server, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET.replace(b"/echo", b"/hold"))
        await until(lambda: echo.seen)
        writer.transport.abort()
        await until(lambda: echo.left == echo.seen)
        echo.gate.set()
        await until(lambda: server.num_serving == 0 and server.num_connections == 0)


async def test_too_many_connections_are_told_so() -> None:
    async with running(max_connections=1) as (_, server, port):
        _, first = await asyncio.open_connection("127.0.0.1", port)
        await until(lambda: server.num_connections == 1)
        assert (await talk(port)).startswith(b"HTTP/1.1 503")
        first.close()
        await until(lambda: server.num_connections == 0)
        assert (await talk(port, post(b"now", CLOSE))).startswith(b"HTTP/1.1 200")


async def test_a_bug_in_the_application_is_a_500_and_no_more() -> None:
    async with running() as (_, _, port):
        answer = await talk(port, GET.replace(b"/echo", b"/broken") + post(b"", CLOSE))
    assert answer.startswith(b"HTTP/1.1 500") and b"HTTP/1.1 200" in answer


async def test_an_answer_that_stops_half_way_does_not_look_complete() -> None:
    async with running() as (_, _, port):
        with pytest.raises((ConnectionError, AssertionError)):
            answer = await talk(port, GET.replace(b"/echo", b"/stops"))
            assert answer.endswith(b"0\r\n\r\n")


async def test_closing_lets_answers_end_and_idle_clients_go() -> None:
    async with running() as (echo, server, port):
        holding = asyncio.create_task(talk(port, GET.replace(b"/echo", b"/hold")))
        idle_reader, idle = await asyncio.open_connection("127.0.0.1", port)
        await until(lambda: echo.seen and server.num_connections == 2)
        closing = asyncio.create_task(server.close(DEADLINE_S))
        assert await idle_reader.read() == b""
        echo.gate.set()
        answer = await holding
        await closing
        assert b"connection: close" in answer and answer.startswith(b"HTTP/1.1 200")
        idle.close()


# -- TLS -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=9))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    cert_path, key_path = folder / "cert.pem", folder / "key.pem"
    cert_path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key_path.write_bytes(key.private_bytes(*form))
    return cert_path, key_path


async def test_tls_client_is_served_and_a_plain_one_is_not(certificate: tuple[Path, Path]) -> None:
    cert_path, key_path = certificate
    trusting = ssl.create_default_context(cafile=str(cert_path))
    trusting.check_hostname = False
    async with running(tls_context(str(cert_path), str(key_path))) as (echo, _, port):
        answer = await talk(port, post(b"secret", CLOSE), tls=trusting)
        assert b'"body":"secret"' in answer
        served = len(echo.seen)
        try:
            assert b"HTTP/1.1 200" not in await talk(port, GET)
        except ConnectionError:
            pass
        assert len(echo.seen) == served


def test_half_of_a_tls_set_up_is_refused(certificate: tuple[Path, Path]) -> None:
    cert_path, key_path = (str(path) for path in certificate)
    assert tls_context("", "") is None
    with pytest.raises(ConfigError, match="both"):
        tls_context(cert_path, "")
    with pytest.raises(ConfigError, match="cannot use"):
        tls_context(cert_path, "/nowhere/key.pem")
    with pytest.raises(ConfigError, match="cannot use"):
        tls_context(key_path, cert_path)

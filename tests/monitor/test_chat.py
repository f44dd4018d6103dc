"""The terminal chat against a small real HTTP server that streams as an OpenAI service does."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from pdserve.cli.app import main
from pdserve.errors import ConfigError, WorkerError, WorkerUnreachable
from pdserve.monitor import chat
from pdserve.monitor.chat_session import AnswerStats, ChatOptions, ChatSession

DONE = "[DONE]"
WAIT_S = 60.0


def piece(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def ending(reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def usage(tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": tokens}}


GREETING = [piece(""), piece("Hel"), piece("lo [b]é🎉[/b]"), ending(), usage(3), DONE]


@dataclass
class FakeService:
    """What the server will answer, and what it was asked."""

    url: str = ""
    events: list[Any] = field(default_factory=lambda: list(GREETING))
    is_endless: bool = False
    status: int = 200
    error: bytes = b""
    models: list[dict[str, str]] = field(default_factory=lambda: [{"id": "toy"}])
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    client_left: threading.Event = field(default_factory=threading.Event)


def _handler(service: FakeService) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self._whole(200, json.dumps({"object": "list", "data": service.models}).encode())

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            service.requests.append(json.loads(body))
            service.keys.append(self.headers["Authorization"])
            if service.status != 200:
                self._whole(service.status, service.error)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for event in self._events():
                    self._chunk(
                        f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
                    )
                if DONE in service.events:
                    self._chunk(b"")
            except OSError:
                service.client_left.set()
            self.close_connection = True

        def _events(self) -> Iterator[Any]:
            yield from service.events
            while service.is_endless:
                yield piece("x" * 4096)

        def _chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.wfile.flush()

        def _whole(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def service() -> Iterator[FakeService]:
    fake = FakeService()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="fake-service"
    )
    thread.start()
    yield fake
    fake.is_endless = False
    server.shutdown()
    thread.join()
    server.server_close()


def _free_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def _reader(*lines: str | type[BaseException]) -> Callable[[], str]:
    pending = iter(lines)

    def read() -> str:
        line = next(pending, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def _console() -> Console:
    return Console(width=100, file=io.StringIO())


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---- the session ----


def test_pieces_come_in_order_and_the_turn_is_remembered(service: FakeService) -> None:
    session = ChatSession(service.url)

    assert list(session.ask("hi")) == ["Hel", "lo [b]é🎉[/b]"]
    assert session.turns == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello [b]é🎉[/b]"},
    ]


def test_request_carries_options_system_prompt_and_history(service: FakeService) -> None:
    session = ChatSession(service.url + "/v1/", ChatOptions("be brief", max_tokens=7, temperature=0.5))
    list(session.ask("one"))
    list(session.ask("two"))

    first, second = service.requests
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("toy", 7, 0.5)
    assert first["stream"] is True
    assert first["stream_options"] == {"include_usage": True}
    assert [turn["role"] for turn in second["messages"]] == ["system", "user", "assistant", "user"]


def test_reset_forgets_all_but_the_system_prompt(service: FakeService) -> None:
    session = ChatSession(service.url, ChatOptions("be brief"))
    list(session.ask("one"))
    session.reset()
    list(session.ask("two"))

    assert service.requests[-1]["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "two"},
    ]


def test_statistics_use_the_reported_token_count(service: FakeService) -> None:
    session = ChatSession(service.url)
    list(session.ask("hi"))

    assert session.last is not None
    assert session.last.completion_tokens == 3
    assert session.last.is_counted
    assert 0 < session.last.ttft_s <= session.last.e2e_s


def test_statistics_without_usage_say_that_they_count_pieces(service: FakeService) -> None:
    service.events = [piece("a"), piece("b"), ending("length"), DONE]
    session = ChatSession(service.url)
    list(session.ask("hi"))

    assert session.last is not None
    assert session.last.line().startswith("2 pieces")
    assert session.last.line().endswith("ended by length")


def test_stats_line_shows_units() -> None:
    stats = AnswerStats(completion_tokens=11, ttft_s=0.5, e2e_s=1.5)

    assert stats.line() == "11 tokens · TTFT 0.50 s · TPOT 100 ms"


def test_closing_the_answer_closes_the_connection_and_keeps_what_was_shown(service: FakeService) -> None:
    service.events, service.is_endless = [piece("shown")], True
    session = ChatSession(service.url)
    pieces = session.ask("hi")

    assert next(pieces) == "shown"
    pieces.close()

    assert service.client_left.wait(WAIT_S)
    assert session.turns[-1] == {"role": "assistant", "content": "shown"}


def test_error_answer_is_translated_and_the_question_dropped(service: FakeService) -> None:
    service.status = 503
    service.error = b'{"error":{"message":"no pair is ready","type":"unavailable","code":503}}'
    session = ChatSession(service.url)

    with pytest.raises(WorkerError, match=r"/v1/chat/completions answered 503: no pair is ready"):
        list(session.ask("hi"))
    assert session.turns == []


def test_error_inside_the_stream_is_raised(service: FakeService) -> None:
    service.events = [piece("a"), {"error": {"message": "decode worker lost"}}, DONE]
    session = ChatSession(service.url)

    with pytest.raises(WorkerError, match="decode worker lost"):
        list(session.ask("hi"))
    assert session.turns == []


def test_stream_that_breaks_off_is_an_error(service: FakeService) -> None:
    service.events = [piece("a")]

    with pytest.raises(WorkerUnreachable):
        list(ChatSession(service.url).ask("hi"))


@pytest.mark.parametrize("event", ["{not json", "[1]"])
def test_event_that_is_no_object_is_an_error(service: FakeService, event: str) -> None:
    service.events = [event, DONE]

    with pytest.raises(WorkerError, match="sent an event"):
        list(ChatSession(service.url).ask("hi"))


def test_service_without_models_is_named(service: FakeService) -> None:
    service.models = []

    with pytest.raises(WorkerError, match="lists no model"):
        ChatSession(service.url).model()


def test_unreachable_service_is_one_line_with_a_hint() -> None:
    with pytest.raises(WorkerUnreachable, match="Connection refused; is the service running") as caught:
        ChatSession(_free_url()).model()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port"])
def test_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        ChatSession(url)


def test_address_without_scheme_is_http() -> None:
    assert ChatSession("127.0.0.1:30000").url == "http://127.0.0.1:30000"


# ---- the terminal ----


def test_prompt_prints_only_the_answer_on_stdout(
    service: FakeService, capsys: pytest.CaptureFixture[str]
) -> None:
    status = chat.run_chat(service.url, prompt="hi")

    out, err = capsys.readouterr()
    assert (status, out) == (0, "Hello [b]é🎉[/b]\n")
    assert "3 tokens · TTFT" in err


def test_prompt_to_unreachable_service_fails_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    status = chat.run_chat(_free_url(), prompt="hi")

    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("error: http://127.0.0.1:")
    assert err.count("\n") == 1


def test_conversation_answers_resets_and_leaves(service: FakeService) -> None:
    console = _console()
    session = ChatSession(service.url)

    status = chat._converse(
        session, console, _reader("hi", "", "/reset", KeyboardInterrupt, "again", "/quit", "x")
    )

    assert status == 0
    assert [len(request["messages"]) for request in service.requests] == [1, 1]
    assert _text(console).count("Hello [b]é🎉[/b]\n3 tokens · TTFT") == 2
    assert "toy at http://" in _text(console)


def test_conversation_survives_an_error_and_ctrl_d_leaves(service: FakeService) -> None:
    service.status, service.error = 400, b'{"message":"too long"}'
    console = _console()

    assert chat._converse(ChatSession(service.url), console, _reader("hi")) == 0
    assert "error: " in _text(console)
    assert "answered 400: too long" in _text(console)


def test_ctrl_c_stops_the_answer_and_returns_to_the_prompt(service: FakeService) -> None:
    class InterruptedFile(io.StringIO):
        def write(self, text: str) -> int:
            if "x" * 4096 in text and service.is_endless:
                service.events, service.is_endless = GREETING, False
                raise KeyboardInterrupt
            return super().write(text)

    service.events, service.is_endless = [piece("start ")], True
    console = Console(width=100, file=InterruptedFile())
    session = ChatSession(service.url)

    assert chat._converse(session, console, _reader("hi", "/reset", "hi")) == 0
    assert "stopped" in _text(console)
    assert "Hello" in _text(console)


def test_model_cannot_send_escape_sequences_to_a_terminal(service: FakeService) -> None:
    service.events = [piece("\x1b]0;title\x07"), ending(), DONE]
    console = Console(width=100, file=io.StringIO(), force_terminal=True)

    assert chat.print_answer(ChatSession(service.url), "hi", console)
    assert "\x1b]0" not in _text(console)
    assert "␛]0;title" in _text(console)


def test_the_key_is_an_option_or_comes_from_the_environment(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PDSERVE_API_KEY", raising=False)
    for args, key in (((), None), (("--api-key", "mine"), "mine")):
        with pytest.raises(SystemExit):
            main(["chat", "hi", "--url", service.url, *args])
        assert service.keys[-1] == (key and f"Bearer {key}")
    monkeypatch.setenv("PDSERVE_API_KEY", "theirs")
    with pytest.raises(SystemExit):
        main(["chat", "hi", "--url", service.url])
    assert service.keys[-1] == "Bearer theirs"
    assert "theirs" not in "".join(capsys.readouterr())

"""``pdserve monitor --once`` and ``--json``, its errors; the monitor of a real balancer and of a launch."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pdserve.errors import ConfigError, WorkerError
from pdserve.monitor.command import run_monitor
from pdserve.monitor.launch_display import MonitorDisplay
from pdserve.state.client import StateClient, parse_url
from tests.support.balancer_client import running_site
from tests.support.monitor_terminal import StateServer, monitored, recorded

CLOSED = "http://127.0.0.1:9"
LAUNCH = """
import logging, signal, sys, threading
from pdserve.monitor.launch_display import MonitorDisplay
from pdserve.state.client import StateClient, parse_url
from pdserve.monitor.progress import ProgressDisplay
url = sys.argv[1]
display = MonitorDisplay(ProgressDisplay(), interval_s=0.1)
stop = threading.Event()
signal.signal(signal.SIGINT, lambda number, frame: stop.set())
def tell(number, frame):
    display.event(logging.WARNING, "decode-1 has ended")
    logging.getLogger("a").warning("a warning in the log")
signal.signal(signal.SIGUSR1, tell)
display.stage("prefill-0", role="prefill", url=url, stage="loading", log_file="a/prefill-0.log")
display.tick()
display.ready(url=url, model="m", log_dir="a")
while not stop.is_set():
    stop.wait(0.05)
display.close()
display.event(logging.INFO, "stopping: requests have 5 s to end")
display.close()
"""


@pytest.fixture
def server() -> Iterator[StateServer]:
    server = StateServer(recorded("healthy"))
    yield server
    server.stop()


# -- one frame, the document -------------------------------------------------------------------


@pytest.mark.parametrize("columns", [None, 80, 200])
def test_once_prints_one_plain_frame(
    server: StateServer,
    columns: int | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    assert run_monitor(server.url, once=True) == 0
    out = capsys.readouterr().out
    assert {len(row) for row in out.splitlines()} == {columns or 100}
    assert "\x1b" not in out
    for word in ("SmolLM2-135M-Instruct", "prefill-0", "158 ms", "412 MB/s"):
        assert word in out


def test_json_prints_the_document_in_ascii(server: StateServer, capsys: pytest.CaptureFixture[str]) -> None:
    server.document["model"] = "m\x9b2J\x1b[31m"
    assert run_monitor(server.url, as_json=True) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == server.document
    assert out.replace("\n", " ").isprintable()
    assert out.isascii()


def test_an_unreachable_balancer_is_one_line_and_exit_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ({"once": True}, {"as_json": True}):
        assert run_monitor(CLOSED, **options) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err == f"error: {CLOSED}: Connection refused\n"


def test_the_key_is_sent_and_its_lack_explained(
    server: StateServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.key = "s3cret"
    assert run_monitor(server.url, once=True) == 1
    assert "give --api-key, or set PDSERVE_ADMIN_API_KEY" in capsys.readouterr().err
    assert run_monitor(server.url, once=True, api_key="s3cret") == 0


def test_what_is_no_state_document_is_named(server: StateServer, capsys: pytest.CaptureFixture[str]) -> None:
    for body, why in (
        (b"<html>", "is not JSON"),
        (b"[1]", "is no object"),
        (b"[" * 100_000, "is not JSON"),
        (b"\xff", "not JSON"),
        (
            b'{"workers": [{"errors": "many"}]}',
            "is damaged: Expected `int`, got `str` - at `$",
        ),
        (b'{"waiting": 1%s}' % (b"0" * 40), "is damaged: a number is out of range"),
    ):
        server.document = body
        assert run_monitor(server.url, once=True) == 1
        assert why in capsys.readouterr().err.replace("\n", " ")


def test_another_service_is_recognised(server: StateServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_monitor(f"{server.url}/other", once=True) == 1
    assert "is this a pdserve balancer?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [{"once": True, "as_json": True}, {"interval_s": 0.0}, {"interval_s": float("nan")}, {}],
    ids=str,
)
def test_wrong_options_are_config_errors(server: StateServer, options: dict[str, bool]) -> None:
    """The last ones are right, but pytest's output is no terminal."""
    with pytest.raises(ConfigError):
        run_monitor(server.url, **options)


def test_wrong_addresses_are_config_errors() -> None:
    for url in ("", "ftp://a", "http://", "http://a:b", "http://a:99999", "http://a\x1b[2J"):
        with pytest.raises(ConfigError) as caught:
            parse_url(url)
        assert str(caught.value).isprintable()


def test_addresses_are_taken_in_the_forms_people_type() -> None:
    for url in ("127.0.0.1:30000", "http://127.0.0.1:30000/", "http://127.0.0.1:30000/v1"):
        assert parse_url(url).geturl() == "http://127.0.0.1:30000"
    assert StateClient("http://user:pass@127.0.0.1:1").url == "http://127.0.0.1:1"
    assert parse_url("https://[::1]:8/p").hostname == "::1"


def test_a_kept_connection_that_was_closed_is_opened_again(server: StateServer) -> None:
    client = StateClient(server.url)
    assert client.fetch().version
    server.stop()
    with pytest.raises(WorkerError):
        client.fetch()
    server.start()
    assert client.fetch().version
    client.close()


@pytest.mark.process
def test_a_dumb_terminal_gets_plain_frames() -> None:
    program = (
        "import sys; from pdserve.monitor.command import run_monitor; sys.exit(run_monitor(sys.argv[1]))"
    )
    with monitored(recorded("healthy"), (100, 30), program, TERM="dumb") as (session, _):
        session.shows("prefill-0")
        assert not session.screen.is_alternate
        session.press("\x03")
        session.end(130)
        assert not session.screen.strange


@pytest.mark.process
def test_the_monitor_needs_nothing_heavy() -> None:
    code = (
        "import sys, pdserve.monitor.command\n"
        "heavy = {'torch', 'sglang', 'numpy', 'uvloop', 'starlette', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- a real balancer ---------------------------------------------------------------------------


async def test_a_real_balancers_document_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "100")  # on a busy machine more happens before the frame is drawn
    async with running_site(decode=2, admin_api_key="s3cret") as site:
        chat = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        assert (await site.ask("POST", "/v1/chat/completions", chat)).status == 200
        rid = site.last["rid"]
        await site.decodes[1].stop()
        for _ in range(2):
            await site.generate({"text": "a"})
        url = site.balancer.url
        assert await asyncio.to_thread(run_monitor, url, once=True) == 1
        assert "401" in capsys.readouterr().err
        assert await asyncio.to_thread(run_monitor, url, once=True, api_key="s3cret") == 0
    text = capsys.readouterr().out
    for word in ("fake-model", "prefill-0", "decode-1", "suspect", rid[-8:], "prefill-0>decode-0", "joined"):
        assert word in text, word


# -- launch --monitor --------------------------------------------------------------------------


@pytest.mark.process
def test_launch_opens_the_monitor_when_ready_and_closes_it_to_drain() -> None:
    with monitored(recorded("healthy"), program=LAUNCH) as (session, _):
        session.until(lambda text: session.screen.is_alternate and "prefill-0" in text and "● live" in text)
        session.signal(signal.SIGUSR1)
        session.shows("launcher ", "decode-1 has ended", "a warning in the log")
        session.press("\x03")
        session.end(0)
        text = session.screen.text
        assert text.index("ready after") < text.index("warning: decode-1 has ended") < text.index("stopping:")
        assert "monitor closed" not in text


@pytest.mark.process
def test_launch_goes_on_when_the_user_leaves_the_monitor() -> None:
    with monitored(recorded("healthy"), program=LAUNCH) as (session, _):
        session.until(lambda text: session.screen.is_alternate and "prefill-0" in text)
        session.press("q")
        session.shows("monitor closed; the service goes on, Ctrl-C stops it")
        session.check_restored()
        session.press("\x03")
        session.shows("stopping: requests have 5 s to end")
        session.end(0)


def test_without_a_terminal_launch_only_says_so() -> None:
    told: list[str] = []

    class Plain:
        """Notes what it is told."""

        def stage(self, name: str, **others: str) -> None:
            told.append(f"stage {name}")

        def tick(self) -> None:
            told.append("tick")

        def ready(self, **others: str) -> None:
            told.append("ready")

        def event(self, level: int, text: str) -> None:
            told.append(text)

        def close(self) -> None:
            told.append("close")

    display = MonitorDisplay(Plain())
    display.stage("a", role="", url="", stage="", log_file="")
    display.tick()
    display.ready(url=CLOSED, model="", log_dir="")
    display.event(20, "later")
    display.close()
    assert told == ["stage a", "tick", "ready", "--monitor needs a terminal; there is none", "later", "close"]

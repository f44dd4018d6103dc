"""What the monitor's tests need: a server of state documents, a pseudo-terminal, a screen that reads it.

StateServer ◄── GET /pdserve/state ── monitor process ──► pty ──► VirtualScreen.rows
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rich.cells import cell_len

STATES = Path(__file__).parent / "monitor_states"
DEADLINE_S = 60.0
LIVE = "import sys; from pdserve.monitor.command import watch; sys.exit(watch(sys.argv[1], interval_s=0.1))"


def recorded(name: str) -> dict[str, Any]:
    """A recorded state document."""
    document: dict[str, Any] = json.loads((STATES / f"{name}.json").read_text())
    return document


def large_fleet(num_workers: int = 64) -> dict[str, Any]:
    """``num_workers`` workers, half of each role, and every pair of them, made from the healthy document."""
    document = recorded("healthy")
    prefill, decode, *_ = document["workers"]
    half, pair = num_workers // 2, document["pairs"][0]
    workers, pairs = [], []
    for role, template in (("prefill", prefill), ("decode", decode)):
        for i in range(half):
            worker = json.loads(json.dumps(template))
            names = {"worker_id": f"{role}-{i}", "instance_id": f"{role}{i:026}"}
            workers.append(worker | names | {"kv_usage": i / half})
    for i in range(half):
        for j in range(half):
            rate = float(1e6 * (i * half + j))
            pairs.append(pair | {"prefill": f"prefill-{i}", "decode": f"decode-{j}", "kv_bytes_s": rate})
    return document | {"workers": workers, "pairs": pairs}


class StateServer:
    """Serves ``document`` at /pdserve/state; asks for ``key`` if there is one. Can go away and come back."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document: Any = document
        self.key = ""
        self.num_asked = 0
        self.port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, after the first time on the same port."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.num_asked += 1
                status, body = outer.answer(self.path, self.headers.get("Authorization", ""))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Close the port. Kept connections answer 503 from now on and are closed with that."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def answer(self, path: str, authorization: str) -> tuple[int, bytes]:
        """Status and body."""
        if self._server is None:
            return 503, b"{}"
        if path != "/pdserve/state":
            return 404, b"{}"
        if self.key and authorization != f"Bearer {self.key}":
            return 401, b'{"error": "Unauthorized"}'
        document = self.document
        return 200, document if isinstance(document, bytes) else json.dumps(document).encode()


class VirtualScreen:
    """Reads what a program writes to a terminal: cursor moves, erasures, text. Knows nothing else."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.row_count = columns, rows
        self.is_alternate = self.is_cursor_hidden = self.is_unwrapped = False
        self.unknown: list[str] = []
        self.strange: set[str] = set()
        """Characters that are not ASCII, of all that was written."""
        self.overflows = 0
        self.num_bytes = 0
        self._row = self._column = 0
        self._at = (0, 0)
        self._cells = self._other = self._blank()
        self._pending = b""

    def _blank(self) -> list[list[str]]:
        return [[" "] * self.columns for _ in range(self.row_count)]

    @property
    def rows(self) -> list[str]:
        """The text of each row."""
        return ["".join(row).rstrip() for row in self._cells]

    @property
    def text(self) -> str:
        """All of it."""
        return "\n".join(self.rows)

    def resize(self, columns: int, rows: int) -> None:
        """As a terminal does; what was there is gone."""
        self.columns, self.row_count = columns, rows
        self._cells = self._blank()

    def feed(self, data: bytes) -> None:
        """Take in what was written."""
        self.num_bytes += len(data)
        data = self._pending + data
        self._pending = b""
        try:
            text = data.decode()
        except UnicodeDecodeError as exc:
            text, self._pending = data[: exc.start].decode(), data[exc.start :]
        if cut := re.search(r"\x1b(\[[0-9;?]*)?$", text):
            text, self._pending = text[: cut.start()], text[cut.start() :].encode() + self._pending
        for escape, plain in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|\x1b.|[\x00-\x1f])|([^\x00-\x1f]+)", text):
            if escape:
                self._control(escape)
            else:
                self._write(plain)

    def _control(self, escape: str) -> None:
        modes = {"?1049": "is_alternate", "?25": "is_cursor_hidden", "?7": "is_unwrapped"}
        body, final = escape[2:-1], escape[-1]
        if final == "H":
            row, _, column = body.partition(";")
            self._row, self._column = int(row or 1) - 1, int(column or 1) - 1
        elif escape == "\x1b[J" and not (self._row or self._column):
            self._cells = self._blank()
        elif final in "hl" and body in modes:
            is_set = final == "h"
            setattr(self, modes[body], is_set if body == "?1049" else not is_set)
            if body == "?1049":  # another page of text; the first one comes back afterwards
                self._other, self._cells = self._cells, self._blank() if is_set else self._other
                at, self._at = (self._row, self._column), (0, 0) if is_set else self._at
                self._row, self._column = self._at
                self._at = at
        elif escape == "\r":
            self._column = 0
        elif escape == "\n":
            self._row = min(self._row + 1, self.row_count - 1)
        elif final != "m" and body != "?2026" and self.is_alternate:
            self.unknown.append(escape)

    def _write(self, text: str) -> None:
        self.strange.update(character for character in text if not character.isascii())
        for character in text:
            size = cell_len(character)
            if self._column + size > self.columns or self._row >= self.row_count:
                self.overflows += 1
                continue
            if size:
                self._cells[self._row][self._column : self._column + size] = [character] + [""] * (size - 1)
                self._column += size


class Session:
    """A program on a pseudo-terminal of its own, of which it is the session leader."""

    def __init__(self, argv: list[str], size: tuple[int, int] = (100, 30), **environment: str) -> None:
        self.screen = VirtualScreen(*size)
        self.master, self.slave = pty.openpty()
        self._set_size(size)
        self.mode = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [sys.executable, *argv],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=_own_terminal,
            env={**_clean_environment(), "TERM": "xterm-256color", **environment},
        )

    def _set_size(self, size: tuple[int, int]) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        """Change the terminal's size; the kernel sends SIGWINCH."""
        self.screen.resize(columns, rows)
        self._set_size((columns, rows))

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self.master, keys.encode())

    def until(self, condition: Callable[[str], object]) -> str:
        """Read until the screen's text satisfies ``condition``; the text."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition(self.screen.text):
            assert time.monotonic() < deadline, f"not seen; the screen is\n{self.screen.text}"
            self._read(0.1)
        return self.screen.text

    def _read(self, wait_s: float) -> None:
        ready, _, _ = select.select([self.master], [], [], wait_s)
        if ready:
            self.screen.feed(os.read(self.master, 65536))

    def shows(self, *words: str) -> str:
        """Read until all words are on the screen."""
        return self.until(lambda text: all(word in text for word in words))

    def end(self, code: int) -> None:
        """Wait for the end, with that exit status and the terminal as it was."""
        deadline = time.monotonic() + DEADLINE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end; the screen is\n{self.screen.text}"
            self._read(0.05)
        while select.select([self.master], [], [], 0)[0]:
            self._read(0)
        assert self.process.returncode == code, self.screen.text
        self.check_restored()

    def check_restored(self) -> None:
        """Attributes, alternate screen, cursor and wrapping are as they were."""
        assert termios.tcgetattr(self.slave) == self.mode
        screen = self.screen
        assert not (screen.is_alternate or screen.is_cursor_hidden or screen.is_unwrapped)
        assert not screen.unknown

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the program."""
        self.process.send_signal(number)

    def close(self) -> None:
        """Kill what is left and close the terminal."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for descriptor in (self.master, self.slave):
            os.close(descriptor)


def _own_terminal() -> None:
    """In the child: take the terminal, and SIGINT's default action, which a parent under nohup ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _clean_environment() -> dict[str, str]:
    dropped = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PDSERVE_API_KEY", "PDSERVE_ADMIN_API_KEY")
    return {name: value for name, value in os.environ.items() if name not in dropped}


@contextmanager
def monitored(
    document: dict[str, Any], size: tuple[int, int] = (100, 30), program: str = LIVE, **environment: str
) -> Iterator[tuple[Session, StateServer]]:
    """A live monitor of a server that serves ``document``."""
    server = StateServer(document)
    session = Session(["-c", program, server.url], size, **environment)
    try:
        yield session, server
    finally:
        session.close()
        server.stop()

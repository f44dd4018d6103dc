"""The mock workers as one process (mock.cpp or py_mock.py), and one-shot requests to anything."""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from proxy.processes import Child

ANSWER_S = 15.0


@dataclass(frozen=True, slots=True)
class MockFleet:
    """Ports of running workers."""

    child: Child
    prefill: tuple[int, ...]
    decode: tuple[int, ...]

    @classmethod
    def start(
        cls, command: Sequence[str], num_prefill: int, num_decode: int, core: int, log: Path
    ) -> MockFleet:
        """Start the process; the caller ends ``child``."""
        child = Child([*command, str(num_prefill), str(num_decode)], core, log, reads_stdout=True)
        ports = json.loads(child.read_line())
        return cls(child, tuple(ports["prefill"]), tuple(ports["decode"]))

    def stats(self, *, reset: bool = False) -> dict[str, int]:
        """What the workers have counted since the last reset."""
        connection = http.client.HTTPConnection("127.0.0.1", self.decode[0], timeout=ANSWER_S)
        try:
            connection.request("GET", "/mock/reset" if reset else "/mock/stats")
            counted: dict[str, int] = json.loads(connection.getresponse().read())
        finally:
            connection.close()
        return counted


def ask(port: int, request: bytes) -> tuple[int, str]:
    """Send a request as it is; returns status and body. Raises OSError."""
    head, _, body = request.partition(b"\r\n\r\n")
    line, *headers = head.decode().split("\r\n")
    method, path, _ = line.split(" ")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        connection.request(method, path, body, dict(header.split(": ", 1) for header in headers))
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except http.client.HTTPException as exc:
        raise OSError(f"no HTTP answer: {exc!r}") from exc
    finally:
        connection.close()

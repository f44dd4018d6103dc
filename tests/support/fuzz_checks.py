"""What must hold of every answer and of all that reached a worker, whatever was sent. Pure but for /proc."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from tests.support.fuzz_json import OURS
from tests.support.sglang_answers import options_of, rids_of
from tests.support.sglang_server import FakeSGLang
from tests.support.wire import WireReply

RID = re.compile(r"(resp_)?[0-9a-f]{32}")
MAX_ROOM = 2**63 - 1
OUR_BUGS = (500,)
NOT_BY_REQUEST = (502, 503, 504)
"""Failures of workers or of the fleet; the fakes never fail here."""


def check_answer(reply: WireReply, path: str, *, is_head: bool = False) -> None:
    """Well-formed, and if it is an error then the client's and in the shape of its path."""
    assert reply.is_complete or (is_head and not reply.body), f"cut off: {reply}"
    assert reply.header("content-type") or reply.header("allow"), reply  # OPTIONS * has no content
    assert reply.status not in (*OUR_BUGS, *NOT_BY_REQUEST), (reply.status, reply.body[:300])
    if reply.status == 200:
        check_success(reply, path)
    else:
        assert 400 <= reply.status < 500 or reply.status == 501, reply.status
        check_error(reply, path)


def check_success(reply: WireReply, path: str) -> None:
    """A document or a stream of them."""
    if reply.is_stream:
        *events, last = reply.events
        assert last == b"[DONE]", last[-200:]
        for event in events:
            json.loads(event)
    elif path not in ("/metrics", "/flush_cache") and reply.body:
        json.loads(reply.body)


def check_error(reply: WireReply, path: str) -> None:
    """As SGLang's handlers of that path say it."""
    assert reply.header("content-type").startswith("application/json"), reply
    if not reply.body:  # HEAD
        return
    document = reply.json
    if path.startswith("/v1/messages"):
        assert document["type"] == "error" and document["error"]["type"], document
        assert document["error"]["message"], document
    elif path.startswith("/v1/responses"):
        assert document["error"]["message"] and document["error"]["code"] == reply.status, document
    elif path.startswith("/workers"):  # sglang-router's
        assert document["error"] and document["code"], document
    elif document.keys() == {"detail"}:  # the fake's own words, passed on
        assert reply.status == 404
    elif "object" in document:
        assert document.keys() == {"object", "message", "type", "param", "code"}, document
        assert document["message"] and document["code"] == reply.status, document
    else:
        assert document.keys() == {"error"} and document["error"]["message"], document


def check_received(worker: FakeSGLang) -> int:
    """Every prompt it got is JSON with rooms and rids of ours; returns their number and forgets them."""
    assert len(worker.bodies) == len(worker.requests)
    for body, path in zip(worker.bodies, worker.paths, strict=True):
        _check_body(body, path)
    for method, target, headers in worker.calls:
        assert "x-evil" not in headers, (method, target, headers)
        assert not re.search(rb"[\x00-\x20\x7f-\xff]", target), target
    number = len(worker.bodies)
    for seen in (worker.bodies, worker.requests, worker.paths, worker.headers, worker.aborts, worker.calls):
        seen.clear()
    worker.disconnects.clear()
    return number


def _check_body(body: bytes, path: str) -> None:
    keys: list[Counter[str]] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys.append(Counter(name for name, _ in items))
        return dict(items)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} reached a worker: {body[:300]!r}")

    try:
        document = json.loads(body.decode(), object_pairs_hook=pairs, parse_constant=refuse)
    except (ValueError, RecursionError) as exc:
        raise AssertionError(f"a worker got what is not JSON ({exc}): {body[:300]!r}") from None
    # The hook sees inner objects first, the document last; parameters are one of those before.
    options = options_of(path, document)
    assert options.get("text") != "SMUGGLED", "the tail of a refused request was taken for another"
    twice = [name for name in OURS if keys[-1][name] > 1]
    assert not twice, f"{twice} twice in {body[:300]!r}"
    rooms, rids = options["bootstrap_room"], rids_of(path, document)
    rooms = rooms if isinstance(rooms, list) else [rooms]
    assert all(type(room) is int and 1 <= room <= MAX_ROOM for room in rooms), rooms
    assert 42 not in rooms and len(set(rooms)) == len(rooms)
    hosts = options["bootstrap_host"]
    assert set(hosts if isinstance(hosts, list) else [hosts]) == {"127.0.0.1"}, hosts
    if path != "/v1/messages":
        assert len(rids) == len(rooms) == len(set(rids)), (path, rids, rooms, body[:300])
        assert all(RID.fullmatch(rid) for rid in rids), rids


def rss_bytes() -> int:
    """Resident memory of this process, what the allocator keeps back returned before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

"""A stream that is silent is left early if somebody says so, and else at its longest silence."""

from __future__ import annotations

import asyncio

import pytest

from pdserve.errors import WorkerTimeout
from pdserve.http.client import HttpClient
from tests.support.sglang_server import FakeSGLang, until


@pytest.mark.parametrize("may_leave", [True, False])
async def test_silence(may_leave: bool) -> None:
    async with FakeSGLang() as fake:
        fake.behaviour.hang_after = 1
        client, asked = HttpClient(), []
        response = client.start(
            fake.url, "POST", "/generate", b'{"stream":true}', limits=(60.0, 0.3), on_change=lambda: None
        )
        await until(lambda: response.has_chunks)
        heard_s = response.heard_s
        response.watch_stalls(0.02, lambda: asked.append(1) or may_leave)
        await until(lambda: response.has_ended)
        assert isinstance(response.error, WorkerTimeout)
        assert response.is_stalled is may_leave
        assert (len(asked) > 1) is not may_leave
        silent_s = asyncio.get_running_loop().time() - heard_s
        assert may_leave or silent_s >= 0.3
        await client.close()


async def test_what_comes_after_all_is_taken() -> None:
    async with FakeSGLang() as fake:
        fake.behaviour.segments = (b"data: 1\n\n", b"data: 2\n\n", b"data: 3\n\n")
        fake.behaviour.hang_after, fake.behaviour.go_on = 1, asyncio.Event()
        client = HttpClient()
        asked: list[int] = []
        response = client.start(
            fake.url, "POST", "/generate", b'{"stream":true}', limits=(60.0, 60.0), on_change=lambda: None
        )
        await until(lambda: response.has_chunks)
        response.watch_stalls(0.01, lambda: bool(asked.append(1)))
        await until(lambda: len(asked) > 2)
        fake.behaviour.hang_after = None
        fake.behaviour.go_on.set()
        await until(lambda: response.has_ended)
        assert response.is_complete and not response.is_stalled
        await client.close()

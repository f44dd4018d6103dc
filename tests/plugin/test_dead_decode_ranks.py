"""A prefill rank forgets a decode rank whose process is gone, and keeps one that only does not answer."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.slow


def test_a_decode_rank_is_forgotten_once_its_control_port_is_closed() -> None:
    from pdserve.plugin.sending import PrefillPlane

    removed: list[tuple[str, str]] = []
    plane = SimpleNamespace(_links={"d": object()}, _refused={})
    plane.outbox = SimpleNamespace(remove_peer=lambda name, reason: removed.append((name, reason)))
    plane.refuse = plane._refused.__setitem__
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = listener.getsockname()
        PrefillPlane.forget_if_gone(plane, "d", endpoint)  # type: ignore[arg-type]
        assert not removed
        assert "d" in plane._links
    PrefillPlane.forget_if_gone(plane, "d", endpoint)  # type: ignore[arg-type]
    PrefillPlane.forget_if_gone(plane, "d", endpoint)  # type: ignore[arg-type]
    reason = f"decode rank d at 127.0.0.1:{endpoint[1]} is gone"
    assert removed == [("d", reason)]
    assert plane._refused == {"d": reason}
    assert not plane._links

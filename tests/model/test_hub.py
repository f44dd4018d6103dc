"""A hub id that cannot be had is refused at once, by a small hub of our own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pdserve.errors import ConfigError
from pdserve.model import check_hub_model

pytestmark = pytest.mark.slow  # imports huggingface_hub

ERRORS = {"gone": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "old": (404, "RevisionNotFound")}
ERRORS |= {"bare": (404, "EntryNotFound"), "sick": (503, "")}


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        status, code = ERRORS.get(self.path.split("/")[2], (200, ""))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", "2")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield url
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("org/gone", "no model org/gone at http"),
        ("org/gated", "org/gated is gated.*HF_TOKEN"),
        ("org/old", "has no revision v1"),
        ("org/sick", "cannot be asked"),
        ("a b/c", "neither a folder here nor the form of a hub id"),
    ],
)
def test_what_the_hub_does_not_give_is_named(hub: str, model: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_hub_model(model, "v1")


def test_what_the_hub_has_passes(hub: str, tmp_path: Path) -> None:
    check_hub_model("org/model")
    check_hub_model("org/bare")
    check_hub_model(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_named_unless_the_model_is_cached(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        dead = str(getattr(constants, name)).replace(hub, "http://127.0.0.1:9")
        monkeypatch.setattr(constants, name, dead)
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9 cannot be asked"):
        check_hub_model("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        check_hub_model("org/model")
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text("0" * 40)
    check_hub_model("org/model")

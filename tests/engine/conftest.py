"""One real fleet and one real reference for the whole session, all of real SGLang servers over real NIXL.

The reference is a plain SGLang server (no disaggregation). It answers every prompt of ``corpus.py``
and every request of the conformance test first and is then stopped, so that at most four SGLang
servers are up at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pdserve.model.tiny import write_tiny_model
from tests.engine.conformance import Reply, send_all
from tests.engine.conformance_cases import CASES
from tests.engine.corpus import CORPUS
from tests.engine.fleet import Fleet, Reference, launch_fleet

DEAD_PROXY = "http://127.0.0.1:9"
LONG_NAME = "a-temporary-folder-whose-name-leaves-no-room-for-the-name-of-a-socket-in-it"


@dataclass(frozen=True)
class Plain:
    """What a plain server answered: tokens by prompt name, replies in the order of ``CASES``."""

    tokens: dict[str, list[int]]
    replies: list[Reply]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded float32 Llama with a byte tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def plain(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Plain:
    """One plain SGLang server's answers; to the conformance test's requests only if that test will run."""
    is_compared = any("answers" in getattr(item, "fixturenames", ()) for item in request.session.items)
    with Reference(tiny_model, tmp_path_factory.mktemp("reference")) as reference:
        replies = send_all(reference.url, CASES, str(tiny_model)) if is_compared else []
        return Plain({prompt.name: reference.generate(prompt) for prompt in CORPUS}, replies)


@pytest.fixture(scope="session")
def expected(plain: Plain) -> dict[str, list[int]]:
    """The plain server's tokens for each prompt at temperature 0: prompt name → tokens."""
    return plain.tokens


@pytest.fixture(scope="session")
def fleet(plain: Plain, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """1 prefill + 2 decode servers behind ``pdserve launch``. Asks for ``plain`` only to run after it.

    They run where users run them: behind a proxy that knows no loopback, in a temporary folder with a name
    too long for Unix sockets.
    """
    folder = tmp_path_factory.mktemp("fleet")
    (folder / LONG_NAME).mkdir()
    environ = dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), DEAD_PROXY)
    environ["TMPDIR"] = str(folder / LONG_NAME)
    with launch_fleet(tiny_model, folder, prefill=1, decode=2, environ=environ) as running:
        yield running

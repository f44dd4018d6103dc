"""One real fleet and one real reference for the whole session, all of real SGLang servers over real NIXL.

The reference is a plain SGLang server (no disaggregation). It answers every
prompt of ``corpus.py`` first and is then stopped, so that at most four SGLang
servers are up at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve.model.tiny import write_tiny_model
from tests.engine.corpus import CORPUS
from tests.engine.fleet import Fleet, Reference, launch_fleet


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded float32 Llama with a byte tokenizer."""
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def expected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """What one plain SGLang server answers to each prompt at temperature 0: prompt name → tokens."""
    with Reference(tiny_model, tmp_path_factory.mktemp("reference")) as reference:
        return {prompt.name: reference.generate(prompt) for prompt in CORPUS}


@pytest.fixture(scope="session")
def fleet(
    expected: dict[str, list[int]], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """1 prefill + 2 decode servers behind ``pdserve launch``. Asks for ``expected`` only to run after it."""
    with launch_fleet(tiny_model, tmp_path_factory.mktemp("fleet"), prefill=1, decode=2) as running:
        yield running

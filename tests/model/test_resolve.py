"""What a MODEL argument means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pdserve.errors import ConfigError
from pdserve.model import resolve_model
from pdserve.model.folder import is_model_folder
from pdserve.model.tiny import write_tiny_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B"])
def test_hub_id_passes_through(name: str) -> None:
    assert resolve_model(name) == name


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/no-such-model", "a/b/c", "../x"])
def test_missing_folder_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="no such model folder"):
        resolve_model(name)


def test_model_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")

    assert resolve_model(str(folder)) == str(folder)


def test_relative_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)

    assert resolve_model("model") == "model"


def test_folder_without_config_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path} has no config.json")):
        resolve_model(str(tmp_path))


def test_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    with pytest.raises(ConfigError, match="is a file; MODEL must be a folder"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_tiny_is_built_once_into_the_cache(tmp_path: Path) -> None:
    folder = Path(resolve_model("tiny"))
    before = (folder / "model.safetensors").stat()

    assert folder.is_relative_to(tmp_path / "cache")
    assert is_model_folder(folder)
    assert resolve_model("tiny") == str(folder)
    assert (folder / "model.safetensors").stat() == before


@pytest.mark.slow  # builds the embedded model
def test_empty_name_builds_the_embedded_model_and_reports_progress(tmp_path: Path) -> None:
    heard: list[str] = []

    folder = Path(resolve_model("", heard.append))

    assert folder.is_relative_to(tmp_path / "cache")
    assert is_model_folder(folder)
    assert any("dequantising" in line for line in heard)
    assert resolve_model("", heard.append) == str(folder)

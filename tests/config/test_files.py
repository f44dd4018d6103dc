"""The files in configs/ name every setting with its default, and files are read strictly."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pdserve.config.balancer import BalancerConfig
from pdserve.config.file import load_file, merge
from pdserve.config.launch import BootstrapConfig, LaunchConfig
from pdserve.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
NOT_IN_FILES = {"config_file"}


@pytest.mark.parametrize(
    ("section", "default"),
    [("launch", LaunchConfig()), ("balancer", BalancerConfig()), ("bootstrap", BootstrapConfig())],
)
def test_example_file_names_every_key_with_its_default(section: str, default: Any) -> None:
    values = getattr(load_file(CONFIGS / f"{section}.toml"), section)
    assert set(values) == {field.name for field in fields(default)} - NOT_IN_FILES
    assert merge(type(default)(), values, {}) == default


def test_every_example_line_has_a_comment() -> None:
    for path in CONFIGS.glob("*.toml"):
        for line in path.read_text().splitlines():
            if "=" in line.partition("#")[0]:
                assert "#" in line, f"{path.name}: {line}"


def test_nested_lists_become_tuples(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_text('[balancer]\nprefill = [["http://a:1", 8998]]\ndecode = ["http://b:2"]\n')
    config = merge(BalancerConfig(), load_file(path).balancer, {})
    assert config.prefill == (("http://a:1", 8998),)
    assert config.decode == ("http://b:2",)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[launch]\nprefil = 2\n", "launch.prefil"),
        ("[fleet]\n", "[fleet]"),
        ("[launch\n", "not valid TOML"),
        ('[launch]\nsglang_args = "--page-size 32"\n', "launch.sglang_args"),
        ("[launch]\nprefill_args = [1]\n", "launch.prefill_args"),
        ("[launch]\nprefill = 1.5\n", "launch.prefill"),
        ("[launch]\nhost = 5\n", "launch.host"),
        ('[launch]\nready_timeout_s = "x"\n', "launch.ready_timeout_s"),
        ('[balancer]\nprefill = [["http://a:1"]]\n', "balancer.prefill"),
    ],
)
def test_bad_file_is_a_config_error_that_names_it(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.toml") as caught:
        load_file(path)
    assert named in str(caught.value)

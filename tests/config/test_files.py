"""configs/ and docs/options.md are what the settings generate, and files are read strictly."""

from __future__ import annotations

from dataclasses import fields
from difflib import unified_diff
from pathlib import Path

import pytest

from pdserve.cli.reference import format_toml, generated_files
from pdserve.config.balancer import BalancerConfig
from pdserve.config.file import SECTIONS, load_file, merge
from pdserve.config.setting import settings_of
from pdserve.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_files_and_options_page_are_what_the_settings_generate() -> None:
    """``python -m pdserve.cli.reference`` writes them."""
    differences: list[str] = []
    for path, text in generated_files().items():
        present = (ROOT / path).read_text() if (ROOT / path).exists() else ""
        differences += unified_diff(
            present.splitlines(), text.splitlines(), path, "generated", n=0, lineterm=""
        )
    assert not differences


def test_generated_file_names_every_key_with_its_default(tmp_path: Path) -> None:
    for section, config in SECTIONS.items():
        path = tmp_path / "defaults.toml"
        path.write_text(format_toml(section))
        values = getattr(load_file(path), section)
        assert set(values) == {field.name for field in fields(config)} - {"config_file"}
        assert merge(config(), values, {}) == config()


def test_every_setting_has_help_and_a_known_panel() -> None:
    """A field of a section that is no setting could not be documented; a choice must allow its default."""
    for config in SECTIONS.values():
        known = {setting.name: setting for setting in settings_of(config)}
        assert set(known) == {field.name for field in fields(config)} - {"config_file"}
        for setting in known.values():
            assert setting.help.endswith(".") and setting.unit and setting.panel, setting
            assert not setting.choices or setting.default in setting.choices, setting


def test_nested_lists_become_tuples(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_text('[balancer]\nprefill = [["http://a:1", 8998]]\ndecode = ["http://b:2"]\n')
    config = merge(BalancerConfig(), load_file(path).balancer, {})
    assert config.prefill == (("http://a:1", 8998),)
    assert config.decode == ("http://b:2",)


def test_bad_file_is_a_config_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    for text, named in (
        ("[launch]\nprefil = 2\n", "launch.prefil"),
        ("[fleet]\n", "[fleet]"),
        ("[launch\n", "not valid TOML"),
        ('[launch]\nsglang_args = "--page-size 32"\n', "launch.sglang_args"),
        ("[launch]\nprefill_args = [1]\n", "launch.prefill_args"),
        ("[launch]\nprefill = 1.5\n", "launch.prefill"),
        ("[launch]\nhost = 5\n", "launch.host"),
        ('[launch]\nready_timeout_s = "x"\n', "launch.ready_timeout_s"),
        ('[balancer]\nprefill = [["http://a:1"]]\n', "balancer.prefill"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.toml") as caught:
            load_file(path)
        assert named in str(caught.value)

"""Python, SGLang and the places where pdserve changes it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from pdserve import SUPPORTED_SGLANG, __version__
from pdserve.doctor.children import ChildResult, run_module
from pdserve.doctor.finding import Finding, error, note, ok
from pdserve.doctor.hook_targets import missing_targets

PYTHON_FROM, PYTHON_BELOW = (3, 11), (3, 14)
"""``requires-python`` of pyproject.toml."""
ENTRY_POINTS = ("sglang.srt.plugins", "sglang.srt.platforms")
DEEP_S = 180.0
"""Importing SGLang takes 20 s on two quiet cores."""

PYTHON, SGLANG, HOOKS, PLUGIN, DEEP = "python", "sglang", "hook targets", "plugin", "hooks applied"
_INSTALL = f"pip install sglang=={SUPPORTED_SGLANG}"


@dataclass(frozen=True, slots=True)
class SoftwareFacts:
    """What is installed. ``sglang_version`` is what ``import sglang`` would say, empty without SGLang;
    ``listed_version`` what the package metadata says."""

    python: tuple[int, int, int]
    executable: str
    pdserve_version: str
    sglang_version: str
    listed_version: str
    sglang_folder: str
    missing_hooks: tuple[str, ...]
    num_hooks: int
    missing_entry_points: tuple[str, ...]


def gather_software() -> SoftwareFacts:
    """Look at this interpreter and its packages; imports none of them."""
    from pdserve.plugin.hooks import HOOKS as TARGETS

    folder = _package_folder("sglang")
    listed = installed_version("sglang")
    paths = [hook.path for hook in TARGETS]
    groups = {group: importlib.metadata.entry_points(group=group) for group in ENTRY_POINTS}
    return SoftwareFacts(
        python=sys.version_info[:3],
        executable=sys.executable,
        pdserve_version=__version__,
        sglang_version=_source_version(folder) or listed if folder else "",
        listed_version=listed,
        sglang_folder=str(folder or ""),
        missing_hooks=tuple(missing_targets(paths, folder.parent)) if folder else tuple(paths),
        num_hooks=len(paths),
        missing_entry_points=tuple(
            group for group, points in groups.items() if all(point.name != "pdserve" for point in points)
        ),
    )


def installed_version(package: str) -> str:
    """By the package metadata; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _package_folder(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)  # a top-level name: located, not imported
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None


def _source_version(folder: Path) -> str:
    """``__version__`` of SGLang's generated ``_version.py``, as its version.py prefers it."""
    try:
        tree = ast.parse((folder / "_version.py").read_text())
    except (OSError, SyntaxError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            if names & {"__version__", "version"}:
                return str(node.value.value)
    return ""


def judge_software(facts: SoftwareFacts) -> list[Finding]:
    """Versions and hook targets."""
    return [_judge_python(facts), _judge_sglang(facts), *_judge_hooks(facts), _judge_plugin(facts)]


def _judge_python(facts: SoftwareFacts) -> Finding:
    text = ".".join(map(str, facts.python))
    if PYTHON_FROM <= facts.python[:2] < PYTHON_BELOW:
        return ok(PYTHON, f"Python {text}, pdserve {facts.pdserve_version}", version=text)
    return error(
        PYTHON,
        f"Python {text} at {facts.executable}",
        "pdserve and SGLang are built for Python 3.11 to 3.13",
        "make an environment with one of those and install pdserve there",
        version=text,
    )


def _judge_sglang(facts: SoftwareFacts) -> Finding:
    if not facts.sglang_folder:
        return error(SGLANG, "SGLang is not installed", "the servers are SGLang's", _INSTALL)
    if facts.sglang_version != SUPPORTED_SGLANG:
        return error(
            SGLANG,
            f"SGLang {facts.sglang_version or 'of unknown version'} at {facts.sglang_folder}",
            f"pdserve {facts.pdserve_version} hooks into SGLang {SUPPORTED_SGLANG}; "
            "servers refuse to start with another release",
            _INSTALL,
            version=facts.sglang_version,
        )
    if facts.listed_version != facts.sglang_version:
        return error(
            SGLANG,
            f"SGLang {facts.sglang_version} at {facts.sglang_folder}, but the package metadata lists "
            f"{facts.listed_version or 'none'}",
            "two installations are mixed; which one is imported depends on PYTHONPATH",
            f"unset PYTHONPATH or reinstall: {_INSTALL}",
            version=facts.sglang_version,
        )
    return ok(SGLANG, f"SGLang {facts.sglang_version}", version=facts.sglang_version)


def _judge_hooks(facts: SoftwareFacts) -> list[Finding]:
    if not facts.sglang_folder:
        return []
    if not facts.missing_hooks:
        return [ok(HOOKS, f"all {facts.num_hooks} places that pdserve changes are there")]
    return [
        error(
            HOOKS,
            f"not in this SGLang: {', '.join(facts.missing_hooks)}",
            "the plugin ends a server whose hooks do not take",
            _INSTALL,
        )
    ]


def _judge_plugin(facts: SoftwareFacts) -> Finding:
    if not facts.missing_entry_points:
        return ok(PLUGIN, "SGLang finds pdserve's plugin and platform")
    return error(
        PLUGIN,
        f"pdserve is not among the entry points {', '.join(facts.missing_entry_points)}",
        "SGLang loads the plugin by the entry points of the installed package",
        "install pdserve with pip (or `pip install -e .`) into this environment instead of by PYTHONPATH",
    )


def apply_hooks_for_real() -> ChildResult:
    """Import SGLang in a child and apply every hook there: what a server does at its start."""
    return run_module("pdserve.doctor.hooks_child", limit_s=DEEP_S)


def judge_deep(result: ChildResult) -> list[Finding]:
    """``--deep``: did every hook take?"""
    answer = result.json()
    if answer is not None:
        return [ok(DEEP, f"{answer['hooks']} hooks applied to an imported SGLang and checked")]
    return [
        error(
            DEEP,
            f"SGLang with pdserve's hooks cannot be imported: {result.complaint(DEEP_S)}",
            "a server does the same at its start",
            f"run `{sys.executable} -m pdserve.doctor.hooks_child` to see the whole message",
        )
    ]


def not_deep() -> list[Finding]:
    """What is said instead without ``--deep``."""
    return [note(DEEP, "not tried; --deep imports SGLang and applies the hooks (about 30 s)")]

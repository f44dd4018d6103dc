"""The import table of the architecture, file sizes, and public docstrings: rules that hold the shape."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pdserve"
MAX_LINES = 400

VOCABULARY = {"types", "errors", "config", "telemetry", "workload", "process"}
"""Modules both towers may import; they import only each other."""

ALLOWED = {
    "http": {"errors", "http"},
    "scheduling": {"types", "errors", "config", "scheduling"},
    "bootstrap": VOCABULARY | {"bootstrap", "http"},
    "balancer": VOCABULARY | {"balancer", "bootstrap", "http", "scheduling"},
    "cluster": VOCABULARY | {"cluster", "bootstrap"},
    "kv": VOCABULARY | {"kv"},
    "transfer": VOCABULARY | {"transfer", "kv"},
    "plugin": VOCABULARY | {"plugin", "kv", "transfer", "bootstrap"},
    "monitor": {"types", "errors", "telemetry", "monitor"},
    "model": {"errors", "config", "model"},
    "sim": VOCABULARY | {"sim", "scheduling", "balancer", "http"},
    "loadgen": VOCABULARY | {"loadgen", "http"},
    "doctor": VOCABULARY
    | {"doctor", "balancer", "bootstrap", "cluster", "http", "kv", "transfer", "plugin", "model"},
    "process": VOCABULARY | {"balancer", "bootstrap"},
}
"""Which parts of pdserve each package may import. cli may import anything."""

FOREIGN = {
    "sglang": {"plugin"},
    "nixl": {"transfer"},
    "torch": {"kv", "plugin", "model"},
    "typer": {"cli"},
    "rich": {"cli", "monitor"},
    "openai": {"cli"},
}
"""Which packages may import a foreign one."""


def _files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _part(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_only_what_the_table_allows(path: Path) -> None:
    part = _part(path)
    for name in _imports(path):
        top, *rest = name.split(".")
        if top in FOREIGN:
            assert part in FOREIGN[top], f"{path.name} imports {name}; only {FOREIGN[top]} may"
        if top == "pdserve" and rest and rest[0] != "SUPPORTED_SGLANG":
            allowed = ALLOWED.get(part, VOCABULARY if part in VOCABULARY else None)
            is_package_constant = rest[0].startswith("__")
            if allowed is not None and not is_package_constant:
                assert rest[0] in allowed, f"{part}/{path.name} may not import pdserve.{rest[0]}"


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_file_is_small_and_public_names_have_docstrings(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES, f"{path} is over {MAX_LINES} lines: split it"
    tree = ast.parse(text)
    if path.name != "__init__.py" or tree.body:
        assert ast.get_docstring(tree), f"{path} has no module docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
            if not isinstance(node, ast.ClassDef):
                assert node.returns is not None, f"{path}: {node.name} has no return type"


def test_only_config_reads_the_environment() -> None:
    for path in _files():
        if path.name == "worker_env.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                assert not (isinstance(node.value, ast.Name) and node.value.id == "os"), (
                    f"{path} reads the environment; add the setting to config/worker_env.py"
                )


@pytest.mark.parametrize("module", ["pdserve.balancer.app", "pdserve.bootstrap.service", "pdserve.cli.app"])
def test_control_plane_process_loads_no_engine_and_no_rust(module: str) -> None:
    """The balancer's process must stay light and pure: no torch, no sglang, no Rust extension."""
    code = (
        f"import sys, {module}\n"
        "bad = {'torch', 'sglang', 'pydantic_core', 'orjson', 'tokenizers', 'safetensors', 'numpy',"
        " 'rpds', 'fastapi'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"{module} loads {done.stdout.strip()}"

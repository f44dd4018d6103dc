"""The shape of the product, one test a rule; each collects all violations and prints them.

The rules: docs/contributing.md. ``PENDING`` names what is known and still to be repaired.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

import pytest

from pdserve.config.balancer import BalancerConfig
from pdserve.config.launch import LaunchConfig
from tests.support.source_tree import ROOT, Module, SourceTree

MAX_MODULES = 20
MAX_LINES = 400
MAX_FUNCTION_LINES = 40
MAX_PARAMETERS = 7
MIN_LINES = 100
"""A module with one importer has as many, or it belongs into its importer."""
MAX_GLOSSARY = 40

VOCABULARY = {"types", "errors", "config", "telemetry", "workload", "process", "state"}
"""Packages that most others may import; they import only each other."""

ALLOWED = {
    "http": {"errors", "http"},
    "scheduling": {"types", "errors", "config", "linear_fit", "scheduling"},
    "bootstrap": VOCABULARY | {"bootstrap", "http"},
    "balancer": VOCABULARY | {"balancer", "bootstrap", "http", "scheduling"},
    "cluster": VOCABULARY | {"cluster", "bootstrap"},
    "kv": VOCABULARY | {"kv"},
    "transfer": VOCABULARY | {"transfer", "kv", "linear_fit"},
    "plugin": VOCABULARY | {"plugin", "kv", "transfer", "bootstrap"},
    "monitor": {"types", "errors", "telemetry", "state", "monitor"},
    "model": {"errors", "config", "model"},
    "sim": VOCABULARY | {"sim", "scheduling", "balancer", "http"},
    "loadgen": VOCABULARY | {"loadgen", "http"},
    "chaos": VOCABULARY | {"chaos", "http"},
    "doctor": VOCABULARY | {"doctor", "cluster", "kv", "transfer", "plugin", "model"},
    "process": VOCABULARY | {"balancer", "bootstrap"},
}
"""Which packages each package may import. cli may import any."""

FOREIGN = {
    "sglang": {"plugin"},
    "nixl": {"transfer"},
    "torch": {"kv", "plugin", "model"},
    "typer": {"cli"},
    "rich": {"cli", "monitor", "chaos"},
    "openai": {"cli"},
}
"""Which packages may import a foreign one."""

ENTRY_POINTS = {
    "pdserve.__main__": "python -m pdserve",
    "pdserve.plugin.platform": "SGLang's entry point for platforms",
    "pdserve.plugin.devices": "SGLang loads the classes by their dotted names",
    "pdserve.plugin.patches": "SGLang's hook registry loads its functions by the names in plugin/hooks.py",
    "pdserve.plugin.children": "a hook of plugin/hooks.py, as patches",
    "pdserve.plugin.resume.penalties": "a hook of plugin/hooks.py, as patches",
    "pdserve.plugin.resume.scheduler": "a hook of plugin/hooks.py, as patches",
    "pdserve.plugin.worker": "the main module of every SGLang process",
    "pdserve.process.service": "the process that a service command becomes",
    "pdserve.scheduling.policy.cache_aware": "a policy: the registry alone imports it",
    "pdserve.scheduling.policy.decode_batch": "half of pair_cost's sum; prefill_time is the other",
    "pdserve.doctor.hooks_child": "a process of the doctor's",
    "pdserve.doctor.loopback_child": "a process of the doctor's",
}
"""Modules that something other than an import starts, and what."""

FEATURES = {
    (BalancerConfig, "policy", "pair_cost"): "policies_4p4d.txt",
    (BalancerConfig, "max_tree_size", 2**26): "prompt_tree.txt",
    (BalancerConfig, "predict_lengths", True): "features.txt",
    (LaunchConfig, "data_plane", "on"): "transfer_e2e.txt",
    (LaunchConfig, "transfer_path", "auto"): "transfer.txt",
    (LaunchConfig, "start_method", "auto"): "startup.txt",
}
"""Setting and default of what a user could do without, and the file of bench/results that shows its gain."""

FOREIGN_SIGNATURES = {"add_transfer_request": "SGLang calls it"}
"""Functions whose parameters somebody else has chosen, and who."""

SEAMS = {
    "TransferListener": "the app's WorkerMetrics; the fleet must not import metrics",
    "DeviceRuntime": "torch's CUDA here, a stream that runs late in tests/support/late_device.py",
    "TransferEngine": "NIXL here, an engine with faults in tests/support/loopback.py",
}
"""Protocols with one implementation in the product, and why."""


@pytest.fixture(scope="module")
def tree() -> SourceTree:
    return SourceTree()


def _report(violations: Iterable[str]) -> None:
    """Fail with every violation."""
    found = sorted(violations)
    assert not found, f"{len(found)} violations\n" + "\n".join(found)


# -- folders, files, functions ---------------------------------------------------------------


def test_no_folder_holds_more_than_twenty_modules(tree: SourceTree) -> None:
    folders = Counter(
        module.path.parent.relative_to(ROOT) for module in tree.modules.values() if not module.is_package
    )
    _report((f"{folder}: {n} modules" for folder, n in folders.items() if n > MAX_MODULES))


def test_files_are_short(tree: SourceTree) -> None:
    long = (module for module in tree.modules.values() if module.num_lines > MAX_LINES)
    _report(f"{module.name}: {module.num_lines} lines" for module in long)


def test_functions_are_short(tree: SourceTree) -> None:
    found = []
    for module in tree.modules.values():
        for function in module.functions():
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{module.name}.{function.name}: {length} lines")
    _report(found)


def test_functions_take_few_parameters(tree: SourceTree) -> None:
    """A command of the command line takes its options as parameters: typer reads them there."""
    found = []
    for module in tree.modules.values():
        for function in module.functions():
            given = function.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            number = len([name for name in names if name not in ("self", "cls")])
            is_ours = function.name not in FOREIGN_SIGNATURES and not _is_command(function)
            if number > MAX_PARAMETERS and is_ours:
                found.append(f"{module.name}.{function.name}: {number} parameters")
    _report(found)


def _is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    calls = (node for node in function.decorator_list if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Attribute) and call.func.attr == "command" for call in calls)


def test_public_names_have_docstrings_and_return_types(tree: SourceTree) -> None:
    found = []
    for module in tree.modules.values():
        if module.tree.body and not ast.get_docstring(module.tree):
            found.append(f"{module.name}: no module docstring")
        for node in module.tree.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                found.append(f"{module.name}.{node.name}: no docstring")
            if not isinstance(node, ast.ClassDef) and node.returns is None:
                found.append(f"{module.name}.{node.name}: no return type")
    _report(found)


# -- imports ---------------------------------------------------------------------------------


def test_packages_import_only_what_the_table_allows(tree: SourceTree) -> None:
    found = []
    for module in tree.modules.values():
        allowed = ALLOWED.get(module.part, VOCABULARY if module.part in VOCABULARY else None)
        for source, name in module.imported_names:
            top, *rest = f"{source}.{name}".split(".")
            if top in FOREIGN and module.part not in FOREIGN[top]:
                found.append(f"{module.name} imports {top}; only {', '.join(FOREIGN[top])} may")
            if top != "pdserve" or allowed is None or rest[0] in allowed:
                continue
            if rest[0] not in ("", "SUPPORTED_SGLANG") and not rest[0].startswith("__"):
                found.append(f"{module.name} imports pdserve.{rest[0]}")
    _report(found)


def test_no_modules_import_each_other(tree: SourceTree) -> None:
    """Imports for types count: a circle is two modules that are one."""
    _report(" <-> ".join(circle) for circle in tree.circles())


def test_a_module_has_two_importers_or_a_hundred_lines(tree: SourceTree) -> None:
    found = []
    for module in tree.modules.values():
        importers = tree.importers[module.name]
        is_small = module.num_lines < MIN_LINES and len(importers) < 2 and not module.is_package
        if is_small and module.name not in ENTRY_POINTS:
            found.append(f"{module.name}: {module.num_lines} lines, imported by {', '.join(importers)}")
    _report(found)
    assert set(ENTRY_POINTS) <= set(tree.modules), set(ENTRY_POINTS) - set(tree.modules)


# -- protocols -------------------------------------------------------------------------------


def test_a_protocol_has_two_implementations_or_stands_at_a_border(tree: SourceTree) -> None:
    """At a border: another package imports or implements it. A protocol of one call is a function's type."""
    classes = [(module, node) for module in tree.modules.values() for node in module.classes()]
    by_name = {node.name: node for _, node in classes}
    members = {node: _members(node, by_name) for _, node in classes}
    found = []
    for module, protocol in classes:
        if not _is_protocol(protocol) or members[protocol] == {"__call__"} or protocol.name in SEAMS:
            continue
        fitting = [(m, n) for m, n in classes if members[protocol] <= members[n] and not _is_protocol(n)]
        at_border = {m.part for m, _ in fitting} - {module.part} or _is_imported_elsewhere(
            tree, module, protocol.name
        )
        if len(fitting) < 2 and not at_border:
            names = [node.name for _, node in fitting]
            found.append(f"{module.name}.{protocol.name}: implemented by {names or 'no class'}")
    _report(found)


def _is_protocol(node: ast.ClassDef) -> bool:
    names = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
    return any(isinstance(name, ast.Name) and name.id == "Protocol" for name in names)


def _members(node: ast.ClassDef, by_name: dict[str, ast.ClassDef]) -> set[str]:
    """Names of its methods and fields, with those of the bases that are classes of the product."""
    found: set[str] = set()
    for base in node.bases:
        if (name := getattr(base, "id", "")) in by_name and name != node.name:
            found |= _members(by_name[name], by_name)
    for inner in ast.walk(node):
        match inner:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                found.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                found.add(name)
    return found


def _is_imported_elsewhere(tree: SourceTree, module: Module, name: str) -> bool:
    return any(
        (module.name, name) in other.imported_names and other.part != module.part
        for other in tree.modules.values()
    )


# -- names, settings, processes --------------------------------------------------------------


def test_module_names_are_words_of_the_glossary(tree: SourceTree) -> None:
    """The table explains the words of this field; the plain words below it need no explanation."""
    table, _, rest = (ROOT / "docs" / "glossary.md").read_text().partition("## Plain words")
    terms = [row.lower() for row in re.findall(r"^\| `?([\w, -]+?)`? +\|", table, re.MULTILINE)]
    terms = [term for term in terms if term not in ("word", "---")]
    assert len(terms) <= MAX_GLOSSARY, f"{len(terms)} words"
    known = set(re.findall(r"\w+", " ".join(terms))) | set(re.findall(r"\w+", rest.lower()))
    modules = tree.modules.values()
    known |= {f"{word}s" for word in known} | {word.removesuffix("s") for word in known}
    used = {word: module for module in modules for word in re.findall(r"[a-z0-9]+", module.name)}
    _report((f"{m.name}: {word}" for word, m in used.items() if word not in known))


def test_a_feature_that_is_on_has_a_measurement() -> None:
    found = []
    for (config, setting, default), file in FEATURES.items():
        if getattr(config(), setting) == default and not (ROOT / "bench" / "results" / file).is_file():
            found.append(f"{setting}={default}: no bench/results/{file}")
    _report(found)


def test_only_the_configuration_reads_the_environment(tree: SourceTree) -> None:
    found = []
    for module in tree.modules.values():
        for node in module.nodes:
            match node:
                case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "getenv"):
                    found.append(f"{module.name} line {node.lineno}: config/worker_env.py is the place")
    _report(text for text in found if not text.startswith("pdserve.config.worker_env "))


@pytest.mark.process
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

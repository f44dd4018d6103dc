"""The product's modules as they are written: syntax trees, imports, and circles among the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pdserve"


class Module:
    """One file of the product; ``name`` is dotted: ``pdserve.http.client``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text()
        self.num_lines = self.text.count("\n")
        parts = path.relative_to(ROOT).with_suffix("").parts
        self.is_package = parts[-1] == "__init__"
        self.name = ".".join(parts[:-1] if self.is_package else parts)
        self.part = parts[1] if len(parts) > 1 else ""
        """Its package: the second word of its name."""
        self.tree = ast.parse(self.text)
        self.nodes = list(ast.walk(self.tree))

    @cached_property
    def imported_names(self) -> list[tuple[str, str]]:
        """``(module, name)`` of every ``from module import name``; name is empty for ``import module``."""
        found = []
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found += [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found += [(node.module, alias.name) for alias in node.names]
        return found

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method, nested ones too."""
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node

    def classes(self) -> list[ast.ClassDef]:
        """Every class."""
        return [node for node in self.nodes if isinstance(node, ast.ClassDef)]


class SourceTree:
    """All modules, read once."""

    def __init__(self) -> None:
        modules = (Module(path) for path in sorted(PACKAGE.rglob("*.py")))
        self.modules = {module.name: module for module in modules}

    @cached_property
    def imports(self) -> dict[str, set[str]]:
        """The modules that each module imports, anywhere in its text and for types as well."""
        return {name: self._imports(module) for name, module in self.modules.items()}

    @cached_property
    def importers(self) -> dict[str, set[str]]:
        """The modules that import each module."""
        found: dict[str, set[str]] = {name: set() for name in self.modules}
        for name, imported in self.imports.items():
            for other in imported:
                found[other].add(name)
        return found

    def circles(self) -> list[list[str]]:
        """Groups of modules that reach each other by imports."""
        reach = {name: self._reachable(name) for name in self.modules}
        groups = {
            tuple(sorted(other for other in reach[name] if name in reach[other]))
            for name in self.modules
            if name in reach[name]
        }
        return [list(group) for group in sorted(groups)]

    def _imports(self, module: Module) -> set[str]:
        found = set()
        for source, name in module.imported_names:
            full = f"{source}.{name}" if f"{source}.{name}" in self.modules else source
            if full in self.modules and full != module.name:
                found.add(full)
        return found

    def _reachable(self, name: str) -> set[str]:
        seen: set[str] = set()
        todo = [name]
        while todo:
            for other in self.imports[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

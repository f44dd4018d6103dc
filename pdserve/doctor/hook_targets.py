"""Are the places where pdserve changes SGLang still there? Read from its source, nothing is imported.

Importing SGLang takes 20 s and may fail for other reasons. A target is found when
its module is a file and each further name is defined there: a class, a function,
an assignment, an import, or a member of a base class that can be followed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

_Scope = ast.Module | ast.ClassDef
MAX_HOPS = 8
"""Imports and base classes followed from one name; a cycle ends here."""


def missing_targets(paths: Sequence[str], site: Path) -> list[str]:
    """Those of the dotted ``paths`` that the packages below ``site`` do not define."""
    return [path for path in paths if not _exists(path, site)]


def _exists(path: str, site: Path) -> bool:
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        file = _module_file(site, parts[:cut])
        if file is not None:
            return _has(file, parts[cut:], site, MAX_HOPS)
    return False


def _module_file(site: Path, parts: Sequence[str]) -> Path | None:
    base = site.joinpath(*parts)
    for file in (base.with_suffix(".py"), base / "__init__.py"):
        if file.is_file():
            return file
    return None


@lru_cache(maxsize=64)
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())


def _has(file: Path, names: Sequence[str], site: Path, hops: int) -> bool:
    tree = _parse(file)
    found = _definition(tree, names[0])
    if found is None:
        return _is_submodule(file, names[0])
    if len(names) == 1:
        return True
    if isinstance(found, ast.ClassDef):
        return _class_has(file, found, names[1], site, hops)
    if isinstance(found, ast.ImportFrom) and hops and (source := _imported_file(file, found, site)):
        return _has(source, [_original_name(found, names[0]), *names[1:]], site, hops - 1)
    return True  # an object whose members the source does not tell


def _is_submodule(file: Path, name: str) -> bool:
    return file.name == "__init__.py" and _module_file(file.parent, [name]) is not None


def _class_has(file: Path, node: ast.ClassDef, name: str, site: Path, hops: int) -> bool:
    if _definition(node, name) is not None:
        return True
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return bool(hops) and any(
        _definition(_parse(file), base) is not None and _has(file, [base, name], site, hops - 1)
        for base in bases
    )


def _definition(scope: _Scope, name: str) -> ast.stmt | None:
    return next((node for node in _statements(scope.body) if name in _names(node)), None)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a body, also inside ``if`` and ``try``."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                for inner in getattr(node, part, ()):
                    yield from _statements([inner] if isinstance(inner, ast.stmt) else inner.body)


def _names(node: ast.stmt) -> set[str]:
    match node:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return {node.name}
        case ast.Assign():
            return {target.id for target in node.targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Import() | ast.ImportFrom():
            return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return set()


def _original_name(node: ast.ImportFrom, name: str) -> str:
    return next(alias.name for alias in node.names if (alias.asname or alias.name) == name)


def _imported_file(file: Path, node: ast.ImportFrom, site: Path) -> Path | None:
    parts = node.module.split(".") if node.module else []
    if node.level:
        package = file.parent.relative_to(site).parts
        parts = [*package[: len(package) - node.level + 1], *parts]
    return _module_file(site, parts)

"""All requests of the conformance test, and the answers that cannot be the same, each with its reason."""

from __future__ import annotations

from fnmatch import fnmatchcase

from tests.engine import conformance_native, conformance_openai, conformance_other

CASES = (*conformance_native.CASES, *conformance_openai.CASES, *conformance_other.CASES)
assert len(CASES) >= 150, len(CASES)
assert len({case.name for case in CASES}) == len(CASES)

LEGITIMATE: tuple[tuple[str, str, str], ...] = ()
"""(case name, path of the difference, why): patterns as of a shell."""


def is_legitimate(name: str, difference: str) -> bool:
    """True if the table says that this difference must be."""
    return any(fnmatchcase(name, case) and fnmatchcase(difference, path) for case, path, _ in LEGITIMATE)

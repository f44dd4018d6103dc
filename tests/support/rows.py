"""Tables of cases as one test: every row is tried, and the failure lists all rows that missed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

Check = Callable[..., None]


def rows(names: str | Sequence[str], table: Iterable[Any]) -> Callable[[Check], Check]:
    """Decorate a test as ``pytest.mark.parametrize`` does, but make one test of all rows.

    Fixtures are shared by the rows; a row that calls ``pytest.skip`` is left out.
    """
    columns = [names] if isinstance(names, str) else list(names)
    cases = list(table)

    def decorate(check: Check) -> Check:
        @functools.wraps(check)
        def test(**fixtures: Any) -> None:
            misses = []
            for case in cases:
                values = (case,) if len(columns) == 1 else case
                try:
                    check(**fixtures, **dict(zip(columns, values, strict=True)))
                except pytest.skip.Exception:
                    continue
                except (Exception, pytest.fail.Exception) as exc:
                    misses.append(f"{case!r}: {type(exc).__name__}: {exc}")
                    error = exc
            if misses:
                text = "\n".join(misses)
                raise AssertionError(f"{len(misses)} of {len(cases)} rows missed\n{text}") from error

        signature = inspect.signature(check)
        kept = [value for name, value in signature.parameters.items() if name not in columns]
        test.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return test

    return decorate

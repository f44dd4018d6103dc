"""Tables of cases as one test: every row is tried, and the failure lists all rows that missed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def rows(names: str, table: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a test as ``pytest.mark.parametrize`` does, but make one test of all rows.

    Fixtures are shared by the rows; a row that calls ``pytest.skip`` is left out.
    """
    columns = [name.strip() for name in names.split(",")]
    cases = list(table)

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
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
                    misses.append(f"{names} = {case!r}: {type(exc).__name__}: {exc}")
                    error = exc
            if misses:
                text = "\n".join(misses)
                raise AssertionError(f"{len(misses)} of {len(cases)} rows missed\n{text}") from error

        signature = inspect.signature(check)
        kept = [value for name, value in signature.parameters.items() if name not in columns]
        test.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return test

    return decorate

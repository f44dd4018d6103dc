"""What a worker tells the fleet of SGLang's priority flags."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pdserve.plugin.membership import priority_flags


@pytest.mark.parametrize(
    ("is_enabled", "is_low_first", "default", "told"),
    [
        (False, False, None, (None, None)),
        (False, False, 3, (None, None)),
        (True, False, None, (False, None)),
        (True, True, 3, (True, 3)),
        (False, True, 3, (True, None)),
    ],
)
def test_the_flags_are_told_where_they_mean_something(
    is_enabled: bool, is_low_first: bool, default: int | None, told: tuple[bool | None, int | None]
) -> None:
    server_args = SimpleNamespace(
        enable_priority_scheduling=is_enabled,
        schedule_low_priority_values_first=is_low_first,
        default_priority_value=default,
    )
    flags = priority_flags(server_args)
    assert (flags.low_priority_first, flags.default_priority) == told

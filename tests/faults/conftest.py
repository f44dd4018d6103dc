"""Fault tests: the checks live in helper modules and shall explain themselves as tests do."""

import pytest

pytest.register_assert_rewrite(
    "tests.faults.site", "tests.faults.black_hole", "tests.support.wire", "tests.support.sglang_server"
)

"""A worker says whether it goes on with others' answers; a stock one does not."""

from __future__ import annotations

import pytest

from pdserve.config.worker_env import WorkerEnv
from pdserve.plugin.membership import WorkerMembership


@pytest.mark.parametrize("stock", [True, False])
async def test_a_worker_says_whether_it_resumes(stock: bool) -> None:
    env = WorkerEnv(is_active=True, instance_id="0" * 32, stock=stock)
    about = await WorkerMembership(env, None, on_refused=print).describe()
    assert (about["instance_id"], about["resumes"]) == ("0" * 32, not stock)

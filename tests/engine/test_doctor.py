"""``pdserve doctor`` against real servers: nothing wrong, every worker and pair named."""

from __future__ import annotations

import pytest

from tests.engine.fleet import Fleet
from tests.support.doctor_command import doctor

pytestmark = pytest.mark.engine

WORKERS = {"prefill-0", "decode-0", "decode-1"}


async def test_a_real_fleet_is_found_sound(fleet: Fleet) -> None:
    fleet.wait_ready(2)
    run = await doctor(fleet.url, "--json", "--device", "cpu")
    assert run.code == 0, run.out
    ours = [f for f in run.findings() if f["section"].startswith("Fleet")]
    # other tests may have killed servers of this fleet, or had some join and leave
    assert {f["check"] for f in ours if f["level"] == "ok"} >= {*WORKERS, "balancer", "bootstrap"}, ours
    assert set(run.finding("pairs", "ok")["values"]["took_s"]) == {
        "prefill-0>decode-0",
        "prefill-0>decode-1",
    }
    assert run.finding("loopback DRAM", "ok", "warning")["values"]["bytes_per_s"] > 0
    fleet.wait_empty()


async def test_the_service_of_that_fleet_is_recognised_on_its_port(fleet: Fleet) -> None:
    run = await doctor("--json", "--model", "tiny", "--port", fleet.url.rpartition(":")[2], "--device", "cpu")
    assert run.code == 1
    found = run.finding("port", "error")
    assert "pdserve" in found["what"]
    assert fleet.url in found["what_to_do"]

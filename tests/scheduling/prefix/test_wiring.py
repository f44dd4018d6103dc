"""The balancer keeps its policy's prompt tree true: what was served is held, what was flushed is not."""

from __future__ import annotations

import json

from pdserve.scheduling.policy import PromptTree
from tests.support.balancer_client import Site, running_site

TEXT = "the same beginning " * 200


def held(site: Site) -> float:
    """The share of TEXT that the prefill worker is believed to hold."""
    tree = site.balancer.fleet.scheduler.policy.tree  # type: ignore[attr-defined]
    assert isinstance(tree, PromptTree)
    (worker,) = (w for w in site.balancer.fleet.workers() if w.worker_id == "prefill-0")
    return tree.match(tree.read(json.dumps(TEXT).encode()), [worker.instance_id], 0.0)[0]


async def test_a_served_prompt_is_held_until_the_cache_is_flushed() -> None:
    async with running_site(policy="pair_cost") as site:
        assert held(site) == 0.0
        assert (await site.generate({"text": TEXT})).status == 200
        assert held(site) > 0.8
        assert (await site.ask("POST", "/flush_cache")).status == 200
        assert held(site) == 0.0

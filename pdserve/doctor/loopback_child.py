"""One real NIXL transfer between two processes of this machine, its bytes checked; prints JSON.

The very code that serves: pools laid out as SGLang's, outbox, planner, NIXL,
inbox (pdserve/transfer/selftest/trial.py). A process of its own because a wrong UCX
setting may hang it: the doctor kills it and everything it started.

    python -m pdserve.doctor.loopback_child [GPU]
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

from pdserve.process.parent_death import die_with_parent
from pdserve.transfer.selftest.trial import Trial, TrialGeometry

NUM_PAGES = 128
"""Of 128 KiB each: 16 MiB a send."""
SHIFT = 5
"""Pages go to others on the far side, or a write that lands nowhere would go unseen."""
SENDS = 5


def measure(gpu: int = -1) -> dict[str, Any]:
    """Send the pages several times; the fastest counts, for others may use the cores meanwhile.

    Returns:
        ``nbytes`` per send; ``seconds`` and ``bytes_per_s`` of the fastest; ``median_s``, ``sends``,
        ``is_intact``.
    """
    # 8 layers of 4 heads of 64 two-byte numbers: 128 KiB a page
    shape = dict(
        num_layers=8, num_pages=NUM_PAGES + SHIFT, page_size=16, num_kv_heads=4, head_bytes=128, gpu=gpu
    )
    source = TrialGeometry(**shape, seed=1)
    here = np.arange(NUM_PAGES, dtype=np.int32)
    there = here + np.int32(SHIFT)
    with Trial(source, TrialGeometry(**shape, seed=2)) as trial:
        reports = [trial.send(here, there) for _ in range(SENDS)]
        tokens = len(here) * source.page_size
        sent = trial.pool.digest(here, tokens, 0, source.num_kv_heads).regions
        got = trial.digest_target(there, tokens).regions
    times = sorted(report.total_s for report in reports)
    nbytes = tokens * source.token_bytes
    return {
        "nbytes": nbytes,
        "seconds": times[0],
        "bytes_per_s": nbytes / times[0],
        "median_s": times[SENDS // 2],
        "sends": SENDS,
        "is_intact": sent == got,
    }


if __name__ == "__main__":
    die_with_parent(os.getppid())
    answer = measure(int(sys.argv[1]) if len(sys.argv) > 1 else -1)
    sys.stdout.write(json.dumps(answer) + "\n")

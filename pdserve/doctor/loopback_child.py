"""One real NIXL transfer between two processes of this machine, its bytes checked; prints JSON.

The very code that serves: pools laid out as SGLang's, outbox, planner, NIXL,
inbox (pdserve/transfer/trial.py). A process of its own because a wrong UCX
setting may hang it: the doctor kills it and everything it started.

    python -m pdserve.doctor.loopback_child [GPU]
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np

from pdserve.lifeline import die_with_parent
from pdserve.transfer.trial import Trial, TrialGeometry

NUM_PAGES = 512
SENDS = 5


def measure(gpu: int = -1) -> dict[str, Any]:
    """Send the pages several times; the median counts.

    Returns:
        ``nbytes`` per send, ``seconds`` (median), ``bytes_per_s``, ``sends``, ``is_intact``.
    """
    # 8 layers of 4 heads of 64 two-byte numbers: 128 KiB a page, 16 MiB a send
    shape = dict(num_layers=8, num_pages=NUM_PAGES, page_size=16, num_kv_heads=4, head_bytes=128, gpu=gpu)
    source = TrialGeometry(**shape, seed=1)
    pages = np.arange(1, 129, dtype=np.int32)
    with Trial(source, TrialGeometry(**shape, seed=2)) as trial:
        reports = [trial.send(pages, pages + np.int32(SENDS)) for _ in range(SENDS)]
        tokens = len(pages) * source.page_size
        sent = trial.pool.digest(pages, tokens, 0, source.num_kv_heads).regions
        got = trial.digest_target(pages + np.int32(SENDS), tokens).regions
    seconds = sorted(report.total_s for report in reports)[SENDS // 2]
    nbytes = tokens * source.token_bytes
    return {
        "nbytes": nbytes,
        "seconds": seconds,
        "bytes_per_s": nbytes / seconds,
        "sends": SENDS,
        "is_intact": sent == got,
    }


if __name__ == "__main__":
    die_with_parent(os.getppid())
    answer = measure(int(sys.argv[1]) if len(sys.argv) > 1 else -1)
    sys.stdout.write(json.dumps(answer) + "\n")

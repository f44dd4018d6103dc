"""The real transfer: KV of one process written into another by NIXL, bytes compared, rate told."""

from __future__ import annotations

from pdserve.doctor.children import ChildResult, run_module
from pdserve.doctor.finding import Finding, error, ok, warning

LOOPBACK_S = 60.0
SLOW_BYTES_PER_S = 0.3e9
"""Below what TCP over the loopback gives on one old core; shared memory gives several GB/s."""


def send_over_loopback(gpu: int = -1) -> ChildResult:
    """Run the transfer in a child process; ``gpu`` -1: host memory."""
    return run_module("pdserve.doctor.loopback_child", str(gpu), limit_s=LOOPBACK_S)


def judge_loopback(result: ChildResult, memory: str = "DRAM") -> list[Finding]:
    """``memory`` is DRAM or VRAM."""
    check = f"loopback {memory}"
    answer = result.json()
    if answer is None:
        return [
            error(
                check,
                f"KV cannot be sent between two processes here: {result.complaint(LOOPBACK_S)}",
                "every request of a P/D pair does exactly this",
                "see the findings on NIXL, UCX_TLS, UCX_NET_DEVICES and /dev/shm above; "
                "`python -m pdserve.doctor.loopback_child` shows the whole message",
            )
        ]
    if not answer["is_intact"]:
        return [
            error(
                check,
                "the bytes that arrived are not those that were sent",
                "answers would be wrong without any error",
                "do not serve on this machine; try UCX_TLS=tcp and report this",
            )
        ]
    rate = float(answer["bytes_per_s"])
    text = (
        f"{answer['nbytes'] / 2**20:.0f} MiB of KV in {answer['seconds'] * 1e3:.1f} ms, "
        f"{rate / 1e9:.2f} GB/s, bytes equal (fastest of {answer['sends']} sends)"
    )
    if rate < SLOW_BYTES_PER_S:
        return [
            warning(
                check,
                text,
                "slower than TCP over the loopback should be; every request waits for its KV",
                "look for UCX_TLS=tcp, a small /dev/shm, or a machine under load",
                **answer,
            )
        ]
    return [ok(check, text, **answer)]

"""The only importer of nixl: settings of its agent that its Python API does not offer.

NIXL's UCX progress thread polls with ``pthrDelay`` as its time-out and the
Python API hard-codes 0, so an idle agent burns a whole core. UCX's wake-up
events end the poll as soon as there is work; the delay only bounds the wait
when an event is missed (nixl 1.5.1, src/plugins/ucx/ucx_backend.cpp,
nixlUcxSharedThread::run).
"""

from __future__ import annotations

from typing import Any


def set_progress_delay(delay_us: int) -> None:
    """Let every NIXL agent made from now on in this process sleep up to ``delay_us`` between progress calls.

    Idempotent; the last value wins. 0 restores NIXL's own busy polling.
    """
    import nixl._api as api

    bindings = api.nixlBind
    original = getattr(bindings.nixlAgent, "pdserve_original", bindings.nixlAgent)

    def make_agent(name: str, config: Any) -> Any:
        config.pthrDelay = delay_us
        return original(name, config)

    make_agent.pdserve_original = original  # type: ignore[attr-defined]
    bindings.nixlAgent = make_agent

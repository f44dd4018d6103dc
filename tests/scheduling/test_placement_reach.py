"""A request may wait for the prefill server that holds its prefix, where queues are kept short."""

from __future__ import annotations

import json

import msgspec

from tests.support.virtual_admission import Desk, shape

PROMPT_TOKENS = 4000
SLO_S = 2.0


def prompt(name: str) -> bytes:
    return json.dumps(name * (4 * PROMPT_TOKENS // len(name))).encode()


def test_a_prefix_is_worth_a_longer_queue_and_nothing_else_is() -> None:
    desk = Desk(2, 1, policy="pair_cost", rate=10_000.0, slo_ttft_s=SLO_S)
    known = msgspec.structs.replace(shape(PROMPT_TOKENS), prompt=prompt("known"))
    first = desk.ask("first", known)
    holder = first.reservation.pair.prefill.worker_id
    desk.end(first)
    others = [
        desk.ask(f"other-{i}", msgspec.structs.replace(shape(6000), prompt=prompt(f"o{i}"))) for i in (1, 2)
    ]
    assert {asked.reservation.pair.prefill.worker_id for asked in others} == {"prefill-0", "prefill-1"}
    # Both queues hold 0.6 s of work, more than a quarter of the objective: no room but for the prefix.
    stranger = desk.ask("stranger", msgspec.structs.replace(shape(PROMPT_TOKENS), prompt=prompt("strange")))
    assert not stranger.outcomes
    desk.leave(stranger)
    again = desk.ask("again", known)
    assert again.reservation.pair.prefill.worker_id == holder
    assert again.reservation.choice.cached_tokens > PROMPT_TOKENS / 2


def test_a_policy_without_prefixes_waits_for_nobody() -> None:
    desk = Desk(2, 1, policy="round_robin", rate=10_000.0, slo_ttft_s=SLO_S)
    known = msgspec.structs.replace(shape(PROMPT_TOKENS), prompt=prompt("known"))
    desk.end(desk.ask("first", known))
    for i in (1, 2):
        desk.ask(f"other-{i}", shape(6000))
    assert not desk.ask("again", known).outcomes

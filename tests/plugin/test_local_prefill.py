"""A decode scheduler's queue of requests that it prefills itself: sizes of chunks, turns, who is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.config.worker_env import WorkerEnv
from pdserve.plugin.local_prefill import hooks
from pdserve.plugin.local_prefill.queue import (
    DUE_PASSES,
    FIRST_TOKENS,
    LEAST_TOKENS,
    ChunkRates,
    LocalQueue,
)
from pdserve.types import LOCAL_HOST, Role

ON = WorkerEnv(is_active=True, role=Role.DECODE, local_prefill=True)
BUDGET_S = 0.09


def _request(rid: str = "a", tokens: int = 100, **changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "rid": rid, "origin_input_ids": [1] * tokens, "output_ids": [], "prefix_len": 0,
        "bootstrap_host": LOCAL_HOST, "bootstrap_port": 90, "return_logprob": False, "logprob_start_len": -1,
        "session": None, "lora_id": None, "multimodal_inputs": None, "input_embeds": None, "beam_group": None,
        "return_hidden_states": False, "sampling_params": SimpleNamespace(max_new_tokens=50),
        "time_stats": SimpleNamespace(set_wait_queue_entry_time=lambda: None),
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def _prealloc(*waiting: bool, retracted: int = 0) -> SimpleNamespace:
    """SGLang's queue of requests from prefill servers; True: it waits for pages."""
    queue = [SimpleNamespace(waiting_for_input=is_waiting) for is_waiting in waiting]
    return SimpleNamespace(
        queue=queue, retracted_queue=[_request()] * retracted, num_reserved_decode_tokens=512
    )


def _server_args(**changes: Any) -> SimpleNamespace:
    values: dict[str, Any] = {
        "enable_mixed_chunk": True, "chunked_prefill_size": 2048, "speculative_algorithm": None, "dp_size": 1,
        "enable_dp_attention": False, "pp_size": 1, "enable_hisparse": False, "dllm_algorithm": None,
        "enable_priority_scheduling": False, "disable_priority_preemption": False,
        "disaggregation_decode_retraction_backup": None, "disaggregation_decode_host_receive_threshold": 1.0,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


class _Scheduler(SimpleNamespace):
    """What of SGLang's scheduler these hooks touch where no pass is planned."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(
            server_args=_server_args(), disaggregation_mode=SimpleNamespace(value="decode"), page_size=16,
            is_hybrid_swa=False, tree_cache=SimpleNamespace(supports_mamba=lambda: False),
            max_total_num_tokens=4096, chunked_req=None, **changes,
        )  # fmt: skip

    def _set_or_validate_priority(self, req: Any) -> bool:
        return True


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> _Scheduler:
    monkeypatch.setattr(hooks.WorkerEnv, "from_environ", lambda: ON)
    return _Scheduler()


# -- sizes of chunks ---------------------------------------------------------------------------------


def _run(rates: ChunkRates, passes: int, step_s: float, token_s: float, steps_between: bool) -> float:
    """Passes of a server whose step and tokens take so long; returns the seconds of the last one."""
    took_s = 0.0
    for _ in range(passes):
        tokens = rates.tokens(BUDGET_S, 8192)
        took_s = step_s + tokens * token_s
        rates.passed(took_s, 8, tokens)
        if steps_between:
            rates.passed(step_s, 8, 0)
    return took_s


def test_the_first_chunk_is_small() -> None:
    assert ChunkRates().tokens(BUDGET_S, 8192) == 2 * FIRST_TOKENS
    assert ChunkRates().tokens(BUDGET_S, 64) == 64


@pytest.mark.parametrize("steps_between", [True, False])
def test_passes_come_to_take_the_budget(steps_between: bool) -> None:
    rates = ChunkRates()
    rates.passed(0.03, 8, 0)
    assert _run(rates, 20, 0.03, 4e-5, steps_between) == pytest.approx(BUDGET_S, rel=0.05)


def test_a_step_that_has_grown_unseen_is_made_up_for() -> None:
    """Chunk follows chunk, so the step alone is timed no more while the batch and its context grow."""
    rates = ChunkRates()
    rates.passed(0.02, 8, 0)
    _run(rates, 20, 0.02, 4e-5, steps_between=False)
    assert _run(rates, 40, 0.06, 4e-5, steps_between=False) == pytest.approx(BUDGET_S, rel=0.05)


def test_a_step_beyond_the_budget_still_takes_a_few_tokens_along() -> None:
    rates = ChunkRates()
    for _ in range(5):
        rates.passed(0.2, 8, 0)
        rates.passed(0.21, 8, LEAST_TOKENS)
    assert rates.tokens(BUDGET_S, 8192) == LEAST_TOKENS


# -- turns ---------------------------------------------------------------------------------------------


def _waiting(passes: int, *requests: Any) -> LocalQueue:
    local = LocalQueue()
    local.waiting = list(requests)
    for _ in range(passes + 1):
        local.pass_by()
    return local


def test_a_local_prompt_begins_at_once_where_nobody_waits_for_pages() -> None:
    assert _waiting(0, _request()).may_begin(_prealloc(False, False))
    assert not _waiting(0).may_begin(_prealloc())


def test_who_waits_for_pages_goes_first_for_a_while() -> None:
    assert not _waiting(DUE_PASSES - 1, _request()).may_begin(_prealloc(False, True))
    assert _waiting(DUE_PASSES, _request()).may_begin(_prealloc(False, True))


def test_pages_are_kept_for_a_prompt_whose_turn_has_come() -> None:
    first = _request(tokens=700)
    assert _waiting(DUE_PASSES - 1, first).reserved_tokens(_prealloc(True), None) == 0
    assert _waiting(DUE_PASSES, first).reserved_tokens(_prealloc(True), None) == 750


def test_each_prompt_waits_its_own_turn() -> None:
    local = _waiting(DUE_PASSES, _request("a"), _request("b"))
    local.waiting.pop(0)
    local.pass_by()
    assert not local.may_begin(_prealloc(True))


def test_what_was_retracted_goes_before_all() -> None:
    local = _waiting(DUE_PASSES, _request())
    assert not local.may_begin(_prealloc(retracted=1))
    assert local.reserved_tokens(_prealloc(retracted=1), None) == 0


def test_the_rest_of_a_prompt_in_work_stays_reserved(scheduler: _Scheduler) -> None:
    scheduler.chunked_req = _request(tokens=1000, prefix_len=256)
    prealloc = _prealloc(True)
    prealloc.scheduler = scheduler
    assert hooks.leave_room(lambda *_, **__: 5000, prealloc, count_retracted=True) == 5000 - 744 - 512


# -- who is taken, who is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"return_logprob": True, "logprob_start_len": 100}, ""),
        ({"return_logprob": True, "logprob_start_len": 0}, "logprobs of the prompt"),
        ({"session": object()}, "session"),
        ({"lora_id": "x"}, "LoRA"),
        ({"multimodal_inputs": object()}, "images"),
        ({"input_embeds": [[0.0]]}, "embeddings"),
        ({"beam_group": object()}, "beam"),
        ({"return_hidden_states": True}, "hidden states"),
        ({"origin_input_ids": [1] * 4096}, "larger than the pool"),
    ],
)
def test_what_needs_a_prefill_server_is_refused_by_name(
    scheduler: _Scheduler, changes: dict[str, Any], why: str
) -> None:
    found = hooks.refused(scheduler, _request(**changes))
    assert (why in found) if why else not found


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"enable_mixed_chunk": False}, "--enable-mixed-chunk"),
        ({"chunked_prefill_size": -1}, "--chunked-prefill-size"),
        ({"speculative_algorithm": "EAGLE"}, "speculative"),
        ({"dp_size": 2}, "data parallelism"),
        ({"disaggregation_decode_retraction_backup": "none"}, "backup"),
        ({"enable_priority_scheduling": True}, "preempt"),
    ],
)
def test_a_server_that_cannot_says_why(changes: dict[str, Any], why: str) -> None:
    found = hooks.unsupported(_server_args(**changes), ON)
    assert (why in found) if why else not found


@pytest.mark.parametrize(
    "env",
    [
        WorkerEnv(is_active=True, role=Role.DECODE),
        WorkerEnv(is_active=True, role=Role.PREFILL, local_prefill=True),
        WorkerEnv(is_active=True, role=Role.DECODE, local_prefill=True, stock=True),
    ],
)
def test_it_is_off_unless_a_decode_server_is_told(env: WorkerEnv) -> None:
    assert hooks.unsupported(None, env)


def test_the_marked_request_waits_here_and_the_others_where_sglang_has_them(scheduler: _Scheduler) -> None:
    passed: list[Any] = []
    mine, theirs = _request("a"), _request("b", bootstrap_host="127.0.0.1")
    for req in (mine, theirs):
        hooks.queue_local(lambda _, req, retracted: passed.append((req, retracted)), scheduler, req)
    local = hooks.local_of(scheduler)
    assert local is not None
    assert (local.waiting, passed) == ([mine], [(theirs, False)])


def test_a_retracted_request_has_its_kv_and_waits_where_sglang_has_it(scheduler: _Scheduler) -> None:
    passed: list[Any] = []
    hooks.queue_local(lambda *args: passed.append(args[1:]), scheduler, req := _request(), is_retracted=True)
    assert passed == [(req, True)]


def test_a_paused_request_is_computed_again_with_its_answer_so_far(scheduler: _Scheduler) -> None:
    req = _request(output_ids=[7, 8], pd_rebootstrap_forced_output_id=9, pd_rebootstrap_in_progress=True)
    hooks.hold_local(
        lambda *_: pytest.fail("a prefill server was asked"), SimpleNamespace(scheduler=scheduler), req
    )
    local = hooks.local_of(scheduler)
    assert local is not None
    assert local.waiting == [req]
    assert (req.output_ids, req.pd_rebootstrap_in_progress) == ([7, 8, 9], False)


def test_waiting_prompts_are_work_but_hold_no_kv(scheduler: _Scheduler) -> None:
    hooks.queue_local(lambda *_: None, scheduler, _request())
    assert not hooks.is_idle(lambda *_, **__: True, scheduler)
    assert hooks.is_idle(lambda *_, **__: True, scheduler, ignore_waiting=True)


def test_loads_count_what_waits_and_what_is_in_work(scheduler: _Scheduler) -> None:
    hooks.queue_local(lambda *_: None, scheduler, _request(tokens=300))
    scheduler.chunked_req = _request(tokens=1000, prefix_len=256)
    snapshot = SimpleNamespace(num_waiting_reqs=1, num_waiting_uncached_tokens=0, num_total_tokens=50)
    inquirer = SimpleNamespace(
        disaggregation_mode=SimpleNamespace(value="decode"),
        get_disagg_decode_prealloc_queue=lambda: SimpleNamespace(scheduler=scheduler),
        get_chunked_req=lambda: scheduler.chunked_req,
    )
    told = hooks.count_local(lambda _: snapshot, inquirer)
    assert (told.num_waiting_reqs, told.num_waiting_uncached_tokens, told.num_total_tokens) == (3, 1044, 350)

"""Prefill on a decode server: a request that names LOCAL_HOST is computed here, a chunk in each pass.

    _add_request_to_queue ─ LOCAL_HOST ─► LocalQueue ─► chunk + decode step in one pass ─► … ─► running batch
                                              ▲                  │ KV is short
                                              └──────────────────┘

No prefill server takes part. SGLang 0.5.23 already ends a decode server's EXTEND batch as a plain server
does (scheduler.py, process_batch_result); what it lacks is a way to plan one. Off unless
PDSERVE_LOCAL_PREFILL is set: each function here then calls the original and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from pdserve.config.worker_env import WorkerEnv
from pdserve.plugin.local_prefill.queue import LocalQueue, most_tokens, tokens_left, uncached_tokens
from pdserve.types import LOCAL_HOST, Role

logger = logging.getLogger(__name__)


def unsupported(server_args: Any, env: WorkerEnv) -> str:
    """Why this server does not prefill by itself; empty if it does."""
    if not env.local_prefill or env.stock or env.role is not Role.DECODE:
        return "it is switched off"
    preempts = server_args.enable_priority_scheduling and not server_args.disable_priority_preemption
    checks = (
        (not server_args.enable_mixed_chunk, "chunk and decode step share no pass: --enable-mixed-chunk"),
        (server_args.chunked_prefill_size == -1, "chunks are switched off: --chunked-prefill-size"),
        (bool(server_args.speculative_algorithm), "speculative decoding"),
        (server_args.dp_size > 1 or server_args.enable_dp_attention, "data parallelism"),
        (server_args.pp_size > 1, "pipeline parallelism"),
        (server_args.enable_hisparse, "hisparse"),
        (bool(server_args.dllm_algorithm), "a diffusion model"),
        (preempts, "requests that preempt others by priority"),
        (server_args.disaggregation_decode_retraction_backup == "none", "retraction without backup"),
        (server_args.disaggregation_decode_host_receive_threshold < 1, "KV received in host memory"),
    )
    return next((why for is_so, why in checks if is_so), "")


def local_of(scheduler: Any) -> LocalQueue | None:
    """The queue of a scheduler that prefills by itself; None if it does not."""
    known = scheduler.__dict__
    if "_pdserve_local" not in known:
        env = WorkerEnv.from_environ()
        is_decode = scheduler.disaggregation_mode.value == "decode"
        why = unsupported(scheduler.server_args, env) if is_decode else "it is a prefill server"
        if not why and (scheduler.is_hybrid_swa or scheduler.tree_cache.supports_mamba()):
            why = "sliding windows or recurrent state"
        known["_pdserve_local"] = None if why else LocalQueue()
        known["_pdserve_local_off"] = why
        if why and is_decode and env.local_prefill:
            logger.warning("this decode server does not prefill requests itself: %s", why)
    local: LocalQueue | None = known["_pdserve_local"]
    return local


# -- requests come and go ------------------------------------------------------------------------


def queue_local(original: Callable[..., Any], scheduler: Any, req: Any, is_retracted: bool = False) -> Any:
    """AROUND ``Scheduler._add_request_to_queue``. A request with a grammar comes again when that is ready."""
    if is_retracted or req.bootstrap_host != LOCAL_HOST:
        return original(scheduler, req, is_retracted)
    local = local_of(scheduler)
    why = scheduler._pdserve_local_off if local is None else refused(scheduler, req)
    if local is None or why:
        _refuse(scheduler, req, f"this server does not prefill the request itself: {why}")
    elif scheduler._set_or_validate_priority(req):
        local.waiting.append(req)
        local.num_local += 1
        req.time_stats.set_wait_queue_entry_time()
    else:
        scheduler._release_aborted_request(req)
    return None


def refused(scheduler: Any, req: Any) -> str:
    """Why a request needs a prefill server; empty if it does not."""
    checks = (
        (req.return_logprob and req.logprob_start_len < len(req.origin_input_ids), "logprobs of the prompt"),
        (req.session is not None, "it belongs to a session"),
        (req.lora_id is not None, "a LoRA adapter"),
        (req.multimodal_inputs is not None, "images, audio or video"),
        (req.input_embeds is not None, "embeddings as input"),
        (req.beam_group is not None, "beam search"),
        (req.return_hidden_states, "hidden states"),
        (most_tokens(req) + 2 * scheduler.page_size > scheduler.max_total_num_tokens, "larger than the pool"),
    )
    return next((why for is_so, why in checks if is_so), "")


def _refuse(scheduler: Any, req: Any, message: str) -> None:
    from sglang.srt.disaggregation.utils import prepare_abort

    scheduler._release_aborted_request(req)
    prepare_abort(req, message, status_code=HTTPStatus.NOT_IMPLEMENTED)
    scheduler.output_streamer.stream_output([req], req.return_logprob)


def abort_local(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    """AROUND ``Scheduler.abort_request``, which by itself ends the one that a chunk was computed of."""
    local = local_of(scheduler)
    if local is not None and local.waiting:
        from sglang.srt.managers.scheduler import _make_abort_req

        for req in local.take_out(recv_req.rid, is_all=recv_req.abort_all):
            scheduler._release_aborted_request(req)
            scheduler.send_abort_output(_make_abort_req(req, finished_reason=recv_req.finished_reason), req)
    return original(scheduler, recv_req)


def hold_local(original: Callable[..., Any], prealloc: Any, req: Any) -> Any:
    """AROUND ``DecodePreallocQueue.hold_rebootstrap``: ``pause_generation`` with retraction.

    There is no prefill server to ask again: prompt and answer so far are computed here once more.
    """
    local = local_of(prealloc.scheduler)
    if local is None or req.bootstrap_host != LOCAL_HOST:
        return original(prealloc, req)
    forced = getattr(req, "pd_rebootstrap_forced_output_id", None)
    if forced is not None:
        req.output_ids.append(forced)
    req.pd_rebootstrap_forced_output_id = None
    req.pd_rebootstrap_in_progress = False
    local.waiting.append(req)
    return None


def is_idle(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    """AROUND ``Scheduler.is_fully_idle``. Those that wait hold no KV: a flush while paused may go on."""
    local = local_of(scheduler)
    is_waiting = local is not None and bool(local.waiting) and not kwargs.get("ignore_waiting")
    return bool(original(scheduler, *args, **kwargs)) and not is_waiting


def count_local(original: Callable[..., Any], inquirer: Any) -> Any:
    """AROUND ``SchedulerLoadInquirer.get_loads``: what waits here is in none of SGLang's queues."""
    snapshot = original(inquirer)
    if inquirer.disaggregation_mode.value != "decode":
        return snapshot
    local = local_of(inquirer.get_disagg_decode_prealloc_queue().scheduler)
    if local is not None:
        chunked = inquirer.get_chunked_req()
        waiting = uncached_tokens(local.waiting)
        snapshot.num_waiting_reqs += len(local.waiting) + (chunked is not None)
        snapshot.num_waiting_uncached_tokens += waiting + (0 if chunked is None else tokens_left(chunked))
        snapshot.num_total_tokens += waiting
    return snapshot


def leave_room(original: Callable[..., Any], prealloc: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``DecodePreallocQueue._allocatable_token_budgets``: what our requests are promised."""
    tokens, scheduler = original(prealloc, *args, **kwargs), prealloc.scheduler
    local = local_of(scheduler)
    return tokens if local is None else tokens - local.reserved_tokens(prealloc, scheduler.chunked_req)


# -- passes --------------------------------------------------------------------------------------


def next_batch(original: Callable[..., Any], scheduler: Any, running_batch: Any) -> Any:
    """AROUND ``get_next_disagg_decode_batch_to_run``: decode steps with a chunk in them where one waits."""
    local = local_of(scheduler)
    if local is None:
        return original(scheduler, running_batch)
    _time_pass(local, scheduler)
    if scheduler._pending_chunked_abort_req is not None:
        scheduler.process_pending_chunked_abort()  # stock decode never looks
    running_batch = _take_in(local, scheduler, running_batch)
    if scheduler.chunked_req is not None or local.waiting:
        plan = _plan_chunk(local, scheduler, running_batch)
        if plan is not None and plan.batch_to_run is not None:
            return plan
        running_batch = running_batch if plan is None else plan.running_batch
    # SGLang's join of requests whose KV has come asserts that no chunk is under way.
    chunked, scheduler.chunked_req = scheduler.chunked_req, None
    try:
        plan = original(scheduler, running_batch)
    finally:
        scheduler.chunked_req = chunked
    if plan.batch_to_run is not None:
        local.steps_since_chunk += 1
        local.last_pass = plan.batch_to_run.batch_size(), 0
    return plan


def _time_pass(local: LocalQueue, scheduler: Any) -> None:
    """The time since the last call is that of the pass planned then; with overlap, of the one before."""
    now_s = time.perf_counter()
    ended = local.pass_before if scheduler.enable_overlap else local.last_pass
    if ended is not None and local.last_pass is not None:
        local.rates.passed(now_s - local.planned_s, *ended)
    local.pass_before, local.last_pass, local.planned_s = local.last_pass, None, now_s


def _take_in(local: LocalQueue, scheduler: Any, running_batch: Any) -> Any:
    """The chunk that just ran keeps its KV with its request; who is through joins, as on a plain server."""
    last = scheduler.last_batch
    if last is None or not last.forward_mode.is_extend():
        return running_batch
    chunked = scheduler.chunked_req
    if chunked is not None and chunked.extend_end > chunked.prefix_len:
        scheduler.stash_chunked_request(chunked)
    last.filter_batch(reqs_to_exclude=[req for req in (chunked, last.chunked_req) if req is not None])
    if last.is_empty() or last is running_batch:
        return running_batch
    if running_batch.is_empty():
        return last
    running_batch.merge_batch(last)
    return running_batch


def _plan_chunk(local: LocalQueue, scheduler: Any, running_batch: Any) -> Any:
    """SGLang's own admission over our queue, for one chunk; None if this pass has none."""
    running_batch.filter_batch()
    if running_batch.is_empty():
        running_batch.batch_is_full = False
    num_running, chunked = running_batch.batch_size(), scheduler.chunked_req
    if chunked is not None and num_running and not running_batch.check_decode_mem():
        _set_aside(local, scheduler)
        return None
    if chunked is None:
        local.pass_by()
    may_begin = local.may_begin(scheduler.disagg_decode_prealloc_queue)
    if (chunked is None and not may_begin) or (num_running and not local.steps_since_chunk):
        return None
    tokens = _chunk_tokens(local, scheduler, num_running)
    if tokens <= 0:
        return None
    plan = _admit(local, scheduler, running_batch, tokens + num_running, may_begin=may_begin)
    batch = plan.batch_to_run
    if batch is not None:
        is_mixed = batch.forward_mode.is_mixed()
        # Requests whose KV has come join in a decode step; where none waits, chunk may follow chunk.
        local.steps_since_chunk = int(is_mixed and not scheduler.waiting_queue)
        local.last_pass = num_running, batch.extend_num_tokens - (num_running if is_mixed else 0)
    return plan


def _admit(local: LocalQueue, scheduler: Any, running_batch: Any, size: int, *, may_begin: bool) -> Any:
    """A request whose grammar gets ready meanwhile joins ``local.waiting``, which SGLang has in hand."""
    waiting, scheduler.waiting_queue = scheduler.waiting_queue, local.waiting if may_begin else []
    chunk, scheduler.chunked_prefill_size = scheduler.chunked_prefill_size, size
    try:
        return scheduler.get_new_batch_prefill(running_batch)
    finally:
        if may_begin:
            local.waiting = scheduler.waiting_queue
        scheduler.waiting_queue, scheduler.chunked_prefill_size = waiting, chunk


def _chunk_tokens(local: LocalQueue, scheduler: Any, num_running: int) -> int:
    """Whole pages, all ranks alike; 0 if there is no room for one beside the next decode step."""
    page, most = scheduler.page_size, scheduler.chunked_prefill_size
    if num_running:
        request = scheduler.chunked_req or local.waiting[0]
        most = _agreed(local.rates.tokens(request.bootstrap_port / 1000.0, most), scheduler)
    free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
    return int(min(max(most, page), free - num_running * page) // page * page)


def _agreed(tokens: int, scheduler: Any) -> int:
    """The least of all ranks: each has timed its own passes."""
    from sglang.srt.disaggregation.utils import all_reduce_flags
    from torch.distributed import ReduceOp

    return int(all_reduce_flags([tokens], scheduler.attn_tp_cpu_group, ReduceOp.MIN)[0])


def _set_aside(local: LocalQueue, scheduler: Any) -> None:
    """Give the KV of the prompt in work back before a running request is retracted."""
    from sglang.srt.managers.schedule_batch import retract_all

    last = scheduler.last_batch
    if scheduler.enable_overlap and last is not None and last.forward_mode.is_extend():
        return  # its result is still to come; it belongs to the prompt as it is
    req, scheduler.chunked_req = scheduler.chunked_req, None
    retract_all(
        reqs=[req],
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        hisparse_coordinator=None,
        offload_kv=False,
    )
    local.waiting.insert(0, req)

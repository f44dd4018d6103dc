"""Every SGLang hook target in one table, and the check that each one took.

SGLang only logs a plugin that fails, so a silent half-plugin would serve wrong
or slow. ``register`` therefore applies the table itself and ends the process
with one clear line when a target is missing or unchanged.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pdserve import SUPPORTED_SGLANG
from pdserve.config.worker_env import WorkerEnv
from pdserve.errors import ProtocolMismatch
from pdserve.types import Role

logger = logging.getLogger(__name__)

EXIT_HOOKS_FAILED = 78
"""Exit status of a process whose hooks did not take (EX_CONFIG of sysexits.h)."""


@dataclass(frozen=True, slots=True)
class HookTarget:
    """One place where SGLang is changed. ``replacement`` is ``module:name``, imported when applied."""

    path: str
    kind: str
    replacement: str
    why: str
    cpu_only: bool = False
    essential: bool = False
    """Kept in stock mode: without it SGLang does not serve on CPU at all."""
    layerwise: bool = False
    """Applied only where layers are sent as they come."""


HOOKS: tuple[HookTarget, ...] = (
    HookTarget(
        "sglang.srt.disaggregation.nixl.conn.NixlKVManager",
        "replace",
        "pdserve.plugin.backend:PdserveKVManager",
        "DRAM pools on CPU; ranks report to the bootstrap service; a lost service fails no request",
        essential=True,
    ),
    HookTarget(
        "sglang.srt.disaggregation.nixl.conn.NixlKVSender",
        "replace",
        "pdserve.plugin.backend:PdserveKVSender",
        "transfer counters",
    ),
    HookTarget(
        "sglang.srt.disaggregation.nixl.conn.NixlKVReceiver",
        "replace",
        "pdserve.plugin.backend:PdserveKVReceiver",
        "order-free completion and slab slots of the data plane",
    ),
    HookTarget(
        "sglang.srt.disaggregation.nixl.conn.NixlKVBootstrapServer",
        "replace",
        "pdserve.plugin.backend:PdserveKVBootstrapServer",
        "one bootstrap service for the fleet instead of one per prefill server",
    ),
    HookTarget(
        "sglang.srt.disaggregation.common.conn._get_bootstrap_session",
        "replace",
        "pdserve.plugin.patches:bootstrap_session",
        "a session is closed when its prefill has left, not kept for ever",
    ),
    HookTarget(
        "sglang.srt.managers.scheduler.Scheduler.on_idle",
        "around",
        "pdserve.plugin.idle:sleep_when_parked",
        "P/D loops spin while a request waits elsewhere; on a GPU they keep the core they have",
        cpu_only=True,
    ),
    HookTarget(
        "sglang.srt.managers.load_snapshot.shm_path_for",
        "replace",
        "pdserve.plugin.patches:snapshot_path_of_worker",
        "a killed server's load snapshot can be found and removed",
    ),
    HookTarget(
        "sglang.srt.entrypoints.http_server._freeze_gc_after_server_warmup",
        "around",
        "pdserve.plugin.patches:wait_until_listening",
        "a server must not join before its HTTP socket is open",
    ),
    HookTarget(
        "sglang.srt.managers.tokenizer_manager.SignalHandler.sigterm_handler",
        "around",
        "pdserve.plugin.membership:leave_before_draining",
        "a server that was told to stop is given no new requests",
    ),
    HookTarget(
        "sglang.srt.arg_groups.overrides._page_size_default",
        "around",
        "pdserve.plugin.patches:default_page_size",
        "on a GPU SGLang's pages of one token are a descriptor each",
    ),
    HookTarget(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.config_from_budget",
        "around",
        "pdserve.plugin.patches:leave_room_for_slab",
        "on a GPU the slab would take memory that a full chunk's activations need",
    ),
    HookTarget(
        "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool_allocator",
        "around",
        "pdserve.plugin.patches:name_forward_stream",
        "pages are not announced to prefill while a forward may still write them",
    ),
    HookTarget(
        "sglang.srt.managers.scheduler.Scheduler.run_batch",
        "around",
        "pdserve.plugin.layers:send_layers",
        "a layer's pages leave while the next layers compute",
        layerwise=True,
    ),
    HookTarget(
        "sglang.srt.mem_cache.pool_host.common._cuda_host_register",
        "replace",
        "pdserve.plugin.patches:skip_host_register",
        "page-locking host memory is a CUDA call",
        cpu_only=True,
        essential=True,
    ),
    HookTarget(
        "sglang.srt.mem_cache.pool_host.base.host_memory_budget_bytes",
        "around",
        "pdserve.plugin.patches:budget_of_this_machine",
        "a decode server needs no 10 GiB of free memory for the KV of requests that are set aside",
    ),
    HookTarget(
        "sglang.srt.entrypoints.engine._set_envs_and_config",
        "around",
        "pdserve.plugin.patches:fork_scheduler_processes",
        "children forked from a process that has imported everything start in milliseconds",
        cpu_only=True,
    ),
    HookTarget(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request",
        "around",
        "pdserve.plugin.resume.outputs:note_ids",
        "resume: token ids out of every stream the balancer asks for, and into a request that goes on",
    ),
    HookTarget(
        "sglang.srt.entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses",
        "around",
        "pdserve.plugin.resume.outputs:name_response",
        "resume: /v1/responses says its id before its first token",
    ),
    HookTarget(
        "sglang.srt.entrypoints.openai.serving_responses.random_uuid",
        "around",
        "pdserve.plugin.resume.outputs:name_item",
        "resume: items of /v1/responses keep their ids on another server",
    ),
    HookTarget(
        "sglang.srt.managers.scheduler.Scheduler._create_generation_req",
        "around",
        "pdserve.plugin.resume.scheduler:create_resumed",
        "resume: prefill computes prompt and emitted tokens, decode begins behind them",
    ),
    HookTarget(
        "sglang.srt.disaggregation.decode.DecodePreallocQueue.add",
        "around",
        "pdserve.plugin.resume.scheduler:add_resumed",
        "resume: the grammar takes the emitted tokens; the request waits as one that was retracted",
    ),
    HookTarget(
        "sglang.srt.disaggregation.decode.DecodePreallocQueue._submit_prefill_recompute",
        "around",
        "pdserve.plugin.resume.scheduler:skip_recompute",
        "resume: the balancer has sent prefill its leg",
    ),
    HookTarget(
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_prebuilt",
        "around",
        "pdserve.plugin.resume.penalties:replay_penalties",
        "penalties and min_new_tokens count what was emitted before; SGLang forgets it when it retracts",
    ),
    HookTarget(
        "sglang.srt.sampling.penaltylib.repetition_penalty.apply_scaling_penalties",
        "replace",
        "pdserve.plugin.resume.penalties:scale_logits",
        "the first repetition penalty stops a CPU server for 19 s: torch.compile",
        cpu_only=True,
    ),
    HookTarget(
        "sglang.srt.managers.scheduler.Scheduler.init_disaggregation",
        "around",
        "pdserve.plugin.resume.penalties:warm_scaling",
        "on a GPU the same is compiled at start",
    ),
    HookTarget(
        "sglang.srt.utils.watchdog.SubprocessWatchdog.start",
        "around",
        "pdserve.plugin.children:watch_children",
        "a crashed scheduler closes the server's connections at once, not after seconds of silence",
    ),
    HookTarget(
        "sglang.srt.managers.scheduler.Scheduler._add_request_to_queue",
        "around",
        "pdserve.plugin.local_prefill.hooks:queue_local",
        "local prefill: a request that names LOCAL_HOST waits for no prefill server",
    ),
    HookTarget(
        "sglang.srt.disaggregation.decode.SchedulerDisaggregationDecodeMixin.get_next_disagg_decode_batch_to_run",
        "around",
        "pdserve.plugin.local_prefill.hooks:next_batch",
        "local prefill: decode's loop plans no prefill chunks",
    ),
    HookTarget(
        "sglang.srt.managers.scheduler.Scheduler.abort_request",
        "around",
        "pdserve.plugin.local_prefill.hooks:abort_local",
        "local prefill: SGLang does not know the queue",
    ),
    HookTarget(
        "sglang.srt.managers.scheduler.Scheduler.is_fully_idle",
        "around",
        "pdserve.plugin.local_prefill.hooks:is_idle",
        "local prefill: SGLang does not know the queue",
    ),
    HookTarget(
        "sglang.srt.managers.scheduler_components.load_inquirer.SchedulerLoadInquirer.get_loads",
        "around",
        "pdserve.plugin.local_prefill.hooks:count_local",
        "local prefill: SGLang does not know the queue",
    ),
    HookTarget(
        "sglang.srt.disaggregation.decode.DecodePreallocQueue._allocatable_token_budgets",
        "around",
        "pdserve.plugin.local_prefill.hooks:leave_room",
        "local prefill: requests from prefill servers leave a local prompt its KV",
    ),
    HookTarget(
        "sglang.srt.disaggregation.decode.DecodePreallocQueue.hold_rebootstrap",
        "around",
        "pdserve.plugin.local_prefill.hooks:hold_local",
        "local prefill: no prefill server can compute a local request's KV again",
    ),
)


def register() -> None:
    """Entry point ``sglang.srt.plugins``: apply every hook and check it, or end the process.

    Does nothing unless pdserve's launcher asked for it (``PDSERVE_ACTIVE=1``).
    """
    env = WorkerEnv.from_environ()
    if not env.is_active:
        return
    try:
        check_sglang_version(importlib.import_module("sglang.version").__version__)
        apply_hooks(wanted_hooks(env), on_cpu=not _has_cuda())
    except Exception as exc:
        # SGLang would log this and serve without us: stop here instead.
        logger.error("pdserve plugin could not be applied: %s", exc)
        sys.stderr.write(f"pdserve: plugin could not be applied: {exc}\n")
        sys.stderr.flush()
        os._exit(EXIT_HOOKS_FAILED)


def wanted_hooks(env: WorkerEnv) -> tuple[HookTarget, ...]:
    """What the worker's environment asks for."""
    plane = env.data_plane
    is_layerwise = plane.is_on and plane.layerwise != "off" and env.role is not Role.DECODE
    return tuple(
        hook for hook in HOOKS if hook.essential or not (env.stock or (hook.layerwise and not is_layerwise))
    )


def check_sglang_version(found: str) -> None:
    """Raise ProtocolMismatch unless ``found`` is the release whose internals the hooks name."""
    if found != SUPPORTED_SGLANG:
        raise ProtocolMismatch(
            f"SGLang {found} is installed but this pdserve hooks into SGLang {SUPPORTED_SGLANG}; "
            f"install sglang=={SUPPORTED_SGLANG}"
        )


def apply_hooks(hooks: tuple[HookTarget, ...], *, on_cpu: bool) -> None:
    """Register ``hooks`` with SGLang, apply them, and verify that each target changed.

    Raises:
        ProtocolMismatch: naming the first target that is missing or did not change.
    """
    registry = importlib.import_module("sglang.srt.plugins.hook_registry")
    wanted = [hook for hook in hooks if on_cpu or not hook.cpu_only]
    before = {hook.path: _resolve(hook.path) for hook in wanted}
    for hook in wanted:
        registry.HookRegistry.register(hook.path, load(hook.replacement), registry.HookType(hook.kind))
    registry.HookRegistry.apply_hooks()
    for hook in wanted:
        if _resolve(hook.path) is before[hook.path]:
            raise ProtocolMismatch(f"hook on {hook.path} did not take ({hook.why})")
    logger.info("pdserve plugin active: %d hooks applied and checked", len(wanted))


def load(reference: str) -> Callable[..., Any]:
    """Import ``module:name``."""
    module, _, name = reference.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return loaded


def _resolve(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as exc:
        raise ProtocolMismatch(f"hook target {path} does not exist in this SGLang: {exc}") from exc


def _has_cuda() -> bool:
    torch = importlib.import_module("torch")
    return bool(torch.cuda.is_available())

"""Layer by layer: a layer's pages leave prefill while the next layers compute.

    run_batch ──► SGLang's send of the batch's pages, before the forward, with a LayerClock
      attention of layer n returns ──► clock.mark(n) ──► the outbox writes what lies below
    run_batch is over ──► clock.end(): whatever no mark has told is there now
    SGLang's send at its usual place ──► the prompt's last page and the metadata row

A layer counts when its attention has returned and those before it have: its K and V rows
are written by then. On a GPU "returned" is an event of the forward stream, which is asked
for and never waited for. A forward that fails ends as a failed transfer.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from pdserve.errors import RegistrationFailed

logger = logging.getLogger(__name__)


class LayerClock:
    """How far one forward pass has come. The scheduler's thread tells it, the outbox's asks."""

    def __init__(self, num_layers: int, record: Callable[[], Callable[[], bool]]) -> None:
        """``record`` marks the present point of the forward; its result tells whether that has passed."""
        self._num_layers = num_layers
        self._record = record
        self._num_marked = 0
        self._num_done = 0
        self._marks: deque[tuple[int, Callable[[], bool]]] = deque()
        self._failure = ""

    def mark(self, layer: int) -> None:
        """The attention of ``layer`` has been called. One that is out of turn is told by ``end``."""
        if layer == self._num_marked < self._num_layers:
            self._add(layer + 1)

    def end(self) -> None:
        """The forward has been called as a whole."""
        if self._num_marked < self._num_layers:
            self._add(self._num_layers)

    def fail(self, reason: str) -> None:
        """The forward failed: what it has not filled will never be."""
        self._failure = reason

    def num_done(self) -> int:
        """Layers that are filled.

        Raises:
            RuntimeError: if the forward failed.
        """
        if self._failure:
            raise RuntimeError(self._failure)
        while self._marks and self._marks[0][1]():
            self._num_done = self._marks.popleft()[0]
        return self._num_done

    def _add(self, num_layers: int) -> None:
        self._num_marked = num_layers
        self._marks.append((num_layers, self._record()))


def hidden_layers(config: Any, spec: Any, *, is_mla: bool, num_regions: int, num_layers: int) -> str:
    """Why layers cannot be told apart while a forward runs; empty when they can.

    Args:
        config, spec: SGLang's resolved configuration, ``get_exec()`` and ``get_spec()``.
        num_regions: of this rank's pools, a draft model's included.
        num_layers: of the model.
    """
    graphs = config.graph.cuda_graph_config
    checks = (
        (graphs and graphs.prefill.backend == "full", "a full prefill graph runs all layers as one"),
        (is_mla, "MLA attention may be called more than once a layer"),
        (spec.speculative_algorithm, "speculative decoding may run layers again"),
        (num_regions != 2 * num_layers, "the KV pools are not two for each layer of the model"),
        (config.overlap.enable_two_batch_overlap, "two batches overlap in one forward"),
    )
    return next((reason for is_so, reason in checks if is_so), "")


def sends_layers(wanted: str, reason: str, *, is_gpu: bool) -> bool:
    """Whether a prefill rank sends layer by layer.

    Args:
        wanted: ``--layerwise``.
        reason: of ``hidden_layers``.

    Raises:
        RegistrationFailed: naming the reason, if it was asked for and cannot be.
    """
    if wanted == "on" and reason:
        raise RegistrationFailed(f"--layerwise on: {reason}; use off, or auto")
    if wanted == "auto" and reason:
        logger.info("KV is not sent layer by layer: %s", reason)
    return wanted == "on" or (wanted == "auto" and is_gpu and not reason)


def send_layers(original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``Scheduler.run_batch``: open the transfers of a prefill batch before its forward runs."""
    clock = _open_transfers(scheduler, batch)
    if clock is None:
        return original(scheduler, batch, *args, **kwargs)
    backend = scheduler.tp_worker.model_runner.attn_backend
    # On the instance: nine backends override forward, and under a breakable prefill graph the replay calls
    # it from the inner body, not from RadixAttention.
    backend.forward = functools.partial(_attend, backend.forward, clock)
    try:
        result = original(scheduler, batch, *args, **kwargs)
        clock.end()
    except BaseException as exc:
        clock.fail(f"forward pass failed: {exc}")
        raise
    finally:
        del backend.forward
    return result


def _attend(
    original: Callable[..., Any],
    clock: LayerClock,
    q: Any,
    k: Any,
    v: Any,
    layer: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    result = original(q, k, v, layer, *args, **kwargs)
    clock.mark(layer.layer_id)
    return result


def _open_transfers(scheduler: Any, batch: Any) -> LayerClock | None:
    """Hand the batch's new pages over; None if none goes layer by layer.

    Called where SGLang hands over what a batch finds in the cache, on the schedule stream.
    """
    queue = getattr(scheduler, "disagg_prefill_bootstrap_queue", None)
    plane = None if queue is None else getattr(queue.kv_manager, "prefill_plane", None)
    # While pages are loaded back from host memory, SGLang sends none of them early either.
    if plane is None or not plane.sends_layers or batch.hicache_consumer_index >= 0:
        return None
    # Nor when pages may be moved under a transfer (unified memory).
    if batch.forward_mode.name != "EXTEND" or scheduler.enable_unified_memory:
        return None
    clock = LayerClock(plane.num_layers, plane.recorder(_forward_stream(scheduler, is_gpu=plane.is_gpu)))
    rooms = [req for req in batch.reqs if _open_room(scheduler, req, plane, clock)]
    return clock if rooms else None


def _open_room(scheduler: Any, req: Any, plane: Any, clock: LayerClock) -> bool:
    if req.pending_bootstrap or not plane.serves(req.bootstrap_room):
        return False
    scheduler.maybe_send_cached_prefix_chunk(req, allow_send=True)
    size, prompt = scheduler.token_to_kv_pool_allocator.page_size, len(req.origin_input_ids)
    # A prompt's last page stays for SGLang's own last send, which carries the metadata row.
    end = (prompt - 1 if req.extend_end >= prompt else req.extend_end) // size * size
    if end <= req.start_send_idx:
        return False
    sender = req.disagg_kv_sender
    sender._early_send_wait_event = clock
    scheduler.send_kv_chunk(req, last_chunk=False, end_idx=end)
    is_taken = sender._early_send_wait_event is None
    sender._early_send_wait_event = None
    if is_taken:
        sender._transfer_start_time = (
            None  # the time of a transfer counts from the next send: no forward is in it
        )
    return is_taken


def _forward_stream(scheduler: Any, *, is_gpu: bool) -> Any:
    if not is_gpu:
        return None
    if scheduler.enable_overlap:
        return scheduler.forward_stream
    import torch

    return torch.cuda.current_stream()

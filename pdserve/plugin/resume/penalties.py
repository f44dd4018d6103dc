"""Penalties that count tokens emitted before this batch: elsewhere, or before SGLang retracted the request.

SGLang starts them at zero for every request that enters a batch (sampling/penaltylib, ``_prepare``),
and so forgets them when it retracts one and takes it up again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.sampling.penaltylib import (
    BatchedFrequencyPenalizer,
    BatchedMinNewTokensPenalizer,
    BatchedPresencePenalizer,
    BatchedRepetitionPenalizer,
)


def replay_penalties(original: Callable[..., Any], batch: Any) -> Any:
    """AROUND ``ScheduleBatch.prepare_for_prebuilt``: feed the penalizers what each request has emitted.

    All but its last token, which ``prepare_for_decode`` adds as it does for every request.
    """
    result = original(batch)
    orchestrator = batch.sampling_info.penalizer_orchestrator
    for row, req in enumerate(batch.reqs):
        req.pdserve_resume = None  # should SGLang retract it from now on, then as any other
        if orchestrator.is_required and len(req.output_ids) > 1:
            ids = torch.tensor(list(req.output_ids[:-1]), dtype=torch.int64, device=batch.device)
            for penalizer in orchestrator.penalizers.values():
                if penalizer.is_prepared():
                    replay_row(penalizer, row, ids)
    return result


def replay_row(penalizer: Any, row: int, ids: torch.Tensor) -> None:
    """Bring one request's ``row`` to where ``len(ids)`` decode steps would have brought it.

    Args:
        penalizer: one of SGLang's four, prepared.
        row: place of the request in the batch.
        ids: ``[n]`` int64, its output tokens in order, on the penalizer's device.

    Raises:
        TypeError: for a penalizer that SGLang 0.5.23 does not have.
    """
    match penalizer:
        case BatchedFrequencyPenalizer():
            # In order and one by one: the same sums, and so the same rounding, as the steps would have made.
            penalty = penalizer.frequency_penalties[row, 0]
            sums = penalizer.cumulated_frequency_penalties[row]
            unique, counts = torch.unique(ids, return_counts=True)
            left = counts.clone()
            while bool((left > 0).any()):
                sums[unique[left > 0]] += penalty
                left -= 1
        case BatchedPresencePenalizer():
            penalizer.cumulated_presence_penalties[row, ids] = penalizer.presence_penalties[row, 0]
        case BatchedRepetitionPenalizer():
            penalizer.cumulated_repetition_penalties[row, ids] = penalizer.repetition_penalties[row, 0]
        case BatchedMinNewTokensPenalizer():
            penalizer.len_output_tokens[row] += len(ids)
        case _:
            raise TypeError(f"unknown penalizer {type(penalizer).__name__}")


def scale_logits(logits: torch.Tensor, scaling_penalties: torch.Tensor) -> None:
    """REPLACE for ``apply_scaling_penalties`` on CPU: the same values without torch.compile.

    SGLang compiles this one line at the first request with a repetition penalty,
    and a CPU server stands still for 19 s meanwhile. Both tensors are ``[batch, vocab]``.
    """
    logits.copy_(torch.where(logits < 0, logits * scaling_penalties, logits / scaling_penalties))


def warm_scaling(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``Scheduler.init_disaggregation``: compile ``apply_scaling_penalties`` now, on a GPU.

    For one request and for several, which torch.compile treats as two shapes.
    """
    result = original(scheduler, *args, **kwargs)
    device = torch.device(scheduler.device)
    if scheduler.disaggregation_mode.value == "decode" and device.type == "cuda":
        from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties

        for size in (1, 2, 3):
            logits = torch.ones((size, scheduler.model_config.vocab_size), device=device)
            apply_scaling_penalties(logits, torch.ones_like(logits))
    return result

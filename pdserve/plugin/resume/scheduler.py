"""In the scheduler: a request that another server began is taken in as SGLang's own "rebootstrap".

    prefill  computes prompt and emitted tokens but the last one; what it samples is thrown away
    decode   receives that KV, takes the last emitted token for the first one, and decodes on

A rebootstrap is how SGLang 0.5.23 brings a retracted request back (disaggregation/decode.py).
"""

from __future__ import annotations

import array
import copy
import json
from collections.abc import Callable
from typing import Any

from sglang.srt.disaggregation.utils import is_aborted

from pdserve.plugin.resume.outputs import FIELD, LOGPROBS_FIELD


def create_resumed(
    original: Callable[..., Any], scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND ``Scheduler._create_generation_req``: the request with what it has emitted elsewhere."""
    req = original(scheduler, recv_req, *args, **kwargs)
    custom = req.sampling_params.custom_params
    ids = custom.get(FIELD) if isinstance(custom, dict) else None
    if not ids:
        return req
    params = req.sampling_params = copy.copy(req.sampling_params)
    kept = {name: value for name, value in custom.items() if name not in (FIELD, LOGPROBS_FIELD)}
    params.custom_params = kept or None
    match scheduler.disaggregation_mode.value:
        case "prefill":
            _extend_prompt(scheduler, req, ids)
        case "decode":
            _begin_after(scheduler, req, ids, custom.get(LOGPROBS_FIELD))
    return req


def _extend_prompt(scheduler: Any, req: Any, ids: list[int]) -> None:
    size = len(req.origin_input_ids) + len(ids) - 1
    if size >= scheduler.max_req_input_len:
        req.set_finish_with_abort(
            f"cannot resume: prompt and answer so far are {size} tokens, "
            f"this server prefills fewer than {scheduler.max_req_input_len}"
        )
        return
    req.origin_input_ids = req.origin_input_ids + array.array("q", ids[:-1])
    req.origin_input_ids_unpadded = req.origin_input_ids
    params = req.sampling_params
    params.json_schema = params.regex = params.ebnf = params.structural_tag = None


def _begin_after(scheduler: Any, req: Any, ids: list[int], logprobs: str | None) -> None:
    req.pdserve_resume = list(ids)
    req.output_ids = array.array("q", ids[:-1])
    req.pd_rebootstrap_forced_output_id = ids[-1]
    req.pd_rebootstrap_in_progress = True
    if req.return_logprob:
        _restore_logprobs(req.logprob, ids, json.loads(logprobs) if logprobs else [[], [], []])
    scheduler.batch_result_processor._maybe_update_reasoning_tokens(req, list(ids))


def _restore_logprobs(into: Any, ids: list[int], rows: list[Any]) -> None:
    """One row per token, for SGLang counts rows."""
    values, tops, asked = rows
    into.output_token_logprobs_val.extend(values or [0.0] * len(ids))
    into.output_token_logprobs_idx.extend(ids)
    for name, pairs in (("top", tops), ("token_ids", asked)):
        pairs = pairs or [[] for _ in ids]
        getattr(into, f"output_{name}_logprobs_val").extend([[item[0] for item in row] for row in pairs])
        getattr(into, f"output_{name}_logprobs_idx").extend([[item[1] for item in row] for row in pairs])


def add_resumed(original: Callable[..., Any], queue: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``DecodePreallocQueue.add``: here the grammar is compiled, and the request not yet admitted."""
    ids = getattr(req, "pdserve_resume", None)
    if ids is None or is_aborted(req):
        return original(queue, req, *args, **kwargs)
    if req.grammar is not None and req.grammar.current_token is None:
        try:
            replay_grammar(req, ids)
        except ValueError as exc:
            req.set_finish_with_abort(f"cannot resume: {exc}")
            return original(queue, req, *args, **kwargs)
    kwargs["is_rebootstrap"] = True
    return original(queue, req, *args, **kwargs)


def replay_grammar(req: Any, ids: list[int]) -> None:
    """Have the request's grammar accept its tokens, the last one too, which process_prebuilt then skips.

    Raises:
        ValueError: if it does not.
    """
    for token in ids:
        req.grammar.accept_token(token)


def skip_recompute(original: Callable[..., Any], queue: Any, decode_req: Any) -> Any:
    """AROUND ``DecodePreallocQueue._submit_prefill_recompute``: the balancer has sent prefill its leg."""
    if getattr(decode_req.req, "pdserve_resume", None) is not None:
        return None
    return original(queue, decode_req)

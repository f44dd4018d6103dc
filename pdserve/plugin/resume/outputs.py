"""In the HTTP process: what TokenizerManager yields is noted, and a resumed request is given its tokens.

All routes ask ``TokenizerManager.generate_request``. Here the balancer's field of the body becomes
``custom_params`` of the request, which is how it gets to the scheduler (scheduler.py), and each
output becomes a word of the log (log.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from pdserve.plugin.resume.log import (
    ABORTED,
    NOT_RESUMABLE,
    RID,
    Log,
    Run,
    Step,
    join_rows,
    logprob_rows,
    output_word,
    parse_log,
)
from pdserve.plugin.resume.replay import Output, Replay
from pdserve.plugin.resume.sse import Stream, current_stream

FIELD = "pdserve_resume"
"""Of the HTTP body, and of ``custom_params`` between SGLang's processes: the emitted token ids."""
LOGPROBS_FIELD = "pdserve_resume_logprobs"
"""Of ``custom_params``: their log probabilities as JSON (log.py, ``logprob_rows``)."""
REPEATING_ROUTES = ("/generate", "/vertex_generate")
"""Here each frame carries the whole text so far, unless SGLang streams incrementally."""

_STATE_ELSEWHERE = {
    "input_embeds": "input_embeds",
    "image_data": "multimodal",
    "video_data": "multimodal",
    "audio_data": "multimodal",
    "session_params": "session",
    "session_id": "session",
    "custom_logit_processor": "custom_logit_processor",
    "max_thinking_tokens": "thinking_budget",
    "return_hidden_states": "hidden_states",
    "return_routed_experts": "routed_experts",
    "return_indexer_topk": "indexer_topk",
    "return_sampling_mask": "sampling_mask",
}
"""Fields of GenerateReqInput that ask for more than tokens can bring back, and the name for it."""


def note_ids(original: Callable[..., Any], manager: Any, obj: Any, request: Any = None) -> Any:
    """AROUND ``TokenizerManager.generate_request``: tokens in for a resumed request, words out for all."""
    if _holds_private(obj):
        return _refuse(f"{FIELD} in custom_params is not a client's to set")
    stream = current_stream()
    if stream is None or request is None or not hasattr(obj, "sampling_params"):
        return original(manager, obj, request)
    return _noted(original, manager, obj, request, stream)


def name_response(original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``create_responses``: note the answer's id, which is in frames before its first token."""
    stream = current_stream()
    if stream is not None and RID.fullmatch(request.request_id) and _is_decode(serving.tokenizer_manager):
        stream.name((request.request_id,))
    return original(serving, request, *args, **kwargs)


def name_item(original: Callable[..., str]) -> str:
    """AROUND ``random_uuid`` of /v1/responses: the same item gets the same id on every leg of an answer."""
    stream = current_stream()
    if stream is None or not (stream.client_rids or stream.rids):
        return original()
    stream.num_item_ids += 1
    name = f"{(stream.client_rids or stream.rids)[0]}/{stream.num_item_ids}"
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def _is_decode(manager: Any) -> bool:
    return str(manager.server_args.disaggregation_mode) == "decode"


def not_resumable(manager: Any, obj: Any) -> str:
    """Why this request could not go on elsewhere, in one word; empty if it could."""
    if getattr(manager.server_args, "speculative_algorithm", None):
        return "speculation"
    for name, reason in _STATE_ELSEWHERE.items():
        value = getattr(obj, name, None)
        if any(value) if isinstance(value, list) else value is not None and value is not False:
            return reason
    params = obj.sampling_params
    for sampling in params if isinstance(params, list) else (params or {},):
        if sampling.get("beam_width") not in (None, 0, 1):
            return "beam"
        if sampling.get("n") not in (None, 1):
            return "samples"
    rids = obj.rid if isinstance(obj.rid, list) else [obj.rid]
    return "" if all(rid is None or RID.fullmatch(rid) for rid in rids) else "rid"


def _rids(obj: Any) -> tuple[str, ...]:
    rids = obj.rid if isinstance(obj.rid, list) else [obj.rid]
    return tuple(rids) if all(isinstance(rid, str) and RID.fullmatch(rid) for rid in rids) else ()


async def _refuse(why: str) -> AsyncIterator[Output]:
    raise ValueError(why)
    yield {}


def _holds_private(obj: Any) -> bool:
    params = getattr(obj, "sampling_params", None)
    for sampling in params if isinstance(params, list) else (params,):
        custom = sampling.get("custom_params") if isinstance(sampling, dict) else None
        if isinstance(custom, dict) and (FIELD in custom or LOGPROBS_FIELD in custom):
            return True
    return False


async def _noted(
    original: Callable[..., Any], manager: Any, obj: Any, request: Any, stream: Stream
) -> AsyncIterator[Output]:
    take: Callable[[Output], list[Output]] | None = None
    try:
        if not stream.has_begun:
            notes = await _begin(manager, obj, request, stream)
            take = None if notes is None else notes.take
        elif _is_decode(manager):
            stream.words.append(f"{NOT_RESUMABLE}calls")
        async with contextlib.aclosing(original(manager, obj, request)) as outputs:
            async for output in outputs:
                for each in take(output) if take else (output,):
                    yield each
    except Exception as exc:  # its route makes a frame of it
        stream.hear()
        if _is_decode(manager):
            stream.words.append(f"{ABORTED}{400 if isinstance(exc, ValueError) else 500}")
        raise


async def _begin(manager: Any, obj: Any, request: Any, stream: Stream) -> _Notes | None:
    """Give a resumed request its tokens; return what notes the outputs of a stream, None if nothing does."""
    resume = await _resume_of(request) if stream.is_resumed else None
    reason = not_resumable(manager, obj)
    if resume is not None:
        if reason:
            raise ValueError(f"this request cannot be resumed: {reason}")
        _give_tokens(manager, obj, resume.log)
    stream.has_begun = True
    if not (obj.stream and _is_decode(manager)):
        return None
    stream.name(_rids(obj))
    if reason:
        stream.words.append(NOT_RESUMABLE + reason)
    return _Notes(manager, obj, request, stream, resume)


# -- a resumed request ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Resume:
    log: Log
    frames: int


async def _resume_of(request: Any) -> _Resume:
    body = await request.json()  # Starlette keeps it: the route has read it already
    field = body.get(FIELD) if isinstance(body, dict) else None
    log, frames = (field.get("log"), field.get("frames")) if isinstance(field, dict) else (None, None)
    if not isinstance(log, str) or not isinstance(frames, int) or frames < 0:
        raise ValueError(f'{FIELD} must be {{"log": text, "frames": number}}')
    return _Resume(parse_log(log), frames)


def _give_tokens(manager: Any, obj: Any, log: Log) -> None:
    """Write each run's tokens into its request.

    Raises:
        ValueError: if they cannot be this request's.
    """
    size = len(obj.rid) if isinstance(obj.rid, list) else 1
    vocab_size = int(manager.model_config.vocab_size)
    for index, run in log.runs.items():
        if not 0 <= index < size:
            raise ValueError(f"{FIELD}: its log is of run {index}, the request has {size}")
        if any(not 0 <= token < vocab_size for token in run.ids):
            raise ValueError(f"{FIELD}: token ids must be below {vocab_size}")
    if set(_rids(obj)) & set(log.rids):
        # SGLang aborts by rid 2 s after each stream's end (create_abort_task), so also after a former leg's.
        raise ValueError(f"{FIELD}: each leg needs a new rid")
    params = obj.sampling_params
    if not isinstance(obj.rid, list):
        obj.sampling_params = _with_tokens(params or {}, log.runs.get(0))
        return
    each = params if isinstance(params, list) else [params or {}] * size
    obj.sampling_params = [_with_tokens(item, log.runs.get(index)) for index, item in enumerate(each)]


def _with_tokens(params: dict[str, Any], run: Run | None) -> dict[str, Any]:
    if run is None or not run.ids:
        return params
    custom = {**(params.get("custom_params") or {}), FIELD: run.ids}
    if run.logprobs:
        custom[LOGPROBS_FIELD] = json.dumps(join_rows(run.logprobs))
    return {**params, "custom_params": custom}


# -- words ---------------------------------------------------------------------------------------


class _Notes:
    """Makes a word of every output of one request, and replays what its log knows."""

    def __init__(self, manager: Any, obj: Any, request: Any, stream: Stream, resume: _Resume | None) -> None:
        self._is_incremental = bool(manager.incremental_streaming_output)
        is_repeating = not self._is_incremental and request.scope["path"] in REPEATING_ROUTES
        self._has_rows = bool(obj.return_logprob)
        self._stream = stream
        log = self._log = resume.log if resume else Log()
        self._replay: Replay | None = None
        if resume:
            self._replay = Replay(log, is_incremental=self._is_incremental, is_repeating=is_repeating)
            stream.resume(0 if is_repeating else resume.frames, log.rids, log.created)
        self._seen = {index: (len(run.ids), run.chars) for index, run in log.runs.items()}

    def take(self, output: Output) -> list[Output]:
        """Return what to hand on for ``output``; its words wait in the stream for the next frame."""
        meta = output["meta_info"]
        finish = meta.get("finish_reason") or {}
        if finish.get("type") == "abort":
            self._stream.hear()
            self._stream.words.append(f"{ABORTED}{int(finish.get('status_code') or 0)}")
            return [output]
        if self._replay is None:
            self._note(output)
            return [output]
        run = self._log.runs.get(output.get("index", 0))
        if run is not None and run.cached is not None and "cached_tokens" in meta:
            meta["cached_tokens"] = run.cached
        outputs = []
        for each, is_known in self._replay.feed(output):
            if not is_known:
                self._note(each)
            outputs.append(each)
        return outputs

    def _note(self, output: Output) -> None:
        ids, text, meta = output["output_ids"], output.get("text") or "", output["meta_info"]
        run = output.get("index", 0)
        num_ids, num_chars = self._seen.get(run) or (0, 0)
        cached = meta.get("cached_tokens") if run not in self._seen else None
        fresh, chars = (ids, len(text)) if self._is_incremental else (ids[num_ids:], len(text) - num_chars)
        self._seen[run] = num_ids + len(fresh), num_chars + chars
        rows = None
        if self._has_rows and "output_token_logprobs" in meta:
            rows = logprob_rows(meta, 0 if self._is_incremental else num_ids)
        step = Step(run, len(fresh), chars, bool(meta.get("finish_reason")))
        self._stream.words.append(output_word(step, fresh, cached, rows))

"""Requests that must be rewritten before workers can take them: batches, samples, ids of the client's own.

SGLang's prefill and decode servers cannot make ``n`` samples of a prompt (all
would share one room), so samples become copies of the prompt, prompt by prompt,
as SGLang orders its own answer (tokenizer_manager.py, _handle_batch_request).
"""

from __future__ import annotations

from typing import Any

import msgspec

from pdserve.balancer.request.merge import needs_prefill_answer
from pdserve.balancer.request.options import (
    new_tokens,
    num_samples,
    priority_of,
    sampling_of,
    typed_options,
    user_of,
)
from pdserve.balancer.request.prompt import head_of_body, key_of, num_tokens, prompt_of
from pdserve.balancer.request.request import ParsedRequest, RequestRefused, Route
from pdserve.types import RequestShape

MAX_TOP_LOGPROBS = 128
"""Room in the metadata that travel with the KV: sglang disaggregation/utils.py, MetadataBuffers."""
MAX_PROMPTS = 65536
"""Copies of a prompt in one request; beyond it a small body would fill the memory."""

_PROMPTS = ("text", "input_ids", "input_embeds")
_PER_PROMPT: tuple[str, ...] = (*_PROMPTS, "image_data", "video_data", "audio_data", "lora_path")
_PER_PROMPT += ("sampling_params",)
_PER_PROMPT += ("extra_key", "cache_salt", "kv_hints", "session_params", "custom_logit_processor")
_PER_PROMPT += ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_hidden_states")
"""Fields of GenerateReqInput that a batch may give as one value per prompt."""
_PARTING = ("lora_path", "cache_salt", "extra_key")
_SINGLE_WITH_SAMPLES = ("return_logprob", "logprob_start_len", "top_logprobs_num", "custom_logit_processor")

_NO_EARLIER_ANSWER = (
    "previous_response_id is not supported with disaggregated servers: the prefill server does not "
    "know the earlier answer; send the whole conversation in `input`"
)


def rewrite(route: Route, body: bytes, wants_prompt: bool) -> ParsedRequest:
    """Decode the whole request and bring it into a form that a pair can serve.

    Raises:
        RequestRefused: as ``parse_request``.
    """
    options = fields = _document(body)
    if route is Route.RESPONSES and fields.get("previous_response_id"):
        raise RequestRefused(_NO_EARLIER_ANSWER, 501)
    if route is Route.VERTEX:
        fields = _vertex(fields)
        options = fields["parameters"]
    options = typed_options(route, options)
    _refuse_poison(route, options, _texts(fields))
    sampling = sampling_of(route, options)
    samples = num_samples(route, options, sampling)
    prompt, (head, head_tokens) = prompt_of(fields), _head(route, body, options)
    _check_lists(route, options, samples, _num_prompts(fields) if route is Route.GENERATE else None)
    fields, num_prompts = _with_samples(route, fields, samples)
    needs_prefill = needs_prefill_answer(route, options)
    shape = RequestShape(
        prompt_tokens=max(1, num_tokens(prompt) + head_tokens) * (1 if num_prompts is None else samples),
        max_new_tokens=new_tokens(route, options, sampling),
        prompt=head + key_of(prompt) if wants_prompt else b"",
        priority=priority_of(options),
        num_prompts=num_prompts or 1,
        route=route,
        user=user_of(options),
        needs_prefill_worker=needs_prefill or num_prompts is not None or samples > 1,
    )
    return ParsedRequest(
        route=route,
        shape=shape,
        is_stream=options.get("stream") is True,
        fields=fields,
        num_prompts=num_prompts,
        num_samples=samples,
        needs_prefill_answer=needs_prefill,
        client_rid=options.get(route.rid_field) if route.rid_field else None,
    )


def _head(route: Route, body: bytes, options: dict[str, Any]) -> tuple[bytes, int]:
    """Of the client's own bytes, so that it is the same whether the request is plain or not."""
    if route.is_chat and options.get("input_ids") is not None:  # no template is applied
        options = {name: options[name] for name in ("model", *_PARTING) if name in options}
    elif route is not Route.VERTEX:
        return head_of_body(route, body)
    return head_of_body(route, msgspec.json.encode(options))


def _document(body: bytes) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(body)
    except RecursionError:
        raise RequestRefused("the request body is nested too deeply", is_unreadable=True) from None
    except (msgspec.MsgspecError, ValueError) as exc:
        raise RequestRefused(f"the request body is not valid JSON: {exc}", is_unreadable=True) from exc
    if not isinstance(fields, dict):
        message = f"the request body must be a JSON object, got {_json_name(fields)}"
        raise RequestRefused(message, is_unreadable=True)
    return fields


# -- what would kill a server ----------------------------------------------------------------------


def _refuse_poison(route: Route, options: dict[str, Any], texts: list[Any]) -> None:
    """Refuse what ends SGLang's scheduler process, and with it every other request on that server."""
    if any(text == "" or text == [] for text in texts):
        if route is Route.COMPLETIONS:
            raise RequestRefused("Prompt cannot be empty")
        is_ids = [] in texts and options.get("text") is None
        raise RequestRefused(
            "input_ids cannot be empty." if is_ids else "the prompt is empty: it needs a token"
        )
    for name in ("top_logprobs_num", "top_logprobs", "logprobs"):
        value = options.get(name)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and number > MAX_TOP_LOGPROBS:
                raise RequestRefused(
                    f"{name} may be {MAX_TOP_LOGPROBS} at most with disaggregation, got {number}"
                )


def _texts(fields: dict[str, Any]) -> list[Any]:
    """Every prompt that is given as text or token ids."""
    found: list[Any] = []
    for name in ("text", "input_ids", "prompt"):
        value = fields.get(name)
        is_batch = isinstance(value, list) and bool(value) and isinstance(value[0], str | list)
        found += value if is_batch and isinstance(value, list) else [value]
    instances = fields.get("instances")
    for instance in instances if isinstance(instances, list) else ():
        if isinstance(instance, dict):
            found += [instance.get("text"), instance.get("input_ids")]
    return found


# -- samples -----------------------------------------------------------------------------------


def _check_lists(route: Route, options: dict[str, Any], samples: int, size: int | None) -> None:
    """What SGLang refuses of a batch before it looks at the prompts (io_struct.py), in its words."""
    if route is not Route.GENERATE:
        return
    rid = options.get("rid")
    if isinstance(rid, list) and size is not None:
        if len(rid) != size:
            raise RequestRefused(
                "The specified rids length mismatch with the batch_size for batch processing."
            )
        twice = sorted({name for name in rid if isinstance(name, str) and rid.count(name) > 1})
        if twice:
            raise RequestRefused(f"Duplicate request IDs detected within the request: {twice}")
    for name in _SINGLE_WITH_SAMPLES if samples > 1 else ():
        if isinstance(options.get(name), list):
            raise RequestRefused(f"Cannot use list {name} with parallel_sample_num > 1")


def _with_samples(route: Route, fields: dict[str, Any], n: int) -> tuple[dict[str, Any], int | None]:
    """The request with its samples as copies, and how many prompts it has then; None: one, not a batch."""
    match route:
        case Route.GENERATE:
            return _generate_batch(fields, n)
        case Route.VERTEX:
            return _vertex_batch(fields, n)
        case Route.COMPLETIONS:
            return _completions_batch(fields, n)
        case _:
            return ({**fields, "n": 1}, None) if n > 1 else (fields, None)


def _generate_batch(fields: dict[str, Any], n: int) -> tuple[dict[str, Any], int | None]:
    size = _num_prompts(fields)
    if n == 1:
        return fields, size
    _check_size(n * (size or 1))
    copies = {**fields, "sampling_params": _one_sample(fields["sampling_params"])}
    for name in _PER_PROMPT:
        value = copies.get(name)
        if value is None:
            continue
        if size is None:
            # One prompt: its value, whatever its type, is every copy's. Options apply to all anyway.
            if name in (*_PROMPTS, "image_data", "video_data", "audio_data"):
                copies[name] = [value] * n
        elif isinstance(value, list) and len(value) == size:
            copies[name] = [item for item in value for _ in range(n)]
    return copies, n * (size or 1)


def _completions_batch(fields: dict[str, Any], n: int) -> tuple[dict[str, Any], int | None]:
    prompt = fields.get("prompt")
    is_batch = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    if n == 1 and not is_batch:
        return fields, None
    prompts = prompt if is_batch and isinstance(prompt, list) else [prompt]
    _check_size(n * len(prompts))
    copies = [item for item in prompts for _ in range(n)]
    return {**fields, "prompt": copies, "n": 1}, len(copies)


def _vertex(fields: dict[str, Any]) -> dict[str, Any]:
    parameters = fields.get("parameters")
    return {**fields, "parameters": parameters if isinstance(parameters, dict) else {}}


def _vertex_batch(fields: dict[str, Any], n: int) -> tuple[dict[str, Any], int | None]:
    instances, parameters = fields.get("instances"), fields["parameters"]
    if not isinstance(instances, list) or not instances:
        return fields, None
    _check_size(n * len(instances))
    if n > 1:
        instances = [instance for instance in instances for _ in range(n)]
        parameters = {**parameters, "sampling_params": _one_sample(parameters["sampling_params"])}
    return {**fields, "instances": instances, "parameters": parameters}, len(instances)


def _one_sample(sampling: Any) -> Any:
    if isinstance(sampling, list):
        return [{**item, "n": 1} if isinstance(item, dict) else item for item in sampling]
    return {**sampling, "n": 1}


def _check_size(num_prompts: int) -> None:
    if num_prompts > MAX_PROMPTS:
        raise RequestRefused(f"prompts times n may be {MAX_PROMPTS} at most, got {num_prompts}")


def _num_prompts(fields: dict[str, Any]) -> int | None:
    """As SGLang's GenerateReqInput counts: by the first of text, input_ids, input_embeds that is there."""
    text, ids, embeds = (fields.get(name) for name in _PROMPTS)
    batch: Any = None
    if text is not None:
        batch = text if isinstance(text, list) else None
    elif isinstance(ids, list):
        batch = ids if ids and isinstance(ids[0], list) else None
    elif isinstance(embeds, list) and embeds and isinstance(embeds[0], list):
        batch = embeds if embeds[0] and isinstance(embeds[0][0], list) else None
    if batch is None:
        return None
    if not batch:
        raise RequestRefused("the batch is empty: give at least one prompt")
    return len(batch)


def _json_name(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")

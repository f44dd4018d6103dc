"""What one event of a stream, or one whole answer, says: the reader of every dialect. Pure.

    /generate            meta_info{finish_reason, …_tokens}                     {"error"}, abort with a status
    chat, completions    choices[{finish_reason}], usage                        {"error"}
    /v1/messages         message_start … message_delta{stop_reason, usage}      event error
    /v1/responses        response.created … response.completed{status, usage}   response.failed, event error

Finish reasons are SGLang's words (stop, length, tool_calls, abort) for every dialect. Only what is named
here is decoded; text, logprobs and ids are skipped.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import structs

from pdserve.balancer.request.request import Route
from pdserve.http.sse import event_data, split_events

_TYPED = (Route.MESSAGES, Route.RESPONSES)
_BEFORE_CONTENT = frozenset(
    ("message_start", "ping", "response.created", "response.queued", "response.in_progress")
)
_FINISH = {
    "end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls",
    "completed": "stop", "incomplete": "length", "failed": "abort", "cancelled": "abort",
}  # fmt: skip
"""Stop reasons of Anthropic, and states of OpenAI's responses."""
_ASKED_FOR = ("Aborted", "Abort in waiting queue", "Generation aborted")
"""SGLang's words of a request that ``/abort_request`` ended: on ``/v1/responses`` nothing else tells."""
_STATUS = {
    "invalid_request_error": 400, "badrequesterror": 400, "bad_request": 400, "invalid_prompt": 400,
    "authentication_error": 401, "permission_error": 403, "not_found_error": 404,
    "request_timeout_error": 408, "request_too_large": 413, "rate_limit_error": 429,
    "rate_limit_exceeded": 429, "overloaded_error": 503,
}  # fmt: skip
"""Errors by name; any other is the server's."""
REFUSED = 400
"""A failed response without usage never reached the engine: SGLang's handler refused it, behind
``response.created``, with the code of a server error."""
NO_REASON = "the worker gave no reason"


class Failure(msgspec.Struct, frozen=True):
    """A worker's own report, within a 200 answer, that a request failed; below 500 it blames the request."""

    status: int
    message: str

    @property
    def is_servers(self) -> bool:
        """True if the worker is to blame, not the request."""
        return self.status >= 500


class Said(msgspec.Struct, frozen=True):
    """What one event, or one whole answer, says; None or empty where it says nothing of that.

    ``finish`` is SGLang's word: stop, length, tool_calls, abort. An abort without a ``failure`` may have
    been asked for. ``is_content`` is False for what comes before an answer's first token; ``index`` is
    the prompt's number in a batch.
    """

    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    failure: Failure | None = None
    is_content: bool = True
    index: int = 0


class _Reason(msgspec.Struct):
    type: str = ""
    message: str | None = None
    status_code: int | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    index: int = 0


class _Counts(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Meta(_Counts):
    finish_reason: _Reason | None = None


class _Response(msgspec.Struct):
    status: str = ""
    usage: _Counts | None = None
    error: Any = None


class _Started(msgspec.Struct):
    usage: _Counts | None = None


class _Delta(msgspec.Struct):
    stop_reason: str | None = None


class _Document(msgspec.Struct):
    """Fields of any dialect."""

    type: str | None = None
    object: str | None = None
    index: int = 0
    meta_info: _Meta | None = None
    choices: list[_Choice] = []
    usage: _Counts | None = None
    error: Any = None
    message: _Started | str | None = None
    delta: _Delta | str | None = None
    code: Any = None
    status: Any = None
    stop_reason: str | None = None
    response: _Response | None = None
    predictions: list[_Document] | None = None


_DECODER = msgspec.json.Decoder(_Document | list[_Document])
_BAD = (msgspec.MsgspecError, ValueError, RecursionError)


def first_said(route: Route, stream: bytes, *, is_whole: bool = False) -> Said | None:
    """What the first event of a stream says that is content, an error or an end; None if there is none yet.

    What precedes content (comments, ``message_start``, ``response.created``) is passed over, but for the
    prompt's tokens that it tells. ``is_whole``: nothing will follow, so the last event needs no end.
    """
    prompt_tokens = None
    for event in split_events(stream + b"\n\n" if is_whole else stream):
        payload = event_data(event)
        if not payload:
            continue
        if route not in _TYPED and b'"error"' not in payload and b'"abort"' not in payload:
            return Said()
        said = said_in(payload)
        if said.is_content:
            return structs.replace(said, prompt_tokens=prompt_tokens or said.prompt_tokens)
        prompt_tokens = prompt_tokens or said.prompt_tokens
    return None


def said_in(payload: bytes) -> Said:
    """Read the data of one event, or a whole answer. What is not JSON, or of no dialect, says nothing."""
    try:
        document = _DECODER.decode(payload)
    except _BAD:
        return Said()
    if isinstance(document, list):
        return joined([_read(item) for item in document])
    if document.predictions is not None:
        return joined([_read(item) for item in document.predictions])
    return _read(document)


def joined(said: Iterable[Said]) -> Said:
    """What the answers to several prompts come to: tokens add up, one failure or abort is that of all."""
    items = list(said)
    if not items:
        return Said()
    finish = "abort" if any(item.finish == "abort" for item in items) else items[-1].finish
    return Said(
        finish,
        sum(item.prompt_tokens or 0 for item in items),
        sum(item.completion_tokens or 0 for item in items),
        next((item.failure for item in items if item.failure is not None), None),
    )


# -- one document ------------------------------------------------------------------------------------


def _read(document: _Document) -> Said:
    if document.type is not None and (found := _read_typed(document, document.type)) is not None:
        return found
    if document.meta_info is not None:
        return _of_meta(document.meta_info, document.index)
    if document.object == "response":
        return _of_response(document.status, document.usage, document.error)
    if document.error is not None or document.object == "error":
        return Said(failure=_failure(document))
    index = document.choices[0].index if document.choices else 0
    return Said(_finish_of(document.choices), *_counts(document.usage), index=index)


def _read_typed(document: _Document, kind: str) -> Said | None:
    """What Anthropic's and OpenAI's typed events, and Anthropic's whole answer, say."""
    match kind:
        case "message":
            reason = document.stop_reason or ""
            return Said(_FINISH.get(reason, reason), *_counts(document.usage))
        case "message_start":
            usage = document.message.usage if isinstance(document.message, _Started) else None
            return Said(prompt_tokens=_counts(usage)[0], is_content=False)
        case "message_delta":
            reason = (document.delta.stop_reason or "") if isinstance(document.delta, _Delta) else ""
            return Said(_FINISH.get(reason, reason), None, _counts(document.usage)[1])
        case "error":
            return Said(failure=_failure(document))
    if kind in _BEFORE_CONTENT:
        return Said(is_content=False)
    if (response := document.response) is None:
        return None
    return _of_response(response.status or kind.rpartition(".")[2], response.usage, response.error)


def _of_meta(meta: _Meta, index: int) -> Said:
    reason, failure = meta.finish_reason or _Reason(), None
    if reason.type == "abort" and 400 <= (reason.status_code or 0) < 600:
        failure = Failure(reason.status_code or 0, reason.message or NO_REASON)
    return Said(reason.type, meta.prompt_tokens, meta.completion_tokens, failure, index=index)


def _of_response(status: Any, usage: _Counts | None, error: Any) -> Said:
    failure = _failure(_Document(error=error)) if status == "failed" else None
    if failure is not None and usage is None:
        failure = Failure(REFUSED, failure.message)
    if failure is not None and failure.message in _ASKED_FOR:
        failure = None
    return Said(_FINISH.get(str(status), ""), *_counts(usage), failure)


def _finish_of(choices: list[_Choice]) -> str:
    if any(choice.finish_reason == "abort" for choice in choices):
        return "abort"
    return (choices[0].finish_reason or "") if choices else ""


def _counts(usage: _Counts | None) -> tuple[int | None, int | None]:
    """Prompt and completion tokens; Anthropic's input leaves out what came from the cache."""
    if usage is None:
        return None, None
    if usage.output_tokens is None and usage.input_tokens is None:
        return usage.prompt_tokens, usage.completion_tokens
    cached = (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    prompt = None if usage.input_tokens is None else usage.input_tokens + cached
    return prompt, usage.output_tokens


def _failure(document: _Document) -> Failure:
    """The error that a document holds, as an object or a bare text, or is."""
    error = document.error
    if isinstance(error, dict):
        return Failure(_status(error.get("code"), error.get("type")), str(error.get("message") or NO_REASON))
    message = error or (document.message if isinstance(document.message, str) else "")
    return Failure(_status(document.code, document.type), str(message or NO_REASON))


def _status(*names: Any) -> int:
    for name in names:
        if isinstance(name, str):
            name = int(name) if name.isdigit() and len(name) == 3 else _STATUS.get(name.lower())
        if isinstance(name, int) and 400 <= name < 600:
            return name
    return 500

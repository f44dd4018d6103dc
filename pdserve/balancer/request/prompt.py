"""How large a request's prompt is, and the key by which prompts with a common beginning are known. Pure.

    key:  adapter, salt | tools, template arguments, system | \\0 | messages, as they stand in the body

A chat template renders more than messages, and most put tools and the system's text before them. What parts
SGLang's prefix cache (a LoRA adapter, ``cache_salt``, ``extra_key``) stands first, so that nothing behind it
matches. Tools are hardly ever decoded: a client sends the same bytes with each request.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pdserve.balancer.request.request import BYTES_PER_TOKEN, Route

ABSENT = msgspec.Raw(b"")
_EMPTY = (b"null", b'""', b"[]", b"{}")
_MEDIA = ("image_url", "input_audio", "audio_url", "video_url", "image", "audio", "video", "file_data")
_NOT_TEXT = frozenset((*_MEDIA, "image_data", "audio_data", "video_data", "source", "data", "cache_control"))
_NOT_TEXT |= {"signature", "encrypted_content"}
"""Parts of messages whose bytes are no tokens."""
_MODEL_IS_READ = (Route.CHAT, Route.INVOCATIONS, Route.COMPLETIONS, Route.MESSAGES)


class PromptHead(msgspec.Struct):
    """The fields that stand before a request's messages or part its prefix from others', as they came."""

    model: Any = None
    lora_path: msgspec.Raw = ABSENT
    cache_salt: msgspec.Raw = ABSENT
    extra_key: msgspec.Raw = ABSENT
    tools: msgspec.Raw = ABSENT
    tool_choice: msgspec.Raw = ABSENT
    chat_template_kwargs: msgspec.Raw = ABSENT
    reasoning_effort: msgspec.Raw = ABSENT
    reasoning: msgspec.Raw = ABSENT
    system: msgspec.Raw = ABSENT
    instructions: msgspec.Raw = ABSENT


_HEAD_DECODER = msgspec.json.Decoder(PromptHead)
_TOOLS_DECODER = msgspec.json.Decoder(list[msgspec.Raw])


def head_of(route: Route, head: PromptHead) -> tuple[bytes, int]:
    """The key's part before the messages, empty or with its ``\\0``, and about how many tokens it makes."""
    has_adapter = isinstance(head.model, str) and ":" in head.model and route in _MODEL_IS_READ
    if not has_adapter and _is_bare(head):
        return b"", 0
    parting, before = head.model.encode("utf-8", "replace") if has_adapter else b"", b""
    for mark, raw in ((b"\1", head.lora_path), (b"\2", head.cache_salt), (b"\3", head.extra_key)):
        if raw is not ABSENT and (value := _given(raw)):
            parting += mark + value
    if route.is_chat or route is Route.RESPONSES or route is Route.MESSAGES:
        before = _rendered(route, head)
    if not (parting or before):
        return b"", 0
    return b"%b\4%b\0" % (parting, before), -(-len(before) // BYTES_PER_TOKEN)


def _is_bare(head: PromptHead) -> bool:
    """True for nearly every request. Spelled out: a loop costs four times more."""
    return (
        head.tools is ABSENT
        and head.system is ABSENT
        and head.instructions is ABSENT
        and head.lora_path is ABSENT
        and head.cache_salt is ABSENT
        and head.extra_key is ABSENT
        and head.chat_template_kwargs is ABSENT
        and head.reasoning_effort is ABSENT
        and head.reasoning is ABSENT
    )


def _rendered(route: Route, head: PromptHead) -> bytes:
    before = b""
    if head.tools is not ABSENT:
        before = _tools(bytes(head.tools), head.tool_choice)
    for raw in (head.chat_template_kwargs, head.reasoning_effort, head.reasoning):
        if raw is not ABSENT:
            before += _given(raw)
    system = head.system if route is Route.MESSAGES else head.instructions
    if system is not ABSENT and not route.is_chat:
        before += _given(system)
    return before


def _given(raw: msgspec.Raw) -> bytes:
    value = bytes(raw)
    return b"" if value in _EMPTY else value


def _tools(tools: bytes, choice: msgspec.Raw) -> bytes:
    """Those that SGLang renders: none if none may be called, one if that one must be (serving_chat.py)."""
    if tools in _EMPTY:
        return b""
    if choice is ABSENT or (b"none" not in bytes(choice) and b"name" not in bytes(choice)):
        return tools
    chosen = msgspec.json.decode(choice)
    kind = chosen.get("type") if isinstance(chosen, dict) else chosen
    if kind == "none":
        return b""
    name = _name(chosen)
    if name is None:
        return tools
    try:
        each_tool = map(bytes, _TOOLS_DECODER.decode(tools))
    except msgspec.ValidationError:
        return tools
    return b"".join(tool for tool in each_tool if _name(msgspec.json.decode(tool)) == name)


def _name(tool: Any) -> Any:
    if not isinstance(tool, dict):
        return None
    function = tool.get("function")
    return function.get("name") if isinstance(function, dict) else tool.get("name")


def head_of_body(route: Route, body: bytes) -> tuple[bytes, int]:
    """The same from a body that is known to be a JSON object; of /vertex_generate, its parameters."""
    return head_of(route, _HEAD_DECODER.decode(body))


# -- prompts that were decoded -----------------------------------------------------------------


def prompt_of(fields: dict[str, Any]) -> Any:
    """The prompt or the prompts of a request, whatever the route calls them; None if there are none."""
    names = ("input_ids", "text", "prompt", "messages", "input", "instances", "input_embeds")
    return next((value for name in names if (value := fields.get(name)) is not None), None)


def key_of(prompt: Any) -> bytes:
    """The key of a prompt, of the first one of a batch, without what stands before it."""
    first = prompt[0] if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else prompt
    return b"" if first is None else msgspec.json.encode(first)


def num_tokens(value: Any, depth: int = 8) -> int:
    """Magnitude of a prompt: ints are token ids, text counts by its bytes, containers add up."""
    if isinstance(value, str):
        return -(-len(value.encode("utf-8", "replace")) // BYTES_PER_TOKEN)
    if depth and isinstance(value, list):
        if value and isinstance(value[0], int | float):
            return len(value) if isinstance(value[0], int) else 1
        return sum(num_tokens(item, depth - 1) for item in value)
    if depth and isinstance(value, dict):
        return sum(num_tokens(item, depth - 1) for name, item in value.items() if name not in _NOT_TEXT)
    return 0

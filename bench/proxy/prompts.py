"""The HTTP requests that are sent: the same bytes to every balancer and to the workers themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass

PATHS = {"generate": "/generate", "chat": "/v1/chat/completions"}
TEXT = (
    "You are a careful assistant. Summarize the following paragraph in one sentence, keep every number "
    "and every name as it is written, and say so if something is missing. "
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One kind of request. ``pace_ms`` 0: the worker makes tokens as fast as they are taken."""

    route: str = "generate"
    tokens: int = 4
    is_stream: bool = False
    pace_ms: int = 0

    @property
    def num_events(self) -> int:
        """Events of a whole stream, ``[DONE]`` too; 0 if it does not stream."""
        return self.tokens + 1 if self.is_stream else 0

    @property
    def expected(self) -> str:
        """What a right answer contains that does not stream: prefill's own answer has one token."""
        return f'"completion_tokens":{self.tokens}'

    def render(self) -> bytes:
        """Head and body."""
        pace = f"pace={self.pace_ms} " if self.pace_ms else ""
        document: dict[str, object]
        if self.route == "generate":
            sampling = {"max_new_tokens": self.tokens, "temperature": 0, "ignore_eos": True}
            document = {"text": pace + TEXT, "sampling_params": sampling, "stream": self.is_stream}
        else:
            messages = [{"role": "user", "content": pace + TEXT}]
            document = {
                "model": "mock",
                "messages": messages,
                "max_tokens": self.tokens,
                "stream": self.is_stream,
            }
        body = json.dumps(document).encode()
        head = (
            f"POST {PATHS[self.route]} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\nAccept: */*\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

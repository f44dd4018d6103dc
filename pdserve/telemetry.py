"""When each stage of a request happened and what follows from it; how a process writes its log.

Times are seconds on the balancer's monotonic clock. A stage that did not
happen stays ``None``; a derived figure whose stages are missing is ``None``
rather than a guess.

    received ─ queued ─► paired ─ prefill ─► prefill answered ─ transfer ─► first token ─► finished

SGLang's prefill server answers once it has sent the KV, so *prefill* holds its queue, its work and
the sending; *transfer* is what remains until decode's first byte: the arrival, and decode's start.
"""

from __future__ import annotations

import json
import logging
import re
import time
from typing import Protocol

import msgspec

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LOG_FORMATS = ("text", "json")


class TokenMeter(Protocol):
    """Counts the events of a stream while it is relayed."""

    def passed(self, num_events: int, gap_s: float | None) -> None:
        """``num_events`` more events (tokens) were relayed; ``gap_s`` is the time between two of them, if it
        was measured."""
        ...


class RequestTimeline(msgspec.Struct):
    """Stage times of one request. ``paired_s`` and ``prefill_done_s`` are the last attempt's.

    ``meter`` counts the events of its stream.
    """

    received_s: float
    paired_s: float | None = None
    prefill_done_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    completion_tokens: int = 0
    meter: TokenMeter | None = None

    @property
    def queued_s(self) -> float | None:
        """From receipt until the pair of the last attempt was held; failed attempts count as waiting."""
        return None if self.paired_s is None else self.paired_s - self.received_s

    @property
    def prefill_s(self) -> float | None:
        """From then to the end of the prefill leg: its queue, its work, and the sending of the KV."""
        done_s, paired_s = self.prefill_done_s, self.paired_s
        if done_s is None or paired_s is None or done_s < paired_s:  # an earlier attempt's
            return None
        first_s = self.first_token_s
        return (done_s if first_s is None else min(done_s, first_s)) - paired_s

    @property
    def transfer_s(self) -> float | None:
        """From the end of the prefill leg to decode's first byte; 0 if that came first. Streams only."""
        first_s, done_s, paired_s = self.first_token_s, self.prefill_done_s, self.paired_s
        if first_s is None or done_s is None or paired_s is None or done_s < paired_s:
            return None
        return max(0.0, first_s - done_s)

    @property
    def ttft_s(self) -> float | None:
        """From receipt by the balancer to the first response byte of the decode leg."""
        return None if self.first_token_s is None else self.first_token_s - self.received_s

    @property
    def e2e_s(self) -> float | None:
        """From receipt by the balancer to the end of the response."""
        return None if self.finished_s is None else self.finished_s - self.received_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; needs two tokens."""
        if self.first_token_s is None or self.finished_s is None or self.completion_tokens < 2:
            return None
        return (self.finished_s - self.first_token_s) / (self.completion_tokens - 1)


_FIELD = re.compile(r"(?<!\S)([a-z][a-z_0-9]*)=(\S+)")
_OURS = frozenset(("time", "level", "logger", "message", "exception"))


class JsonFormatter(logging.Formatter):
    """Each log line as one JSON object: time, level, logger, message, and fields.

    Fields are the ``name=value`` words of the message (values without closing punctuation), or those that an
    argument's ``log_fields()`` returns, where ``event`` is the message. They never replace the first
    four. ``time`` is UTC, ISO 8601.
    """

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__()
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the message holds."""
        fields: dict[str, object] = {}
        arguments = record.args if isinstance(record.args, tuple) else ()
        for argument in arguments:
            if hasattr(argument, "log_fields"):
                fields |= argument.log_fields()
        if "event" in fields:
            message = str(fields.pop("event"))  # its text says the same as its fields
        else:
            message = record.getMessage()
            fields |= {name: value.rstrip(",;:") for name, value in _FIELD.findall(message)}
        line: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        line |= {name: value for name, value in fields.items() if name not in _OURS}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return msgspec.json.encode(line).decode()
        except (UnicodeEncodeError, TypeError, ValueError):  # a lone surrogate, a field of an odd kind
            return json.dumps(line, default=str)


def configure_logging(level: str, log_format: str = "text") -> None:
    """Have this process log to stderr: one line per event, as text or as JSON objects.

    Args:
        level: a name that ``logging`` knows, in any case.
        log_format: one of ``LOG_FORMATS``.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(LOG_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])

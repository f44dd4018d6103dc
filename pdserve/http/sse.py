"""Server-sent events as bytes: cut a stream into whole events, read one event, write one. Pure.

An event ends with an empty line, and a line with ``\\n``, ``\\r\\n`` or ``\\r``. SGLang ends lines with
``\\n``; what stands between it and us may use the others. JSON text has no line breaks, so the end of
an event occurs nowhere else. An event without a ``data`` line is a comment: nobody is told of it.
"""

from __future__ import annotations

import re

EVENT_END = b"\n\n"
DONE_EVENT = b"data: [DONE]\n\n"

_LINE_END = rb"(?:\r\n|\n|\r(?!\n))"
_LINES = re.compile(_LINE_END)
_EVENTS = re.compile(_LINE_END + rb"{2}")
_DATA = re.compile(rb"(?:\A|[\r\n])data: ?")


def events_end(text: bytes) -> int:
    """Return where the last whole event in ``text`` ends; 0 if none does."""
    end = text.rfind(EVENT_END) + 2
    if b"\r" in text:
        end = max(end, text.rfind(b"\n\r") + 2, text.rfind(b"\r\r") + 2)
        if end > 1 and text.startswith(b"\r\n", end - 1):
            end += 1
    return end if end > 1 else 0


class EventSplitter:
    """Cuts a stream into whole events, however it arrives; ``tail`` is the event that is not complete yet."""

    __slots__ = ("tail",)

    def __init__(self) -> None:
        self.tail = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return the events that are complete now, with their ends.

        Without a ``tail``, a chunk that ends in ``EVENT_END`` comes back as it is: hot loops skip the call.
        An event whose end is cut between ``\\r`` and ``\\n`` is complete: the ``\\n`` goes before the next.
        """
        text = self.tail + chunk if self.tail else chunk
        end = text.rfind(EVENT_END) + 2 if b"\r" not in text else events_end(text)
        if end < 2:
            self.tail = text
            return b""
        self.tail = text[end:]
        return text[:end]


def split_events(stream: bytes) -> list[bytes]:
    """Return each whole event without its end; an incomplete last one is left out."""
    if b"\r" not in stream:
        return stream.split(EVENT_END)[:-1]
    return _EVENTS.split(stream)[:-1]


def split_data(event: bytes) -> tuple[bytes, bytes]:
    """Return what precedes the value of an event's first ``data`` field, and the rest of the event: empty if
    it has none."""
    if event.startswith(b"data:"):  # as nearly every one does
        start = 6 if event.startswith(b" ", 5) else 5
        return event[:start], event[start:]
    found = _DATA.search(event)
    return (event, b"") if found is None else (event[: found.end()], event[found.end() :])


def event_data(event: bytes) -> bytes:
    """Return the value of an event's ``data`` field; of several, their lines."""
    data = split_data(event)[1]
    if b"\n" not in data and b"\r" not in data:
        return data.strip()
    first, *others = _LINES.split(data)
    values = [line[5:].removeprefix(b" ") for line in others if line.startswith(b"data:")]
    return b"\n".join([first, *values]).strip()


def render_event(data: bytes, name: bytes = b"") -> bytes:
    """Return an event that has only data, or a name before them."""
    return b"event: %b\ndata: %b\n\n" % (name, data) if name else b"data: %b\n\n" % data

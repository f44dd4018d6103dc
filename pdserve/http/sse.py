"""Server-sent events as bytes: cut a stream into whole events, read one event, write one. Pure.

An event ends with an empty line. JSON text has no line breaks, so an event of
SGLang has exactly one ``data`` line and the two bytes ``\\n\\n`` occur nowhere else.
"""

from __future__ import annotations

EVENT_END = b"\n\n"
DONE_EVENT = b"data: [DONE]\n\n"


class EventSplitter:
    """Cuts a stream into whole events, however it arrives; ``tail`` is the event that is not complete yet."""

    __slots__ = ("tail",)

    def __init__(self) -> None:
        self.tail = b""

    def feed(self, chunk: bytes) -> bytes:
        """Return the events that are complete now, with their ends.

        Without a ``tail``, a chunk that ends in ``EVENT_END`` comes back as it is: hot loops skip the call.
        """
        text = self.tail + chunk
        end = text.rfind(EVENT_END) + 2
        if end < 2:
            self.tail = text
            return b""
        self.tail = text[end:]
        return text[:end]


def split_events(stream: bytes) -> list[bytes]:
    """Return each whole event without its end; an incomplete last one is left out."""
    return stream.split(EVENT_END)[:-1]


def split_data(event: bytes) -> tuple[bytes, bytes]:
    """Return what precedes the value of an event's ``data`` field, and the value: empty if it has none."""
    mark = 0 if event.startswith(b"data:") else event.find(b"\ndata:") + 1
    if not event.startswith(b"data:", mark):
        return event, b""
    start = mark + 6 if event.startswith(b" ", mark + 5) else mark + 5
    return event[:start], event[start:]


def event_data(event: bytes) -> bytes:
    """Return the value of an event's ``data`` field."""
    return split_data(event)[1].strip()


def render_event(data: bytes) -> bytes:
    """Return an event that has only data."""
    return b"data: %b\n\n" % data

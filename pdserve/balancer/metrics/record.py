"""One request as the state document, the access log and traces show it, and how it ended. Pure data."""

from __future__ import annotations

import enum
import json

import msgspec
from msgspec import structs

from pdserve.balancer.request.request import Route
from pdserve.state.document import RequestEntry
from pdserve.telemetry import RequestTimeline
from pdserve.types import Pair


class Outcome(enum.StrEnum):
    """How a request ended for its client."""

    COMPLETED = "completed"
    FAILED = "failed"
    ABORTED = "aborted"
    SHED = "shed"


class RequestRecord(msgspec.Struct, eq=False):
    """One request as the state document and the access log show it; filled in as it goes.

    ``pair``, ``room``, ``rid`` are the last attempt's; ``reason`` is why the policy chose that pair,
    rendered as text when it is read; ``error`` says what went wrong, for the operator.
    ``request_id`` is the client's own, from its headers; ``num_resumes`` how often its answer went on
    elsewhere after a failure, ``num_moves`` how often by somebody's wish.
    """

    route: Route
    timeline: RequestTimeline
    rid: str = ""
    pair: Pair | None = None
    room: int = 0
    is_stream: bool = False
    status: int = 0
    reason: object = ""
    prompt_tokens: int = 0
    finish: str = ""
    error: str = ""
    request_id: str = ""
    num_resumes: int = 0
    num_moves: int = 0
    _row: RequestEntry | None = None

    def render(self) -> RequestEntry:
        """The row of the state document."""
        row, timeline = self._row, self.timeline
        # Status and error may change after the end: the client leaves with the last bytes unread.
        if row is not None and row.status == self.status and row.error == self.error:
            return row
        row = RequestEntry(
            rid=self.rid,
            request_id=self.request_id,
            pair=self.pair.label if self.pair else "",
            room=self.room,
            route=str(self.route),
            stream=self.is_stream,
            status=self.status,
            reason=str(self.reason),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=timeline.completion_tokens,
            queued_s=timeline.queued_s,
            prefill_s=timeline.prefill_s,
            transfer_s=timeline.transfer_s,
            first_token_s=timeline.ttft_s,
            done_s=timeline.e2e_s,
            ttft_s=timeline.ttft_s,
            e2e_s=timeline.e2e_s,
            tpot_s=timeline.tpot_s,
            resumes=self.num_resumes,
            moves=self.num_moves,
            finish=self.finish,
            error=self.error,
        )
        self._row = row if timeline.finished_s is not None else None
        return row

    def log_fields(self) -> dict[str, object]:
        """Fields of the access log; stages that did not happen are left out."""
        fields = {"event": "request", **structs.asdict(self.render())}
        for name in ("first_token_s", "done_s"):  # the same as ttft_s and e2e_s
            del fields[name]
        for name in ("resumes", "moves"):
            if not fields[name]:
                del fields[name]
        fields |= {name: round(value, 6) for name, value in fields.items() if isinstance(value, float)}
        return {name: value for name, value in fields.items() if value not in ("", None)}

    def __str__(self) -> str:
        """The line of the access log: ``request name=value …``; texts with spaces are quoted."""
        words = [f"{name}={_word(value)}" for name, value in self.log_fields().items() if name != "event"]
        return " ".join(["request", *words])


def _word(value: object) -> str:
    """A text that is not one plain word is quoted as JSON: nothing in it can begin a line or a field."""
    if isinstance(value, str) and (not value.isprintable() or any(char in ' "=' for char in value)):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)

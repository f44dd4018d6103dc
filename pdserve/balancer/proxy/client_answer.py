"""One streamed answer on its way to its client, over all legs that make it.

    leg 1 ── whole frames ──┐
    leg 2 ── the next ones ─┴─► AnswerLog: comments off ─► tally ─► merge, rename ─► sink

A frame that is not whole when its leg ends is thrown away with the leg. Without a log nothing can be
resumed, and events pass as they come.
"""

from __future__ import annotations

from collections.abc import Callable

from pdserve.balancer.fleet.weights import Weights
from pdserve.balancer.proxy.answer_log import AnswerLog
from pdserve.balancer.request.merge import stream_merger
from pdserve.balancer.request.request import ParsedRequest
from pdserve.balancer.request.transforms import Renaming
from pdserve.balancer.request.usage import BatchTally, StreamTally, Usage
from pdserve.http.sse import EVENT_END, EventSplitter
from pdserve.telemetry import TokenMeter

Push = Callable[[bytes], bool]
"""Takes a piece of a stream; False if the next should wait."""


class ClientAnswer:
    """What a client has of an answer. Made for each whole try of a request, and kept while that is resumed.

    Args:
        renaming: what becomes of the first leg's request ids.
        may_resume: whether another server may go on if this one says that it gives up; None: the
            answer cannot be resumed, and no log is kept.
        may_leave: whether another one should go on if this one is silent for ``patience_s``, which is
            each leg's.
        went_on: told the seconds without a frame when another leg has gone on.
        weights_now: those of the decode server that serves it now.

    ``is_moving``: the present leg is to stop, as another pair is held. ``begun_with``: the weights of the
    server that began it; None while there is none, or no log.
    """

    __slots__ = (
        "_may_resume",
        "_rewrite",
        "_route",
        "_splitter",
        "_tally",
        "_wake",
        "_weights_now",
        "_went_on",
        "begun_with",
        "heard_s",
        "is_moving",
        "log",
        "may_leave",
        "patience_s",
        "renaming",
    )

    def __init__(
        self,
        request: ParsedRequest,
        renaming: Renaming | None,
        *,
        may_resume: Callable[[], bool] | None = None,
        may_leave: Callable[[], bool] | None = None,
        went_on: Callable[[float], None] | None = None,
        weights_now: Callable[[], Weights | None] | None = None,
    ) -> None:
        self.renaming = renaming
        self.log = AnswerLog() if may_resume is not None else None
        self.may_leave = may_leave
        self.patience_s = float("inf")
        self.heard_s = 0.0
        self.is_moving = False
        self.begun_with: Weights | None = None
        self._wake: Callable[[], None] | None = None
        self._weights_now = weights_now
        self._route = request.route
        self._may_resume = may_resume
        self._went_on = went_on
        self._tally: StreamTally | None = None
        self._rewrite: Callable[[bytes], bytes] | None = None
        self._splitter = EventSplitter()

    @property
    def has_begun(self) -> bool:
        """True once its first leg has something for the client: from here on it is resumed, not repeated."""
        return self._tally is not None

    @property
    def is_given_up(self) -> bool:
        """True if the leg has said that it ends, and another one may go on."""
        return self.log is not None and self.log.aborted is not None

    @property
    def is_running(self) -> bool:
        """True while a leg sends it, and the end has not come."""
        return self._wake is not None and not self.has_end

    @property
    def has_end(self) -> bool:
        """True if the client has its last event already."""
        return self._tally is not None and self._tally.has_end

    @property
    def next_sequence_number(self) -> int:
        """The ``sequence_number`` that an event of ours would have after those that have passed."""
        return 0 if self._tally is None else self._tally.next_sequence_number

    def begin(
        self,
        request: ParsedRequest,
        prefill_answer: bytes,
        meter: TokenMeter | None,
        prompt_tokens: int | None,
    ) -> None:
        """The first leg has something for the client; ``prefill_answer`` is what is merged into it."""
        is_single = (request.num_prompts or 1) == 1 and request.num_samples == 1
        self._tally = StreamTally(request.route, meter) if is_single else BatchTally(request.route)
        self._tally.prompt_tokens = prompt_tokens
        if self._weights_now is not None:
            self.begun_with = self._weights_now()
        rename = self.renaming.apply if self.renaming is not None else None
        merge = None
        if request.needs_prefill_answer or request.num_samples > 1:
            merge = stream_merger(request, prefill_answer)
        if merge is None or rename is None:
            self._rewrite = merge or rename
        else:
            self._rewrite = lambda events: rename(merge(events))

    def go_on(self, now_s: float) -> None:
        """Another leg has something for the client."""
        assert self._went_on is not None, "an answer without a log is not resumed"
        self._went_on(now_s - self.heard_s)

    def move(self) -> None:
        """Have the leg that runs stop after the last whole frame."""
        assert self._wake is not None, "no leg sends it"
        self.is_moving = True
        self._wake()

    def close_leg(self) -> None:
        """The leg sends nothing more."""
        self._wake = None

    def open_leg(self, push: Push, wake: Callable[[], None]) -> Push:
        """Return what the bytes of the next leg are fed to; ``push`` takes what goes out.

        ``wake`` is called when ``is_given_up`` or ``is_moving`` gets true.
        """
        assert self._tally is not None, "it has not begun"
        self.is_moving, self._wake = False, wake
        splitter, tally, rewrite = EventSplitter(), self._tally, self._rewrite
        self._splitter = splitter
        if self.log is not None:
            self.log.begin_leg()
            return self._open_logged(self.log, push, wake)

        def pour(data: bytes) -> bool:
            if splitter.tail or not data.endswith(EVENT_END):  # a part of an event waits for its end
                data = splitter.feed(data)
                if not data:
                    return push(data)
            tally.add(data)
            return push(rewrite(data) if rewrite else data)

        return pour

    def _open_logged(self, log: AnswerLog, push: Push, wake: Callable[[], None]) -> Push:
        assert self._tally is not None, "it has not begun"
        splitter, take, add, rewrite = self._splitter, log.take, self._tally.add, self._rewrite

        def pour(data: bytes) -> bool:
            if splitter.tail or not data.endswith(EVENT_END):
                data = splitter.feed(data)
                if not data:
                    return push(data)
            data = take(data)
            if log.aborted is not None:
                data += self._given_up(wake)
            if not data:
                return push(data)
            add(data)
            return push(rewrite(data) if rewrite else data)

        return pour

    def _given_up(self, wake: Callable[[], None]) -> bytes:
        """The frames of the error if the client is to have them: it, or its operator, has asked for the
        end, it is the request's fault, or nobody may go on."""
        assert self.log is not None and self.log.aborted is not None and self._may_resume is not None
        is_servers = self.log.aborted == 0 or self.log.aborted >= 500
        if is_servers and self._may_resume():
            wake()
            return b""
        return self.log.give_in()

    def forget(self) -> None:
        """Nothing of it is to come: whoever decided for it is let go, for that refers to it."""
        self.may_leave = self._may_resume = self._went_on = self._weights_now = None

    def end(self, push: Push) -> Usage:
        """The last leg has ended well: send what is left; return what was counted."""
        tally, tail = self._tally, self._splitter.tail
        assert tally is not None, "it has not begun"
        if tail:
            if self.log is not None:
                tail = self.log.take(tail + EVENT_END).removesuffix(EVENT_END)
            push(tail if self.renaming is None else self.renaming.apply(tail))
            tally.add(tail + EVENT_END)
        return tally.usage()

    def usage(self) -> Usage:
        """What was counted so far."""
        assert self._tally is not None, "it has not begun"
        return self._tally.usage()

    def resumed_body(self, body: bytes) -> bytes:
        """``body`` for both legs with what the servers need to go on from here."""
        assert self.log is not None, "an answer without a log is not resumed"
        return body[: body.rindex(b"}")] + self.log.resume_field() + b"}"

"""One request on its way, or one sample of a chat: what its attempts share. Pure data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from pdserve.balancer.metrics.record import RequestRecord
from pdserve.balancer.proxy.client_answer import ClientAnswer
from pdserve.balancer.proxy.retry import History
from pdserve.balancer.request.ids import RequestIds
from pdserve.balancer.request.request import ParsedRequest
from pdserve.balancer.request.transforms import ResponseSink
from pdserve.scheduling.reservation import Reservation
from pdserve.scheduling.workers import PairKey
from pdserve.types import RequestShape, Rid

if TYPE_CHECKING:
    from pdserve.balancer.tracing.trace import RequestTrace


class Run(msgspec.Struct, eq=False):
    """One request on its way. ``ids`` and ``key`` are the present attempt's, ``lines`` its headers.

    ``whole_shape`` is the request's with a forecast, ``shape`` what is left of it for the present attempt.
    ``exclude`` holds pairs it must not get (again).
    ``on_prefilled`` is called when the prompt is computed.
    ``is_aborted``: its client, or an operator, has asked for its end; ``aborted_prompts``: for that of
    some of a batch's, by their numbers.
    ``history`` is what its failures so far tell; None before the first. ``answer`` is what the client has
    of a whole try: once that has begun, further attempts go on with it. ``first_rids`` are the names under
    which the client knows such an answer; ``num_resumes`` counts attempts to go on after a failure, and
    ``num_tokens`` of each prompt were there at the last one.
    ``held`` is the pair to which its answer is being moved; ``is_moved``: so the present leg goes on with it.
    """

    request: ParsedRequest
    lines: bytes
    sink: ResponseSink
    record: RequestRecord
    whole_shape: RequestShape | None = None
    shape: RequestShape | None = None
    exclude: set[PairKey] = msgspec.field(default_factory=set)
    ids: RequestIds | None = None
    key: PairKey | None = None
    on_prefilled: Callable[[], None] | None = None
    is_aborted: bool = False
    aborted_prompts: frozenset[int] = frozenset()
    answer: ClientAnswer | None = None
    first_rids: tuple[Rid, ...] = ()
    num_resumes: int = 0
    num_tokens: int = 0
    held: Reservation | None = None
    is_moved: bool = False
    trace: RequestTrace | None = None
    history: History | None = None

    @property
    def has_begun(self) -> bool:
        """True once its client has a part of the answer: an attempt goes on with it, or fails for good."""
        return self.answer is not None and self.answer.has_begun

    def leaves_its_pair(self) -> None:
        """Another pair goes on with its answer: keep the names under which its client knows it."""
        if not self.first_rids and self.ids is not None:
            self.first_rids = self.ids.rids

    @property
    def is_unwanted(self) -> bool:
        """True if its end, or that of a part of it, was asked for."""
        return self.is_aborted or bool(self.aborted_prompts)

    @property
    def known_rids(self) -> tuple[Rid, ...]:
        """The workers' ids that the client can know; empty before the first attempt."""
        return self.first_rids or (() if self.ids is None else self.ids.rids)

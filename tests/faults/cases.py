"""Every way a leg can end × either leg × every stage × streaming or not × with or without another pair. Pure.

``impossible`` says why a combination cannot occur; ``expected`` what the client must get
and who may be blamed, from the rules of the design:

    no event at the client yet  another pair is tried; without one 502, silence 504
    events at the client        the stream ends with an error event
    decode has the KV           a prefill that fails later is blamed, the answer goes on
    4xx                         goes to the client, nobody is blamed, nothing is tried again
    an abort not asked for here goes to the client, its worker is blamed, nothing is tried again
"""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass

from pdserve.types import Role
from tests.support.sglang_pairing import Way


class Ending(enum.Enum):
    """How the leg, or the request, ends."""

    HTTP_500 = "500"
    HTTP_503 = "503"
    HTTP_400 = "400"
    REFUSED = "refused"
    RESET_BEFORE_HEAD = "reset-before-head"
    RESET_MID_BODY = "reset-mid-body"
    FIN_BEFORE_HEAD = "fin-before-head"
    FIN_MID_BODY = "fin-mid-body"
    GARBAGE = "garbage"
    SILENCE = "silence"
    KILLED = "killed"
    REMOVED = "removed"
    ERROR_EVENT = "error-event"
    ABORTED = "aborted"
    CLIENT_GONE = "client-gone"

    @property
    def way(self) -> Way | None:
        """What the fake does; None: it is done to it from outside."""
        return next((way for way in Way if way.value == self.value), None)


class Stage(enum.Enum):
    """How far the request had come."""

    BEFORE = "before"
    """Nothing was sent to the worker."""
    ACCEPTED = "accepted"
    """Both workers have it."""
    PREFILLED = "prefilled"
    """Prefill has answered, decode has the KV and has sent nothing."""
    STREAMING = "streaming"
    """Decode's first event, or half of its body, is out."""
    DECODED = "decoded"
    """Decode's answer is complete, prefill's has not begun."""


@dataclass(frozen=True)
class Case:
    """One combination. ``spare``: a second prefill and a second decode worker are there."""

    leg: Role
    ending: Ending
    stage: Stage
    stream: bool
    spare: bool

    def __str__(self) -> str:
        mode, company = "stream" if self.stream else "whole", "spare" if self.spare else "alone"
        return f"{self.stage.value}-{self.leg}-{self.ending.value}-{mode}-{company}"


@dataclass(frozen=True)
class Expected:
    """``outcomes``: any of ``ok``, ``error-event``, ``left`` or a status. ``blame``: failures counted for
    ``leg``, ``both``, ``nobody``, ``leg or both``; empty: depends on which worker was chosen."""

    outcomes: tuple[str, ...]
    blame: str


_BEFORE = (Ending.REFUSED, Ending.RESET_BEFORE_HEAD, Ending.SILENCE, Ending.KILLED, Ending.REMOVED)
_FROM_OUTSIDE = (Ending.KILLED, Ending.REMOVED)
_NEED_NO_HEAD = (
    Ending.HTTP_500, Ending.HTTP_503, Ending.HTTP_400, Ending.ERROR_EVENT, Ending.RESET_BEFORE_HEAD,
    Ending.FIN_BEFORE_HEAD,
)  # fmt: skip


def possible_cases() -> list[Case]:
    """The whole product without what cannot occur."""
    product = itertools.product(Role, Ending, Stage, (False, True), (False, True))
    return [case for values in product if not impossible(case := Case(*values))]


def covering_set() -> list[Case]:
    """Every leg, ending and stage once; streaming or not, and with or without a spare, alternate."""
    groups = itertools.groupby(possible_cases(), key=lambda case: (case.leg, case.ending, case.stage))
    options = [list(group) for _, group in groups]
    return [cases[number % len(cases)] for number, cases in enumerate(options)]


def impossible(case: Case) -> str:
    """Why it cannot occur, or an empty string."""
    ending, stage = case.ending, case.stage
    if ending is Ending.CLIENT_GONE:
        if case.leg is Role.DECODE:
            return "a client has no leg: tested once"
        return "another pair makes no difference" if case.spare else ""
    if stage is Stage.BEFORE:
        return "" if ending in _BEFORE else "no request was sent: there is no answer to spoil"
    if ending is Ending.REFUSED:
        return "the connection was accepted already"
    if ending is Ending.ERROR_EVENT and not case.stream:
        return "only a stream has events"
    ended = {Stage.PREFILLED: Role.PREFILL, Stage.DECODED: Role.DECODE}.get(stage)
    if case.leg is ended and ending not in _FROM_OUTSIDE:
        return "this leg's answer has ended already"
    if ending is Ending.ABORTED and stage is Stage.STREAMING and not case.stream:
        return "a body that is half out cannot say so"
    if stage is Stage.STREAMING and case.leg is Role.DECODE:
        if ending in _NEED_NO_HEAD:
            return "its head is out already"
        if ending is Ending.GARBAGE and not case.stream:
            return "a body of known length has no framing to break"
    return ""


def expected(case: Case) -> Expected:
    """What must come of it."""
    ending, stage = case.ending, case.stage
    if ending is Ending.CLIENT_GONE:
        return Expected(("left",), "nobody")
    if stage is Stage.BEFORE:
        return _expected_before(case)
    if ending is Ending.ABORTED:
        return _expected_aborted(case)
    if ending is Ending.REMOVED:
        return Expected(("ok",), "nobody")  # what it was given, it may finish
    if (stage, case.leg) in ((Stage.PREFILLED, Role.PREFILL), (Stage.DECODED, Role.DECODE)):
        return Expected(("ok",), "nobody")
    blame = "nobody" if ending is Ending.HTTP_400 else "leg"
    if ending is Ending.SILENCE and stage is Stage.STREAMING and not case.stream:
        blame = "leg or both"  # decode waits to be let go on, and is silent as long
    is_answer_safe = stage is Stage.DECODED or (stage is Stage.STREAMING and case.stream)
    if case.leg is Role.PREFILL and is_answer_safe:
        return Expected(("ok",), blame)
    if ending is Ending.HTTP_400:
        return Expected(("400",), "nobody")
    if stage is Stage.STREAMING and case.stream:
        return Expected(("error-event",), "leg")
    if ending is Ending.SILENCE and stage is Stage.ACCEPTED and case.leg is Role.PREFILL:
        blame = "both"  # decode is silent too, because it waits for prefill: either may be the cause
    retried = "ok" if case.spare else "504" if ending is Ending.SILENCE else "502"
    outcomes = (retried, "503") if ending is Ending.HTTP_503 and not case.spare else (retried,)
    return Expected(outcomes, blame)


def _expected_aborted(case: Case) -> Expected:
    """It may be somebody's wish: it is not tried again. Nobody told the balancer: the worker is blamed."""
    is_answer_safe = case.stage is Stage.DECODED or (case.stage is Stage.STREAMING and case.stream)
    if case.leg is Role.PREFILL and is_answer_safe:
        return Expected(("ok",), "nobody")
    return Expected(("aborted",), "leg")


def _expected_before(case: Case) -> Expected:
    if case.spare:
        return Expected(("ok",), "")
    if case.ending is Ending.REMOVED:
        return Expected(("503",), "nobody")
    return Expected(("502",), "leg")

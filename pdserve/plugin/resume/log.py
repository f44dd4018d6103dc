"""The log of an answer: what its server says beside the frames, and what the next server is told. Pure.

A log is words with a blank between them. The balancer keeps it as it comes and reads two kinds
of words only, those that begin with ``!`` and ``~`` (docs/resume.md); all others are ours:

    =RID[,RID…][@CREATED]      first word of an answer: the ids and the time that its client has seen
    [RUN:]IDS;CHARS[;OPTION…]  one output: its new token ids and how many characters they added

``RUN`` is the place in a batch, left out for the first. Options: ``cN`` cached tokens of the run,
``e`` the run's end, ``l[…]`` log probabilities of these tokens as JSON. A log holds no quote, no
backslash and no control character, so that it is the text of a JSON string as it stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

RID = re.compile(r"[\w.:-]+")
"""Ids that may stand in a log; the balancer's are hexadecimal."""
ABORTED, NOT_RESUMABLE = "~", "!"


class Step(NamedTuple):
    """One output of the first server: which run, how many tokens and characters it added."""

    run: int
    num_ids: int
    chars: int
    is_end: bool = False


@dataclass(slots=True)
class Run:
    """One prompt's answer as far as it is known."""

    ids: list[int] = field(default_factory=list)
    chars: int = 0
    cached: int | None = None
    is_over: bool = False
    logprobs: list[Any] = field(default_factory=list)
    """Parts as ``logprob_rows`` made them; empty unless the client asked for log probabilities."""


@dataclass(slots=True)
class Log:
    """Everything that is known of an answer."""

    rids: tuple[str, ...] = ()
    created: int | None = None
    runs: dict[int, Run] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)


def first_word(rids: Sequence[str], created: int | None) -> str:
    """The names under which the client knows this answer; empty if it knows none."""
    if not rids and created is None:
        return ""
    return f"={','.join(rids)}" + ("" if created is None else f"@{created}")


def output_word(step: Step, ids: Sequence[int], cached: int | None = None, rows: Any = None) -> str:
    """One output as a word. ``rows``: what ``logprob_rows`` returned."""
    listed = str(ids[0]) if len(ids) == 1 else ",".join(map(str, ids))
    word = f"{listed};{step.chars}"
    if step.run:
        word = f"{step.run}:{word}"
    if cached is not None:
        word += f";c{cached}"
    if step.is_end:
        word += ";e"
    if rows is not None:
        word += f";l{json.dumps(rows, separators=(',', ':'))}"
    return word


def parse_log(text: str) -> Log:
    """Read a log, of one leg or of several one after the other.

    Raises:
        ValueError: naming the word that is not one of ours.
    """
    log = Log()
    for word in text.split():
        if word[0] in (ABORTED, NOT_RESUMABLE):
            raise ValueError(f"this answer cannot be resumed: its log says {word!r}")
        try:
            if word[0] == "=":
                _read_names(log, word)
            else:
                _read_output(log, word)
        except ValueError:
            raise ValueError(f"a log of an answer cannot hold {word[:80]!r}") from None
    return log


def _read_names(log: Log, word: str) -> None:
    names, _, created = word[1:].partition("@")
    log.rids = tuple(names.split(",")) if names else ()
    log.created = int(created) if created else None


def _read_output(log: Log, word: str) -> None:
    head, chars, *options = word.split(";")
    index, _, listed = head.rpartition(":")
    ids = [int(token) for token in listed.split(",")] if listed else []
    run = log.runs.setdefault(int(index or 0), Run())
    for option in options:
        match option[:1]:
            case "c":
                run.cached = int(option[1:])
            case "e":
                run.is_over = True
            case "l":
                run.logprobs.append(json.loads(option[1:]))
            case _:
                raise ValueError(option)
    run.ids += ids
    run.chars += int(chars)
    log.steps.append(Step(int(index or 0), len(ids), int(chars), run.is_over))


# -- log probabilities ---------------------------------------------------------------------------

_ROWS = ("output_token_logprobs", "output_top_logprobs", "output_token_ids_logprobs")


def logprob_rows(meta: dict[str, Any], start: int) -> list[Any]:
    """Log probabilities of the tokens from ``start``: of the tokens, of the top ones, of those asked for.

    Each is a list with a row per token: ``[value]``, or pairs ``[value, id]``.
    """
    tokens, tops, asked = (meta.get(name) or () for name in _ROWS)
    return [
        [row[0] for row in tokens[start:]],
        [[[item[0], item[1]] for item in row or ()] for row in tops[start:]],
        [[[item[0], item[1]] for item in row or ()] for row in asked[start:]],
    ]


def join_rows(parts: Sequence[Any]) -> list[Any]:
    """The parts of one run as one."""
    return [[row for part in parts for row in part[kind]] for kind in range(len(_ROWS))]

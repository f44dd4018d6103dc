"""Answers that tell their tokens and go on with others', as pdserve's workers do (docs/resume.md), in small.

    frames_of ─► undisturbed frames, a comment before some ─► what a leg sends, cut as its ``Break`` says
    resumed   ─► the same without those that the client has; refuses a log that is not exactly theirs

Token number ``k`` of every prompt has the id 100 + k.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tests.support.dialects import CHAT, GENERATE, deltas, end, failure, preamble

HEADER = "x-pdserve-ids"
CREATED = 1764525600


@dataclass(frozen=True)
class Break:
    """How a leg ends early: after so many frames and ``num_bytes`` of the next one.

    ``how``: ``fin`` closes its connection, ``kill`` ends the server, ``hang`` sends no more, ``refuse``
    answers 400, a number is the status with which it gives the answer up. ``obstacle``: it says that the
    answer cannot be resumed.
    """

    frames: int
    num_bytes: int = 0
    how: str = "fin"
    obstacle: str = ""


Frame = tuple[str, bytes]
"""The words of its comment, and the frame without it."""


def frames_of(path: str, rids: list[str], num_tokens: int, *, is_batch: bool = False) -> list[Frame]:
    """Every frame of an undisturbed answer."""
    path = {"/invocations": CHAT, "/vertex_generate": GENERATE}.get(path, path)
    opening, tokens = preamble(path), deltas(path, num_tokens)
    opening += tokens[: len(tokens) - num_tokens]
    tokens = tokens[len(tokens) - num_tokens :]
    *last, done = end(path, num_tokens=num_tokens)
    runs = range(len(rids) if is_batch else 1)
    frames: list[Frame] = [("", frame) for frame in opening]
    is_told = len(opening) > len(preamble(path))  # what opens the content has the words of the first token
    if is_told:
        frames[len(preamble(path))] = "100;9;c3", opening[len(preamble(path))]
    for number, frame in enumerate(tokens):
        for run in runs:
            word = f"{100 + number};9" + (f";c{3}" if number == 0 else "")
            word = "" if is_told and number == 0 else f"{run}:{word}" if run else word
            frames.append((word, _of_run(frame, run, is_batch)))
    frames += [("", _of_run(frame, run, is_batch)) for frame in last for run in runs]
    frames.append(("", done))
    if rids:
        names = f"={','.join(rids)}@{CREATED}"
        frames[0] = f"{names} {frames[0][0]}".strip(), frames[0][1]
    return [(words, _named(frame, rids)) for words, frame in frames]


def _of_run(frame: bytes, run: int, is_batch: bool) -> bytes:
    if not is_batch or not frame.startswith(b"data: {"):
        return frame
    document = json.loads(frame.removeprefix(b"data: "))
    if "choices" in document:
        for choice in document["choices"]:
            choice["index"] = run
    else:
        document["index"] = run
        document["meta_info"]["id"] = f"run{run}"
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def _named(frame: bytes, rids: list[str]) -> bytes:
    if not rids:
        return frame
    for run, rid in enumerate(rids):
        frame = frame.replace(b'"run%d"' % run, json.dumps(rid).encode())
    return frame.replace(b'"id":"1"', b'"id":"%b"' % rids[0].encode()).replace(
        b'"resp_1"', b'"%b"' % rids[0].encode()
    )


def rendered(frame: Frame) -> bytes:
    """A frame as it is sent."""
    words, data = frame
    return f": ids {words}\n".encode() + data if words else data


def rids_in(log: str) -> list[str]:
    """The ids under which the client knows the answer."""
    first = log.partition(" ")[0]
    return first[1:].partition("@")[0].split(",") if first.startswith("=") else []


def rest_of(frames: list[Frame], field: dict[str, Any]) -> list[Frame] | None:
    """The frames that the client does not have; None if the log is not that of the others."""
    count = field["frames"]
    told = " ".join(words for words, _ in frames[:count] if words)
    return frames[count:] if told == field["log"] else None


def error_frames(path: str, status: int) -> list[Frame]:
    """How a server says that it gives the answer up."""
    frames = failure(path, "the fake gives up", status)
    return [(f"~{status}", frames[0]), *(("", frame) for frame in frames[1:])]

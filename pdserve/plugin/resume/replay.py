"""The first outputs of a resumed request, in the portions in which its first server made them. Pure.

A resumed request begins with one output that holds everything the client has already. Parsers
of tool calls and reasoning give the same frames again only if they are fed in the same portions;
with the same frames, dropping as many as the client has leaves exactly the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pdserve.plugin.resume.log import Log, Step

Output = dict[str, Any]
"""What SGLang's TokenizerManager yields: ``text``, ``output_ids``, ``meta_info``, ``index`` in a batch."""


class Replay:
    """Cuts the first output of every run that ``log`` knows.

    ``is_incremental``: outputs hold only what is new (``--incremental-streaming-output``).
    ``is_repeating``: each frame carries the whole text so far (``/generate`` without that
    switch); then nothing is made again, only what is not new is left out.
    """

    def __init__(self, log: Log, *, is_incremental: bool, is_repeating: bool) -> None:
        self._log = log
        self._is_incremental = is_incremental
        self._is_repeating = is_repeating
        self._waiting = set(log.runs)
        self._first: dict[int, Output] = {}
        self._held: list[Output] = []

    def feed(self, output: Output) -> list[tuple[Output, bool]]:
        """Return what to hand on now, each with whether all of it is known to the log already."""
        if self._is_repeating:
            return [(output, False)] if self._is_new(output) else []
        if not self._waiting:
            return [(output, False)]
        run = output.get("index", 0)
        if run in self._waiting:
            self._waiting.discard(run)
            self._first[run] = output
        else:
            self._held.append(output)
        if self._waiting:
            return []  # runs of a batch were interleaved: all must be here to do it again
        return list(self._all())

    def _is_new(self, output: Output) -> bool:
        run = self._log.runs.get(output.get("index", 0))
        if run is None:
            return True
        is_longer = len(output["output_ids"]) > len(run.ids)
        return not run.is_over and (is_longer or bool(output["meta_info"].get("finish_reason")))

    def _all(self) -> Iterator[tuple[Output, bool]]:
        cuts = {run: _Cuts(output, self._is_incremental) for run, output in self._first.items()}
        for step in self._log.steps:
            yield cuts[step.run].part(step), True
        for cut in cuts.values():
            if (rest := cut.rest()) is not None:
                yield rest, False
        for output in self._held:
            yield output, False


class _Cuts:
    """One output and how much of it has been handed on."""

    def __init__(self, whole: Output, is_incremental: bool) -> None:
        self._whole = whole
        self._ids = list(whole["output_ids"])
        self._text = whole.get("text") or ""
        self._is_incremental = is_incremental
        self._num_ids = self._chars = 0
        self._is_over = False

    def part(self, step: Step) -> Output:
        """The next ``step`` of it."""
        if step.is_end:
            self._is_over = True
            return self._from_here() if self._is_incremental else self._whole
        first_id, first_char = (self._num_ids, self._chars) if self._is_incremental else (0, 0)
        self._num_ids += step.num_ids
        self._chars += step.chars
        meta = self._whole["meta_info"]
        part = {**meta, "finish_reason": None, "completion_tokens": self._num_ids}
        part |= _rows_of(meta, first_id, self._num_ids)
        if "output_token_logprobs_length" in meta:
            part["output_token_logprobs_length"] = self._num_ids
        return self._with(self._ids[first_id : self._num_ids], self._text[first_char : self._chars], part)

    def rest(self) -> Output | None:
        """What no step has taken; None if that is nothing."""
        is_finished = bool(self._whole["meta_info"].get("finish_reason"))
        has_more = self._num_ids < len(self._ids) or self._chars < len(self._text)
        if self._is_over or not (has_more or is_finished):
            return None
        return self._from_here() if self._is_incremental else self._whole

    def _from_here(self) -> Output:
        meta = self._whole["meta_info"]
        rows = _rows_of(meta, self._num_ids, len(self._ids))
        return self._with(self._ids[self._num_ids :], self._text[self._chars :], {**meta, **rows})

    def _with(self, ids: list[int], text: str, meta: Output) -> Output:
        changed = {**self._whole, "output_ids": ids, "meta_info": meta}
        return changed if self._whole.get("text") is None else {**changed, "text": text}


def _rows_of(meta: Output, start: int, end: int) -> Output:
    """Those fields that have a row per token, cut."""
    names = (name for name in meta if name.startswith("output_") and isinstance(meta[name], list))
    return {name: meta[name][start:end] for name in names}

"""Length forecasts for a simulation: the production predictor, its bounds, or none."""

from __future__ import annotations

from pdserve.scheduling.lengths import LengthPredictor, Lengths, unlearned
from pdserve.types import Forecast, RequestShape

LENGTHS = ("learned", "oracle", "useless", "none")
"""``oracle`` knows each answer's length, ``useless`` learns nothing; both bound what prediction is worth."""


class NoLengths:
    """No forecast at all: policies fall back on the limit."""

    def forecast(self, shape: RequestShape) -> Forecast | None:
        """None."""
        return None

    def learn(self, shape: RequestShape, output_tokens: int, is_cut: bool) -> None:
        """Learns nothing."""

    def snapshot(self) -> dict[str, object]:
        """Nothing was learned."""
        return {"num_learned": 0}


class UselessLengths(NoLengths):
    """The same forecast for every request."""

    def forecast(self, shape: RequestShape) -> Forecast | None:
        """As before anything was learned."""
        return unlearned(shape.max_new_tokens)


class OracleLengths(NoLengths):
    """The length of each answer, which the simulation sets as ``next_tokens`` before it asks."""

    next_tokens: int | None = None

    def forecast(self, shape: RequestShape) -> Forecast | None:
        """``next_tokens``, at most the limit; the limit if it was not set."""
        limit = shape.max_new_tokens
        tokens = float(limit if self.next_tokens is None else min(limit, self.next_tokens))
        return Forecast(tokens, tokens, tokens, True)


def make_lengths(kind: str) -> Lengths:
    """One of LENGTHS, new."""
    if kind == "learned":
        return LengthPredictor()
    return {"oracle": OracleLengths, "useless": UselessLengths, "none": NoLengths}[kind]()

"""Who tells how long answers will be in a simulation: the production predictor, a bound, or nobody."""

from __future__ import annotations

from typing import Protocol

import msgspec

from pdserve.scheduling import lengths as production
from pdserve.types import RequestShape

LENGTHS = ("learned", "oracle", "useless", "none")
"""``oracle`` knows each answer's length, ``useless`` learns nothing; both bound what prediction is worth."""


class Lengths(Protocol):
    """Puts a forecast into a request's shape, and hears of its end."""

    def annotated(self, shape: RequestShape, output_tokens: int) -> RequestShape:
        """The shape with a forecast; ``output_tokens`` is the truth, for the oracle."""
        ...

    def learn(self, shape: RequestShape, output_tokens: int) -> None:
        """An answer has ended."""
        ...


class NoLengths:
    """No forecast at all: policies fall back on the limit."""

    def annotated(self, shape: RequestShape, output_tokens: int) -> RequestShape:
        """The shape as it is."""
        return shape

    def learn(self, shape: RequestShape, output_tokens: int) -> None:
        """Nothing."""


class OracleForecasts:
    """Knows."""

    def __init__(self) -> None:
        self._oracle = production.OracleLengths()

    def annotated(self, shape: RequestShape, output_tokens: int) -> RequestShape:
        """The truth, without doubt."""
        self._oracle.tell(output_tokens)
        return msgspec.structs.replace(shape, forecast=self._oracle.forecast(shape))

    def learn(self, shape: RequestShape, output_tokens: int) -> None:
        """Nothing."""


class PredictedLengths:
    """Forecasts of a predictor of balancer/lengths.py."""

    def __init__(self, predictor: production.Lengths) -> None:
        self._predictor = predictor

    def annotated(self, shape: RequestShape, output_tokens: int) -> RequestShape:
        """What the predictor thinks."""
        return msgspec.structs.replace(shape, forecast=self._predictor.forecast(shape))

    def learn(self, shape: RequestShape, output_tokens: int) -> None:
        """A finished answer; it was cut if it reached the client's limit."""
        self._predictor.learn(shape, output_tokens, output_tokens >= shape.max_new_tokens)


def make_lengths(kind: str) -> Lengths:
    """One of LENGTHS, new."""
    if kind == "none":
        return NoLengths()
    if kind == "oracle":
        return OracleForecasts()
    return PredictedLengths(
        production.UselessLengths() if kind == "useless" else production.LengthPredictor()
    )

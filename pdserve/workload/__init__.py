"""Requests to replay: public traces, synthetic arrivals, and what is done to them before a run.

A request is an arrival time, two lengths and, where a trace tells it, ids of prompt blocks: equal
leading ids are an equal prompt prefix. Pure data; nothing here knows of workers.
"""

from pdserve.workload.change import cut, overlaid, rate_of, rearrived, sampled, scaled, shifted, spread
from pdserve.workload.read import read_trace
from pdserve.workload.request import BLOCK_TOKENS, BYTES_PER_TOKEN, TracedRequest, prompt_bytes
from pdserve.workload.synthetic import LengthDistribution, Synthetic, synthetic

__all__ = [
    "BLOCK_TOKENS",
    "BYTES_PER_TOKEN",
    "LengthDistribution",
    "Synthetic",
    "TracedRequest",
    "cut",
    "overlaid",
    "prompt_bytes",
    "rate_of",
    "read_trace",
    "rearrived",
    "sampled",
    "scaled",
    "shifted",
    "spread",
    "synthetic",
]

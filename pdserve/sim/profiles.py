"""Published cost models, each with its source. ``model_of`` takes one of their names or a file.

Prefill and decode of Llama-2-70B: fits to ``data/perf_model.csv`` of github.com/Mutinifni/splitwise-sim at
8f99e7d (MIT; the measurements behind Splitwise, ISCA 2024, vLLM on DGX machines): medians per row, least
squares of the relative error over prompts of 128 to 8192 tokens and batches of 1 to 32 times 512
(at most 16 384 tokens in a pass; decode 1 to 64). What the rows cannot tell apart is taken from the machine:
``prefill_pair_s``, 2.6 MFLOP per pair of tokens (4 * 8192 * 80 layers) at 40 % of the peak, on 8 H100 the
measured difference between one prompt of 8192 and sixteen of 512; ``decode_token_s``, the KV bytes of a
token over the bandwidth of all memories. ``fit_error`` is prefill's, decode's is 0.02: measured prefill bends
upwards between 2048 and 4096 tokens, which no line follows; small prompts come out 20 % slow, large ones
25 % fast.

Pools: 88 % of the memory less 140 GB of weights, 327 680 bytes per token (80 layers, 8 KV heads of 128,
K and V, 2 bytes). The link: Mooncake's own 1P1D table on 8 ConnectX-7 of 400 Gb/s (0.54 ms for 128 tokens
to 31.65 ms for 32 768 of Qwen3-8B; kvcache-ai.github.io), fitted within 7 %: 0.39 ms and 146 GB/s; fewer or
slower adapters in proportion. Assumed, not measured: ``request_s``, ``handshake_s`` and ``response_s``, about
what SGLang's HTTP server, tokenizer and bootstrap take; ``reload_beta_s``, PCIe 5 x16 at 25 GB/s per GPU
(PCIe 4: half).
"""

from __future__ import annotations

from pathlib import Path

from pdserve.errors import ConfigError
from pdserve.sim.cost import CostModel, load_model

_SOURCE = "splitwise-sim data/perf_model.csv (8f99e7d), llama2-70b, {}; link: Mooncake 1P1D table"

LLAMA_70B_8XH100 = CostModel(
    name="llama-70b-8xh100",
    source=_SOURCE.format("h100-80gb, TP 8"),
    prefill_base_s=26.1e-3,
    prefill_token_s=67.2e-6,
    prefill_pair_s=1.05e-9,
    decode_base_s=30.1e-3,
    decode_request_s=289e-6,
    decode_token_s=12.2e-9,
    kv_bytes_per_token=327_680,
    prefill_pool_tokens=1_290_000,
    decode_pool_tokens=1_290_000,
    link_alpha_s=0.39e-3,
    link_beta_s=1 / 146e9,
    request_s=0.003,
    handshake_s=0.002,
    response_s=0.001,
    reload_beta_s=1 / 200e9,
    fit_error=0.24,
)
"""Llama-2-70B in 16 bits on eight H100 of 80 GB."""

LLAMA_70B_4XH100 = CostModel(
    name="llama-70b-4xh100",
    source=_SOURCE.format("h100-80gb, TP 4"),
    prefill_base_s=25.1e-3,
    prefill_token_s=91.0e-6,
    prefill_pair_s=1.66e-9,
    decode_base_s=28.9e-3,
    decode_request_s=305e-6,
    decode_token_s=24.5e-9,
    kv_bytes_per_token=327_680,
    prefill_pool_tokens=432_000,
    decode_pool_tokens=432_000,
    link_alpha_s=0.39e-3,
    link_beta_s=1 / 73e9,
    request_s=0.003,
    handshake_s=0.002,
    response_s=0.001,
    reload_beta_s=1 / 100e9,
    fit_error=0.13,
)
"""The same on four."""

LLAMA_70B_8XA100 = CostModel(
    name="llama-70b-8xa100",
    source=_SOURCE.format("a100-80gb, TP 8"),
    prefill_base_s=29.7e-3,
    prefill_token_s=147.7e-6,
    prefill_pair_s=2.6e-9,
    decode_base_s=44.5e-3,
    decode_request_s=361e-6,
    decode_token_s=20.1e-9,
    kv_bytes_per_token=327_680,
    prefill_pool_tokens=1_290_000,
    decode_pool_tokens=1_290_000,
    link_alpha_s=0.39e-3,
    link_beta_s=1 / 73e9,
    request_s=0.003,
    handshake_s=0.002,
    response_s=0.001,
    reload_beta_s=1 / 100e9,
    fit_error=0.17,
)
"""The same on eight A100 of 80 GB with adapters of 200 Gb/s."""

PROFILES = {model.name: model for model in (LLAMA_70B_8XH100, LLAMA_70B_4XH100, LLAMA_70B_8XA100)}
"""Every published model by its name."""


def model_of(name: str) -> CostModel:
    """The published model of that name, or the one in the file of that name.

    Raises:
        ConfigError: if it is neither.
    """
    if model := PROFILES.get(name):
        return model
    if Path(name).exists() or name.endswith(".json"):
        return load_model(name)
    raise ConfigError(f"model {name!r}: expected a file that calibrate wrote or one of {', '.join(PROFILES)}")

"""Published cost models, each with its source. ``model_of`` takes one of their names or a file."""

from __future__ import annotations

from pathlib import Path

from pdserve.errors import ConfigError
from pdserve.sim.cost import CostModel, load_model

LLAMA_70B_H100 = CostModel(
    name="llama-70b-8xh100",
    source="provisional",
    prefill_base_s=0.060,
    prefill_token_s=23e-6,
    prefill_pair_s=1.6e-9,
    decode_base_s=0.027,
    decode_request_s=100e-6,
    decode_token_s=14e-9,
    kv_bytes_per_token=327_680,
    prefill_pool_tokens=1_200_000,
    decode_pool_tokens=1_200_000,
    max_running_requests=256,
    link_alpha_s=0.0004,
    link_beta_s=1 / 150e9,
    request_s=0.003,
    handshake_s=0.002,
    response_s=0.001,
    reload_beta_s=1 / 200e9,
)

PROFILES = {model.name: model for model in (LLAMA_70B_H100,)}
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

"""A llama-architecture GGUF turned into a Hugging Face Llama folder, by numpy alone.

llama.cpp stores the rows of Q and K so that its rotary embedding turns *adjacent*
channels; Hugging Face turns channel i with i + head_dim / 2. Rows go back here:

    GGUF    [head, head_dim / 2, 2, in]  ──swap axes 1, 2──►  HF  [head, 2, head_dim / 2, in]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdserve.errors import ConfigError
from pdserve.model.folder import WEIGHTS_FILE, write_json
from pdserve.model.gguf_tokenizer import end_ids, special_ids, write_tokenizer
from pdserve.model.weights import bfloat16_bits, write_weights

Progress = Callable[[str], None]
"""Hears one short line per step of a build."""

_MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf_as_folder(gguf: Path, folder: Path, progress: Progress) -> None:
    """Fill ``folder`` (which exists) with the GGUF's model: bfloat16 weights, configs, tokenizer.

    Raises:
        ConfigError: if the file is no GGUF, not of architecture llama, or has parts unknown here.
    """
    from gguf import GGUFReader

    progress(f"reading {gguf.name}")
    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError, OSError) as exc:
        raise ConfigError(f"{gguf} cannot be read as GGUF: {exc}") from exc
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    if metadata.get("general.architecture") != "llama":
        raise ConfigError(f"{gguf} is of architecture {metadata.get('general.architecture')}, not llama")
    write_tokenizer(folder, metadata)
    weights = _weights(reader.tensors, metadata, progress)
    progress(f"writing {WEIGHTS_FILE}, {sum(w.nbytes for w in weights.values()) / 1e6:.0f} MB")
    write_weights(folder / WEIGHTS_FILE, weights)
    write_json(folder / "generation_config.json", special_ids(metadata) | {"eos_token_id": end_ids(metadata)})
    write_json(folder / "config.json", model_config(metadata, is_tied="lm_head.weight" not in weights))


def hub_name(tensor: str) -> str:
    """A GGUF tensor's checkpoint name: ``blk.3.attn_q.weight`` is ``model.layers.3.self_attn.q_proj.weight``.

    Raises:
        ConfigError: if a Llama has no such tensor.
    """
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor):
        layer, part = match.groups()
        if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
    elif tensor.removesuffix(".weight") in _MODEL_NAMES:
        return _MODEL_NAMES[tensor.removesuffix(".weight")] + ".weight"
    raise ConfigError(f"the GGUF has a tensor that a plain Llama lacks: {tensor}")


def unpermute_rows(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order (module head) of a Q or K projection ``[num_heads * head_dim, in]``."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def model_config(metadata: Mapping[str, Any], *, is_tied: bool) -> dict[str, Any]:
    """``config.json`` of a LlamaForCausalLM from a GGUF's key-value section."""

    def count(key: str) -> int:
        return int(metadata[f"llama.{key}"])

    heads, hidden = count("attention.head_count"), count("embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": count("feed_forward_length"),
        "num_hidden_layers": count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv"),
        "head_dim": int(metadata.get("llama.attention.key_length", hidden // heads)),
        "hidden_act": "silu",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "max_position_embeddings": count("context_length"),
        "rms_norm_eps": _shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(metadata["llama.rope.freq_base"]),
        "tie_word_embeddings": is_tied,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        **special_ids(metadata),
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _weights(
    tensors: Iterable[Any], metadata: Mapping[str, Any], progress: Progress
) -> dict[str, NDArray[np.uint16]]:
    """Dequantised tensors by checkpoint name, as bfloat16 bits; one float32 tensor is alive at a time."""
    from gguf.quants import dequantize

    heads = {
        "attn_q": int(metadata["llama.attention.head_count"]),
        "attn_k": int(metadata["llama.attention.head_count_kv"]),
    }
    num_layers = int(metadata["llama.block_count"])
    progress(f"dequantising {num_layers} layers")
    weights: dict[str, NDArray[np.uint16]] = {}
    for tensor in tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = unpermute_rows(values, heads[part])
        weights[hub_name(tensor.name)] = bfloat16_bits(values)
    return weights

"""A llama-architecture GGUF turned into a Hugging Face Llama folder, by numpy alone.

llama.cpp stores the rows of Q and K so that its rotary embedding turns *adjacent*
channels; Hugging Face turns channel i with i + head_dim / 2. Rows go back here:

    GGUF    [head, head_dim / 2, 2, in]  ──swap axes 1, 2──►  HF  [head, 2, head_dim / 2, in]

A GGUF names its pre-tokenizer only by a word; ``smollm`` stands for "split every
digit, then GPT-2's byte-level words". The vocabulary lacks the symbols of bytes its
training text never had (U+0004, 06, 13, 14, 16, 1D and the lead bytes of planes 4
to 11): such a byte encodes to nothing, as with the published tokenizer.
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


_CONTROL = 3  # gguf.TokenType.CONTROL


def write_tokenizer(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    ``metadata`` is the GGUF's key-value section, values as Python objects.

    Raises:
        ConfigError: if the GGUF holds another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ConfigError(f"the GGUF has tokenizer {kind[0]}/{kind[1]}; only gpt2/smollm can be rebuilt")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    pairs = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    merges = [(left, right) for left, right in pairs]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    specials = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", _tokenizer_config(metadata, tokens, specials))


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` as Hugging Face's configs name them."""
    return {
        "bos_token_id": int(metadata["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(metadata["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(metadata["tokenizer.ggml.padding_token_id"]),
    }


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end an answer: the end-of-turn token and, if there is one, ``<|endoftext|>``."""
    eos = special_ids(metadata)["eos_token_id"]
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    end_of_text = tokens.index("<|endoftext|>") if "<|endoftext|>" in tokens else eos
    return list(dict.fromkeys([eos, end_of_text]))


def _tokenizer_config(metadata: Mapping[str, Any], tokens: list[str], specials: list[str]) -> dict[str, Any]:
    ids = special_ids(metadata)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(metadata["llama.context_length"]),
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[int(metadata["tokenizer.ggml.unknown_token_id"])],
        "additional_special_tokens": specials,
        "chat_template": metadata["tokenizer.chat_template"],
    }

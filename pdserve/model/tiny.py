"""A Llama of a few hundred kilobytes, for tests and for trying the launcher.

Seeded random weights, made so that greedy decoding is worth comparing: attention
is sharp and outweighs the residual stream, so the next token depends on the whole
prompt, and logits are far apart, so two correct engines agree on the argmax.
The tokenizer is the alphabet of bytes: **id == byte value**, specials follow at 256.
Only printable ASCII is ever the argmax: one token is one visible character, and the
end token never comes by itself (a test that wants an early end uses ``stop``).

SGLang's ``--dtype auto`` runs a float32 folder in float16: exact tests pass ``--dtype float32``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdserve.errors import ConfigError
from pdserve.model.folder import WEIGHTS_FILE, publish, write_json
from pdserve.model.weights import ModelDtype, encode_weights, write_weights

TINY_VERSION = 1
"""Counts changes of what ``write_tiny_model`` writes for equal arguments."""

END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS: dict[str, int] = {END: 256, TURN_START: 257, TURN_END: 258}
"""Special token -> id. The end-of-sequence token is ``<|im_end|>``."""

VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
_PRINTABLE = slice(32, 127)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinyShape:
    """Sizes of the model. ``heads`` are query heads; ``max_position`` is the context length in tokens.

    Raises:
        ConfigError: if the sizes do not fit together.
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    max_position: int = 4096
    dtype: ModelDtype = "float32"

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads or (self.hidden // self.heads) % 2:
            raise ConfigError(
                "tiny model: need hidden divisible by heads, heads by kv_heads, and an even head_dim; "
                f"got hidden={self.hidden} heads={self.heads} kv_heads={self.kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden // self.heads


DEFAULT_SHAPE = TinyShape()


def write_tiny_model(folder: Path | str, shape: TinyShape = DEFAULT_SHAPE, *, seed: int = 0) -> Path:
    """Write a Hugging Face Llama folder and return its path; a complete folder is left unchanged.

    Equal arguments give equal bytes. Needs neither torch nor the network, and
    takes a fraction of a second.
    """

    def write(path: Path) -> None:
        weights = _weights(shape, np.random.default_rng(seed))
        encoded = {name: encode_weights(value, shape.dtype) for name, value in weights.items()}
        write_weights(path / WEIGHTS_FILE, encoded)
        _write_tokenizer(path, shape)
        write_json(path / "generation_config.json", _special_ids())
        write_json(path / "config.json", _config(shape))

    return publish(Path(folder), write)


def _special_ids() -> dict[str, int]:
    return {
        "bos_token_id": SPECIAL_TOKENS[TURN_START],
        "eos_token_id": SPECIAL_TOKENS[TURN_END],
        "pad_token_id": SPECIAL_TOKENS[END],
    }


def _config(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": shape.max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": shape.dtype,
        **_special_ids(),
    }


def _weights(shape: TinyShape, rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """All tensors, float32. Gains below are of one linear map for inputs of unit variance."""

    def linear(out_features: int, in_features: int, gain: float) -> NDArray[np.float32]:
        values: NDArray[np.float64] = rng.standard_normal((out_features, in_features))
        return np.asarray(values * (gain / in_features**0.5), np.float32)

    hidden, kv_width, inner = shape.hidden, shape.kv_heads * shape.head_dim, 2 * shape.hidden
    ones = np.ones(hidden, np.float32)
    weights = {"model.embed_tokens.weight": linear(VOCAB_SIZE, hidden, hidden**0.5)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        # Gains: q·k / sqrt(head_dim) has deviation 1.6² so that a few tokens win the softmax, and v·o lets
        # attention outweigh the residual; measured by tests/model/test_tiny.py.
        weights |= {
            prefix + "input_layernorm.weight": ones,
            prefix + "self_attn.q_proj.weight": linear(hidden, hidden, 1.6),
            prefix + "self_attn.k_proj.weight": linear(kv_width, hidden, 1.6),
            prefix + "self_attn.v_proj.weight": linear(kv_width, hidden, 2.0),
            prefix + "self_attn.o_proj.weight": linear(hidden, hidden, 2.0),
            prefix + "post_attention_layernorm.weight": ones,
            prefix + "mlp.gate_proj.weight": linear(inner, hidden, 1.5),
            prefix + "mlp.up_proj.weight": linear(inner, hidden, 1.5),
            prefix + "mlp.down_proj.weight": linear(hidden, inner, 1.5),
        }
    weights["model.norm.weight"] = ones
    head = np.zeros((VOCAB_SIZE, hidden), np.float32)  # logit 0 for all but printable characters
    head[_PRINTABLE] = linear(VOCAB_SIZE, hidden, 4.0)[_PRINTABLE]
    weights["lm_head.weight"] = head
    return weights


def _write_tokenizer(folder: Path, shape: TinyShape) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = {_byte_symbol(byte): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": shape.max_position,
            "clean_up_tokenization_spaces": False,
            "bos_token": TURN_START,
            "eos_token": TURN_END,
            "pad_token": END,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _byte_symbol(byte: int) -> str:
    """GPT-2's printable stand-in for a byte: itself where Latin-1 prints it, else the next of U+0100…"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sum(1 for other in range(byte) if other not in printable))

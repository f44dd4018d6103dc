"""SmolLM2's tokenizer, rebuilt from the vocabulary and merges inside a GGUF.

A GGUF names its pre-tokenizer only by a word; ``smollm`` stands for "split every
digit, then GPT-2's byte-level words". The vocabulary lacks the symbols of bytes its
training text never had (U+0004, 06, 13, 14, 16, 1D and the lead bytes of planes 4
to 11): such a byte encodes to nothing, as with the published tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError
from pdserve.model.folder import write_json

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

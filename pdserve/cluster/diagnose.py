"""Why a process ended, in one line, from the end of its log. Pure.

The patterns are the texts of SGLang 0.5.23, transformers, argparse, uvicorn and
pdserve's own workers; a log that matches none gives its last error line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

TAIL_BYTES = 64 * 1024
MAX_LINE = 400
_MAX_SCAN = 1000
"""Longer lines are cut before matching, which takes time quadratic in their length."""

_Explain = Callable[[re.Match[str]], str]

_RULES: tuple[tuple[str, _Explain], ...] = (
    (
        r"pdserve: refused by the bootstrap service: (.+)",
        lambda m: f"the bootstrap service refused it: {m[1]}",
    ),
    (
        r"pdserve: plugin could not be applied: (.+)",
        lambda m: f"pdserve's SGLang plugin could not be applied: {m[1]}",
    ),
    (
        r"error: unrecognized arguments: (.+)",
        lambda m: f"unknown SGLang flag: {m[1]}; see `python -m sglang.launch_server --help`",
    ),
    (
        r"error: (argument \S+: (?:invalid|expected|not allowed).+)",
        lambda m: f"bad SGLang flag: {m[1]}",
    ),
    (
        r"bind on address \('([^']+)', (\d+)[^)]*\): .*address already in use",
        lambda m: f"port {m[2]} on {m[1]} is in use by another process",
    ),
    (
        r"(?i)address already in use|port is already in use",
        lambda _: "a port it wants to listen on is in use by another process",
    ),
    (
        r"CUDA out of memory\. (Tried to allocate [\d.]+ \w+)?",
        lambda m: (
            f"the GPU has not enough memory ({m[1] or 'CUDA out of memory'}); "
            "use a smaller model, a higher --tp, or a lower --mem-fraction-static after --"
        ),
    ),
    (
        r"RuntimeError: Not enough memory: (.+)",
        lambda m: f"not enough memory: {m[1]} after --",
    ),
    (
        r"Not enough host memory available\. Requesting ([\d.]+) GB but only have (-?[\d.]+) GB free",
        lambda m: (
            f"not enough free memory for KV on the host ({m[1]} GB wanted, {m[2]} GB to give); free some, or "
            "give --decode-args '--disaggregation-decode-retraction-backup cpu_tensor'"
        ),
    ),
    (
        r"scheduler died during initialization \(exit code: -9\)",
        lambda _: (
            "its scheduler was killed while it started, as the kernel does when memory is short; start "
            "fewer servers, or give a lower --max-total-tokens after --"
        ),
    ),
    (
        r"Not enough memory\. Please try to increase --mem-fraction-static",
        lambda _: (
            "not enough memory is left for the KV pool; after --, give a higher --mem-fraction-static "
            "or a lower --max-total-tokens"
        ),
    ),
    (
        r"(?:DefaultCPUAllocator: )?can't allocate memory|std::bad_alloc|\bMemoryError\b",
        lambda _: (
            "this machine has not enough memory; start fewer servers, or give a lower "
            "--max-total-tokens after --"
        ),
    ),
    (
        r"(\S+) does not appear to have a file named config\.json",
        lambda m: f"no config.json in {m[1]}: it is not a model folder",
    ),
    (
        r"(\S+) is not a local folder and is not a valid model identifier",
        lambda m: f"model {m[1]} is neither a local folder nor a model on the hub",
    ),
    (
        r"(?:Incorrect path_or_model_id: |Repo id must be in the form .*: )'([^']+)'",
        lambda m: f"model {m[1]} is neither a local folder nor a model on the hub",
    ),
    (
        r"couldn't connect to '(https://[^']+)'|Cannot find .* outgoing traffic has been disabled",
        lambda m: f"the model is not in the local cache and {m[1] or 'the hub'} cannot be reached",
    ),
    (
        r"(?:Unrecognized model in |Model architectures )(.+)",
        lambda m: f"SGLang does not know this model: {m[1]}",
    ),
)
_ERROR_LINE = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)\b: .+|.*\b(?:Error|ERROR): .+")
_CLIENTS_MISTAKE = "[http_server] Error:"
"""How SGLang logs a request it refused: never why a process ended."""
_COMPILED = tuple((re.compile(pattern), explain) for pattern, explain in _RULES)


def diagnose(log_tail: str) -> str | None:
    """One clear line on why the process with this log ended; None if the log does not say."""
    lines = [line.strip()[:_MAX_SCAN] for line in log_tail.splitlines()]
    log_tail = "\n".join(lines)
    for pattern, explain in _COMPILED:
        found = list(pattern.finditer(log_tail))
        if found:
            return _shorten(explain(found[-1]))
    errors = [line for line in lines if _ERROR_LINE.match(line) and _CLIENTS_MISTAKE not in line]
    return _shorten(errors[-1]) if errors else None


def explain_exit(returncode: int, log_tail: str) -> str:
    """How it ended and why: ``exit status 1: port 31000 on 127.0.0.1 is in use …``."""
    how = f"killed by signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
    why = diagnose(log_tail)
    if why is None and returncode == -9:
        why = "SIGKILL from outside, as the kernel sends when memory is short (see `dmesg`)"
    return f"{how}: {why}" if why else how


def read_tail(path: Path, start: int = 0) -> str:
    """The last TAIL_BYTES of ``path`` from byte ``start`` on; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(start, end - TAIL_BYTES) if start <= end else 0)
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def last_lines(text: str, num_lines: int = 40) -> str:
    """The last ``num_lines`` lines of ``text``, without the usage text of argparse."""
    lines = [line[:_MAX_SCAN] for line in text.splitlines()]
    usage = next((i for i, line in enumerate(lines) if line.startswith("usage: ")), None)
    if usage is not None:
        rest = (i for i in range(usage + 1, len(lines)) if not lines[i].startswith(" "))
        del lines[usage : next(rest, len(lines))]
    return "\n".join(lines[-num_lines:])


def _shorten(line: str) -> str:
    line = " ".join(line.split())
    return line if len(line) <= MAX_LINE else line[: MAX_LINE - 1] + "…"

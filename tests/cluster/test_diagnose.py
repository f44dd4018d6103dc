"""One clear line for each common failure, from the lines that SGLang and its libraries really print."""

from __future__ import annotations

from pathlib import Path

from pdserve.cluster.diagnose import TAIL_BYTES, diagnose, explain_exit, last_lines, read_tail
from tests.support.rows import rows

SAMPLES = [
    (
        "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 31000): "
        "address already in use",
        "port 31000 on 127.0.0.1 is in use by another process",
    ),
    ("OSError: [Errno 98] Address already in use", "a port it wants to listen on is in use"),
    (
        "ValueError: scheduler_input_port at 31234 is not available in 30 seconds.\n"
        "Port is already in use. dist_init_port=31233 port_base=31232 detokenizer_port=31233",
        "a port it wants to listen on is in use",
    ),
    (
        "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. "
        "Current value: mem_fraction_static=0.1",
        "not enough memory is left for the KV pool",
    ),
    (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity",
        "the GPU has not enough memory (Tried to allocate 20.00 GiB)",
    ),
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)",
        "this machine has not enough memory",
    ),
    (
        "usage: worker.py [-h] --model-path MODEL_PATH\nworker.py: error: unrecognized arguments: --foo 1",
        "unknown SGLang flag: --foo 1",
    ),
    (
        "worker.py: error: argument --dtype: invalid choice: 'int1' (choose from 'auto', 'half')",
        "bad SGLang flag: argument --dtype: invalid choice: 'int1'",
    ),
    (
        "OSError: /models/x does not appear to have a file named config.json. Checkout 'https://hf.co'",
        "no config.json in /models/x",
    ),
    (
        "OSError: no/model is not a local folder and is not a valid model identifier listed on "
        "'https://huggingface.co/models'",
        "model no/model is neither a local folder nor a model on the hub",
    ),
    (
        "HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
        "'/no/such/model'. Use `repo_type` argument if needed.",
        "model /no/such/model is neither a local folder nor",
    ),
    (
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them",
        "the model is not in the local cache and https://huggingface.co cannot be reached",
    ),
    (
        "pdserve: refused by the bootstrap service: page_size: 16 != 32\nTraceback …\nValueError: later",
        "the bootstrap service refused it: page_size: 16 != 32",
    ),
    (
        "pdserve: plugin could not be applied: SGLang 0.5.24 is not supported",
        "pdserve's SGLang plugin could not be applied: SGLang 0.5.24 is not supported",
    ),
    (
        "Traceback (most recent call last):\n  File \"x.py\", line 1\nKeyError: 'a'\n"
        "ModuleNotFoundError: No module named 'nixl'\n[2026-01-01] goodbye",
        "ModuleNotFoundError: No module named 'nixl'",
    ),
]


@rows(("log", "expected"), SAMPLES)
def test_known_failures(log: str, expected: str) -> None:
    line = diagnose(f"[2026-01-01 00:00:00] server_args=…\n{log}\n")
    assert line is not None and expected in line
    assert "\n" not in line


def test_a_harmless_log_says_nothing() -> None:
    assert (
        diagnose("Load weight begin. avail mem=3.00 GB\nThe server is fired up and ready to roll!\n") is None
    )


def test_kill_without_a_word_suggests_memory() -> None:
    assert "dmesg" in explain_exit(-9, "Load weight begin")
    assert explain_exit(-9, "ValueError: x") == "killed by signal 9: ValueError: x"
    assert explain_exit(0, "") == "exit status 0"


def test_long_lines_are_cut() -> None:
    line = diagnose("ValueError: " + "x" * 5000)
    assert line is not None and len(line) == 400


def test_tail_starts_at_this_run_and_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old run\nnew run\n")
    assert read_tail(path, 8) == "new run\n"
    path.write_text("x" * (3 * TAIL_BYTES))
    assert len(read_tail(path)) == TAIL_BYTES
    assert read_tail(tmp_path / "missing") == ""
    assert last_lines("a\nb\nc", 2) == "b\nc"
    assert last_lines("a\nusage: x [-h]\n   [--foo]\nx: error: bad") == "a\nx: error: bad"


def test_a_clients_mistake_in_the_log_is_not_why_the_process_ended() -> None:
    tail = "[2026-11-21 06:29:37] [http_server] Error: The input (5000 tokens) is longer than the context"
    assert diagnose(tail) is None
    assert "SIGKILL from outside" in explain_exit(-9, tail)


def test_pool_larger_than_the_machine_is_told_in_its_own_words() -> None:
    tail = (
        "RuntimeError: Not enough memory: a KV pool of 4000000016 tokens needs 2048.0 GB, this machine has "
        "18.3 GB to give; use a lower --max-total-tokens\n"
        "RuntimeError: Rank 0 scheduler died during initialization (exit code: 1)\n"
    )
    told = diagnose(tail)
    assert told is not None
    assert told.startswith("not enough memory: a KV pool of 4000000016 tokens needs 2048.0 GB")
    assert told.endswith("use a lower --max-total-tokens after --")

"""What it costs that answers can go on elsewhere, and how long a client waits when one does.

    cost    streams over two balancers on the same 1P2D servers, --max-resumes 3 (workers tell their tokens)
            and 0 (stock frames), in turn: TPOT at the client, CPU time of balancer and decode servers a frame
    gap     one stream; its decode server gives it up after so many frames; the client's longest silence, with
            prefill's cache as it is ("hit": the prompt's pages are there) and flushed ("cold")
    rate    fake workers give each answer up once, one answer at a time; CPU time of the balancer for a resume
            is what such a round takes more than an undisturbed one; resumes a second is one core's worth

The servers run the tiny model in float32; TPOT is a few ms, so telling takes a far larger share of it than
behind a GPU.

    python bench/resume.py [--rounds 8] [--parts cost,gap,rate]

Output: set-up, three tables, one JSON object as the last line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from common import describe_setup, print_result, print_setup
from replay import Servers, balancer, servers

from pdserve.model.tiny import TinyShape, write_tiny_model
from pdserve.sim.report import percentile
from pdserve.types import Role

ROOT = Path(__file__).resolve().parent.parent
SIDES = {"on": "3", "off": "0"}
STREAMS, FRAMES = (1, 8), 200
PROMPTS, EMITTED = (200, 1000, 3000), (20, 200)
FAKE_ANSWERS, FAKE_FRAMES = 200, 60
FLAGS = ("--dtype", "float32", "--max-total-tokens", "24576", "--chunked-prefill-size", "2048")


@dataclass
class Stream:
    """When each frame of an answer came. Seconds."""

    times: list[float]

    @property
    def tpot_s(self) -> float:
        """Mean time between frames after the first."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)

    def longest_silence_s(self) -> float:
        """The largest time between two frames."""
        return max(later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False))


def main() -> None:
    """Print the tables and the result line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rounds", type=int, default=8, help="times each figure is measured, gaps a third of it (count)"
    )
    parser.add_argument("--parts", default="cost,gap,rate", help="what to measure")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--fakes", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fakes:
        asyncio.run(serve_fakes())
        return
    parts = options.parts.split(",")
    setup = describe_setup(
        model="tiny, float32, 1 prefill and 2 decode servers",
        rounds=options.rounds,
        seed=options.seed,
        cost=f"{STREAMS} streams of {FRAMES} tokens",
        rate=f"{FAKE_ANSWERS} answers of {FAKE_FRAMES} frames a round",
    )
    print_setup(setup)
    result: dict[str, Any] = {"bench": "resume", "setup": setup}
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as name:
        folder = Path(name)
        if {"cost", "gap"} & set(parts):
            model = write_tiny_model(folder / "model", TinyShape(max_position=8192, dtype="float32"))
            with servers(str(model), 1, 2, folder, FLAGS) as fleet, contextlib.ExitStack() as stack:
                sides = {
                    side: stack.enter_context(
                        balancer(fleet, "pair_cost", folder, *_lenient(folder), "--max-resumes", most)
                    )
                    for side, most in SIDES.items()
                }
                if "cost" in parts:
                    result["cost"] = cost(fleet, sides, options.rounds, rng)
                if "gap" in parts:
                    result["gap"] = gap(fleet, sides["on"][0], max(1, options.rounds // 3), rng)
        if "rate" in parts:
            result["rate"] = rate(folder, max(1, options.rounds // 3))
    print_result(result)


# -- cost --------------------------------------------------------------------------------------


def cost(
    fleet: Servers, sides: dict[str, tuple[str, int]], rounds: int, rng: random.Random
) -> list[dict[str, Any]]:
    """A row for each number of streams: medians over rounds, and of each round's ratio."""
    decodes = [int(_get(url + "/pdserve/instance")["pid"]) for url in fleet.decode]
    rows = []
    print(f"{'streams':>7} {'':10} {'on':>9} {'off':>9} {'on/off':>7}")
    for streams in STREAMS:
        seen: dict[str, list[tuple[float, ...]]] = {side: [] for side in sides}
        for turn in range(-1, rounds):
            for side in sides if turn % 2 else reversed(sides):
                url, pid = sides[side]
                begin = _cpu_us(pid), sum(map(_cpu_us, decodes))
                tpots = _stream_all(url, [_prompt(rng, 100) for _ in range(streams)])
                cpu = _cpu_us(pid) - begin[0], sum(map(_cpu_us, decodes)) - begin[1]
                if turn >= 0:
                    frames = streams * FRAMES
                    seen[side].append((median(tpots) * 1e3, cpu[0] / frames, cpu[1] / frames))
        for index, figure in enumerate(("tpot_ms", "balancer_us", "decode_us")):
            on, off = ([row[index] for row in seen[side]] for side in ("on", "off"))
            ratio = median(one / other for one, other in zip(on, off, strict=True))
            print(f"{streams:7} {figure:10} {median(on):9.3f} {median(off):9.3f} {ratio:7.3f}", flush=True)
            row = {"streams": streams, "figure": figure, "on": median(on), "off": median(off), "ratio": ratio}
            rows.append({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
    print(flush=True)
    return rows


def _stream_all(url: str, prompts: list[list[int]]) -> list[float]:
    with ThreadPoolExecutor(len(prompts)) as threads:
        return [stream.tpot_s for stream in threads.map(lambda ids: _stream(url, ids, FRAMES), prompts)]


# -- gap ---------------------------------------------------------------------------------------


def gap(fleet: Servers, url: str, rounds: int, rng: random.Random) -> list[dict[str, Any]]:
    """A row for each prompt and emitted length and state of prefill's cache."""
    rows = []
    print(f"{'prompt':>6} {'emitted':>7} {'cache':>5} {'gap ms':>8} {'p90':>7} {'max':>7} {'TPOT ms':>8}")
    for length in PROMPTS:
        for emitted in EMITTED:
            for cache in ("hit", "cold"):
                streams = []
                for _ in range(rounds):
                    begun = _resumes(url)
                    streams.append(_give_up(fleet, url, _prompt(rng, length), emitted, cache == "cold"))
                    if _resumes(url) != begun + 1:
                        raise SystemExit(f"the answer was resumed {_resumes(url) - begun} times, not once")
                gaps = [1e3 * stream.longest_silence_s() for stream in streams]
                tpot = 1e3 * median(stream.tpot_s for stream in streams)
                figures = median(gaps), percentile(gaps, 0.9), max(gaps)
                print(
                    f"{length:6} {emitted:7} {cache:>5} "
                    + "{:8.1f} {:7.1f} {:7.1f} {:8.2f}".format(*figures, tpot),
                    flush=True,
                )
                row = {"prompt": length, "emitted": emitted, "cache": cache}
                rows.append(row | {"gap_ms": [round(figure, 1) for figure in figures]})
    print(flush=True)
    return rows


def _give_up(fleet: Servers, url: str, ids: list[int], emitted: int, is_cold: bool) -> Stream:
    """A stream whose decode server is told to drop it after ``emitted`` frames."""

    def drop() -> None:
        if is_cold:
            _post(fleet.prefill[0][0] + "/flush_cache?timeout=10")  # refused while anything is in its queues
        for decode in fleet.decode:
            _post(decode + "/abort_request", {"abort_all": True})

    return _stream(url, ids, emitted + 300, emitted, drop)


def _resumes(url: str) -> int:
    text = urllib.request.urlopen(url + "/metrics", timeout=10).read().decode()
    lines = [line for line in text.splitlines() if line.startswith("pdserve:resumes_total")]
    return int(sum(float(line.rpartition(" ")[2]) for line in lines))


# -- rate --------------------------------------------------------------------------------------


async def serve_fakes() -> None:
    """A prefill and two decode servers; a line on stdin is how many answers are given up once."""
    sys.path.insert(0, str(ROOT))
    from tests.support.resumable import Break
    from tests.support.sglang_server import FakeSGLang

    prefill, *decodes = (
        FakeSGLang(role, name=f"{role}-{index}", resumes=True)
        for index, role in enumerate((Role.PREFILL, Role.DECODE, Role.DECODE))
    )
    breaks: Any = decodes[0].breaks
    for fake in (prefill, *decodes):
        fake.behaviour.tokens = FAKE_FRAMES
        fake.breaks = breaks
        await fake.start()
    print(json.dumps([fake.url for fake in (prefill, *decodes)]), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        breaks.clear()
        for _ in range(int(line)):
            breaks.extend((Break(FAKE_FRAMES // 3, how="0"), None))
        print("ready", flush=True)


def rate(folder: Path, rounds: int) -> dict[str, Any]:
    """CPU time of the balancer for one resume."""
    flags = *_lenient(folder), "--max-resumes", "100"
    plain, extra = [], []
    with contextlib.ExitStack() as stack:
        fakes = Fakes(stack)
        url, pid = stack.enter_context(balancer(fakes.fleet, "pair_cost", folder, *flags))
        for turn in range(-1, rounds):
            spent, resumes = dict[bool, float](), 0
            for is_cut in (False, True) if turn % 2 else (True, False):
                fakes.give_up(FAKE_ANSWERS * is_cut)
                begun, cpu = _resumes(url), _cpu_us(pid)
                for _ in range(FAKE_ANSWERS):
                    _stream(url, [1] * 100, FAKE_FRAMES)
                spent[is_cut] = _cpu_us(pid) - cpu
                resumes = max(resumes, _resumes(url) - begun)
            if turn >= 0:
                plain.append(spent[False] / FAKE_ANSWERS)
                extra.append((spent[True] - spent[False]) / resumes)
    print(f"balancer: {median(plain):.0f} us an answer, {median(extra):.0f} us a resume:")
    print(f"          {1e6 / median(extra):.0f} resumes a second on one core, beside nothing else\n")
    return {"answer_us": round(median(plain)), "resume_us": round(median(extra))}


class Fakes:
    """The process of ``serve_fakes``."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        command = [sys.executable, __file__, "--fakes"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        stack.callback(self._process.wait)
        stack.callback(self._process.kill)
        prefill, *decodes = json.loads(self._line())
        self.fleet = Servers("", ((prefill, 9000),), tuple(decodes), self._process)

    def give_up(self, count: int) -> None:
        """Of the next answers, so many legs end after a third."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % count)
        self._process.stdin.flush()
        self._line()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


# -- common ------------------------------------------------------------------------------------


def _stream(url: str, ids: list[int], frames: int, when: int = 0, then: Any = None) -> Stream:
    """One answer of ``frames`` tokens; ``then`` is called once after ``when`` frames."""
    body = {"input_ids": ids, "stream": True}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": frames, "ignore_eos": True}
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status} {response.read()!r}")
    times, is_done = [], False
    for line in response:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
            if len(times) == when:
                then()
        is_done |= line.startswith(b"data: [DONE]")
    connection.close()
    if not is_done:
        raise SystemExit(f"a stream ended after {len(times)} of {frames} frames")
    return Stream(times)


def _lenient(folder: Path) -> tuple[str, str]:
    """Flags of a balancer that keeps workers in service although they give up as often as a bench wants."""
    config = folder / "lenient.toml"
    config.write_text("[balancer]\nbreaker_failures = 1000000\n")
    return "--config", str(config)


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(32, 127) for _ in range(length)]


def _cpu_us(pid: int) -> float:
    """CPU time of every thread of a process so far, from the kernel's nanosecond counters."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return 1e-3 * sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def _post(url: str, body: Any = None) -> None:
    headers = {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(url, json.dumps(body or {}).encode(), headers), timeout=30)


def _get(url: str) -> Any:
    return json.loads(urllib.request.urlopen(url, timeout=10).read())


if __name__ == "__main__":
    main()

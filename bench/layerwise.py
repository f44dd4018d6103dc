"""What is left of a KV transfer when the last forward has ended, with and without sending layer by layer.

The very outbox, inbox and planner that serve, in one process. The network is a model: a write takes
``descriptors x alpha + bytes / rate`` once the writes before it are through, and moves no bytes. The
forward pass is a thread that sleeps an equal share for each layer and then tells its LayerClock.

    chunk     the prompt is handed over when its forward has ended, as without --layerwise
    layers    before the forward, layer by layer; its last page and the metadata row afterwards

Both run in turn, round after round. Left is the time from the end of the last forward until the decode
rank knows of every byte. What SGLang does between the two, and what posts to
a real NIC cost, are not in it.

    python bench/layerwise.py [--tokens 2048,8192] [--gbits 100,400] [--forward-ms-per-k 25] [--rounds 7]
"""

from __future__ import annotations

import argparse
import itertools
import sys
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np
from common import describe_setup, print_result, print_setup

sys.path.insert(0, str(Path(__file__).parent.parent))

from pdserve.plugin.layers import LayerClock
from pdserve.transfer.engine import PeerName, Spans, TransferHandle, TransferState
from pdserve.transfer.jobs import Target
from pdserve.transfer.plan import Path as SendPath
from tests.support.kv_rig import DecodeRank, Geometry, PrefillRank
from tests.support.loopback import LoopbackEngine, LoopbackFabric, _Write, num_merged

NUM_LAYERS, PAGE, ALPHA_S = 32, 16, 1e-6
LLAMA_8B = Geometry(
    num_regions=2 * NUM_LAYERS, regions_per_layer=2, num_pages=1040, page_size=PAGE, num_kv_heads=8,
    total_kv_heads=8, head_bytes=256,
)  # fmt: skip
SLAB_BYTES, SLOT_BYTES = 256 << 20, 8 << 20
"""As pdserve's default on a GPU."""

PATIENCE_S = 30.0


class Link(LoopbackEngine):
    """A prefill rank's engine whose writes go one after another over a link of ``bytes_per_s``."""

    bytes_per_s = 1.0
    _free_s = 0.0

    def _post(self, peer: PeerName, source: Spans, target: Spans, message: bytes) -> TransferHandle:
        took_s = num_merged(source, target) * ALPHA_S + int(source[:, 1].sum()) / self.bytes_per_s
        self._free_s = max(time.monotonic(), self._free_s) + took_s
        write = _Write(self._fabric.engines[peer], source[:0], target[:0], message, writer=self.name)
        return TransferHandle((write, self._free_s))

    def poll(self, handle: TransferHandle) -> TransferState:
        """Done when the link has had the time for it."""
        write, due_s = handle.raw
        if write.state is TransferState.PENDING and time.monotonic() >= due_s:
            write.land(self._fabric.faults)
        return write.state


class Untouched:
    """In place of a random generator: pools whose pages the system never has to give."""

    def integers(self, low: int, high: int, size: object = None, dtype: type = int) -> object:
        return 0 if size is None else np.zeros(size, dtype=dtype)  # type: ignore[call-overload]


class Pair:
    """A prefill and a decode rank."""

    def __init__(self, bytes_per_s: float) -> None:
        fabric, blank = LoopbackFabric(), Untouched()
        self.decode = DecodeRank(
            fabric.engine("d"),
            LLAMA_8B,
            blank,
            slab_bytes=SLAB_BYTES,
            slot_bytes=SLOT_BYTES,  # type: ignore[arg-type]
        )
        self.link = Link(fabric, "p")
        fabric.engines["p"] = self.link
        self.link.bytes_per_s = bytes_per_s
        self.prefill = PrefillRank(
            self.link,
            LLAMA_8B,
            blank,
            slab_bytes=SLAB_BYTES,
            max_piece_bytes=SLOT_BYTES,  # type: ignore[arg-type]
        )
        self.peer = self.prefill.connect(self.decode)
        self.prefill.outbox.start()
        self._rooms = itertools.count(1)

    def left_s(self, tokens: int, forward_s: float, *, is_layered: bool) -> float:
        """Send a prompt; seconds from the end of its forward until all has arrived."""
        room, pages = next(self._rooms), np.arange(1, 1 + tokens // PAGE, dtype=np.int32)
        self.decode.inbox.expect(room, pages)
        clock = LayerClock(NUM_LAYERS, lambda: lambda: True)
        if is_layered:
            self._submit(room, pages, 0, len(pages) - 1, clock)
        forward = threading.Thread(target=_forward, args=(clock, forward_s))
        forward.start()
        forward.join()
        ended_s = time.monotonic()
        self._submit(room, pages, len(pages) - 1 if is_layered else 0, len(pages))
        while not self.decode.owner.arrived[room]:
            if time.monotonic() > ended_s + PATIENCE_S:
                raise SystemExit(f"room {room} has not arrived within {PATIENCE_S:.0f} s")
            if not self.decode.inbox.poll():
                time.sleep(0.0001)
        return time.monotonic() - ended_s

    def _submit(
        self, room: int, pages: np.ndarray, begin: int, end: int, clock: LayerClock | None = None
    ) -> None:
        is_last = clock is None
        target = Target(self.peer, pages, self.decode.pool.aux_span(2) if is_last else None)
        job = self.prefill.job(
            room, pages[begin:end], begin * PAGE, is_last, [target], forced_path=SendPath.DIRECT,
            num_filled=None if clock is None else lambda: 2 * clock.num_done(),
        )  # fmt: skip
        self.prefill.outbox.submit(job)


def _forward(clock: LayerClock, seconds: float) -> None:
    begin_s = time.monotonic()
    for layer in range(NUM_LAYERS):
        # Attention is the first part of a layer: its mark comes before the layer's end.
        time.sleep(max(0.0, begin_s + (layer + 0.3) * seconds / NUM_LAYERS - time.monotonic()))
        clock.mark(layer)
    time.sleep(max(0.0, begin_s + seconds - time.monotonic()))
    clock.end()


def main() -> None:
    """Print the table and the result line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", default="2048,8192", help="comma-separated prompt lengths (tokens)")
    parser.add_argument("--gbits", default="100,400", help="comma-separated link rates (Gb/s)")
    parser.add_argument("--forward-ms-per-k", type=float, default=25.0, help="forward of 1024 tokens (ms)")
    parser.add_argument("--rounds", type=int, default=7, help="times each way is measured (count)")
    options = parser.parse_args()
    token_bytes = LLAMA_8B.num_regions * LLAMA_8B.num_kv_heads * LLAMA_8B.head_bytes
    setup = describe_setup(
        geometry=f"Llama-8B: {NUM_LAYERS} layers, pages of {PAGE}, {token_bytes} bytes a token, one run",
        network=f"modelled, {ALPHA_S * 1e6:.0f} us a descriptor",
        forward_ms_per_k=options.forward_ms_per_k,
        rounds=options.rounds,
    )
    print_setup(setup)
    print(f"{'tokens':>7} {'Gb/s':>6} {'forward':>8} {'wire':>12} {'chunk left':>11} {'layers left':>12}  ms")
    rows = []
    for tokens, gbits in itertools.product(
        map(int, options.tokens.split(",")), map(float, options.gbits.split(","))
    ):
        forward_s = tokens / 1024 * options.forward_ms_per_k / 1e3
        pair = Pair(gbits * 1e9 / 8)
        left: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(-1, options.rounds):
            for is_layered in (False, True):
                seconds = pair.left_s(tokens, forward_s, is_layered=is_layered)
                if turn >= 0:
                    left[is_layered].append(seconds * 1e3)
        pair.prefill.outbox.close()
        row = {
            "tokens": tokens, "gbits": gbits, "forward_ms": round(forward_s * 1e3, 1),
            "wire_ms": round(tokens * token_bytes * 8e-6 / gbits, 2),
            "chunk_left_ms": round(median(left[False]), 2), "layers_left_ms": round(median(left[True]), 2),
            "chunk_range_ms": [round(min(left[False]), 2), round(max(left[False]), 2)],
            "layers_range_ms": [round(min(left[True]), 2), round(max(left[True]), 2)],
        }  # fmt: skip
        rows.append(row)
        print(
            f"{tokens:7} {gbits:6.0f} {row['forward_ms']:8} {row['wire_ms']:12} "
            f"{row['chunk_left_ms']:11} {row['layers_left_ms']:12}",
            flush=True,
        )
    print_result({"bench": "layerwise", "setup": setup, "rows": rows})


if __name__ == "__main__":
    main()

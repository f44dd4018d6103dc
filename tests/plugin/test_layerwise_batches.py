"""Batches of a prefill server that sends layer by layer, through SGLang's own send, without servers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pdserve.transfer.engine import MemoryKind
from pdserve.transfer.jobs import ChunkJob

pytestmark = pytest.mark.slow

PAGE, NUM_LAYERS, AGENT = 4, 3, "agent-d"


class Request:
    """What the hook and SGLang's send read of a request."""

    def __init__(self, server: Server, room: int, prompt: int, *, prefix: int = 0) -> None:
        from sglang.srt.observability.trace import TraceNullContext

        from pdserve.plugin.backend import PdserveKVSender

        sender: Any = object.__new__(PdserveKVSender)
        sender.kv_mgr, sender.bootstrap_room, sender.conclude_state = server.manager, room, None
        sender.curr_idx, sender.num_kv_indices, sender.aux_index = 0, -(-prompt // PAGE), 0
        sender._transfer_num_kv_indices = sender._transfer_num_state_indices = 0
        sender._transfer_start_time = sender._early_send_wait_event = None
        sender.trace_ctx = TraceNullContext()
        self.disagg_kv_sender = sender
        self.rid, self.bootstrap_room = f"r{room}", room
        self.origin_input_ids = list(range(prompt))
        self.extend_end, self.start_send_idx, self.prefix_len, self.host_hit_length = 0, 0, prefix, 0
        self.pending_bootstrap, self.disagg_decode_prefix_len = False, 0
        self.kv = SimpleNamespace(req_pool_idx=room)


class Server:
    """A scheduler with SGLang's prefill mixin, our manager and plane, and jobs kept instead of sent."""

    def __init__(self) -> None:
        import torch
        from sglang.srt.disaggregation.base.conn import KVPoll
        from sglang.srt.disaggregation.prefill import SchedulerDisaggregationPrefillMixin

        from pdserve.plugin.sending import PrefillPlane
        from pdserve.plugin.transfer_manager import TransferManager

        self.jobs: list[ChunkJob] = []
        manager: Any = object.__new__(TransferManager)
        plane: Any = object.__new__(PrefillPlane)
        plane._manager, plane.sends_layers, plane._forced_path = manager, True, None
        plane._links, plane._refused = {AGENT: None}, {}
        plane.outbox = SimpleNamespace(submit=self.jobs.append)
        regions = SimpleNamespace(page_size=PAGE, num_regions=2 * NUM_LAYERS, regions_per_layer=2)
        plane._own = SimpleNamespace(kind=MemoryKind.DRAM, device=0, regions=regions)
        manager.prefill_plane, manager.kv_shard_size = plane, 1
        manager.enable_all_cp_ranks_for_transfer = manager.is_dummy_cp_rank = False
        manager._dcp_pack_max_tokens, manager._pdserve_env = None, None
        manager.kv_args = SimpleNamespace(state_types=[], aux_data_ptrs=[64], aux_item_lens=[8])
        table = SimpleNamespace(dst_aux_ptrs=[64], requires_dcp_relayout=False)
        manager.decode_kv_args_table = {AGENT: table}
        manager.transfer_infos, manager.request_status = {}, {}
        self.manager, self.waiting = manager, KVPoll.WaitingForInput
        scheduler: Any = object.__new__(
            type("Scheduler", (SchedulerDisaggregationPrefillMixin,), {})  # the whole one needs a model
        )
        scheduler.disagg_prefill_bootstrap_queue = SimpleNamespace(kv_manager=manager)
        scheduler.kv_checksum_computer = None
        scheduler.enable_staging = scheduler.enable_overlap = scheduler.enable_unified_memory = False
        scheduler.token_to_kv_pool_allocator = SimpleNamespace(
            page_size=PAGE, translate_kv_indices_for_transfer=lambda indices: indices
        )
        table = (torch.arange(4)[:, None] * 40 + torch.arange(40)[None, :]).int()
        scheduler.req_to_token_pool = SimpleNamespace(req_to_token=table)
        scheduler.disagg_metadata_buffers = SimpleNamespace(set_buf=lambda req: None)
        scheduler.disagg_prefill_pending_chunk_rids = set()
        scheduler.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(attn_backend=Attention()))
        self.scheduler = scheduler

    def request(self, room: int, prompt: int, *, prefix: int = 0, agent: str = AGENT) -> Request:
        """A request whose decode rank has given pages."""
        import numpy as np

        pages = np.arange(-(-prompt // PAGE), dtype=np.int32)
        info = SimpleNamespace(
            room=room, agent_name=agent, is_dummy=False, dst_kv_indices=pages, dst_aux_index=0
        )
        self.manager.transfer_infos[room] = {agent: info}
        self.manager.request_status[room] = self.waiting
        return Request(self, room, prompt, prefix=prefix)

    def run(self, *requests: Request, fails_at: int | None = None, mode: str = "EXTEND") -> list[list[int]]:
        """One batch through the hook; regions that each job may send, after each layer."""
        from pdserve.plugin.layers import send_layers

        filled: list[list[int]] = []

        def run_batch(scheduler: Any, batch: Any) -> str:
            for req in batch.reqs:
                scheduler.maybe_send_cached_prefix_chunk(req)
            backend = scheduler.tp_worker.model_runner.attn_backend
            for layer in range(NUM_LAYERS):
                if layer == fails_at:
                    raise MemoryError("no memory for activations")
                backend.forward("q", "k", "v", SimpleNamespace(layer_id=layer), "batch", save_kv_cache=True)
                filled.append([job.num_filled() for job in self.jobs if job.num_filled is not None])
            return "result"

        batch = SimpleNamespace(
            reqs=list(requests), forward_mode=SimpleNamespace(name=mode), hicache_consumer_index=-1
        )
        assert send_layers(run_batch, self.scheduler, batch) == "result"
        return filled

    def after(self, req: Request, *, last_chunk: bool) -> None:
        """What SGLang sends when the batch's result is there."""
        self.scheduler.send_kv_chunk(req, last_chunk=last_chunk)


class Attention:
    """An attention backend."""

    def forward(self, q: str, k: str, v: str, layer: Any, forward_batch: str, save_kv_cache: bool) -> str:
        assert (q, k, v, forward_batch, save_kv_cache) == ("q", "k", "v", "batch", True)
        return f"out{layer.layer_id}"


def _pages(job: ChunkJob) -> list[int]:
    return [int(page) for page in job.pages]


def _sent(server: Server) -> list[tuple[list[int], int, bool]]:
    return [(_pages(job), job.first_token, job.is_last) for job in server.jobs]


def test_a_prompt_goes_layer_by_layer_and_its_last_page_with_the_metadata_row() -> None:
    server = Server()
    req = server.request(1, 18)
    req.extend_end = 18
    assert server.run(req) == [[2], [4], [6]], "two regions a layer, each when its attention has returned"
    server.after(req, last_chunk=True)
    assert _sent(server) == [([10, 11, 12, 13], 0, False), ([14], 16, True)]
    assert server.jobs[1].num_filled is None
    assert server.jobs[1].aux is not None
    assert req.disagg_kv_sender.curr_idx == req.disagg_kv_sender.num_kv_indices


def test_a_prompt_that_ends_on_a_page_keeps_that_page_for_the_last_send() -> None:
    server = Server()
    req = server.request(1, 16)
    req.extend_end = 16
    server.run(req)
    server.after(req, last_chunk=True)
    assert _sent(server) == [([10, 11, 12], 0, False), ([13], 12, True)]


def test_chunks_of_a_prompt_and_what_the_cache_had_are_sent_once_each() -> None:
    server = Server()
    req = server.request(1, 30, prefix=8)
    req.extend_end = 18
    assert server.run(req) == [[2], [4], [6]]
    server.after(req, last_chunk=False)
    req.extend_end = 30
    server.run(req)
    server.after(req, last_chunk=True)
    assert _sent(server) == [
        ([10, 11], 0, False),  # cached
        ([12, 13], 8, False),  # the first chunk's whole pages
        ([14, 15, 16], 16, False),
        ([17], 28, True),
    ]
    assert server.jobs[0].num_filled is None, "what the cache had is there already"


def test_the_transfers_time_counts_from_the_last_send_so_no_forward_is_in_it() -> None:
    server = Server()
    req = server.request(1, 30, prefix=8)
    req.extend_end = 18
    server.run(req)
    server.after(req, last_chunk=False)
    req.extend_end = 30
    server.run(req)
    assert req.disagg_kv_sender._transfer_start_time is None
    server.after(req, last_chunk=True)
    assert req.disagg_kv_sender._transfer_start_time is not None


def test_requests_of_a_batch_share_the_forwards_clock() -> None:
    server = Server()
    first, second = server.request(1, 10), server.request(2, 14)
    first.extend_end, second.extend_end = 10, 14
    assert server.run(first, second) == [[2, 2], [4, 4], [6, 6]]


def test_what_cannot_go_by_layer_goes_as_it_always_did() -> None:
    server = Server()
    late, short, foreign = server.request(1, 10), server.request(2, 3), server.request(3, 10, agent="stock")
    late.pending_bootstrap = True
    for req in (late, short, foreign):
        req.extend_end = len(req.origin_input_ids)
    assert server.run(late, short, foreign) == [[], [], []]
    assert server.jobs == []
    whole = server.request(1, 10)
    whole.extend_end = 10
    for mode in ("DECODE", "MIXED", "SPLIT_PREFILL", "TARGET_VERIFY", "IDLE"):
        server.run(whole, mode=mode)
    server.scheduler.enable_unified_memory = True
    server.run(whole)
    server.scheduler.enable_unified_memory = False
    server.manager.prefill_plane.sends_layers = False
    server.run(whole)
    assert server.jobs == []
    server.after(whole, last_chunk=True)
    assert _sent(server) == [([10, 11, 12], 0, True)]


def test_layers_that_a_graph_hides_are_there_when_the_forward_is_over() -> None:
    server = Server()
    req = server.request(1, 10)
    req.extend_end = 10
    backend = server.scheduler.tp_worker.model_runner.attn_backend
    backend.forward_of_graph = backend.forward  # captured before the hook came
    from pdserve.plugin.layers import send_layers

    batch = SimpleNamespace(
        reqs=[req], forward_mode=SimpleNamespace(name="EXTEND"), hicache_consumer_index=-1
    )
    seen: list[int] = []

    def replay(scheduler: Any, batch: Any) -> None:
        (job,) = server.jobs
        assert job.num_filled is not None
        seen.append(job.num_filled())

    send_layers(replay, server.scheduler, batch)
    (job,) = server.jobs
    assert job.num_filled is not None
    assert (seen, job.num_filled()) == ([0], 2 * NUM_LAYERS)


def test_a_failed_forward_fails_what_it_has_not_filled_and_is_raised_on() -> None:
    server = Server()
    req = server.request(1, 10)
    req.extend_end = 10
    with pytest.raises(MemoryError):
        server.run(req, fails_at=1)
    (job,) = server.jobs
    assert job.num_filled is not None
    with pytest.raises(RuntimeError, match="forward pass failed: no memory"):
        job.num_filled()
    backend = server.scheduler.tp_worker.model_runner.attn_backend
    assert "forward" not in vars(backend), "the backend is as it was"

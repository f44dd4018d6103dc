"""When layers go one by one, what hides them, and a clock that is never ahead of the stream."""

from __future__ import annotations

import time
from pathlib import Path as FilePath
from types import SimpleNamespace

import numpy as np
import pytest

from pdserve.config.launch import LaunchConfig
from pdserve.config.worker_env import DataPlaneConfig, WorkerEnv
from pdserve.errors import ConfigError, RegistrationFailed
from pdserve.plugin.hooks import HOOKS, wanted_hooks
from pdserve.plugin.layers import LayerClock, hidden_layers, sends_layers
from pdserve.transfer.jobs import Target
from pdserve.transfer.plan import Path
from pdserve.types import Role
from tests.support.kv_rig import Geometry, Rig, wait_until
from tests.support.late_device import LateRuntime
from tests.support.rows import rows

RUN_BATCH = "sglang.srt.managers.scheduler.Scheduler.run_batch"


def _at_once() -> LayerClock:
    return LayerClock(4, lambda: lambda: True)


def test_layers_count_in_turn_and_the_end_tells_of_the_rest() -> None:
    clock = _at_once()
    assert clock.num_done() == 0
    clock.mark(0)
    clock.mark(0)  # attention that is called twice in a layer
    assert clock.num_done() == 1
    clock.mark(2)  # layers that are called in another order: told by the end
    clock.mark(3)
    assert clock.num_done() == 1
    clock.end()
    clock.mark(1)
    assert clock.num_done() == 4


def test_a_failed_forward_is_raised_to_whoever_asks() -> None:
    clock = _at_once()
    clock.mark(0)
    clock.fail("forward pass failed: out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        clock.num_done()


def test_an_event_of_an_earlier_kernel_that_failed_is_raised_too() -> None:
    def broken() -> bool:
        raise RuntimeError("CUDA error: illegal memory access")

    clock = LayerClock(2, lambda: broken)
    clock.mark(0)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        clock.num_done()


@rows("path", [Path.DIRECT, Path.PACKED])
@rows("seed", [1, 2, 3])
def test_on_a_stream_that_runs_late_no_layer_leaves_before_its_kernel_has_run(path: Path, seed: int) -> None:
    num_layers = 6
    layered = Geometry(num_regions=2 * num_layers, regions_per_layer=2)
    rig, stream = Rig(seed, source=layered, target=layered, max_piece_bytes=2 * 60 * 48), LateRuntime(seed)
    try:
        clock = LayerClock(num_layers, stream.record)
        pages = np.arange(1, 16, dtype=np.int32)
        rig.decode.inbox.expect(1, pages)
        for begin, end, is_last in ((0, 14, False), (14, 15, True)):
            target = Target(rig.peer, pages, rig.decode.pool.aux_span(2) if is_last else None)
            job = rig.prefill.job(
                1, pages[begin:end], 4 * begin, is_last, [target], forced_path=path,
                num_filled=None if is_last else lambda: 2 * clock.num_done(),
            )  # fmt: skip
            if is_last:
                wait_until(lambda: bool(rig.prefill.gate.done), poll=rig.decode.inbox.poll)
            rig.prefill.outbox.submit(job)
            if not is_last:
                _launch(rig, stream, clock, num_layers)
        rig.receive(1)
        rig.check(pages, pages, 60)
        rig.settle()
    finally:
        stream.close()
        rig.close()


def _launch(rig: Rig, stream: LateRuntime, clock: LayerClock, num_layers: int) -> None:
    """The host is through with all layers at once; their kernels run when the stream gets to them."""

    def kernel(layer: int) -> None:
        for region in (2 * layer, 2 * layer + 1):
            time.sleep(0.0005)
            rig.prefill.pool.rows(region)[4:60] = 17 * layer + region

    for layer in range(num_layers):
        stream.launch(lambda layer=layer: kernel(layer))  # type: ignore[misc]
        clock.mark(layer)
    clock.end()


def _hidden(**changes: object) -> str:
    values = {"prefill": "breakable", "algorithm": None, "tbo": False, "is_mla": False, "num_regions": 8}
    values.update(changes)
    config = SimpleNamespace(
        graph=SimpleNamespace(
            cuda_graph_config=SimpleNamespace(prefill=SimpleNamespace(backend=values["prefill"]))
        ),
        overlap=SimpleNamespace(enable_two_batch_overlap=values["tbo"]),
    )
    spec = SimpleNamespace(speculative_algorithm=values["algorithm"])
    return hidden_layers(
        config,
        spec,
        is_mla=bool(values["is_mla"]),
        num_regions=values["num_regions"],
        num_layers=4,  # type: ignore[arg-type]
    )


@rows(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"prefill": "disabled"}, ""),
        ({"prefill": "full"}, "full prefill graph"),
        ({"is_mla": True, "num_regions": 4}, "MLA"),
        ({"algorithm": "EAGLE", "num_regions": 10}, "speculative decoding"),
        ({"num_regions": 6}, "not two for each layer"),
        ({"tbo": True}, "two batches"),
    ],
)
def test_what_hides_the_layers_is_named(changes: dict[str, object], reason: str) -> None:
    assert reason in _hidden(**changes)
    assert bool(_hidden(**changes)) == bool(reason)


@pytest.mark.slow
@rows(
    ("flags", "reason"),
    [
        ([], ""),
        (["--cuda-graph-backend-prefill", "breakable"], ""),
        (["--cuda-graph-backend-prefill", "full"], "full prefill graph"),
        (["--cuda-graph-config", '{"prefill": {"backend": "full"}}'], "full prefill graph"),
        (["--enable-two-batch-overlap"], "two batches"),
        (["--speculative-algorithm", "NGRAM"], "speculative decoding"),
    ],
)
def test_sglangs_own_flags_are_read_as_it_resolves_them(
    tmp_path: FilePath, flags: list[str], reason: str
) -> None:
    from sglang.srt.arg_groups.cuda_graph_hook import parse_cuda_graph_config
    from sglang.srt.runtime_context import _build_config_bags
    from sglang.srt.server_args import prepare_server_args

    args = prepare_server_args(
        ["--model-path", str(tmp_path), "--device", "cpu", "--disaggregation-mode", "prefill", *flags]
    )
    parse_cuda_graph_config(args)
    bags = _build_config_bags(args)
    found = hidden_layers(bags["exec"], bags["spec"], is_mla=False, num_regions=8, num_layers=4)
    assert reason in found
    assert bool(found) == bool(reason)


@rows(
    ("wanted", "reason", "is_gpu", "sends"),
    [
        ("off", "", True, False),
        ("auto", "", True, True),
        ("auto", "", False, False),
        ("auto", "a full prefill graph", True, False),
        ("on", "", False, True),
        ("on", "", True, True),
    ],
)
def test_auto_sends_by_layer_on_a_gpu_where_it_can(
    wanted: str, reason: str, is_gpu: bool, sends: bool
) -> None:
    assert sends_layers(wanted, reason, is_gpu=is_gpu) is sends


def test_what_was_asked_for_and_cannot_be_stops_the_server() -> None:
    with pytest.raises(RegistrationFailed, match="--layerwise on: a full prefill graph runs"):
        sends_layers("on", _hidden(prefill="full"), is_gpu=True)


@rows(
    ("role", "layerwise", "stock", "is_on", "is_hooked"),
    [
        (Role.PREFILL, "off", False, True, False),
        (Role.PREFILL, "auto", False, True, True),
        (Role.PREFILL, "on", False, True, True),
        (Role.DECODE, "on", False, True, False),
        (Role.PREFILL, "on", True, True, False),
        (Role.PREFILL, "on", False, False, False),
    ],
)
def test_off_leaves_sglangs_run_batch_alone(
    role: Role, layerwise: str, stock: bool, is_on: bool, is_hooked: bool
) -> None:
    plane = DataPlaneConfig(layerwise=layerwise, is_on=is_on)
    hooks = wanted_hooks(WorkerEnv(is_active=True, role=role, stock=stock, data_plane=plane))
    assert any(hook.path == RUN_BATCH for hook in hooks) is is_hooked
    if not stock:
        assert len(hooks) == len(HOOKS) - (not is_hooked), "all other hooks as before"


def test_the_option_reaches_the_worker() -> None:
    environ = LaunchConfig(layerwise="auto").data_plane_environment
    assert environ == {"PDSERVE_LAYERWISE": "auto"}
    assert DataPlaneConfig.from_environ(environ).layerwise == "auto"
    assert DataPlaneConfig.from_environ({}).layerwise == "off"
    with pytest.raises(ConfigError, match="layerwise must be one of auto, on, off"):
        DataPlaneConfig.from_environ({"PDSERVE_LAYERWISE": "yes"})
    with pytest.raises(ConfigError, match="layerwise"):
        LaunchConfig(layerwise="yes")

"""`pdserve simulate` as a function: a table, files where asked, each wrong option named before it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from pdserve.errors import ConfigError
from pdserve.sim.command import SimulateOptions, run_simulation
from pdserve.sim.cost import CostModel, load_model
from pdserve.sim.profiles import PROFILES, model_of
from pdserve.sim.report import Slo, parse_slo, percentile
from pdserve.sim.simulator import simulate
from pdserve.workload import LengthDistribution, Synthetic, synthetic

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:00:{index // 10:02d}.{index % 10}000000,{400 + index},20" for index in range(120)]
    path.write_text(HEADER + "\n".join(rows) + "\n")
    return path


@pytest.mark.slow
def test_a_table_a_json_file_and_a_picture(trace: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    options = SimulateOptions(
        trace=str(trace), policy="least_load,round_robin", prefill=2, decode=2, rate=5.0, seed=3,
        json=str(out), plot=str(plot),
    )  # fmt: skip
    text = run_simulation(options)
    assert "least_load" in text
    assert "round_robin" in text
    assert "120 at 5.00 per second" in text
    runs = json.loads(out.read_text())["runs"]
    assert [run["policy"] for run in runs] == ["least_load", "round_robin"]
    assert runs[0]["requests"] == 120
    assert runs[0]["goodput"] == pytest.approx(runs[0]["attainment"] * runs[0]["rate"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run_simulation(options) == text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy": "best"}, "--policy: unknown policy 'best'"),
        ({"policy": ","}, "--policy"),
        ({"policy": "random,random"}, "each once"),
        ({"trace": ""}, "--trace"),
        ({"trace": "nowhere.csv"}, "no such file"),
        ({"prefill": 0}, "--prefill"),
        ({"decode": -1}, "--decode"),
        ({"rate": -1.0}, "--rate"),
        ({"rate": float("nan")}, "--rate"),
        ({"requests": -1}, "--requests"),
        ({"lengths": "psychic"}, "--lengths"),
        ({"slo": "ttft=2"}, "slo"),
        ({"slo": "ttft=2,tpot=fast"}, "slo"),
        ({"slo": "ttft=-2,tpot=1"}, "both positive"),
        ({"model": "gpt"}, "expected a file that calibrate wrote or one of llama-70b-8xh100"),
        ({"model": "nowhere.json"}, "no such file"),
        ({"json": "/nowhere/out.json"}, "--json"),
        ({"plot": "/nowhere/out.png"}, "--plot"),
    ],
)
def test_each_wrong_option_is_named(trace: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_simulation(replace(SimulateOptions(trace=str(trace)), **change))
    assert said in str(caught.value)


def test_a_cost_model_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = PROFILES["llama-70b-4xh100"]
    model.save(tmp_path / "model.json")
    assert load_model(tmp_path / "model.json") == model
    assert model_of(str(tmp_path / "model.json")) == model


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "required field"),
        ("not json", "malformed"),
        ('{"speed": 1}', "unknown field"),
    ],
)
def test_a_file_that_is_no_cost_model_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_model(path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"prefill_token_s": -1.0},
        {"decode_pool_tokens": 0},
        {"link_beta_s": float("nan")},
        {"decode_base_s": 0.0, "decode_request_s": 0.0},
        {"prefill_base_s": 0.0, "prefill_token_s": 0.0},
    ],
)
def test_figures_that_make_no_sense_are_named(change: dict[str, float]) -> None:
    model = msgspec.structs.replace(PROFILES["llama-70b-8xh100"], **change)
    with pytest.raises(ConfigError, match=next(iter(change))):
        model.check()


@pytest.mark.parametrize("model", PROFILES.values(), ids=lambda model: model.name)
def test_published_profiles_make_sense_and_name_their_source(model: CostModel) -> None:
    assert model.check() is model
    assert "splitwise-sim" in model.source
    assert model.prefill_alone_s(8192) == pytest.approx(8192 / 9000, rel=0.6)
    assert 0.02 < model.decode_step_s(32, 32 * 600) < 0.08


def test_percentiles_lie_between_neighbours() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.25) == 1.25
    assert percentile([], 0.5) != percentile([], 0.5)


def test_goodput_counts_only_what_meets_both_limits() -> None:
    trace = synthetic(Synthetic(rate=2.0, requests=50, inputs=LengthDistribution(mean=500)), seed=1)
    report = simulate(trace, PROFILES["llama-70b-8xh100"], "round_robin", 1, 1)
    assert report.attainment(Slo(1e6, 1e6)) == 1.0
    assert report.attainment(Slo(1e6, 1e-6)) == 0.0
    assert report.attainment(Slo(1e-6, 1e6)) == 0.0
    middle = report.percentile("ttft_s", 0.5)
    assert 0.4 < report.attainment(Slo(middle, 1e6)) < 0.6
    assert report.goodput(Slo(1e6, 1e6)) == pytest.approx(report.rate())
    assert parse_slo("ttft=2,tpot=0.05") == Slo(2.0, 0.05)

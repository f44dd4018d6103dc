"""Traces are read, refused in words, scaled, mixed and given texts with the prefixes they claim."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve.errors import ConfigError
from pdserve.workload import (
    LengthDistribution,
    Synthetic,
    TracedRequest,
    cut,
    overlaid,
    prompt_bytes,
    rate_of,
    read_trace,
    rearrived,
    sampled,
    scaled,
    shifted,
    spread,
    synthetic,
)

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.4799600,3180,8
"""


def mooncake(*rows: tuple[int, int, int, list[int]]) -> str:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    return "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows) + "\n"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text)
    return path


def plain(*arrivals: float) -> list[TracedRequest]:
    return [TracedRequest(at_s, 100, 10, serial=index) for index, at_s in enumerate(arrivals)]


def test_azure_rows_become_requests_from_zero(tmp_path: Path) -> None:
    first, second = read_trace(written(tmp_path, AZURE))
    assert (first.arrival_s, first.input_tokens, first.output_tokens) == (0.0, 4808, 10)
    assert second.arrival_s == pytest.approx(0.5)
    assert first.block_ids is None


def test_mooncake_rows_keep_their_block_ids(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, mooncake((3000, 600, 5, [1, 2]), (6000, 1024, 7, [1, 3]))))
    assert [request.arrival_s for request in trace] == [0.0, 3.0]
    assert trace[1].block_ids == (1, 3)
    assert trace[1].block_tokens == 512


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected Mooncake jsonl"),
        ("hello\n", "expected Mooncake jsonl"),
        (mooncake((0, 600, 5, [1, 2])) + '{"timestamp": 1}\n', "row 2"),
        (mooncake((0, 600, 5, [1])), "one hash id per 512 tokens (2)"),
        (AZURE + "2023-11-16 18:17:05.0,many,3\n", "row 4"),
        (AZURE + "2023-11-16 18:17:05.0,0,3\n", "row 4"),
        ("TIMESTAMP,Context\n", "expected header"),
        (AZURE.splitlines()[0], "no request"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_trace(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_where_traces_come_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file.*Mooncake.*Azure"):
        read_trace(tmp_path / "nowhere.jsonl")


def test_scaling_sets_the_rate_and_keeps_the_rhythm() -> None:
    trace = scaled(plain(0.0, 1.0, 4.0), 10.0)
    assert rate_of(trace) == pytest.approx(10.0)
    assert trace[2].arrival_s / trace[1].arrival_s == pytest.approx(4.0)
    with pytest.raises(ConfigError, match="rate"):
        scaled(trace, 0.0)


def test_spreading_keeps_order_and_step_and_ends_bursts() -> None:
    trace = plain(0.0, 0.0, 0.0, 3.0, 3.0, 6.0)
    once, again = spread(trace, seed=1), spread(trace, seed=1)
    assert once == again
    assert once != spread(trace, seed=2)
    arrivals = [request.arrival_s for request in once]
    assert arrivals == sorted(arrivals)
    assert len(set(arrivals)) == len(arrivals)
    assert [request.serial for request in once] == list(range(6))
    assert all(0 <= after - before.arrival_s < 3.0 for after, before in zip(arrivals, trace, strict=True))


def test_cut_by_count_and_by_seconds() -> None:
    trace = plain(0.0, 1.0, 2.0, 3.0)
    assert len(cut(trace, requests=2)) == 2
    assert len(cut(trace, seconds=2.0)) == 3
    assert len(cut(trace, requests=3, seconds=1.0)) == 2


def test_new_arrivals_have_the_rate_and_differ_by_seed() -> None:
    trace = plain(*[0.0] * 4000)
    first = rearrived(trace, 20.0, seed=1)
    assert rate_of(first) == pytest.approx(20.0, rel=0.1)
    assert first == rearrived(trace, 20.0, seed=1)
    assert first != rearrived(trace, 20.0, seed=2)


def test_a_sample_goes_round_the_trace_with_new_prefixes() -> None:
    trace = [TracedRequest(float(i), 512, 1, (i,), serial=i) for i in range(10)]
    picked = sampled(trace, 25, seed=3)
    assert len(picked) == 25
    assert picked[0].arrival_s == 0.0
    arrivals = [request.arrival_s for request in picked]
    assert arrivals == sorted(arrivals)
    assert len({request.block_ids for request in picked}) == 25


def test_copies_laid_over_each_other_share_no_prefix_and_add_their_rates() -> None:
    trace = [TracedRequest(float(i), 1024, 1, (0, i + 1), serial=i) for i in range(50)]
    merged = overlaid(trace, 4, seed=5)
    assert len(merged) == 200
    assert rate_of(merged) == pytest.approx(4 * rate_of(trace), rel=0.1)
    assert len({request.block_ids[0] for request in merged if request.block_ids}) == 4


def test_a_shift_changes_the_trace_midway() -> None:
    first = [TracedRequest(float(i), 512, 1, (i,)) for i in range(10)]
    second = [TracedRequest(float(i), 100, 99, (i,)) for i in range(3)]
    trace = shifted(first, second, at=4.0)
    assert [request.arrival_s for request in trace] == [0, 1, 2, 3, 4, 5, 6]
    assert [request.output_tokens for request in trace] == [1] * 4 + [99] * 3
    assert trace[0].block_ids != trace[4].block_ids


def test_equal_leading_blocks_are_equal_text_and_nothing_else_is() -> None:
    one = TracedRequest(0.0, 1200, 1, (7, 8, 9))
    other = TracedRequest(0.0, 1500, 1, (7, 8, 10))
    a, b = prompt_bytes(one), prompt_bytes(other)
    assert len(a) == 4800
    assert len(b) == 6000
    shared = next(i for i in range(len(a)) if a[i] != b[i])
    assert 4096 <= shared < 4096 + 16


def test_prompts_without_ids_are_all_different_from_the_start() -> None:
    texts = {prompt_bytes(request)[:64] for request in plain(*[0.0] * 100)}
    assert len(texts) == 100


def test_synthetic_workloads_are_drawn_by_seed_at_the_rate_asked_for() -> None:
    plan = Synthetic(rate=5.0, requests=2000, inputs=LengthDistribution("lognormal", mean=800, cv=0.5))
    trace = synthetic(plan, seed=1)
    assert trace == synthetic(plan, seed=1)
    assert trace != synthetic(plan, seed=2)
    assert rate_of(trace) == pytest.approx(5.0, rel=0.1)
    mean = sum(request.input_tokens for request in trace) / len(trace)
    assert mean == pytest.approx(800, rel=0.1)


def test_turns_of_a_session_begin_with_the_turn_before() -> None:
    plan = Synthetic(rate=1.0, requests=60, turns=3, num_prefixes=2, prefix_tokens=1024)
    sessions: dict[str, list[TracedRequest]] = {}
    for request in synthetic(plan, seed=4):
        sessions.setdefault(request.user, []).append(request)
    whole = [turns for turns in sessions.values() if len(turns) == 3]
    assert whole
    for first, second, _ in whole:
        assert first.block_ids is not None
        assert second.block_ids is not None
        known = first.input_tokens // 512
        assert second.block_ids[:known] == first.block_ids[:known]
        assert second.input_tokens > first.input_tokens
    assert len({turns[0].block_ids[:2] for turns in whole if turns[0].block_ids}) == 2


def test_an_unknown_distribution_and_an_impossible_plan_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected fixed, uniform or lognormal"):
        synthetic(Synthetic(rate=1.0, requests=1, inputs=LengthDistribution("zipf")), seed=0)
    with pytest.raises(ConfigError, match="synthetic"):
        synthetic(Synthetic(rate=0.0, requests=1), seed=0)

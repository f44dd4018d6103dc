"""Several expositions as one that Prometheus still reads."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.balancer.metrics.exposition import ExpositionMerger

HISTOGRAM = """# HELP h a time
# TYPE h histogram
h_bucket{le="1.0"} 2.0
h_bucket{le="+Inf"} 3.0
h_sum 4.5
h_count 3.0
# HELP g a level
# TYPE g gauge
g{a="x y{z}"} 1.0 1700000000
"""


def merge_expositions(parts: Iterable[tuple[dict[str, str], str]]) -> str:
    merger = ExpositionMerger()
    for labels, text in parts:
        merger.add(labels, text)
    return merger.text()


def test_samples_of_a_metric_stand_together_under_one_header() -> None:
    merged = merge_expositions([({"w": "a"}, HISTOGRAM), ({"w": "b"}, HISTOGRAM)]).splitlines()
    assert merged == [
        "# HELP h a time",
        "# TYPE h histogram",
        *(
            'h_bucket{w="a",le="1.0"} 2.0',
            'h_bucket{w="a",le="+Inf"} 3.0',
            'h_sum{w="a"} 4.5',
            'h_count{w="a"} 3.0',
        ),
        *(
            'h_bucket{w="b",le="1.0"} 2.0',
            'h_bucket{w="b",le="+Inf"} 3.0',
            'h_sum{w="b"} 4.5',
            'h_count{w="b"} 3.0',
        ),
        "# HELP g a level",
        "# TYPE g gauge",
        'g{w="a",a="x y{z}"} 1.0 1700000000',
        'g{w="b",a="x y{z}"} 1.0 1700000000',
    ]


def test_odd_lines() -> None:
    merged = merge_expositions([({"w": 'a"\\\n'}, "# a comment\n\nx{} 1\ny 2"), ({}, "")])
    assert merged.splitlines() == ['x{w="a\\"\\\\\\n"} 1', 'y{w="a\\"\\\\\\n"} 2']
    assert merge_expositions([]) == ""


TRICKY = """# HELP up Whether {it} is "up".
# TYPE up gauge
up 1
up_since{a="b"} 2
# TYPE x_total counter
x_total{path="a\\nx_total{",q="\\"}"} 3
x_created{} 4 # {trace="1"} 5
# TYPE xy gauge
xyz{a=""} 6
xy{a="}"} NaN
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_samples_keep_their_values_and_labels_whatever_is_in_them(end: str) -> None:
    text = TRICKY.replace("\n", end)
    merged = merge_expositions([({"w": "1"}, text), ({"w": "2"}, text)])
    assert [line for line in merged.splitlines() if 'w="2"' not in line] == [
        '# HELP up Whether {it} is "up".',
        "# TYPE up gauge",
        'up{w="1"} 1',
        'up_since{w="1",a="b"} 2',
        "# TYPE x_total counter",
        'x_total{w="1",path="a\\nx_total{",q="\\"}"} 3',
        'x_created{w="1"} 4 # {trace="1"} 5',
        "# TYPE xy gauge",
        'xy{w="1",a="}"} NaN',
        'xyz{w="1",a=""} 6',
    ]


NAMES = st.sampled_from(["a", "a_b", "a_total", "b"])


@given(st.lists(st.lists(st.tuples(NAMES, st.integers(0, 9)), max_size=6), max_size=4))
def test_no_sample_is_lost_and_no_metric_is_split(parts: list[list[tuple[str, int]]]) -> None:
    texts = ["".join(f"# TYPE {name} gauge\n{name} {value}\n" for name, value in part) for part in parts]
    merged = merge_expositions([({"w": str(index)}, text) for index, text in enumerate(texts)])
    lines = merged.splitlines()
    samples = [line for line in lines if not line.startswith("#")]
    wanted = [f'{n}{{w="{i}"}} {v}' for i, part in enumerate(parts) for n, v in part]
    assert sorted(samples) == sorted(wanted)
    headers = [line for line in lines if line.startswith("#")]
    assert len(headers) == len(set(headers))

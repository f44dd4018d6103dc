"""What is published, what is documented and what the dashboard asks for are the same names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pdserve.balancer.metrics.catalog import BY_NAME, METRICS, Kind

ROOT = Path(__file__).parents[3]
TABLE_ROW = re.compile(r"^\| `(pdserve:[a-z0-9_]+)` \| (\w+) \| (\S+) \| (.*?) \| (.*) \|$", re.M)
NAME = re.compile(r"pdserve:[a-z0-9_]+")
LABELS = re.compile(r"(?:by \(([^)]*)\)|\{([^}]*)\})")
OF_PROMETHEUS = {"job", "instance", "le"}


def documented() -> str:
    return (ROOT / "docs" / "metrics.md").read_text()


def dashboard() -> dict[str, Any]:
    document = json.loads((ROOT / "configs" / "grafana" / "pdserve.json").read_text())
    assert isinstance(document, dict)
    return document


def expressions() -> list[tuple[str, str]]:
    """Panel and expression of every query, with those of the variables."""
    found = [
        (panel["title"], target["expr"])
        for panel in dashboard()["panels"]
        for target in panel.get("targets", ())
    ]
    variables = dashboard()["templating"]["list"]
    return found + [(each["name"], each["definition"]) for each in variables if "definition" in each]


def metric_of(name: str) -> str:
    """The family of a sample's name."""
    family = re.sub(r"_(bucket|sum|count)$", "", name)
    return family if BY_NAME.get(family) and BY_NAME[family].kind is Kind.HISTOGRAM else name


def test_the_table_has_every_metric_with_its_type_unit_labels_and_help() -> None:
    rows = {row[0]: row[1:] for row in TABLE_ROW.findall(documented())}
    assert list(rows) == [metric.name for metric in METRICS]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
        assert rows[metric.name] == (str(metric.kind), metric.unit, labels, metric.help)


def test_every_name_in_the_text_exists() -> None:
    assert {metric_of(name) for name in NAME.findall(documented())} <= set(BY_NAME)
    short = set(
        re.findall(
            r"`((?:worker|pair|queue|requests|breaker|leg|kv|handover|prefill|time)_[a-z_]+)`", documented()
        )
    )
    labels = {label for metric in METRICS for label in metric.labels}
    unknown = {name for name in short - labels if f"pdserve:{name}" not in BY_NAME}
    assert not unknown


def test_panels_ask_for_metrics_and_labels_that_exist() -> None:
    wrong = []
    for panel, expression in expressions():
        names = [metric_of(name) for name in NAME.findall(expression)]
        unknown = {name for name in names if name not in BY_NAME}
        known = {label for name in names if name in BY_NAME for label in BY_NAME[name].labels} | OF_PROMETHEUS
        for grouped, selected in LABELS.findall(expression):
            asked = re.findall(r"[a-z_]+", grouped) + re.findall(r"([a-z_]+)\s*!?=", selected)
            unknown |= set(asked) - known
        if unknown or not names:
            wrong.append((panel, expression, unknown))
    assert not wrong


def test_rates_are_taken_of_counters_only() -> None:
    for panel, expression in expressions():
        for name in re.findall(r"(?:rate|increase)\((pdserve:[a-z0-9_]+)", expression):
            is_counter = name.endswith("_total") or BY_NAME[metric_of(name)].kind is Kind.HISTOGRAM
            assert is_counter, f"{panel}: {name}"


def test_the_dashboard_shows_every_metric_but_those_that_only_name_or_date() -> None:
    shown = {metric_of(name) for _, expression in expressions() for name in NAME.findall(expression)}
    missing = set(BY_NAME) - shown
    assert missing == {
        f"pdserve:{name}"
        for name in ("start_time_seconds", "bootstrap_connected", "pair_probes_total", "pair_ready")
    }


def test_legends_use_labels_of_their_query() -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            names = [metric_of(name) for name in NAME.findall(target["expr"])]
            known = {label for name in names for label in BY_NAME[name].labels}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known, panel["title"]


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_names_say_kind_and_unit_as_prometheus_wants_it() -> None:
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        if metric.unit == "seconds":
            assert metric.name.endswith("_seconds"), metric.name
        if metric.unit == "bytes":
            assert metric.name.endswith("_bytes_total"), metric.name
        assert metric.help.endswith("."), metric.name

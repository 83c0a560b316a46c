"""What scripts/deploy and docs/slo.md name exists: metrics, their labels, and the values of labels."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from ovserve.api.record import OUTCOMES
from ovserve.dispatch.jobs import State
from ovserve.dispatch.model_queue import MODEL_STATES
from ovserve.metrics import WATCHED, Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "scripts" / "deploy"
PROCESS = ("process_cpu_seconds_total", "process_open_fds", "process_max_fds", "process_resident_memory_bytes")
SCRAPED = {"instance", "job", "le"}  # labels that Prometheus or the type of the metric add
_SELECTOR = re.compile(r"\b((?:ovserve|process)_[a-z_]+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!=|=)\s*"([^"]*)"')


def known() -> dict[str, set[str]]:
    """Return the labels of each sample by its name."""
    found: dict[str, set[str]] = {name: set() for name in PROCESS}
    for name, watched in WATCHED.items():
        found[name] = set(watched.labels)
    for family in vars(Metrics()).values():
        if isinstance(family, MetricWrapperBase):
            described: Any = family.describe()[0]
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum", "")}.get(
                described.type, ("",)
            )
            for suffix in suffixes:
                found[described.name + suffix] = set(family._labelnames)
    return found


KNOWN = known()
VALUES = {"outcome": set(OUTCOMES), "stage": {"queue", "prepare", "denoise", "finish"}, "result": {"hits", "misses"}}


def expressions() -> Iterator[str]:
    """Yield the expressions of the dashboard and of the rules."""
    for panel in json.loads((DEPLOY / "grafana.json").read_text("utf-8"))["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text("utf-8"))["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_metrics_of_an_expression_exist_with_its_labels(expression: str) -> None:
    grouped = [name for names in re.findall(r"by \(([^)]*)\)", expression) for name in re.split(r",\s*", names)]
    labels: set[str] = set()
    for name, matchers in _SELECTOR.findall(expression):
        assert name in KNOWN
        labels |= KNOWN[name] | SCRAPED
        states = set(MODEL_STATES) if name == "ovserve_model_state" else {state.value for state in State}
        for label, value in _MATCHER.findall(matchers):
            assert label in KNOWN[name] | SCRAPED, label
            allowed = {**VALUES, "state": states}.get(label)
            assert allowed is None or set(value.split("|")) <= allowed, value
    assert not labels or set(grouped) <= labels


@pytest.mark.parametrize("page", ["slo.md", "operations.md", "install.md", "security.md"])
def test_metrics_of_a_page_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text("utf-8")
    for name in re.findall(r"`((?:ovserve)_[a-z_]+)", text):
        assert name in KNOWN, name


def test_alerts_of_the_page_exist() -> None:
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text("utf-8"))["groups"]
    alerts = {rule.get("alert") for group in groups for rule in group["rules"]}
    assert set(re.findall(r"`(Ovserve\w+)`", (ROOT / "docs" / "slo.md").read_text("utf-8"))) <= alerts


def test_example_line_of_the_usage_log_has_the_fields_of_the_code() -> None:
    example = re.search(r"```json\n(\{.*\})\n", (ROOT / "docs" / "slo.md").read_text("utf-8"))
    assert example
    code = (ROOT / "ovserve" / "api" / "api.py").read_text("utf-8")
    fields = re.findall(r'^        "(\w+)":', code, re.MULTILINE)
    stages = [f"{stage}_ms" for stage in ("queue", "prepare", "denoise", "finish")]
    assert list(json.loads(example[1])) == [*fields[:-1], *stages, fields[-1]]


def test_panels_do_not_overlap() -> None:
    seen: set[tuple[int, int]] = set()
    for panel in json.loads((DEPLOY / "grafana.json").read_text("utf-8"))["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + column, place["y"] + line) for column in range(place["w"]) for line in range(place["h"])}
        assert not cells & seen, panel["title"]
        assert place["x"] + place["w"] <= 24
        seen |= cells


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed: scripts/test-all extracts it")
def test_promtool_accepts_the_rules() -> None:
    command = ["promtool", "check", "rules", str(DEPLOY / "alerts.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed: scripts/test-all extracts it")
def test_alerts_fire_for_the_series_that_they_are_for() -> None:
    command = ["promtool", "test", "rules", str(ROOT / "tests" / "data" / "alerts_test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr

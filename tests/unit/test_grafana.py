"""Dashboards, alert rules and runbook agree with each other and with the exported series."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from forecache.cluster.observe.metrics import Metrics, registry_of
from forecache.cluster.observe.metrics_targets import service_discovery
from forecache.indexer.serving.protocol import IndexerStats
from forecache.indexer.serving.telemetry import MetricsTarget
from forecache.workers.core.stats import EngineStats, ScorerStats, WorkerStats
from forecache.workers.memory.arena.stats import TierStats

GRAFANA = Path(__file__).resolve().parents[2] / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
PROMETHEUS = GRAFANA / "prometheus"
RUNBOOK = "https://github.com/forecache/forecache/blob/main/grafana/README.md#"
PROMETHEUS_OWN = {"up", "ALERTS"}
TARGET_LABELS = set(service_discovery([MetricsTarget("h:1", "worker", "w", "n")])[0]["labels"])
WORDS = {"and", "or", "unless", "on", "ignoring", "group_left", "group_right", "by", "without", "bool", "offset"}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules(kind: str) -> list[dict[str, Any]]:
    """Rules of a ``kind``, "alert" or "record"."""
    files = (PROMETHEUS / "alert_rules.yml", PROMETHEUS / "recording_rules.yml")
    return [rule for file in files for group in load(file)["groups"] for rule in group["rules"] if kind in rule]


def expressions() -> Iterator[tuple[str, str]]:
    """Place → PromQL expression, for all dashboards and rules."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel["targets"]:
                yield f"{path.name}: {panel['title']}", target["expr"]
    for kind in ("alert", "record"):
        yield from ((rule[kind], rule["expr"]) for rule in rules(kind))


def labels_of_series() -> dict[str, set[str]]:
    """Every sample name that a server may expose → its labels."""
    labels: dict[str, set[str]] = {}
    metrics = Metrics("m")
    metrics.error("k")
    worker = WorkerStats("w", "n", EngineStats(), None, ScorerStats("bounds", "", 0))
    others: tuple[object, ...] = (worker, TierStats(1, 0, 0, 0, 0, 0), IndexerStats())
    registries = [registry_of("m", lambda stats=stats: stats) for stats in others]
    for registry in [metrics.registry, *registries]:
        for family in text_string_to_metric_families(generate_latest(registry).decode()):
            suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}.get(family.type, ("",))
            found = set().union(*(sample.labels for sample in family.samples))
            labels.update((family.name + suffix, found | TARGET_LABELS) for suffix in suffixes)
    return labels


def series_in(expression: str) -> set[str]:
    """The series in a PromQL expression: words that are neither labels, functions nor keywords."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]', " ", expression)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    return set(re.findall(r"(?<![\w.:$])[a-zA-Z_:][\w:]*(?![\w:])(?!\s*\()", bare)) - WORDS


def test_series_are_told_from_what_else_is_in_an_expression() -> None:
    assert series_in('sum by (a, le) (rate(x_total{kind=~"y|z", b="{c}"}[5m])) / on (d) (0.5 * k:l:m > 1e3) or up') == {
        "x_total",
        "k:l:m",
        "up",
    }


def test_there_are_the_three_dashboards() -> None:
    assert [path.stem for path in DASHBOARDS] == ["cache", "cluster", "serving"]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in DASHBOARDS]
    assert len({one["uid"] for one in found}) == 3
    assert [one["title"] for one in found] == ["forecache: Cache", "forecache: Cluster", "forecache: Serving"]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_says_what_it_shows_and_in_which_unit(path: Path) -> None:
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) > 0
    for panel in dashboard["panels"]:
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"] and all(target["legendFormat"] for target in panel["targets"])
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and all(x < 24 for x, _ in cells), f"{panel['title']} lies over another panel"
        taken |= cells


def test_every_expression_names_series_that_are_there() -> None:
    known = labels_of_series()
    recorded = {rule["record"] for rule in rules("record")}
    for where, expression in expressions():
        names = series_in(expression)
        assert names, where
        assert names - known.keys() - recorded - PROMETHEUS_OWN == set(), where
        for name, matchers in re.findall(r"([\w:]+)\{([^}]*)\}", expression):
            labels = set(re.findall(r"(\w+)\s*[=!]", matchers))
            assert labels <= known.get(name, {"model_name"}) or name in PROMETHEUS_OWN, f"{where}: {labels} of {name}"


def test_every_series_is_shown() -> None:
    """Every exported series is used in a dashboard; histograms by their buckets, or by sum and count."""
    shown = set().union(*(series_in(expression) for _, expression in expressions()))
    families = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in labels_of_series()}
    seen = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in shown}
    assert families - seen == set()


def test_kinds_of_server_errors_are_those_of_the_code() -> None:
    errors = (GRAFANA.parent / "cluster" / "errors.py").read_text(encoding="utf-8")
    kinds = {
        kind
        for _, expression in expressions()
        for one in re.findall(r'kind=~"([^"]*)"', expression)
        for kind in one.split("|")
    }
    assert kinds and all(f'"{kind}"' in errors for kind in kinds)


def test_every_recorded_series_is_used() -> None:
    used = set().union(*(series_in(expression) for _, expression in expressions()))
    assert {rule["record"] for rule in rules("record")} - used == set()


def anchors() -> dict[str, str]:
    """Anchor of each heading of the runbook, as GitHub makes it → the text below."""
    parts = re.split(r"^#+ (.+)$", (GRAFANA / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"): text
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }


def test_every_alert_has_a_summary_a_description_and_its_page_of_the_runbook() -> None:
    runbook = anchors()
    alerts = rules("alert")
    assert len({rule["alert"] for rule in alerts}) == len(alerts) > 10
    for rule in alerts:
        said = rule["annotations"]
        assert said["summary"] and said["description"], rule["alert"]
        assert said["runbook_url"] == RUNBOOK + rule["alert"].lower()
        assert rule["labels"]["severity"] in ("warning", "critical")
        text = runbook[rule["alert"].lower()]
        assert all(part in text for part in ("**Means**", "**Look first**", "**Remedy**")), rule["alert"]
    stale = {anchor for anchor in runbook if anchor.startswith("forecache") and anchor != "forecache"}
    assert stale == {rule["alert"].lower() for rule in alerts}, "the runbook has alerts that are not there"


def test_every_alert_and_every_recorded_series_has_a_unit_test() -> None:
    """The tests of rules expect every alert and every recorded series."""
    expected = set()
    for test in load(PROMETHEUS / "rules_test.yml")["tests"]:
        for case in test.get("promql_expr_test", []):
            for sample in case["exp_samples"]:
                name, alert = re.fullmatch(r'([\w:]+)\{(?:alertname="(\w+)")?.*\}', sample["labels"]).groups()
                expected.add(alert or name)
    assert {rule["alert"] for rule in rules("alert")} | {rule["record"] for rule in rules("record")} == expected


def test_what_compose_mounts_is_there_and_images_are_pinned() -> None:
    services = load(GRAFANA / "compose.yaml")["services"]
    assert set(services) == {"prometheus", "grafana"}
    inside: dict[str, Path] = {}
    for service in services.values():
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"]), "an image needs a full version"
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            if source.startswith("."):
                assert (GRAFANA / source).is_dir(), source
                inside[target] = GRAFANA / source
    provider = load(GRAFANA / "provisioning" / "dashboards" / "forecache.yml")["providers"][0]
    assert inside[provider["options"]["path"]] == GRAFANA / "dashboards"
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (inside[str(home.parent)] / home.name).is_file()
    source = load(GRAFANA / "provisioning" / "datasources" / "prometheus.yml")["datasources"][0]
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in services["prometheus"]["command"]
    scraped = load(PROMETHEUS / "prometheus.yml")
    assert scraped["scrape_configs"][0]["job_name"] == "forecache"
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    assert all((PROMETHEUS / name).is_file() for name in scraped["rule_files"])


@needs_promtool
@pytest.mark.parametrize(
    "command",
    [
        ("check", "rules", "recording_rules.yml", "alert_rules.yml"),
        ("check", "config", "prometheus.yml"),
        ("test", "rules", "rules_test.yml"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_promtool(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr

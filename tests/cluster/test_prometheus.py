"""A real Prometheus, with the shipped configuration, scrapes a running server: dashboards and rules have data."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on PATH"),
]

GRAFANA = Path(__file__).resolve().parents[2] / "grafana"
INTERVAL_S = 2
DATA_WITHIN_S = 40.0
STOP_S = 10.0
# a model without a manifest has no retrieval heads, so no retrieval events; the quantiles of nothing are NaN
NEED_RETRIEVAL_EVENTS = re.compile(r"forecache_attention_coverage|forecache_lookahead_hit_ratio")


@pytest.fixture(scope="module")
def server(start_server: Any) -> Any:
    return start_server("--hot-bytes", "1MiB", "--keep-ratio", "0.2")


class Prometheus:
    """A running Prometheus; ``url`` without a path."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **params: str) -> Any:
        """``data`` of an answer of its API."""
        answer = httpx.get(f"{self._url}/api/v1/{path}", params=params, timeout=30)
        said = answer.json()
        assert said["status"] == "success", f"{params}: {said.get('error')}"
        assert not said.get("warnings"), f"{params}: {said['warnings']}"
        return said["data"]

    def values(self, expression: str) -> list[float]:
        """The vector's values, NaN left out."""
        found = [float(one["value"][1]) for one in self.get("query", query=expression)["result"]]
        return [value for value in found if value == value]

    def wait_for(self, expression: str, value: float) -> None:
        start = time.monotonic()
        while (now := self.values(expression)) != [value]:
            assert time.monotonic() - start < DATA_WITHIN_S, f"{expression} is {now}, not {value}"
            time.sleep(0.2)


@pytest.fixture
def prometheus(server: Any, tmp_path: Path) -> Iterator[Prometheus]:
    """The shipped configuration but for the server's address and a shorter interval, on a port the system chose."""
    shipped = GRAFANA / "prometheus"
    config = yaml.safe_load((shipped / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), f"{INTERVAL_S}s")
    config["rule_files"] = [str(shipped / name) for name in config["rule_files"]]
    [discovery] = config["scrape_configs"][0]["http_sd_configs"]
    discovery.update(url=f"{server.url}{urlsplit(discovery['url']).path}", refresh_interval=f"{INTERVAL_S}s")
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [
        *("prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"),
        "--web.listen-address=127.0.0.1:0",
    ]
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        try:
            start = time.monotonic()
            while (found := re.search(r"Listening on.*address=\S*:(\d+)", log.read_text())) is None or (
                "ready to receive" not in log.read_text()
            ):
                assert process.poll() is None and time.monotonic() - start < DATA_WITHIN_S, log.read_text()
                time.sleep(0.1)
            yield Prometheus(f"http://127.0.0.1:{found[1]}")
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def queries() -> dict[str, str]:
    """Every query of the dashboards as Grafana would ask it, and every rule: where it stands → PromQL."""
    found = {}
    for path in sorted((GRAFANA / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
                found[f"{path.stem}: {panel['title']} {target['refId']}"] = expression
    rules = yaml.safe_load((GRAFANA / "prometheus" / "recording_rules.yml").read_text(encoding="utf-8"))
    for rule in rules["groups"][0]["rules"]:
        found[rule["record"]] = rule["record"]
    return found


def ask(server: Any, text: str) -> dict[str, Any]:
    body = {"model": "bytes", "prompt": text, "max_tokens": 140, "ignore_eos": True, "temperature": 0}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    usage: dict[str, Any] = answer.json()["usage"]
    return usage


def test_every_query_has_data_and_no_rule_fails(server: Any, prometheus: Prometheus) -> None:
    prometheus.wait_for('count by (job) (up{job="forecache"} == 1)', 4)  # ingress, worker, tier, indexer
    prometheus.wait_for("model:forecache_workers:count", 1)
    # two documents, each asked about twice: more than the hot pool holds, so chunks are recalled
    documents = ["".join(chr(97 + (seed * i * i + i) % 26) for i in range(1400)) for seed in (3, 7)]
    usages = [ask(server, document + question) for question in ("who?", "what?") for document in documents]
    assert server.post("/v1/completions", {"model": "other", "prompt": "x"}).status_code == 404
    prometheus.wait_for("forecache_requests_finished_total", len(usages))

    wanted = {where: query for where, query in queries().items() if not NEED_RETRIEVAL_EVENTS.search(query)}
    start = time.monotonic()
    while missing := [where for where, query in wanted.items() if not prometheus.values(query)]:
        assert time.monotonic() - start < DATA_WITHIN_S, f"no data: {missing}"
        time.sleep(0.5)
    for query in queries().values():
        prometheus.get("query", query=query)  # those that may have no data are right PromQL too

    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 20 and {group["name"] for group in groups} == {"forecache-recording", "forecache-alerts"}
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []

    # the dashboard's hit rate is what the client was told
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    told = cached / sum(usage["prompt_tokens"] for usage in usages)
    assert told > 0.3
    assert prometheus.values("model:forecache_prefix_cache_hit_ratio:rate5m") == [pytest.approx(told, rel=0.01)]

"""Observability of a real server: Prometheus with the shipped configuration scrapes it, dashboards and rules have
data, an OTLP receiver gets its traces, and logs and `forecache top` show the same requests."""

import gzip
import itertools
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import torch
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from processes import processes_below
from transformers import LlamaForCausalLM

from forecache.cluster.cli.top import short
from forecache.indexer.records.manifest import CalibrationRecord, RetrievalHead, RetrievalManifest

pytestmark = pytest.mark.cluster
needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on PATH")

GRAFANA = Path(__file__).resolve().parents[2] / "grafana"
INTERVAL_S = 2
DATA_WITHIN_S = 40.0
STOP_S = 10.0
SHARPER = 20.0


class Collector:
    """An OTLP receiver that keeps what it gets as (service, span). ``url`` has no path."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers["Content-Encoding"] == "gzip":
                    body = gzip.decompress(body)
                sent = ExportTraceServiceRequest.FromString(body)
                for resource in sent.resource_spans:
                    [service] = [
                        one.value.string_value for one in resource.resource.attributes if one.key == "service.name"
                    ]
                    spans.extend((service, span) for scope in resource.scope_spans for span in scope.spans)
                assert self.path == "/v1/traces"
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def trace(self, trace_id: str, spans: int) -> dict[str, tuple[str, Span]]:
        """Wait for ``count`` spans of a trace; returns name → (service, span)."""
        start = time.monotonic()
        while True:
            found = {span.name: (service, span) for service, span in self.spans if span.trace_id.hex() == trace_id}
            if len(found) >= spans:
                return found
            assert time.monotonic() - start < DATA_WITHIN_S, f"{list(found)} of {len(self.spans)} spans"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(made.http.serve_forever)
        try:
            yield made
        finally:
            made.http.shutdown()
            made.http.server_close()


@pytest.fixture(scope="module")
def server(
    start_server: Any, byte_model: Path, collector: "Collector", tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A server of a model with sharp attention, so that retrieval events occur; all its heads are retrieval heads."""
    folder = tmp_path_factory.mktemp("sharp")
    shutil.copytree(byte_model, folder / "bytes")
    model = LlamaForCausalLM.from_pretrained(byte_model, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(SHARPER)
    model.save_pretrained(folder / "bytes")
    calibration = CalibrationRecord(
        documents=0, tasks=(), min_tokens=0, max_tokens=0, chunk_tokens=16, seed=0, events=0.0,
        torch_version="", transformers_version="", date="",
    )  # fmt: skip
    manifest = RetrievalManifest(
        model_type="llama", layers=2, attention_heads=4, kv_heads=2, head_dim=16, calibration=calibration,
        heads=tuple(RetrievalHead(layer=layer, head=head, score=0.5) for layer in range(2) for head in range(4)),
    )  # fmt: skip
    (folder / "heads.json").write_text(manifest.model_dump_json(), encoding="utf-8")
    flags = ("--model", str(folder / "bytes"), "--indexer-manifest", str(folder / "heads.json"))
    telling = ("--log-format", "json", "--log-level", "info", "--otlp-endpoint", collector.url)
    return start_server(*flags, *telling, "--hot-bytes", "1MiB", "--keep-ratio", "0.2")


class Prometheus:
    """A running Prometheus; ``url`` without a path."""

    def __init__(self, url: str) -> None:
        self._url = url

    def get(self, path: str, **params: str) -> Any:
        """The ``data`` field of a response of Prometheus' API."""
        answer = httpx.get(f"{self._url}/api/v1/{path}", params=params, timeout=30)
        said = answer.json()
        assert said["status"] == "success", f"{params}: {said.get('error')}"
        assert not said.get("warnings"), f"{params}: {said['warnings']}"
        return said["data"]

    def values(self, expression: str) -> list[float]:
        """The values of a vector without NaN."""
        found = [float(one["value"][1]) for one in self.get("query", query=expression)["result"]]
        return [value for value in found if value == value]

    def wait_for(self, expression: str, value: float) -> None:
        start = time.monotonic()
        while (now := self.values(expression)) != [value]:
            assert time.monotonic() - start < DATA_WITHIN_S, f"{expression} is {now}, not {value}"
            time.sleep(0.2)

    def wait_for_rules(self) -> None:
        """Wait until every rule was evaluated after the data were stored."""
        start, now = time.monotonic(), datetime.now(UTC)
        while any(datetime.fromisoformat(x["lastEvaluation"]) < now for x in self.get("rules")["groups"]):
            assert time.monotonic() - start < DATA_WITHIN_S, "rules are not evaluated"
            time.sleep(0.2)


@pytest.fixture
def prometheus(server: Any, tmp_path: Path) -> Iterator[Prometheus]:
    """The shipped configuration with the server's address, a shorter interval, and a port that the system chose."""
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
    """Every query of the dashboards, as Grafana would send it, and every rule: place → PromQL."""
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


@contextmanager
def load(server: Any) -> Iterator[list[dict[str, Any]]]:
    """Two clients that ask about two documents each, again and again.

    The documents exceed the hot pool, so chunks are recalled. The list of usages is complete after the block.
    """
    usages: list[dict[str, Any]] = []
    done = threading.Event()

    def client(seeds: tuple[int, int]) -> None:
        documents = ["".join(chr(97 + (seed * i * i + i) % 26) for i in range(1400)) for seed in seeds]
        for number in itertools.count():
            usages.append(ask(server, f"{documents[number % 2]} question {number}?"))
            if done.wait(0.2):
                return

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(client, seeds) for seeds in ((3, 7), (11, 17))]
        try:
            yield usages
        finally:
            done.set()
    for one in clients:
        one.result()


@needs_prometheus
def test_every_query_has_data_and_no_rule_fails(server: Any, prometheus: Prometheus) -> None:
    prometheus.wait_for('count by (job) (up{job="forecache"} == 1)', 4)  # ingress, worker, tier, indexer
    prometheus.wait_for("model:forecache_workers:count", 1)
    assert server.post("/v1/completions", {"model": "other", "prompt": "x"}).status_code == 404
    with load(server) as usages:
        wanted, start = queries(), time.monotonic()
        while wanted := {where: query for where, query in wanted.items() if not prometheus.values(query)}:
            assert time.monotonic() - start < DATA_WITHIN_S, f"no data: {list(wanted)}"
            time.sleep(0.5)
    prometheus.wait_for("forecache_requests_finished_total", len(usages))
    prometheus.wait_for_rules()

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


def test_top_shows_what_the_server_does(server: Any) -> None:
    command = [
        sys.executable,
        "-m",
        "forecache.cluster.cli.main",
        "top",
        "--url",
        server.url,
        "--interval-s",
        "1",
        "--once",
    ]
    with load(server) as usages:
        while len(usages) < 2:
            time.sleep(0.1)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    tokens = re.search(r"tokens/s out\s+([\d.]+)", done.stdout)
    assert tokens is not None and float(tokens[1]) > 10, done.stdout
    assert {"worker", "tier", "indexer"} <= rows.keys() and "4 / 4" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines()) and "…" not in done.stdout
    ids = {short(group["labels"]["process"]) for group in server.get("/metrics/targets").json()}
    assert len(ids & rows.keys()) == 3, "a worker, a tier and an indexer, but not the ingress"
    nobody = subprocess.run([*command, "--url", "http://127.0.0.1:1"], capture_output=True, text=True, timeout=60)
    assert nobody.returncode == 2 and "does not answer" in nobody.stderr


def test_top_goes_on_until_it_is_stopped(server: Any) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "forecache.cluster.cli.main", "top", "--url", server.url, "--interval-s", "0.2"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        try:
            start, shown = time.monotonic(), b""
            while shown.count(b"tokens/s out") < 3:
                assert time.monotonic() - start < DATA_WITHIN_S, shown
                shown += os.read(ours, 65536)
            process.send_signal(signal.SIGINT)
            assert process.wait(STOP_S) == 130
        finally:
            process.kill()
            os.close(ours)


def test_a_trace_follows_a_request_to_the_tier(server: Any, collector: Collector) -> None:
    trace_id, above = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    body = {"model": "bytes", "prompt": "trace " * 40, "max_tokens": 5, "ignore_eos": True, "stream": True}
    with server.stream("/v1/completions", body, headers={"traceparent": f"00-{trace_id}-{above}-01"}) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data:")]
    request_id = json.loads(lines[0].removeprefix("data:"))["id"]
    found = collector.trace(trace_id, 3)
    names = ("POST /v1/completions", "worker.generate", "tier.hold_prefix")
    services = ("forecache-ingress", "forecache-worker", "forecache-tier")
    assert tuple(found[name][0] for name in names) == services
    parents = [found[name][1].parent_span_id.hex() for name in names]
    assert parents == [above, *(found[name][1].span_id.hex() for name in names[:2])]
    for name in names:
        told = {one.key: one.value for one in found[name][1].attributes}
        assert told["request_id"].string_value == request_id
        assert found[name][1].end_time_unix_nano > found[name][1].start_time_unix_nano
    worker = {one.key: one.value for one in found["worker.generate"][1].attributes}
    assert worker["completion_tokens"].int_value == 5 and worker["finish_reason"].string_value == "length"
    assert [event.name for event in found[names[0]][1].events] == ["first token"]


def test_logs_name_the_request_in_every_process(server: Any) -> None:
    answer = server.post("/v1/completions", {"model": "bytes", "prompt": "log " * 40, "max_tokens": 3}).json()
    refused = server.post("/v1/completions", {"model": "bytes", "prompt": "x", "max_tokens": -1})
    assert refused.status_code == 400
    [session] = {
        found[1]
        for line in processes_below(server.process.pid).values()
        if (found := re.search(r"--session_dir=(\S+)", line))
    }
    lines: list[dict[str, Any]] = []
    start = time.monotonic()
    while {"ingress", "worker", "tier"} - {line["component"] for line in lines if of_request(line, answer["id"])}:
        assert time.monotonic() - start < DATA_WITHIN_S, lines
        time.sleep(0.2)
        files = Path(session, "logs").glob("worker-*.err")
        text = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        lines = [json.loads(line) for line in text if line.startswith('{"time"')]
    messages = {line["message"]: line for line in lines if of_request(line, answer["id"])}
    assert messages.keys() == {"request came", "prefix looked up", "request done", "request ended"}
    usage = answer["usage"]
    assert messages["request ended"]["completion_tokens"] == usage["completion_tokens"]
    assert messages["request done"]["prompt_tokens"] == usage["prompt_tokens"] == 160
    assert any(line["message"] == "request refused" and line["status"] == 400 for line in lines)
    assert all(datetime.fromisoformat(line["time"]).tzinfo is UTC for line in lines)


def of_request(line: dict[str, Any], request_id: str) -> bool:
    return line.get("request_id") == request_id

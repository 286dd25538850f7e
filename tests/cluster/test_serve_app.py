"""The Serve config of the Kubernetes manifests, through `serve run`: it answers, and every node gets a memory tier."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

if TYPE_CHECKING:
    from tests.conftest import RedisServer

ROOT = Path(__file__).resolve().parents[2]
START_S, STOP_S = 180.0, 60.0


def serve_config(settings: Path, port: int) -> dict[str, object]:
    """The Serve config of the overlay, with another port and test settings."""
    manifest = yaml.safe_load((ROOT / "deploy/multi-node/rayservice.yaml").read_text(encoding="utf-8"))
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    [application] = config["applications"]
    application["args"]["config"] = [str(settings)]
    return dict(config)


@pytest.mark.cluster
def test_the_manifests_serve_config_serves(
    byte_model: Path, tmp_path: Path, redis_server: "RedisServer", two_nodes: Any
) -> None:
    settings, file = tmp_path / "settings.yaml", tmp_path / "serve.yaml"
    settings.write_text(
        yaml.safe_dump({
            "redis_url": redis_server.url,
            "engine": {"model": str(byte_model), "device": "cpu", "threads": 1, "hot_bytes": "8MiB"},
            "memory": {"arena_dir": str(tmp_path), "cold_bytes": "128MiB"},
        })
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file.write_text(yaml.safe_dump(serve_config(settings, port)))
    url = f"http://127.0.0.1:{port}"
    log = (tmp_path / "serve.log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "ray.serve.scripts", "run", "--address", two_nodes.address, str(file)],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until_ready(url, process, log.name)
        answer = httpx.post(
            f"{url}/v1/completions", json={"model": "bytes", "prompt": "a" * 100, "max_tokens": 8}, timeout=60
        )
        assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == 100, answer.text
        assert httpx.get(f"{url}/health", timeout=30).json() == {"status": "ok"}
        # the worker made its own node's tier; the other node's is the supervisor's doing
        end_s = time.monotonic() + 60
        while len(list(tmp_path.glob("forecache-*-tier-*"))) < 2:
            assert time.monotonic() < end_s, "the node without a worker has no memory tier"
            time.sleep(0.2)
        check_metrics(url)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        finally:
            process.kill()
            log.close()


def check_metrics(url: str) -> None:
    """Every process of both nodes is listed, and serves its series."""
    listed = httpx.get(f"{url}/metrics/targets", timeout=30).json()
    components = [group["labels"]["component"] for group in listed]
    assert components == ["indexer", "ingress", "ingress", "tier", "tier", "worker"]
    assert len({group["labels"]["node"] for group in listed if group["labels"]["component"] == "tier"}) == 2
    for group in listed:
        [address] = group["targets"]
        assert "forecache_build_info" in httpx.get(f"http://{address}/metrics", timeout=30).text
    assert httpx.get(f"{url}/metrics/cluster", timeout=30).text.count("\nforecache_memory_tier_usage_perc{") == 2


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: str) -> None:
    end_s = time.monotonic() + START_S
    while True:
        try:
            if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass  # the server does not listen yet
        assert process.poll() is None and time.monotonic() < end_s, Path(log).read_text()
        time.sleep(0.5)

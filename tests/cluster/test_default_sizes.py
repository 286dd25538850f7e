"""A server that is given no sizes chooses them, and says what it chose."""

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from forecache.cluster.config import ServeConfig
from forecache.workers.models.backbone import load_config
from tests.cluster.conftest import START_S, STOP_S

pytestmark = pytest.mark.cluster
SIZES = (
    r"sizes: hot pool [\d.]+ GiB \((\d+) tokens\), cold memory [\d.]+ GiB per node \((\d+) tokens\), "
    r"batches of up to 16"
)


def test_two_workers_without_any_size(byte_model: Path, tmp_path: Path) -> None:
    """The sizes hold two batches of the model's longest contexts, for each worker and in the memory that both share."""
    config = ServeConfig()
    assert (config.engine.hot_bytes, config.memory.cold_bytes, config.engine.max_batch_size) == ("auto", "auto", "auto")
    command = [sys.executable, "-m", "forecache.cluster.cli.main", "serve", "--model", str(byte_model), "--port", "0"]
    command += ["--workers", "2", "--threads", "1", "--start-deadline-s", str(START_S)]
    with (tmp_path / "stderr").open("w+") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            assert process.stdout is not None
            lines = iter(process.stdout)
            ready = next((match for line in lines if (match := re.search(r"(http://\S+)/v1", line))), None)
            said = (tmp_path / "stderr").read_text(encoding="utf-8")
            assert ready is not None, said
            found = re.findall(SIZES, said)
            assert len(found) == 1, "both workers chose the same"
            [(hot_tokens, cold_tokens)] = found
            longest = load_config(byte_model).max_position_embeddings
            assert int(hot_tokens) >= 2 * 16 * longest
            assert int(cold_tokens) >= longest
            body = {"model": "bytes", "prompt": "x" * 500, "max_tokens": 4}
            answer = httpx.post(f"{ready[1]}/v1/completions", json=body, timeout=60, trust_env=False)
            assert answer.status_code == 200
            page = httpx.get(f"{ready[1]}/metrics/cluster", timeout=60, trust_env=False).text
            assert len(re.findall(r"^forecache_hot_pool_usage_perc", page, re.MULTILINE)) == 2
            assert len(re.findall(r"^forecache_memory_tier_usage_perc", page, re.MULTILINE)) == 1
        finally:
            process.terminate()
            assert process.wait(STOP_S) == 0

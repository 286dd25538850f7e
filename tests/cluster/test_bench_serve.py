"""`forecache bench serve` against a real server: its counts equal the server's metrics."""

import json
from pathlib import Path
from typing import Any

import pytest

from forecache.cluster.cli import main as cli

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def server(plain_server: Any) -> Any:
    return plain_server


@pytest.mark.parametrize(
    ("flags", "requests", "hits", "first_prompt"),
    [
        (("--workload", "unique", "--rate", "20"), 8, False, (200, 450)),
        (("--workload", "shared-prefix", "--prefixes", "1", "--concurrency", "1"), 8, True, (200, 450)),
        (("--workload", "multi-turn", "--turns", "3", "--concurrency", "2"), 24, True, (200, 450)),
        (
            ("--workload", "agentic", "--turns", "3", "--system-tokens", "200", "--pause-s", "0.01"),
            24,
            True,
            (400, 650),
        ),
        (("--workload", "mixed", "--document-tokens", "800", "--rate", "20"), 8, False, (200, 900)),
    ],
)
def test_a_run_of_each_workload(
    server: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    requests: int,
    hits: bool,
    first_prompt: tuple[int, int],
) -> None:
    names = ("forecache_requests_finished_total", "forecache_prompt_tokens_total", "forecache_generation_tokens_total")
    before = [server.metric(name) for name in names]
    sizes = ("--conversations", "8", "--input-tokens", "300", "--question-tokens", "40", "--output-tokens", "6")
    command = ["bench", "serve", "--model", "bytes", "--url", f"{server.url}/v1", "--out", str(tmp_path), *sizes]
    assert cli.main([*command, *flags, "--seed", str(len(flags))]) == 0
    told = json.loads((tmp_path / "serve.json").read_text())
    summary, seen = told["summary"], told["requests"]
    assert (summary["requests"], summary["answered"], summary["failed"]) == (requests, requests, 0)
    grown = [server.metric(name) - value for name, value in zip(names, before, strict=True)]
    prompt = sum(one["prompt_tokens"] for one in seen)
    assert grown == [requests, prompt, 6 * requests]
    first_turns = [one["prompt_tokens"] for one in seen if one["turn"] == 0]
    assert all(first_prompt[0] < tokens < first_prompt[1] for tokens in first_turns)
    assert (summary["prefix_hit_ratio"] > 0.3) if hits else (summary["prefix_hit_ratio"] < 0.1)
    assert summary["prompt_tokens"] == prompt and summary["completion_tokens"] == 6 * requests
    assert 0 < summary["time_to_first_token_s"]["p50"] <= summary["end_to_end_s"]["p50"]
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")
    assert "time to first token" in capsys.readouterr().out


def test_a_name_that_is_not_served(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "serve", "--model", "other", "--url", f"{server.url}/v1"]) == 2
    assert "404" in capsys.readouterr().err

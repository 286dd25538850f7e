"""The load tool's arithmetic: workloads, percentiles, goodput, and whom it may ask."""

import json
import math
from pathlib import Path

import pytest

from forecache.cluster.cli import main as cli
from forecache.cluster.cli.load_test import (
    Answered,
    LoadError,
    Slo,
    WorkloadSettings,
    as_json,
    check_loopback,
    conversations,
    plot,
    summarize,
)

SLO = Slo(first_token_s=1.0, inter_token_s=0.1)


def answered(due_s: float, first_s: float, gap_s: float, tokens: int = 5, **more: object) -> Answered:
    times = [due_s + first_s + i * gap_s for i in range(tokens)]
    return Answered(
        due_s, 0, 200, times[-1], times, "x", prompt_tokens=100, cached_tokens=40, completion_tokens=tokens,
        keep_ratio=0.5, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def test_figures_of_a_run() -> None:
    answers = [
        answered(10.0, 0.5, 0.05),
        answered(11.0, 2.0, 0.05),  # too late
        answered(12.0, 0.5, 0.2),  # too slow
        Answered(13.0, 0, 429, 13.02, error="full"),
        Answered(14.0, 0, 0, 20.0, error="ConnectError"),
        Answered(14.0, 0, 200, 15.0, [14.5], error="broke off"),
    ]
    summary = summarize(answers, SLO)
    assert (summary.requests, summary.answered, summary.refused, summary.failed) == (6, 3, 1, 2)
    assert summary.duration_s == 10 and summary.requests_per_s == 0.3 and summary.output_tokens_per_s == 1.5
    assert summary.goodput_per_s == pytest.approx(0.1) and summary.slo_met == pytest.approx(1 / 6)
    assert summary.time_to_first_token_s["p50"] == pytest.approx(0.5)
    assert summary.inter_token_s["p50"] == pytest.approx(0.05) and summary.inter_token_s["p99"] == pytest.approx(0.2)
    assert summary.refusal_s["p99"] == pytest.approx(0.02)
    assert summary.keep_ratio == 0.5 and summary.prefix_hit_ratio == 0.4


def test_a_run_without_answers_is_told_too(tmp_path: Path) -> None:
    answers = [Answered(1.0, 0, 503, 2.0, error="draining")]
    summary = summarize(answers, SLO)
    assert summary.answered == 0 and summary.time_to_first_token_s == {} and math.isnan(summary.keep_ratio)
    told = json.loads(json.dumps(as_json(summary, {"rate": 1}, answers), allow_nan=False))
    assert told["summary"]["keep_ratio"] is None and told["requests"][0]["status"] == 503
    plot(tmp_path / "p.png", answers, SLO)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert summarize([], SLO).requests == 0


@pytest.mark.parametrize("workload", ["unique", "shared-prefix", "multi-turn"])
def test_workloads_are_the_same_again_and_what_they_say(workload: str) -> None:
    settings = WorkloadSettings(workload, input_tokens=200, question_tokens=20, prefixes=3, turns=4, seed=5)  # type: ignore[arg-type]
    asked = conversations(12, settings, words_per_token=0.5)
    assert asked == conversations(12, settings, words_per_token=0.5)
    beginnings = {conversation.turns[0][:60] for conversation in asked}
    assert len(beginnings) == (3 if workload == "shared-prefix" else 12)
    assert len({conversation.turns for conversation in asked}) == 12
    assert {len(conversation.turns) for conversation in asked} == {4 if workload == "multi-turn" else 1}
    words = len(asked[0].turns[0].split())
    assert words == (110 if workload == "shared-prefix" else 100)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:9/v1"])
def test_this_machine_may_be_asked(url: str) -> None:
    check_loopback(url)


@pytest.mark.parametrize("url", ["http://192.0.2.1:8000/v1", "http://10.0.0.5/v1", "ftp://127.0.0.1", "nonsense"])
def test_others_only_when_told_so(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LoadError):
        check_loopback(url)
    assert cli.main(["bench", "serve", "--model", "m", "--url", url]) == 2
    assert capsys.readouterr().err.startswith("forecache: ")

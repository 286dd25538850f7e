"""The load test's arithmetic (workloads, percentiles, goodput), and which servers it accepts."""

import json
import math
import random
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, pairwise
from pathlib import Path

import pytest

from forecache.cluster.cli import main as cli
from forecache.cluster.cli.load_test import (
    Answered,
    LoadError,
    Slo,
    as_json,
    check_loopback,
    plot,
    summarize,
)
from forecache.cluster.cli.load_workloads import WorkloadSettings, conversations, mixed_sizes, poisson_arrivals_s

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
    assert (summary.prompt_tokens, summary.cached_tokens, summary.completion_tokens) == (300, 120, 15)
    assert summary.errors == {"full": 1, "ConnectError": 1, "broke off": 1} and set(summary.by_kind) == {"request"}


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


def test_agentic_sessions_share_a_system_prompt_and_grow_by_short_results_of_tools() -> None:
    settings = WorkloadSettings("agentic", input_tokens=200, question_tokens=20, turns=5, system_tokens=300, pause_s=2)
    asked = conversations(200, settings, words_per_token=0.5)
    assert asked == conversations(200, settings, words_per_token=0.5)
    (system,) = {conversation.system for conversation in asked}
    assert len(system.split()) == 150
    assert len({conversation.turns[0] for conversation in asked}) == len(asked)
    results = [json.loads(turn) for conversation in asked for turn in conversation.turns[1:]]
    words = [len(result["result"].split()) for result in results]
    assert len(results) == 800 and min(words) >= 5 and max(words) <= 15
    assert sum(words) / len(words) == pytest.approx(10, rel=0.05)
    assert {conversation.kind_of_turn(0) for conversation in asked} == {"first turn"}
    assert asked[0].kind_of_turn(1) == asked[0].kind_of_turn(4) == "later turns"
    pauses_s = [pause for conversation in asked for pause in conversation.pauses_s]
    assert len(pauses_s) == 800 and sum(pauses_s) / 800 == pytest.approx(2, rel=0.15)


def test_mixed_is_short_chats_and_long_documents() -> None:
    settings = WorkloadSettings("mixed", input_tokens=20, document_tokens=320, document_share=0.25, seed=3)
    asked = conversations(40, settings, words_per_token=1.0)
    assert len({conversation.turns for conversation in asked}) == 40
    assert Counter(conversation.kind_of_turn(0) for conversation in asked) == {"chat": 30, "document": 10}
    for conversation in asked:
        words = len(conversation.turns[0].split())
        assert 20 <= words <= 40 if conversation.kind == "chat" else 160 <= words <= 320
    kinds = [kind for kind, _ in mixed_sizes(40, 20, 320, 0.25, random.Random(3))]
    assert kinds != sorted(kinds)
    assert mixed_sizes(3, 64, 32, 1.0, random.Random(0))[0][0] == "document"
    assert all(tokens == 32 for _, tokens in mixed_sizes(3, 64, 32, 0.0, random.Random(0)))


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    at_s = list(islice(poisson_arrivals_s(4.0, seed=1), 4000))
    gaps = [b - a for a, b in pairwise([0.0, *at_s])]
    assert min(gaps) > 0
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.05)
    # an exponential's deviation is its mean, and it exceeds it with probability 1/e
    assert math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) == pytest.approx(mean, rel=0.1)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, abs=0.03)
    assert list(islice(poisson_arrivals_s(8.0, seed=1), 4000)) == pytest.approx([at / 2 for at in at_s])


class OtherServer(BaseHTTPRequestHandler):
    """A server of OpenAI's API without forecache's extensions; a token is a word."""

    counts_tokens = True
    bodies: list[dict[str, object]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize" and self.counts_tokens:
            self.answer("application/json", json.dumps({"count": len(body["prompt"].split())}))
        elif self.path == "/v1/chat/completions":
            self.bodies.append(body)
            prompt = sum(len(message["content"].split()) for message in body["messages"])
            usage = {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"], "prompt_tokens_details": None}
            if not body.get("stream"):
                self.answer("application/json", json.dumps({"choices": [], "usage": usage}))
                return
            word = {"choices": [{"delta": {"content": "word "}}]}
            events = [*[word] * body["max_tokens"], {"choices": [], "usage": usage}]
            text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
            self.answer("text/event-stream", text + "data: [DONE]\n\n")
        else:
            self.send_error(404)

    def answer(self, media_type: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", media_type)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["tokenize", "usage"])
def other_server(request: pytest.FixtureRequest) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """The URL of another server, with and without an endpoint that counts tokens, and the requests it got."""
    bodies: list[dict[str, object]] = []
    handler = type("Handler", (OtherServer,), {"counts_tokens": request.param, "bodies": bodies})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_servers_that_are_not_forecache_are_measured(
    other_server: tuple[str, list[dict[str, object]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, bodies = other_server
    command = ["bench", "serve", "--model", "m", "--url", url, "--out", str(tmp_path), "--stop-at-eos"]
    sizes = ["--input-tokens", "50", "--question-tokens", "20", "--system-tokens", "30", "--output-tokens", "5"]
    agentic = ["--workload", "agentic", "--conversations", "3", "--turns", "4"]
    assert cli.main([*command, *sizes, *agentic]) == 0
    out = capsys.readouterr().out
    told = json.loads(out.splitlines()[-1])
    assert told == {"workload": "agentic", **json.loads((tmp_path / "serve.json").read_text())["summary"]}
    assert (told["requests"], told["answered"], told["errors"]) == (12, 12, {})
    assert told["completion_tokens"] == 60 and told["cached_tokens"] is None and told["keep_ratio"] is None
    assert set(told["by_kind"]) == {"first turn", "later turns"}
    assert all(set(told["by_kind"][kind]["time_to_first_token_s"]) == {"p50", "p90", "p99"} for kind in told["by_kind"])
    assert "not reported" in out and "later turns, first token" in out
    asked = [body for body in bodies if body.get("stream")]
    assert len(asked) == 12 and not any("ignore_eos" in body or "forecache" in body for body in asked)
    lengths = Counter(len(body["messages"]) for body in asked)  # type: ignore[arg-type]
    assert lengths == {2: 3, 4: 3, 6: 3, 8: 3}
    assert len({str(body["messages"][0]) for body in asked}) == 1  # type: ignore[index]
    assert told["prompt_tokens"] == pytest.approx(3 * (4 * 30 + 4 * 50 + 6 * 20 + 6 * 5), rel=0.2)


def test_mixed_arrives_at_a_rate_and_names_its_kinds(
    other_server: tuple[str, list[dict[str, object]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, bodies = other_server
    command = ["bench", "serve", "--model", "m", "--url", url, "--workload", "mixed", "--out", str(tmp_path)]
    sizes = ["--input-tokens", "20", "--document-tokens", "200", "--conversations", "8", "--output-tokens", "3"]
    assert cli.main([*command, *sizes, "--rate", "40", "--seed", "2"]) == 0
    told = json.loads((tmp_path / "serve.json").read_text())
    assert told["settings"]["rate"] == 40 and told["settings"]["concurrency"] is None
    assert set(told["summary"]["by_kind"]) == {"chat", "document"}
    assert all(body["ignore_eos"] is True for body in bodies if body.get("stream"))
    due_s = sorted(one["due_s"] for one in told["requests"])
    arrivals = list(islice(poisson_arrivals_s(40, seed=2), 8))
    assert due_s == pytest.approx([at - arrivals[0] for at in arrivals], abs=1e-6)
    for one in told["requests"]:
        assert one["prompt_tokens"] >= 90 if one["kind"] == "document" else one["prompt_tokens"] <= 45
    assert "document, first token" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:9/v1"])
def test_this_machine_may_be_asked(url: str) -> None:
    check_loopback(url)


@pytest.mark.parametrize("url", ["http://192.0.2.1:8000/v1", "http://10.0.0.5/v1", "ftp://127.0.0.1", "nonsense"])
def test_others_only_when_told_so(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LoadError):
        check_loopback(url)
    assert cli.main(["bench", "serve", "--model", "m", "--url", url]) == 2
    assert capsys.readouterr().err.startswith("forecache: ")

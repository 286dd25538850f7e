"""`forecache serve` through its HTTP API, with a tiny random model in a whole cluster."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from processes import processes_below, still_running
from tokenizers import pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM

from forecache.workers.residency.window import PROBE_TOKENS

pytestmark = pytest.mark.cluster

MODEL = "bytes"
MAX_MODEL_LEN = 8192
CHUNK_TOKENS = 16
START_S = 180.0
STOP_S = 60.0


@pytest.fixture(scope="module")
def server(plain_server: Any) -> Any:
    return plain_server


@pytest.fixture
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat_body(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object of a response, checked against OpenAI's format."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def test_health_readiness_and_models(server: Any, client: openai.OpenAI) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready", "workers": 1, "scorer": "bounds"}
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**chat_body(temperature=0))
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 4
    assert answer.usage.prompt_tokens == len("<user>hello<assistant>")
    context = answer.usage.model_extra["forecache"]
    assert context["context_chunks"] == 2 and context["context_bytes"] >= context["resident_bytes"] > 0


def test_a_stream_says_what_the_answer_at_once_says(client: openai.OpenAI) -> None:
    body = chat_body("the same twice", temperature=0.8, seed=5, max_tokens=12)
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]].count("length") == 1
    assert not chunks[-1].choices and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions(client: openai.OpenAI) -> None:
    by_text = client.completions.create(model=MODEL, prompt="abc", max_tokens=5, temperature=0)
    ids = [1 + sorted(pre_tokenizers.ByteLevel.alphabet()).index(letter) for letter in "abc"]
    by_ids = client.completions.create(model=MODEL, prompt=ids, max_tokens=5, temperature=0)
    assert by_text.choices[0].text == by_ids.choices[0].text
    assert by_text.usage is not None and by_text.usage.prompt_tokens == 3
    pieces = [
        chunk.choices[0].text
        for chunk in client.completions.create(model=MODEL, prompt="abc", max_tokens=5, temperature=0, stream=True)
    ]
    assert "".join(pieces) == by_text.choices[0].text


def test_a_stream_tells_of_its_prefill_in_comments(server: Any) -> None:
    body = chat_body("x" * 3000, stream=True)
    with server.stream("/v1/chat/completions", body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    told = [match for line in lines if (match := re.fullmatch(r": prefill (\d+)/(\d+)", line))]
    done = [int(match[1]) for match in told]
    assert done and done == sorted(done) and {int(match[2]) for match in told} == {3000 + len("<user><assistant>")}
    assert lines[-1] == "data: [DONE]"


def test_an_equal_beginning_is_not_prefilled_again(client: openai.OpenAI) -> None:
    def cached_tokens(**options: Any) -> int | None:
        body = chat_body("a common beginning " * 20)
        usage = client.chat.completions.create(**body, extra_body={"forecache": options}).usage
        assert usage is not None and usage.prompt_tokens == prompt_tokens and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens

    prompt_tokens = len("<user><assistant>") + 20 * len("a common beginning ")
    assert cached_tokens() == 0
    deadline = time.monotonic() + 30  # chunks reach the memory tier in the background
    # all but the last tokens, which choose the first resident set
    while cached_tokens() != (prompt_tokens - PROBE_TOKENS) // CHUNK_TOKENS * CHUNK_TOKENS:
        assert time.monotonic() < deadline
    assert cached_tokens(cache_salt="mine") == 0


def test_a_session_is_pinned_told_of_and_deleted(server: Any) -> None:
    name = "users/7/a trip"  # ids are what clients make them
    path = f"/v1/sessions/{name}"
    for method in ("GET", "POST", "DELETE"):
        missing = server.http.request(method, path)
        assert missing.status_code == 404 and error_of(missing)["code"] == "session_not_found"
    body = chat_body("what a session says " * 20, forecache={"session_id": name})
    chunks = server.post("/v1/chat/completions", body).json()["usage"]["forecache"]["context_chunks"] - 1
    session = server.stored_session(name, chunks)
    assert (session["chunks"], session["tokens"], session["pinned_until"]) == (chunks, chunks * CHUNK_TOKENS, None)
    assert list(session["tiers"].values()) == [chunks]
    pinned = server.post(path, {"ttl_s": 60}).json()
    assert 50 < pinned["pinned_until"] - time.time() <= 60
    server.wait_for_metric("forecache_memory_tier_pinned_slots", chunks, within_s=10)
    assert server.post(path, {"ttl_s": -1}).status_code == 400
    assert server.post(path, {"ttl_s": 0.5}).status_code == 200
    server.wait_for_metric("forecache_memory_tier_pinned_slots", 0, within_s=10)
    assert server.http.delete(path).json()["deleted"] is True
    assert server.get(path).status_code == 404


@pytest.mark.parametrize("policy", ["full", "lookahead", "recency", "random"])
def test_every_policy_answers(client: openai.OpenAI, policy: str) -> None:
    options = {"ignore_eos": True, "forecache": {"policy": policy, "keep_ratio": 0.2}}
    answer = client.chat.completions.create(**chat_body("word " * 400, max_tokens=20), extra_body=options)
    assert answer.usage is not None
    context = answer.usage.model_extra["forecache"]
    assert answer.usage.completion_tokens == 20
    assert context["context_chunks"] >= 125
    assert (context["keep_ratio"] == 1) if policy == "full" else (context["keep_ratio"] < 0.5)


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"messages": []}, 400, "messages", "invalid_value"),
        ({"model": "gpt-9"}, 404, "model", "model_not_found"),
        ({"temperature": -1}, 400, "temperature", "invalid_value"),
        ({"temperature": 1e9}, 400, "temperature", "invalid_value"),
        ({"top_p": 0}, 400, "top_p", "invalid_value"),
        ({"top_k": -5}, 400, "top_k", "invalid_value"),
        ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({"max_tokens": -1}, 400, "max_tokens", "invalid_value"),
        ({"n": 0}, 400, "n", "invalid_value"),
        ({"nonsense": 1}, 400, "nonsense", "unknown_parameter"),
        ({"forecache": {"keep_ratio": 2}}, 400, "forecache.keep_ratio", "invalid_value"),
        ({"max_tokens": MAX_MODEL_LEN}, 400, "messages", "context_length_exceeded"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(server: Any, fields: dict[str, Any], status: int, param: str, code: str, stream: bool) -> None:
    response = server.post("/v1/chat/completions", {**chat_body(), "stream": stream, **fields})
    error = error_of(response)
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"


def test_a_text_far_over_the_context_is_refused_before_it_is_all_tokenized(server: Any) -> None:
    response = server.post("/v1/chat/completions", chat_body("x" * 50 * MAX_MODEL_LEN))
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert f"{MAX_MODEL_LEN} tokens" in error["message"] and "the messages alone hold more" in error["message"]


def test_a_context_that_is_too_long_is_told_with_both_numbers(server: Any) -> None:
    response = server.post("/v1/chat/completions", chat_body("x" * MAX_MODEL_LEN))
    message = error_of(response)["message"]
    asked = MAX_MODEL_LEN + len("<user><assistant>") + 4
    assert response.status_code == 400 and str(MAX_MODEL_LEN) in message and str(asked) in message


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"model": "bytes", "messages": [', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"model": "bytes", "max_tokens": NaN}', "not valid JSON"),
        (b'{"model": "bytes", "messages": [{"role": "user", "content": "\xff\xfe"}]}', "not valid UTF-8"),
        (b'{"model": "bytes", "messages": [{"role": "user", "content": "\\ud800"}]}', "not valid Unicode"),
        (b"[1, 2]", "JSON object"),
    ],
)
def test_bad_bodies(server: Any, content: bytes, sentence: str) -> None:
    response = server.http.post("/v1/chat/completions", content=content)
    assert response.status_code == 400 and sentence in error_of(response)["message"]


def test_wrong_paths_and_methods(server: Any) -> None:
    missing = server.get("/v1/embeddings")
    assert missing.status_code == 404 and error_of(missing)["code"] == "unknown_url"
    wrong = server.get("/v1/chat/completions")
    assert wrong.status_code == 405 and error_of(wrong)["code"] == "method_not_allowed"
    unknown = server.get("/v1/models/nobody")
    assert unknown.status_code == 404 and error_of(unknown)["code"] == "model_not_found"


def test_errors_are_counted_and_harm_nobody(server: Any, client: openai.OpenAI) -> None:
    # before a first error there is no series
    assert server.post("/v1/chat/completions", chat_body(max_tokens=0)).status_code == 400
    before = server.metric("forecache_errors_total")
    stream = client.chat.completions.create(**chat_body(max_tokens=200, temperature=0), stream=True)
    next(iter(stream))
    for _ in range(3):
        assert server.post("/v1/chat/completions", chat_body(max_tokens=0)).status_code == 400
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
    assert server.metric("forecache_errors_total") == before + 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slots(server: Any, stream: bool) -> None:
    server.wait_for_metric("forecache_num_requests_running", 0, within_s=30)
    cancelled = server.metric("forecache_requests_cancelled_total")
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    body = chat_body("x" * 2000, max_tokens=6000, stream=stream, ignore_eos=True)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    server.wait_for_metric("forecache_num_requests_running", 1, within_s=30)
    assert server.metric("forecache_hot_pool_usage_perc") > 0
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    server.wait_for_metric("forecache_num_requests_running", 0, within_s=1)
    assert server.metric("forecache_hot_pool_usage_perc") == 0
    server.wait_for_metric("forecache_memory_tier_held_perc", 0, within_s=10)
    assert server.metric("forecache_requests_cancelled_total") == cancelled + 1


def test_metrics_count_what_the_client_counts(server: Any, client: openai.OpenAI) -> None:
    names = ("forecache_prompt_tokens_total", "forecache_generation_tokens_total", "forecache_requests_finished_total")
    before = [server.metric(name) for name in names]
    first_tokens = server.metric("forecache_time_to_first_token_seconds_count")
    usage = client.chat.completions.create(**chat_body("count me", max_tokens=9, temperature=0)).usage
    assert usage is not None
    after = [server.metric(name) for name in names]
    grown = [b - a for a, b in zip(before, after, strict=True)]
    assert grown == [usage.prompt_tokens, usage.completion_tokens, 1]
    assert server.metric("forecache_time_to_first_token_seconds_count") == first_tokens + 1


@pytest.mark.parametrize(
    ("flags", "sentences"),
    [
        (("--redis-url", "redis://127.0.0.1:1"), ["no Redis answers at redis://127.0.0.1:1", "--redis-url"]),
        (("--cold-bytes", "1TiB"), ["too small", str(2**40), "--cold-bytes"]),
        (("--model", "/nowhere/at/all"), ["/nowhere/at/all"]),
        (("--keep-ratio", "0"), ["--keep-ratio", "greater than 0"]),
    ],
)
def test_what_cannot_work_is_said_at_start(
    byte_model: Path, serve_command: Any, tmp_path: Path, flags: tuple[str, ...], sentences: list[str]
) -> None:
    ended = subprocess.run(serve_command(byte_model, tmp_path, *flags), capture_output=True, text=True, timeout=START_S)
    assert ended.returncode == 2
    said = ended.stderr.strip().splitlines()[-1]
    assert said.startswith("forecache: ") and all(sentence in said for sentence in sentences)
    assert "Traceback" not in ended.stderr
    assert not list(tmp_path.glob("forecache-*"))


def test_a_model_that_is_no_decoder_is_refused(serve_command: Any, tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    ended = subprocess.run(serve_command(tmp_path / "bert", tmp_path), capture_output=True, text=True, timeout=START_S)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "decoder" in ended.stderr.strip().splitlines()[-1]


def test_a_model_whose_logits_are_not_what_we_compute_is_refused(
    byte_model: Path, serve_command: Any, tmp_path: Path
) -> None:
    broken = LlamaForCausalLM.from_pretrained(byte_model)
    broken.model.norm.weight.data.fill_(float("nan"))
    shutil.copytree(byte_model, tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken")
    ended = subprocess.run(
        serve_command(tmp_path / "broken", tmp_path), capture_output=True, text=True, timeout=START_S
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "differ from the model's own" in ended.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.glob("forecache-*"))


def test_a_port_that_is_taken(byte_model: Path, serve_command: Any, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            serve_command(byte_model, tmp_path, "--port", port), capture_output=True, text=True, timeout=START_S
        )
    assert ended.returncode == 2 and f"127.0.0.1:{port}" in ended.stderr and "--port" in ended.stderr


def test_a_signal_to_the_whole_group_during_the_start_leaves_nothing(
    byte_model: Path, serve_command: Any, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        serve_command(byte_model, tmp_path), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "loading the model" in line:
            break
    processes = processes_below(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    process.stderr.read()
    assert process.wait(STOP_S) == 0
    assert not still_running(processes)
    assert not list(tmp_path.glob("forecache-*"))


SWALLOWED = """
import os, signal, sys
from contextlib import suppress
from pathlib import Path

from forecache.cluster.config import ServeConfig
from forecache.cluster.launch.cluster import Stopped, run
from forecache.workers.core.config import EngineConfig
from forecache.workers.memory.config import MemoryConfig


def say(text):
    if text == "loading the model":
        print(text)
        with suppress(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)


model, arena_dir = sys.argv[1:]
engine = EngineConfig(model=model, threads=1, chunk_tokens=16, hot_bytes=8 << 20)
memory = MemoryConfig(cold_bytes=32 << 20, arena_dir=Path(arena_dir))
run(ServeConfig(engine=engine, memory=memory, port=0), say, lambda running: print("ready"))
print("ended")
"""


def test_a_signal_that_nobody_saw_during_the_start_ends_it_all_the_same(byte_model: Path, tmp_path: Path) -> None:
    """The signal arrives while a callback of a library runs, which drops exceptions."""
    command = [sys.executable, "-c", SWALLOWED, str(byte_model), str(tmp_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=START_S + STOP_S, check=True)
    assert done.stdout.splitlines() == ["loading the model", "ended"]
    assert not list(tmp_path.glob("forecache-*"))


def said(line: str) -> str:
    """The text in one line of a stream of chat chunks. Fails if the line is an error."""
    if not line.startswith("data: {"):
        return ""
    event = json.loads(line.removeprefix("data: "))
    assert "choices" in event, line
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def text_of(stream: Iterable[str]) -> str:
    """The text of a stream of chat chunks, which must end properly."""
    lines = [line for line in stream if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]", lines[-1]
    return "".join(map(said, lines))


def begun(lines: Iterator[str]) -> str:
    """Read a stream up to its first line with text: from then on a worker holds memory for it."""
    line = next(filter(said, lines), None)
    assert line is not None, "the stream ended without text"
    return line


@pytest.fixture(scope="module")
def two_workers(start_server: Any) -> Any:
    """A server with one arena of 768 chunks, 12,288 tokens."""
    return start_server("--workers", "2", "--keep-ratio", "1.0", "--cold-bytes", "8MiB", "--max-pinned-fraction", "1.0")


def test_what_memory_has_no_room_for_is_refused_and_what_runs_goes_on(two_workers: Any) -> None:
    """A pinned session leaves no room for the second answer, even after the first has ended."""
    server, path = two_workers, "/v1/chat/completions"
    kept = chat_body("p" * 7500, forecache={"session_id": "kept"})
    chunks = server.post(path, kept).json()["usage"]["forecache"]["context_chunks"] - 1
    server.stored_session("kept", chunks)
    assert server.post("/v1/sessions/kept", {"ttl_s": 600}).status_code == 200
    server.wait_for_metric("forecache_memory_tier_pinned_slots", chunks, within_s=10)
    with server.stream(path, chat_body("a" * 20, stream=True, max_tokens=1000, ignore_eos=True)) as running:
        lines = running.iter_lines()
        beginning = begun(lines)
        for streamed in (False, True):
            refused = server.post(path, chat_body("c" * 20, max_tokens=5000, ignore_eos=True, stream=streamed))
            assert refused.status_code == 503
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("server_error", "overloaded")
            assert "no room for the 315 chunks" in error["message"] and f"{chunks} are pinned" in error["message"]
            assert "max_tokens" in error["message"]
        # one that fits is let in, and what runs goes on
        assert server.post(path, chat_body("d" * 20)).status_code == 200
        text_of(chain([beginning], lines))
    assert server.http.delete("/v1/sessions/kept").json()["deleted"] is True
    server.wait_for_metric("forecache_num_requests_running", 0, within_s=10)
    server.wait_for_metric("forecache_memory_tier_held_perc", 0, within_s=10)


def test_a_worker_that_is_killed_costs_a_pause(two_workers: Any) -> None:
    """One plain answer and one with a grammar on each worker continue after a failure. Must run last."""
    server = two_workers
    try:
        path = "/v1/chat/completions"
        # different from the first chunk on, so that no worker is preferred for its prefix
        options = {"max_tokens": 2950, "stream": True, "ignore_eos": True, "temperature": 0.8, "seed": 1}
        schema = {"type": "array", "items": {"enum": ["Bern", "Rome"]}, "minItems": 410, "maxItems": 410}
        ruled: dict[str, Any] = {
            "response_format": {"type": "json_schema", "json_schema": {"name": "cities", "schema": schema}}
        }
        blanks = server.post("/v1/tokenize", {"model": MODEL, "prompt": " \n\t\r"}).json()["tokens"]
        ruled["logit_bias"] = {str(token): -100 for token in blanks}  # else noise would fill the answer with them
        bodies = [
            *(chat_body(text * 20, **options, **ruled) for text in "ab"),
            *(chat_body(text * 20, **options) for text in "cd"),
        ]

        def answered(body: dict[str, Any]) -> str:
            with server.stream(path, body) as answer:
                return text_of(answer.iter_lines())

        with ThreadPoolExecutor(len(bodies)) as pool:
            whole = list(pool.map(answered, bodies))
        assert all(set(json.loads(text)) == {"Bern", "Rome"} for text in whole[:2])
        # else one may wait for room, and its worker be taken for full
        server.wait_for_metric("forecache_memory_tier_promised_perc", 0, within_s=30)
        with ExitStack() as streams:
            salt = {"cache_salt": "again"}
            # one after the other, each to the worker that has fewer: with a salt no worker is preferred for its prefix
            answers = [
                streams.enter_context(server.stream(path, {**body, "forecache": salt})).iter_lines() for body in bodies
            ]
            beginnings = [begun(lines) for lines in answers]
            server.kill_worker(of=2)
            assert [text_of(chain([first], rest)) for first, rest in zip(beginnings, answers, strict=True)] == whole
        assert server.metric("forecache_resumed_answers_total") == 2, "each worker had two, and no answer was over"
        # its holds are given back, and another takes its place
        server.wait_for_metric("forecache_memory_tier_held_perc", 0, within_s=30)
        end_s = time.monotonic() + START_S
        while len(server.samples("forecache_num_requests_running")) < 2:
            assert time.monotonic() < end_s, "no worker took the place of the one that was killed"
            time.sleep(0.5)
        assert server.post("/v1/chat/completions", chat_body()).status_code == 200
    finally:
        server.process.terminate()
        server.process.wait(STOP_S)

"""Admission limits, API keys, tenants and deadlines, through a real server."""

import concurrent.futures
import http.client
import json
import random
import signal
import socket
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from forecache.cluster.tenants import new_key

pytestmark = pytest.mark.cluster

MODEL = "bytes"
MAX_QUEUED = 4
KEYS = {name: new_key() for name in ("alpha", "beta", "small")}


@pytest.fixture(scope="module")
def server(start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    limits = {"small": ", max_concurrent: 1, max_resident_bytes: 1MiB"}
    lines = [
        f"- {{key_sha256: {digest}, tenant: {{name: {name}{limits.get(name, '')}}}}}"
        for name, (_, digest) in KEYS.items()
    ]
    file.write_text("\n".join(lines))
    return start_server(
        *("--api-keys-file", str(file), "--max-queued-requests", str(MAX_QUEUED), "--max-batch-size", "2"),
        *("--max-body-bytes", "1MiB", "--max-header-bytes", "4KiB", "--drain-deadline-s", "60"),
    )


def body(content: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}


def ask(server: Any, tenant: str = "alpha", **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEYS[tenant][0]}"}
    response: httpx.Response = server.post("/v1/chat/completions", body(**fields), headers=headers)
    return response


def stream(server: Any, tenant: str = "alpha", **fields: Any) -> Any:
    headers = {"Authorization": f"Bearer {KEYS[tenant][0]}"}
    return server.stream("/v1/chat/completions", body(stream=True, **fields), headers=headers)


def test_only_keys_of_the_file_open_the_door(server: Any) -> None:
    assert ask(server).status_code == 200
    for headers in ({}, {"Authorization": "Bearer fc-none"}, {"Authorization": KEYS["alpha"][0]}):
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/tokenize"):
            refused = server.post(path, body(), headers=headers)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
        assert server.get("/v1/models", headers=headers).status_code == 401
    assert all(server.get(path).status_code == 200 for path in ("/health", "/ready", "/metrics", "/ui"))


def test_long_bodies_and_headers(server: Any) -> None:
    long = ask(server, content="x" * (1 << 20))
    assert long.status_code == 413 and long.json()["error"]["code"] == "request_too_large"
    headers = {"Authorization": f"Bearer {KEYS['alpha'][0]}", "X-Long": "x" * 5000}
    assert server.post("/v1/chat/completions", body(), headers=headers).status_code == 431
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)

    def endless() -> Any:
        for _ in range(64):
            yield b" " * (1 << 16)

    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Authorization", f"Bearer {KEYS['alpha'][0]}")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    try:
        for part in endless():
            connection.send(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        connection.send(b"0\r\n\r\n")
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server need not read on
    else:
        assert connection.getresponse().status == 413
    connection.close()
    assert ask(server).status_code == 200


def test_a_tenant_has_its_share(server: Any) -> None:
    with stream(server, "small", max_tokens=6000, ignore_eos=True) as running:
        lines = running.iter_lines()
        next(lines)
        second = ask(server, "small")
        assert second.status_code == 429 and int(second.headers["retry-after"]) >= 1
        assert ask(server, "alpha").status_code == 200
    server.wait_for_metric("forecache_num_requests_running", 0, within_s=5)
    assert ask(server, "small").status_code == 200
    alone = ask(server, "small", forecache={"policy": "full"}, max_tokens=7000)
    assert alone.status_code == 400 and alone.json()["error"]["param"] == "max_tokens"


def cached_tokens(response: httpx.Response) -> int:
    assert response.status_code == 200
    return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_tenants_share_no_chunk(server: Any) -> None:
    document = "a document of alpha's " * 40
    assert cached_tokens(ask(server, "alpha", content=document)) == 0
    deadline = time.monotonic() + 30  # chunks reach the memory tier in the background
    while not cached_tokens(ask(server, "alpha", content=document)):
        assert time.monotonic() < deadline
    assert cached_tokens(ask(server, "beta", content=document)) == 0
    # nor does a salt that spells the other's name help
    for salt in ("alpha", "alpha\x1f", "\x1f", ""):
        assert cached_tokens(ask(server, "small", content=document, forecache={"cache_salt": salt})) == 0


def test_the_time_to_a_first_token_does_not_tell_what_others_have(server: Any) -> None:
    """Compare times of prompts that another tenant has stored with times of new ones.

    A rank test must find no difference; for the tenant that stored them it must find one.
    """
    generator = random.Random(1)
    prompts = ["".join(generator.choices("abcdefgh ", k=1500)) for _ in range(24)]
    known, unknown = prompts[::2], prompts[1::2]

    def first_token_s(tenant: str, prompt: str) -> float:
        response = ask(server, tenant, content=prompt, max_tokens=1)
        assert response.status_code == 200
        return float(response.json()["usage"]["forecache"]["time_to_first_token_s"])

    for prompt in known:
        first_token_s("alpha", prompt)
    deadline = time.monotonic() + 30
    while not cached_tokens(ask(server, "alpha", content=known[-1])):
        assert time.monotonic() < deadline
    pairs = [(first_token_s("beta", a), first_token_s("beta", b)) for a, b in zip(known, unknown, strict=True)]
    stored, unstored = [a for a, _ in pairs], [b for _, b in pairs]
    own = [first_token_s("alpha", prompt) for prompt in known]
    # Mann-Whitney's U: the share of pairs in which one is quicker; 1/2 where nothing can be told
    share = statistics.mean(float(a < b) for a in stored for b in unstored)
    own_share = statistics.mean(float(a < b) for a in own for b in unstored)
    assert 0.15 < share < 0.85, f"quicker in {share:.2f} of pairs: {stored} {unstored}"
    assert own_share > 0.85


def test_more_than_may_wait_are_told_when_to_come_again(server: Any) -> None:
    def one(number: int) -> tuple[int, int | None, float]:
        start = time.monotonic()
        response = ask(server, content=f"{number} " * 500, max_tokens=60, ignore_eos=True)
        wait = response.headers.get("retry-after")
        return response.status_code, wait and int(wait), time.monotonic() - start

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(one, range(48)))
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= MAX_QUEUED
    assert all((wait is not None and 1 <= wait <= 600) == (status == 429) for status, wait, _ in answers)
    server.wait_for_metric("forecache_num_requests_running", 0, within_s=5)
    assert ask(server).status_code == 200


def test_a_thousand_clients_that_leave_at_random_moments_leave_nothing_behind(server: Any) -> None:
    generator = random.Random(7)
    host, port = server.url.removeprefix("http://").split(":")
    key = KEYS["alpha"][0]

    def leave(number: int) -> None:
        patience_s = number % 50 / 250  # before the body is there, in the queue, in prefill, in mid-stream
        content = json.dumps(body("z" * (number % 7 * 100), max_tokens=200, stream=bool(number % 2), ignore_eos=True))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        request = f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode()
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(request[: len(request) // 2] if number % 10 == 0 else request)
            time.sleep(patience_s)

    numbers = generator.sample(range(1000), 1000)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, numbers))
    server.wait_for_metric("forecache_num_requests_running", 0, within_s=10)
    server.wait_for_metric("forecache_num_requests_waiting", 0, within_s=1)
    assert server.metric("forecache_hot_pool_usage_perc") == 0
    server.wait_for_metric("forecache_memory_tier_held_perc", 0, within_s=10)
    assert 'kind="internal_error"' not in server.get("/metrics").text
    # the queue is empty too: as many as may wait are let in at once
    with concurrent.futures.ThreadPoolExecutor(MAX_QUEUED) as pool:
        answers = list(pool.map(lambda i: ask(server, content=str(i)).status_code, range(MAX_QUEUED)))
    assert answers == [200] * MAX_QUEUED


def test_who_finds_no_place_is_told_so_before_its_body_has_come(server: Any) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['alpha'][0]}\r\n"
    leave = threading.Event()

    both_run = threading.Barrier(3)

    def run(number: int) -> None:
        with stream(server, content=f"{number}", max_tokens=7000, ignore_eos=True) as running:
            lines = running.iter_lines()
            while not next(lines).startswith("data:"):
                pass
            both_run.wait(30)  # the ingress counts neither as queued any more
            assert leave.wait(60)

    def stay(number: int) -> None:
        with stream(server, content=f"{number}", max_tokens=7000, ignore_eos=True) as queued:
            assert queued.status_code == 200
            assert leave.wait(60)

    with concurrent.futures.ThreadPoolExecutor(2 + MAX_QUEUED) as pool:
        try:
            staying = [pool.submit(run, number) for number in range(2)]
            both_run.wait(30)
            staying += [pool.submit(stay, number) for number in range(2, 2 + MAX_QUEUED)]
            server.wait_for_metric("forecache_num_requests_waiting", MAX_QUEUED, within_s=20)
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 429 ")
        finally:
            leave.set()
    assert [one.result() for one in staying] == [None] * len(staying)
    server.wait_for_metric("forecache_num_requests_running", 0, within_s=10)
    server.wait_for_metric("forecache_num_requests_waiting", 0, within_s=10)


def test_a_signal_lets_what_runs_finish_and_nothing_new_in(server: Any) -> None:
    """Must run last: it stops the server."""
    with stream(server, max_tokens=4000, ignore_eos=True) as running:
        lines = running.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while (ready := server.get("/ready")).status_code == 200:
            assert time.monotonic() < deadline
        assert ready.status_code == 503 and "stopped" in ready.json()["reason"]
        assert server.get("/health").status_code == 200
        refused = ask(server)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
        said = [line for line in lines if line]
    assert said[-1] == "data: [DONE]"
    assert json.loads(said[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(60) == 0


def test_the_keys_file_is_checked_before_anything_starts(tmp_path: Path, start_server: Any) -> None:
    with pytest.raises(AssertionError, match="ended with status 2"):
        start_server("--api-keys-file", str(tmp_path / "none.yaml"))

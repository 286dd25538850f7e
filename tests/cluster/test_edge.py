"""HTTP edge cases through one real server: proxies in the environment, upgrades to HTTP/2, late headers, invalid
requests. The server's environment names a proxy that never answers."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import processes_below

pytestmark = pytest.mark.cluster

MODEL = "bytes"
HEADER_DEADLINE_S = 2
ANSWER_S = 20.0
"""Far more than an answer takes, far less than a connection through the proxy, which never comes."""
JAVA_CLIENT = """
import java.net.URI;
import java.net.http.*;

public class Ask {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();
        HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0]))
            .POST(HttpRequest.BodyPublishers.ofString(arguments[1])).build();
        for (int turn = 0; turn < 2; turn++) {
            HttpResponse<String> answer = client.send(request, HttpResponse.BodyHandlers.ofString());
            System.out.println(answer.statusCode() + " " + answer.body());
        }
    }
}
"""


@pytest.fixture(scope="module")
def black_hole() -> Iterator[socket.socket]:
    """A local port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as hole:
        yield hole


@pytest.fixture(scope="module")
def server(start_server: Any, black_hole: socket.socket) -> Any:
    proxy = f"http://127.0.0.1:{black_hole.getsockname()[1]}"
    environment = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), proxy)
    return start_server(
        *("--header-deadline-s", str(HEADER_DEADLINE_S), "--body-deadline-s", "2", "--max-body-bytes", "1MiB"),
        environment={**environment, "no_proxy": "localhost,127.0.0.1"},
    )


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **fields}


def connect(server: Any) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=ANSWER_S)


def raw(server: Any, data: bytes) -> bytes:
    """The bytes that the server sends in reply to ``data`` before it closes the connection or the time is over."""
    with connect(server) as connection:
        connection.sendall(data)
        got = b""
        with contextlib.suppress(ConnectionResetError):  # it had said all, and did not read on
            while part := connection.recv(1 << 16):
                got += part
    return got


def post(content: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Content-Length: {length or len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


def test_a_server_answers_though_its_environment_names_a_proxy(server: Any) -> None:
    """gRPC between ingress, workers and Serve's proxies must not use the proxy of the environment."""
    assert server.get("/health", timeout=ANSWER_S).json() == {"status": "ok"}
    assert server.get("/ready", timeout=ANSWER_S).status_code == 200
    answer = server.post("/v1/chat/completions", body(), timeout=ANSWER_S)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
    with server.stream("/v1/chat/completions", body(stream=True), timeout=ANSWER_S) as stream:
        assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
    assert "forecache_prompt_tokens_total" in server.get("/metrics/cluster", timeout=ANSWER_S).text


def test_an_offer_of_http_2_is_answered_in_http_1_1(server: Any) -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings, close", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk")
    answer = raw(server, post(json.dumps(body()).encode(), *offer))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and b'"completion_tokens":4' in answer


def test_javas_client_is_answered(server: Any, tmp_path: Path) -> None:
    """By default this client offers an upgrade to HTTP/2."""
    if (java := shutil.which("java")) is None:
        pytest.skip("no Java on this machine")
    source = tmp_path / "Ask.java"
    source.write_text(JAVA_CLIENT, encoding="utf-8")
    command = [java, str(source), f"{server.url}/v1/chat/completions", json.dumps(body())]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    assert [line[:4] for line in said] == ["200 ", "200 "]
    assert json.loads(said[1][4:])["usage"]["completion_tokens"] == 4


def test_curl_with_http2_is_answered(server: Any) -> None:
    curl = shutil.which("curl")
    if curl is None or "HTTP2" not in subprocess.run([curl, "-V"], capture_output=True, text=True).stdout:
        pytest.skip("no curl with HTTP/2 on this machine")
    command = [curl, "--http2", "--noproxy", "*", "-sS", "-d", json.dumps(body()), f"{server.url}/v1/chat/completions"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(answer)["usage"]["completion_tokens"] == 4


def test_headers_that_come_slowly_are_cut(server: Any) -> None:
    start = time.monotonic()
    answer = raw(server, b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"code": "request_timeout"' in answer
    assert raw(server, b"") == b""
    assert time.monotonic() - start < ANSWER_S


def logs(server: Any) -> str:
    """The log lines of this server's Serve processes, which log only warnings and errors."""
    command = next(line for line in processes_below(server.process.pid).values() if "raylet/raylet" in line)
    session = next(Path(word.partition("=")[2]) for word in command.split() if word.startswith("--session_dir="))
    files = [*session.glob("logs/serve/*.log"), *session.glob("logs/worker-*.err")]
    assert any("proxy" in file.name for file in files) and any("DecodeWorker" in file.name for file in files)
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def test_a_request_that_is_wrong_is_no_error_in_the_log(server: Any) -> None:
    """Must run last: it reads the log of all requests before it."""
    wrong: list[dict[str, Any]] = [
        {"n": 0},
        {"model": "other"},
        {"logit_bias": {"999999": 1}},
        {"messages": [{"role": "user", "content": "x" * 20_000}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/none"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": "("}}}},
        {"forecache": {"timeout_s": 0.0001}},
        {"forecache": {"timeout_s": 0.0001}, "stream": True},
    ]
    for fields in wrong:
        answer = server.post("/v1/chat/completions", body(**fields), timeout=ANSWER_S)
        assert 400 <= answer.status_code < 500, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    refused = [
        b"no HTTP\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (2 << 20),
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\nzz\r\n",
        post(b"{", "Connection: close"),
        post(b"", "Connection: close", length=2 << 20),
        post(b"{", "Connection: close", length=100),
    ]
    for data in refused:
        assert raw(server, data).startswith(b"HTTP/1.1 4"), data[:60]
    endless = body(stream=True, max_tokens=4000, ignore_eos=True)
    for begun in (post(b"{", length=100), post(json.dumps(endless).encode())):
        with connect(server) as connection:
            connection.sendall(begun)
            connection.settimeout(1)
            with contextlib.suppress(TimeoutError):  # the one that waits for the rest of a body
                connection.recv(1)
    server.wait_for_metric("forecache_num_requests_running", 0, within_s=20)
    written = logs(server)
    assert "Traceback" not in written and "ERROR" not in written, written

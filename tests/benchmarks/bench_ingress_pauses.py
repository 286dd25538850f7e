"""Pauses of a running stream while other clients send requests that are costly to parse or to answer.

    python tests/benchmarks/bench_ingress_pauses.py [--only NAME …] [--tokenizer DIRECTORY]

A process serves the real HTTP application; its worker gives tokens at a steady pace and computes nothing. This process
listens to one stream and sends the attacks, one after another. For each it prints the answers' statuses, how long they
took, the longest time in which the server's event loop did nothing else, and the longest gap between two events of
the stream beyond their pace.
"""

import argparse
import asyncio
import gc
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from forecache.cluster.config import ResumeConfig

PACE_S = 0.02
BEAT_S = 0.005
MAX_MODEL_LEN = 1 << 20
MODEL = "m"
DEADLINE_S = 600.0
GOAL_S = 0.25


class PacedStream:
    """Tokens of one request: at ``PACE_S`` for the one that is listened to, else as fast as they are taken."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self._made = 0
        self.assigned = True
        self._next_s = time.monotonic()

    def __aiter__(self) -> "PacedStream":
        return self

    async def __anext__(self) -> Any:
        from forecache.workers.core.requests import SequenceStats, TokenEvent, TokenLogprobs

        wanted = self._request.sampling
        if wanted.ignore_eos:  # the one that is listened to
            self._next_s += PACE_S
            await asyncio.sleep(max(0.0, self._next_s - time.monotonic()))
        else:
            await asyncio.sleep(0)
        self._made += 1
        last = self._made >= min(wanted.max_tokens, 1 << 20)
        prompt = len(self._request.prompt_token_ids)
        told = ()
        if wanted.logprobs is not None:
            told = (TokenLogprobs(5, -1.0, tuple((token, -2.0) for token in range(wanted.logprobs))),)
        return TokenEvent(
            self._request.request_id,
            (5,),
            "x ",
            "length" if last else None,
            SequenceStats(prompt, completion_tokens=self._made) if last else None,
            position=self._made - 1,
            logprobs=told,
        )

    def cancel(self) -> None: ...


class PacedWorkers:
    failover_config = ResumeConfig()

    def start(self, request: Any) -> PacedStream:
        return PacedStream(request)

    async def stats(self) -> list[Any]:
        return []


class NoSessions:
    def describe(self, session_id: str) -> dict[str, Any]:
        from forecache.cluster.errors import UnknownSessionError

        raise UnknownSessionError("no such session is known")

    def pin(self, session_id: str, ttl_s: float) -> dict[str, Any]:
        return self.describe(session_id)


async def serve(tokenizer: str) -> None:
    import uvicorn

    from forecache.cluster.config import LimitsConfig
    from forecache.cluster.dispatch.admission import Admission, ResidentEstimate
    from forecache.cluster.http.api import Api
    from forecache.cluster.http.prompts import PromptEncoder
    from forecache.cluster.http.sessions import SessionRoutes
    from forecache.cluster.observe.metrics import Metrics
    from forecache.cluster.tenants import Tenants
    from forecache.indexer.serving.config import SelectionConfig
    from forecache.workers.core.config import EngineConfig
    from forecache.workers.models.tokenizer import load_tokenizer

    limits = LimitsConfig(max_queued_requests=4096)
    encoder = PromptEncoder(load_tokenizer(Path(tokenizer)), MAX_MODEL_LEN)
    if hasattr(encoder, "start"):
        encoder.start()
    resident = ResidentEstimate(EngineConfig(), SelectionConfig(), 0)
    api = Api(PacedWorkers(), encoder, Metrics(MODEL), Admission(limits), Tenants(None), resident)
    app = api.app()
    SessionRoutes(NoSessions(), api).add_to(app)  # type: ignore[arg-type]
    if hasattr(encoder, "start"):  # as the ingress does
        gc.collect()
        gc.freeze()
    longest_s = 0.0

    @app.get("/pause")
    async def pause() -> float:
        nonlocal longest_s
        told, longest_s = longest_s, 0.0
        return told

    async def beat() -> None:
        nonlocal longest_s
        last_s = time.monotonic()
        while True:
            await asyncio.sleep(BEAT_S)
            now_s = time.monotonic()
            longest_s, last_s = max(longest_s, now_s - last_s - BEAT_S), now_s

    listening = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"port": listening.getsockname()[1]}), flush=True)
    task = asyncio.ensure_future(beat())
    try:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", loop="asyncio", http="h11"))
        await server.serve(sockets=[listening])
    finally:
        task.cancel()
        encoder.close()


class Client:
    """One stream that is listened to, and any number of other requests."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._arrived_s = 0.0
        self._longest_s = 0.0
        self._listening = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        assert self._listening.wait(DEADLINE_S)

    def _listen(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE_S)
        body = {"model": MODEL, "prompt": [5, 6], "max_tokens": 1 << 19, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body))
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        while answer.readline().startswith((b"data:", b"\n")):
            now_s = time.monotonic()
            if self._arrived_s:
                self._longest_s = max(self._longest_s, now_s - self._arrived_s - PACE_S)
            self._arrived_s = now_s
            self._listening.set()

    def post(self, path: str, body: bytes) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE_S)
        try:
            connection.request("POST", path, body)
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except (BrokenPipeError, ConnectionResetError):
            return 0  # refused before the body was sent
        finally:
            connection.close()

    def pauses_s(self) -> tuple[float, float]:
        """The longest ones since the last call: of the loop, and of the stream."""
        time.sleep(0.3)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE_S)
        connection.request("GET", "/pause")
        loop_s = json.loads(connection.getresponse().read())
        connection.close()
        stream_s = max(self._longest_s, time.monotonic() - self._arrived_s - PACE_S)
        self._longest_s = 0.0
        return float(loop_s), stream_s


def message(role: str) -> dict[str, str]:
    return {"role": role, "content": "what is the time in the city where you are today"}


def body_of(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, **fields}).encode()


def text_of(words: int) -> str:
    draw = random.Random(words)
    return " ".join(str(draw.random()) for _ in range(words))


def turns(count: int) -> list[dict[str, str]]:
    return [message(("user", "assistant")[number % 2]) for number in range(count)]


def schema_of(properties: int) -> dict[str, Any]:
    named = {f"property_{n}": {"type": "string", "description": "what it says " * 4} for n in range(properties)}
    return {"type": "object", "properties": named}


def tool(number: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"f{number}", "parameters": schema_of(1500)}}


def raw(text: str) -> bytes:
    return text.encode()


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [message("user")]
ATTACKS: dict[str, tuple[str, Callable[[], bytes], int]] = {
    "60 MB of token ids": (COMPLETIONS, lambda: b'{"model":"m","prompt":[' + b"7," * (30 << 20) + b"7]}", 1),
    "1,000,000 token ids": (COMPLETIONS, lambda: body_of(prompt=[7000 + n % 999 for n in range(10**6)]), 1),
    "text of a million tokens": (COMPLETIONS, lambda: body_of(prompt=text_of(48_000)), 1),
    "1,024 prompts": (COMPLETIONS, lambda: body_of(prompt=["say it again"] * 1024, max_tokens=4), 1),
    "1,024 prompts, streamed": (
        COMPLETIONS,
        lambda: body_of(prompt=["say it again"] * 1024, max_tokens=4, stream=True),
        1,
    ),
    "4,096 messages": (CHAT, lambda: body_of(messages=turns(4096), max_tokens=4), 1),
    "100 tokenize calls": ("/v1/tokenize", lambda: body_of(prompt=text_of(450)), 100),
    "100 tokenize calls of 8K tokens": ("/v1/tokenize", lambda: body_of(prompt=text_of(900)), 100),
    "nested 60 M deep": (COMPLETIONS, lambda: b'{"model":"m","prompt":' + b"[" * (60 << 20), 1),
    "nested 500 deep, 60 MB": (
        CHAT,
        lambda: raw('{"model":"m","messages":[' + ",".join(["[" * 500 + "]" * 500] * 60_000) + "]}"),
        1,
    ),
    "3 million empty objects": (
        CHAT,
        lambda: raw('{"model":"m","messages":[' + ",".join(["{}"] * 3_000_000) + "]}"),
        1,
    ),
    "a string of 60 MB": (COMPLETIONS, lambda: body_of(prompt="word " * (12 << 20)), 1),
    "128 tools, 15 MB": (CHAT, lambda: body_of(messages=USER, tools=[tool(n) for n in range(128)], max_tokens=2), 1),
    "a schema of 10 MB": (
        CHAT,
        lambda: body_of(
            messages=USER,
            max_tokens=2,
            response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema_of(100_000)}},
        ),
        1,
    ),
    "a million biases": (CHAT, lambda: body_of(messages=USER, logit_bias={str(n): 1.0 for n in range(10**6)}), 1),
    "1,024 biases": (
        CHAT,
        lambda: body_of(messages=USER, logit_bias={str(n): 1.0 for n in range(1024)}, max_tokens=2),
        8,
    ),
    "a million entries of metadata": (
        CHAT,
        lambda: body_of(messages=USER, metadata={str(n): "v" for n in range(10**6)}, max_tokens=2),
        1,
    ),
    "a million unknown fields": (CHAT, lambda: body_of(messages=USER, **{f"f{n}": n for n in range(10**6)}), 1),
    "60 MB for a session": ("/v1/sessions/s", lambda: body_of(ids="x" * (60 << 20)), 1),
    "detokenize a million ids": ("/v1/detokenize", lambda: body_of(tokens=[n % 40_000 for n in range(10**6)]), 1),
    "log-probabilities, 128 choices": (
        CHAT,
        lambda: body_of(messages=USER, n=128, max_tokens=64, logprobs=True, top_logprobs=20),
        1,
    ),
    "log-probabilities of 20,000 tokens": (
        COMPLETIONS,
        lambda: body_of(prompt="x", max_tokens=20_000, logprobs=20),
        1,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="attacks whose names hold one of these")
    parser.add_argument("--tokenizer", type=Path, help="directory of a tokenizer; default: that of smollm2-135m")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        asyncio.run(serve(asked.serve))
        return
    if (tokenizer := asked.tokenizer) is None:
        from forecache.workers.models.loader import resolve_model

        tokenizer = resolve_model("smollm2-135m")
    command = [sys.executable, __file__, "--serve", str(tokenizer)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) as server:
        try:
            assert server.stdout is not None
            client = Client(json.loads(server.stdout.readline())["port"])
            client.post(COMPLETIONS, body_of(prompt="warm " * 10_000, max_tokens=1))
            client.pauses_s()
            print(f"{'attack':36} {'body':>9} {'statuses':>16} {'took':>8} {'loop pause':>11} {'stream pause':>13}")
            worst_s = 0.0
            for name, (path, make, count) in ATTACKS.items():
                if asked.only and not any(part in name for part in asked.only):
                    continue
                body = make()
                client.pauses_s()
                start_s = time.monotonic()
                with ThreadPoolExecutor(min(count, 100)) as threads:
                    statuses = Counter(threads.map(lambda _: client.post(path, body), range(count)))  # noqa: B023
                took_s = time.monotonic() - start_s
                loop_s, stream_s = client.pauses_s()
                worst_s = max(worst_s, loop_s)
                said = " ".join(f"{times} of {status}" for status, times in statuses.items())
                size = f"{len(body) / 1e6:.1f} MB"
                print(f"{name:36} {size:>9} {said:>16} {took_s:6.1f} s {loop_s:9.3f} s {stream_s:11.3f} s", flush=True)
            verdict = "within" if worst_s <= GOAL_S else "beyond"
            print(f"longest pause of the event loop: {worst_s:.3f} s, {verdict} the goal of {GOAL_S} s")
        finally:
            server.kill()  # it would drain the stream that this process listens to


if __name__ == "__main__":
    main()

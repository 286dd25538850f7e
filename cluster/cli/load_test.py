"""The load tool's clients: when they ask, and what they see of each answer."""

import asyncio
import ipaddress
import json
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx

from forecache.cluster.cli.load_workloads import Conversation, prose
from forecache.cluster.http.tenants import authorization
from forecache.workers.errors import ForecacheError

SAMPLE_WORDS = 400


class LoadError(ForecacheError):
    """The load can't be made; the message says why."""


@dataclass(frozen=True)
class Target:
    """Where requests go: ``url`` ends before `/chat/completions`. ``timeout_s`` is of one request."""

    url: str
    model: str
    api_key: str | None = None
    output_tokens: int = 64
    keep_ratio: float | None = None
    timeout_s: float = 600.0


@dataclass
class Answered:
    """One request. Times in seconds of ``time.monotonic``; ``due_s`` is when it should have been sent.

    ``token_s`` has the time of each piece of text. ``status`` is 0 when there was no answer at all.
    """

    due_s: float
    turn: int
    status: int = 0
    end_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    keep_ratio: float = 1.0
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.error is None

    @property
    def first_token_s(self) -> float:
        return self.token_s[0] - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


def check_loopback(url: str) -> None:
    """Raise :class:`LoadError` unless every address of the host is this machine's own."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LoadError(f"{url} is no http URL")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LoadError(f"{parts.hostname} can't be found: {error}") from error
    addresses = {str(entry[4][0]) for entry in found}
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        raise LoadError(
            f"{parts.hostname} is not this machine ({', '.join(sorted(addresses))}): load is made towards others only "
            "with --allow-remote"
        )


def client(target: Target) -> httpx.AsyncClient:
    headers = authorization(target.api_key)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # no proxy from the environment: what is measured is the server
    return httpx.AsyncClient(timeout=target.timeout_s, headers=headers, limits=limits, trust_env=False)


async def words_per_token(http: httpx.AsyncClient, target: Target, seed: int) -> float:
    """Of the served model, by its own count.

    Raises:
        LoadError: the server does not tell.
    """
    text = prose(SAMPLE_WORDS, random.Random(seed))
    try:
        answer = await http.post(f"{target.url}/tokenize", json={"model": target.model, "prompt": text})
        answer.raise_for_status()
        return SAMPLE_WORDS / int(answer.json()["count"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise LoadError(f"{target.url} does not count tokens: {error}") from error


async def converse(
    http: httpx.AsyncClient, target: Target, conversation: Conversation, due_s: float, told: Callable[[Answered], None]
) -> None:
    """All turns of ``conversation``, the first due at ``due_s``, others with the answers before; each is ``told``."""
    messages: list[dict[str, str]] = []
    for turn, said in enumerate(conversation.turns):
        messages.append({"role": "user", "content": said})
        answer = await ask(http, target, messages, due_s, turn)
        told(answer)
        if not answer.ok:
            return
        messages.append({"role": "assistant", "content": answer.text})
        due_s = time.monotonic()


async def ask(
    http: httpx.AsyncClient, target: Target, messages: Sequence[dict[str, str]], due_s: float, turn: int
) -> Answered:
    """One request, read to its end."""
    answer = Answered(due_s, turn)
    body = {
        "model": target.model,
        "messages": messages,
        "max_tokens": target.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({} if target.keep_ratio is None else {"forecache": {"keep_ratio": target.keep_ratio}}),
    }
    try:
        async with http.stream("POST", f"{target.url}/chat/completions", json=body) as response:
            answer.status = response.status_code
            if response.status_code != 200:
                answer.error = (await response.aread()).decode("utf-8", "replace")[:500]
            else:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        _take(json.loads(line.removeprefix("data: ")), answer)
                if not answer.completion_tokens and answer.error is None:
                    answer.error = "the stream ended early"
    except (httpx.HTTPError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.end_s = time.monotonic()
    return answer


def _take(event: dict[str, object], answer: Answered) -> None:
    if "error" in event:
        answer.error = json.dumps(event["error"])
    choices, usage = event.get("choices"), event.get("usage")
    if isinstance(choices, list) and choices and (text := choices[0]["delta"].get("content")):
        answer.token_s.append(time.monotonic())
        answer.text += text
    if isinstance(usage, dict):
        answer.prompt_tokens, answer.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        answer.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
        answer.keep_ratio = usage["forecache"]["keep_ratio"]


async def open_loop(
    http: httpx.AsyncClient,
    target: Target,
    asked: Sequence[Conversation],
    rate_per_s: float,
    seed: int,
    told: Callable[[Answered], None],
) -> None:
    """Conversations begin as a Poisson process does, whether or not earlier ones are over."""
    generator = random.Random(seed)
    due_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for conversation in asked:
            due_s += generator.expovariate(rate_per_s)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            group.create_task(converse(http, target, conversation, due_s, told))


async def closed_loop(
    http: httpx.AsyncClient,
    target: Target,
    asked: Sequence[Conversation],
    concurrency: int,
    told: Callable[[Answered], None],
) -> None:
    """``concurrency`` clients, each with its next conversation as soon as the last is over."""
    left = iter(asked)

    async def one() -> None:
        for conversation in left:
            await converse(http, target, conversation, time.monotonic(), told)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(one())

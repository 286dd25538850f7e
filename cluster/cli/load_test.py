"""The load test of `forecache bench serve`: the prompts, the clients that send them, and the report."""

import asyncio
import ipaddress
import json
import math
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx
import numpy as np
from rich.table import Table

from forecache.cluster.tenants import authorization
from forecache.indexer.training.plots import PlotError
from forecache.workers.errors import ForecacheError

Workload = Literal["unique", "shared-prefix", "multi-turn"]

SAMPLE_WORDS = 400
PERCENTILES = (50, 90, 99)

_SYLLABLES = ("ba", "co", "di", "fe", "gu", "ha", "ki", "lo", "mu", "ne", "pa", "ri", "so", "ta", "vu", "ze")


@dataclass(frozen=True)
class WorkloadSettings:
    """What clients send. Sizes are in tokens of the served model.

    ``prefixes``: number of documents that prompts share; ``turns``: turns of a conversation.
    """

    workload: Workload = "unique"
    input_tokens: int = 1024
    question_tokens: int = 64
    prefixes: int = 4
    turns: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Conversation:
    """User messages, one per turn; each waits for the answer to the previous one."""

    turns: tuple[str, ...]


def prose(words: int, generator: random.Random) -> str:
    """Sentences of made-up words, so that no two documents share a prefix."""
    made = []
    for number in range(words):
        word = "".join(generator.choices(_SYLLABLES, k=generator.randint(1, 3)))
        made.append(word + ("." if number % 12 == 11 else ""))
    return " ".join(made)


def conversations(count: int, settings: WorkloadSettings, words_per_token: float) -> Sequence[Conversation]:
    """``count`` conversations, a function of the settings."""
    generator = random.Random(settings.seed)
    document_words = max(1, round(settings.input_tokens * words_per_token))
    question_words = max(1, round(settings.question_tokens * words_per_token))

    def question() -> str:
        return prose(question_words, generator)

    if settings.workload == "unique":
        return [Conversation((prose(document_words, generator),)) for _ in range(count)]
    if settings.workload == "shared-prefix":
        documents = [prose(document_words, generator) for _ in range(settings.prefixes)]
        return [Conversation((f"{documents[i % settings.prefixes]} {question()}",)) for i in range(count)]
    return [
        Conversation((prose(document_words, generator), *(question() for _ in range(settings.turns - 1))))
        for _ in range(count)
    ]


class LoadError(ForecacheError):
    """The load test can't run; the message says why."""


@dataclass(frozen=True)
class Target:
    """The server. ``url``: up to `/v1`; ``timeout_s``: longest silence during a request."""

    url: str
    model: str
    api_key: str | None = None
    output_tokens: int = 64
    keep_ratio: float | None = None
    timeout_s: float = 600.0


@dataclass
class Answered:
    """One request. Times are in seconds of ``time.monotonic``; ``due_s`` is when it should have been sent.

    ``token_s``: arrival of each piece of text; ``status``: HTTP status, 0 without a response.
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
    """Raise :class:`LoadError` unless every address of the host is a loopback address."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LoadError(f"{url} is not an HTTP URL")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LoadError(f"{parts.hostname} can't be resolved: {error}") from error
    addresses = {str(entry[4][0]) for entry in found}
    if not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        raise LoadError(
            f"{parts.hostname} is not this machine ({', '.join(sorted(addresses))}): pass --allow-remote to put load "
            f"on "
            "another machine"
        )


def client(target: Target) -> httpx.AsyncClient:
    headers = authorization(target.api_key)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # no proxy from the environment, which would be measured too
    return httpx.AsyncClient(timeout=target.timeout_s, headers=headers, limits=limits, trust_env=False)


async def words_per_token(http: httpx.AsyncClient, target: Target, seed: int) -> float:
    """Words per token of the served model, by its tokenizer.

    Raises:
        LoadError: the server does not count tokens.
    """
    text = prose(SAMPLE_WORDS, random.Random(seed))
    try:
        answer = await http.post(f"{target.url}/tokenize", json={"model": target.model, "prompt": text})
        answer.raise_for_status()
        return SAMPLE_WORDS / int(answer.json()["count"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise LoadError(f"{target.url} does not count tokens: {error}") from error


async def converse(
    http: httpx.AsyncClient,
    target: Target,
    conversation: Conversation,
    due_s: float,
    report: Callable[[Answered], None],
) -> None:
    """Run all turns of ``conversation``, the first due at ``due_s``, and pass each answer to ``report``."""
    messages: list[dict[str, str]] = []
    for turn, said in enumerate(conversation.turns):
        messages.append({"role": "user", "content": said})
        answer = await ask(http, target, messages, due_s, turn)
        report(answer)
        if not answer.ok:
            return
        messages.append({"role": "assistant", "content": answer.text})
        due_s = time.monotonic()


async def ask(
    http: httpx.AsyncClient, target: Target, messages: Sequence[dict[str, str]], due_s: float, turn: int
) -> Answered:
    """Send one request and read its stream to the end."""
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
    report: Callable[[Answered], None],
) -> None:
    """Start conversations as a Poisson process, whether or not earlier ones have ended."""
    generator = random.Random(seed)
    due_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for conversation in asked:
            due_s += generator.expovariate(rate_per_s)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            group.create_task(converse(http, target, conversation, due_s, report))


async def closed_loop(
    http: httpx.AsyncClient,
    target: Target,
    asked: Sequence[Conversation],
    concurrency: int,
    report: Callable[[Answered], None],
) -> None:
    """``concurrency`` clients; each starts its next conversation when the previous one ends."""
    left = iter(asked)

    async def one() -> None:
        for conversation in left:
            await converse(http, target, conversation, time.monotonic(), report)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(one())


async def make_load(
    target: Target, workload: WorkloadSettings, count: int, rate_per_s: float | None, concurrency: int | None
) -> list[Answered]:
    """Hold ``count`` conversations with the server: an open loop at ``rate_per_s``, else a closed loop."""
    answers: list[Answered] = []
    async with client(target) as http:
        asked = conversations(count, workload, await words_per_token(http, target, workload.seed))
        if rate_per_s is not None:
            await open_loop(http, target, asked, rate_per_s, workload.seed, answers.append)
        else:
            await closed_loop(http, target, asked, concurrency or 1, answers.append)
    return answers


@dataclass(frozen=True)
class Slo:
    """A good answer: its first token, and the mean gap between its tokens, take at most so many seconds."""

    first_token_s: float
    inter_token_s: float

    def met(self, answer: Answered) -> bool:
        gaps = answer.gaps_s
        slow = gaps and sum(gaps) / len(gaps) > self.inter_token_s
        return answer.ok and bool(answer.token_s) and answer.first_token_s <= self.first_token_s and not slow


@dataclass(frozen=True)
class Summary:
    """The figures of a run. Rates are per second of the whole run; times are in seconds, by percentile; ratios are
    from 0 to 1."""

    duration_s: float
    requests: int
    answered: int
    refused: int
    failed: int
    requests_per_s: float
    output_tokens_per_s: float
    input_tokens_per_s: float
    goodput_per_s: float
    slo_met: float
    time_to_first_token_s: dict[str, float]
    inter_token_s: dict[str, float]
    end_to_end_s: dict[str, float]
    refusal_s: dict[str, float]
    keep_ratio: float
    prefix_hit_ratio: float


def summarize(answers: Sequence[Answered], slo: Slo) -> Summary:
    """The figures of all requests of a run; without an answer, the times are empty."""
    good = [answer for answer in answers if answer.ok]
    refused = [answer for answer in answers if answer.status in (429, 503)]
    start = min((answer.due_s for answer in answers), default=0.0)
    duration_s = max(max((answer.end_s for answer in answers), default=0.0) - start, 1e-9)
    met = sum(slo.met(answer) for answer in answers)
    prompt = sum(answer.prompt_tokens for answer in good)
    return Summary(
        duration_s=duration_s,
        requests=len(answers),
        answered=len(good),
        refused=len(refused),
        failed=len(answers) - len(good) - len(refused),
        requests_per_s=len(good) / duration_s,
        output_tokens_per_s=sum(answer.completion_tokens for answer in good) / duration_s,
        input_tokens_per_s=prompt / duration_s,
        goodput_per_s=met / duration_s,
        slo_met=met / len(answers) if answers else 0.0,
        time_to_first_token_s=percentiles([answer.first_token_s for answer in good if answer.token_s]),
        inter_token_s=percentiles([gap for answer in good for gap in answer.gaps_s]),
        end_to_end_s=percentiles([answer.end_s - answer.due_s for answer in good]),
        refusal_s=percentiles([answer.end_s - answer.due_s for answer in refused]),
        keep_ratio=sum(answer.keep_ratio for answer in good) / len(good) if good else math.nan,
        prefix_hit_ratio=sum(answer.cached_tokens for answer in good) / prompt if prompt else math.nan,
    )


def percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{p}": float(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def table(summary: Summary, title: str) -> Table:
    drawn = Table(title=title, show_header=False)
    drawn.add_row("requests: answered / refused / failed", f"{summary.answered} / {summary.refused} / {summary.failed}")
    drawn.add_row("requests/s", f"{summary.requests_per_s:.2f}")
    drawn.add_row("tokens/s: output / input", f"{summary.output_tokens_per_s:.1f} / {summary.input_tokens_per_s:.1f}")
    drawn.add_row("goodput, requests/s (share of all)", f"{summary.goodput_per_s:.2f} ({summary.slo_met:.0%})")
    for name, label in (
        ("time_to_first_token_s", "time to first token"),
        ("inter_token_s", "between tokens"),
        ("end_to_end_s", "end to end"),
        ("refusal_s", "refused after"),
    ):
        values = getattr(summary, name)
        if values:
            drawn.add_row(f"{label}, ms: {' / '.join(values)}", " / ".join(f"{1e3 * v:.1f}" for v in values.values()))
    drawn.add_row("keep ratio", f"{summary.keep_ratio:.3f}")
    drawn.add_row("prompt tokens found in the cache", f"{summary.prefix_hit_ratio:.1%}")
    return drawn


def as_json(summary: Summary, settings: dict[str, Any], answers: Sequence[Answered]) -> dict[str, Any]:
    """Settings, figures and every request of a run; times of requests are from its start."""
    start = min((answer.due_s for answer in answers), default=0.0)
    requests = [
        {
            "due_s": answer.due_s - start,
            "end_s": answer.end_s - start,
            "turn": answer.turn,
            "status": answer.status,
            "error": answer.error,
            "prompt_tokens": answer.prompt_tokens,
            "cached_tokens": answer.cached_tokens,
            "completion_tokens": answer.completion_tokens,
            "keep_ratio": answer.keep_ratio,
            "token_s": [at - start for at in answer.token_s],
        }
        for answer in answers
    ]
    # JSON has no NaN
    figures = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(summary).items()}
    return {"settings": settings, "summary": figures, "requests": requests}


def plot(path: Path, answers: Sequence[Answered], slo: Slo) -> None:
    """Plot the distributions of time to first token and of gaps between tokens, and the requests over time.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError("plots need matplotlib: pip install 'forecache[train]'") from error
    canvas = Figure(figsize=(13.5, 3.6), layout="constrained")
    FigureCanvasAgg(canvas)
    first, gaps, course = canvas.subplots(1, 3)
    good = [answer for answer in answers if answer.ok]
    series = (
        (first, "time to first token, s", [a.first_token_s for a in good if a.token_s], slo.first_token_s),
        (gaps, "between tokens, s", [gap for a in good for gap in a.gaps_s], slo.inter_token_s),
    )
    for axes, label, values, limit in series:
        ordered = np.sort(np.array(values))
        axes.step(ordered, np.arange(1, len(ordered) + 1) / max(len(ordered), 1), where="post")
        axes.axvline(limit, color="tab:red", linestyle="--", label="SLO")
        axes.set(xlabel=label, ylabel="share", ylim=(0, 1.02))
        axes.legend()
    start = min((answer.due_s for answer in answers), default=0.0)
    for name, color, chosen in (
        ("answered", "tab:blue", good),
        ("not answered", "tab:red", [a for a in answers if not a.ok]),
    ):
        points = [(a.due_s - start, a.end_s - a.due_s) for a in chosen]
        course.scatter([x for x, _ in points], [y for _, y in points], s=8, color=color, label=name)
    course.set(xlabel="due after, s", ylabel="end to end, s")
    course.legend()
    for axes in (first, gaps, course):
        axes.grid(alpha=0.3)
    canvas.savefig(path, dpi=120)

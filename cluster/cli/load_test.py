"""The load test of `forecache bench serve`: the clients, and the report of what they saw."""

import asyncio
import ipaddress
import json
import math
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from rich.table import Table

from forecache.cluster.cli.load_workloads import (
    Conversation,
    WorkloadSettings,
    conversations,
    poisson_arrivals_s,
    prose,
)
from forecache.cluster.tenants import authorization
from forecache.indexer.training.plots import PlotError
from forecache.workers.errors import ForecacheError

SAMPLE_WORDS = 400
PERCENTILES = (50, 90, 99)


class LoadError(ForecacheError):
    """The load test can't run; the message says why."""


@dataclass(frozen=True)
class Target:
    """The server. ``url``: up to `/v1`; ``timeout_s``: longest silence during a request.

    ``keep_ratio``: forecache's parameter of each request; ``None``: the server's, and other servers know none.
    ``ignore_eos``: answers are as long as asked; OpenAI's own API refuses this parameter, other servers take it.
    """

    url: str
    model: str
    api_key: str | None = None
    output_tokens: int = 64
    keep_ratio: float | None = None
    timeout_s: float = 600.0
    ignore_eos: bool = True


@dataclass
class Answered:
    """One request. Times are in seconds of ``time.monotonic``; ``due_s`` is when it should have been sent.

    ``token_s``: arrival of each piece of text; ``status``: HTTP status, 0 without a response. ``cached_tokens`` and
    ``keep_ratio`` are ``None`` if the server does not report them. The report groups requests by ``kind``.
    """

    due_s: float
    turn: int
    status: int = 0
    end_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    completion_tokens: int = 0
    keep_ratio: float | None = None
    error: str | None = None
    kind: str = "request"

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
    """Words per token of the served model.

    The server's `/v1/tokenize` or `/tokenize` counts the tokens of a sample; where neither exists, the ``usage`` of a
    completion of one token does, which includes the few tokens of the chat template.

    Raises:
        LoadError: the server can't be reached, does not serve the model, or reports no usage.
    """
    text = prose(SAMPLE_WORDS, random.Random(seed))
    tokenize = {"model": target.model, "prompt": text}
    complete = {"model": target.model, "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    problem: Exception | None = None
    for url, body in (
        (f"{target.url}/tokenize", tokenize),
        (f"{target.url.removesuffix('/v1')}/tokenize", tokenize),
        (f"{target.url}/chat/completions", complete),
    ):
        try:
            response = await http.post(url, json=body)
            response.raise_for_status()
            answer = response.json()
            return SAMPLE_WORDS / int(answer["count"] if "count" in answer else answer["usage"]["prompt_tokens"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            problem = error
    raise LoadError(f"{target.url} does not count tokens of {target.model}: {problem}") from problem


async def converse(
    http: httpx.AsyncClient,
    target: Target,
    conversation: Conversation,
    due_s: float,
    report: Callable[[Answered], None],
) -> None:
    """Run all turns of ``conversation``, the first due at ``due_s``, and pass each answer to ``report``."""
    messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
    for turn, said in enumerate(conversation.turns):
        if turn and conversation.pauses_s:
            await asyncio.sleep(conversation.pauses_s[turn - 1])
            due_s = time.monotonic()
        messages.append({"role": "user", "content": said})
        answer = await ask(http, target, messages, due_s, turn, conversation.kind_of_turn(turn))
        report(answer)
        if not answer.ok:
            return
        messages.append({"role": "assistant", "content": answer.text})
        due_s = time.monotonic()


async def ask(
    http: httpx.AsyncClient,
    target: Target,
    messages: Sequence[dict[str, str]],
    due_s: float,
    turn: int,
    kind: str = "request",
) -> Answered:
    """Send one request and read its stream to the end."""
    answer = Answered(due_s, turn, kind=kind)
    body = {
        "model": target.model,
        "messages": messages,
        "max_tokens": target.output_tokens,
        "temperature": 0,
        **({"ignore_eos": True} if target.ignore_eos else {}),
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
                    answer.error = "the stream ended early, or the server ignores stream_options.include_usage"
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
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        answer.keep_ratio = (usage.get("forecache") or {}).get("keep_ratio")


async def open_loop(
    http: httpx.AsyncClient,
    target: Target,
    asked: Sequence[Conversation],
    rate_per_s: float,
    seed: int,
    report: Callable[[Answered], None],
) -> None:
    """Start conversations as a Poisson process, whether or not earlier ones have ended."""
    start_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for conversation, at_s in zip(asked, poisson_arrivals_s(rate_per_s, seed), strict=False):
            due_s = start_s + at_s
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
    from 0 to 1. Figures that the server does not report are NaN or ``None``.

    ``by_kind``: times to first token and between tokens of each kind of request. ``errors``: how often each message
    came.
    """

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
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    by_kind: dict[str, dict[str, dict[str, float]]]
    errors: dict[str, int]


def summarize(answers: Sequence[Answered], slo: Slo) -> Summary:
    """The figures of all requests of a run; without an answer, the times are empty."""
    good = [answer for answer in answers if answer.ok]
    refused = [answer for answer in answers if answer.status in (429, 503)]
    start = min((answer.due_s for answer in answers), default=0.0)
    duration_s = max(max((answer.end_s for answer in answers), default=0.0) - start, 1e-9)
    met = sum(slo.met(answer) for answer in answers)
    prompt = sum(answer.prompt_tokens for answer in good)
    cached = [answer.cached_tokens for answer in good if answer.cached_tokens is not None]
    kept = [answer.keep_ratio for answer in good if answer.keep_ratio is not None]
    kinds = {kind: [answer for answer in good if answer.kind == kind] for kind in sorted({a.kind for a in good})}
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
        **_latencies(good),
        end_to_end_s=percentiles([answer.end_s - answer.due_s for answer in good]),
        refusal_s=percentiles([answer.end_s - answer.due_s for answer in refused]),
        keep_ratio=sum(kept) / len(kept) if kept else math.nan,
        prefix_hit_ratio=sum(cached) / prompt if cached and prompt else math.nan,
        prompt_tokens=prompt,
        cached_tokens=sum(cached) if cached else None,
        completion_tokens=sum(answer.completion_tokens for answer in good),
        by_kind={kind: _latencies(answers) for kind, answers in kinds.items()},
        errors=dict(Counter(answer.error for answer in answers if answer.error)),
    )


def _latencies(answers: Sequence[Answered]) -> dict[str, dict[str, float]]:
    return {
        "time_to_first_token_s": percentiles([answer.first_token_s for answer in answers if answer.token_s]),
        "inter_token_s": percentiles([gap for answer in answers for gap in answer.gaps_s]),
    }


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
    for kind, latencies in summary.by_kind.items() if len(summary.by_kind) > 1 else ():
        for name, label in (("time_to_first_token_s", "first token"), ("inter_token_s", "between tokens")):
            if values := latencies[name]:
                drawn.add_row(f"  {kind}, {label}", " / ".join(f"{1e3 * v:.1f}" for v in values.values()))
    drawn.add_row("keep ratio", "not reported" if math.isnan(summary.keep_ratio) else f"{summary.keep_ratio:.3f}")
    cached = "not reported"
    if summary.cached_tokens is not None:
        cached = f"{summary.cached_tokens} of {summary.prompt_tokens} ({summary.prefix_hit_ratio:.1%})"
    drawn.add_row("prompt tokens found in the cache", cached)
    return drawn


def as_json(summary: Summary, settings: dict[str, Any], answers: Sequence[Answered]) -> dict[str, Any]:
    """Settings, figures and every request of a run; times of requests are from its start."""
    start = min((answer.due_s for answer in answers), default=0.0)
    requests = [
        {
            "due_s": answer.due_s - start,
            "end_s": answer.end_s - start,
            "turn": answer.turn,
            "kind": answer.kind,
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

"""Measures in this process how much prompts and running streams delay each other.

    python tests/benchmarks/bench_mixed_step.py [--model smollm2-135m] [--prompt 5148] [--long 11600] [--short 50] \
        [--streams 32] [--targets 0.05 0.1 0.2] [--skip beside behind streams] [--label new] [--out FILE] \
        [--set threads=2 …]

Parts, each a row of the file per repetition:

- ``beside``: one prompt of ``--prompt`` tokens, alone and while one stream decodes. The stream's tokens per second are
  counted before and during the prefill;
- ``behind``: the first token of a short prompt alone, and behind a long prompt that arrived 1 s earlier;
- ``streams``: p50 and p99 of the time between tokens of ``--streams`` streams while one long prompt is prefilled, for
  each of ``--targets``.

Prompts are random tokens, so none is found stored. Compare versions in alternate runs: the machine may be busy.
"""

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from harness import append_row, now

from forecache.workers.core.requests import GenerateRequest, SamplingParams, TokenEvent
from forecache.workers.llm import LLM

STREAM_PROMPT, STREAM_ANSWER = 600, 100_000
WARM_UP_TOKENS, PACE_TOKENS = 5, 20
HEAD_START_S = 1.0


@dataclass(frozen=True)
class Row:
    """One figure. ``target_s`` is empty where the default was used."""

    label: str
    model: str
    part: str
    figure: str
    value: float
    prompt: int
    streams: int
    target_s: float | None
    date: str


class Client:
    """Sends requests of random tokens and notes when their tokens come."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self.token_s: dict[str, list[float]] = {}
        self._engine = llm.engine
        self._vocabulary = int(llm.backbone.config.vocab_size)
        self._room = llm.engine.max_model_len
        self._random = random.Random(seed)
        self._sent = 0

    def send(self, prompt: int, answer: int) -> str:
        self._sent += 1
        name = f"r{self._sent}"
        tokens = tuple(self._random.randrange(100, self._vocabulary - 100) for _ in range(prompt))
        sampling = SamplingParams(max_tokens=min(answer, self._room - prompt), ignore_eos=True)
        self.token_s[name] = []
        self._engine.add_request(GenerateRequest(name, tokens, sampling))
        return name

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            for event in self._engine.step():
                self._note(event)

    def first_token_s(self, prompt: int) -> float:
        """Until the first token of a new prompt."""
        start = time.perf_counter()
        name = self.send(prompt, 1)
        self.until(lambda: bool(self.token_s[name]))
        return self.token_s[name][0] - start

    def start_streams(self, count: int) -> list[str]:
        names = [self.send(STREAM_PROMPT, STREAM_ANSWER) for _ in range(count)]
        self.until(lambda: all(len(self.token_s[name]) >= WARM_UP_TOKENS for name in names))
        return names

    def end(self, names: list[str]) -> None:
        for name in names:
            self._engine.cancel(name)
        while not self._engine.idle:
            self._engine.step()

    def _note(self, event: TokenEvent) -> None:
        assert event.error is None, event.error
        self.token_s[event.request_id] += [time.perf_counter()] * len(event.token_ids)


def beside(client: Client, prompt: int) -> dict[str, float]:
    alone_s = client.first_token_s(prompt)
    (stream,) = client.start_streams(1)
    times = client.token_s[stream]
    start, had = time.perf_counter(), len(times)
    client.until(lambda: len(times) >= had + PACE_TOKENS)
    before = PACE_TOKENS / (time.perf_counter() - start)
    had = len(times)
    beside_s = client.first_token_s(prompt)
    during = (len(times) - had) / beside_s
    client.end([stream])
    return {
        "alone_s": alone_s,
        "beside_s": beside_s,
        "beside / alone": beside_s / alone_s,
        "stream_before_per_s": before,
        "stream_during_per_s": during,
        "during / before": during / before,
    }


def behind(client: Client, long: int, short: int) -> dict[str, float]:
    alone_s = client.first_token_s(short)
    first = client.send(long, 1)
    start = time.perf_counter()
    client.until(lambda: time.perf_counter() >= start + HEAD_START_S)
    # it arrives while a step runs: that step's remainder is part of its wait
    arrived_s = start + HEAD_START_S
    second = client.send(short, 1)
    client.until(lambda: bool(client.token_s[second]))
    behind_s = client.token_s[second][0] - arrived_s
    client.end([first])
    return {"short_alone_s": alone_s, "short_behind_s": behind_s}


def streams(client: Client, long: int, count: int) -> dict[str, float]:
    names = client.start_streams(count)
    start = time.perf_counter()
    first_s = client.first_token_s(long)
    gaps = []
    for name in names:
        times = [start, *(at for at in client.token_s[name] if at > start)]
        gaps += [later - earlier for earlier, later in itertools.pairwise(times)]
    client.end(names)
    percentiles = statistics.quantiles(gaps, n=100) if len(gaps) > 1 else gaps * 99
    return {"first_token_s": first_s, "gap_p50_s": percentiles[49], "gap_p99_s": percentiles[98]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompt", type=int, default=5148)
    parser.add_argument("--long", type=int, default=11_600)
    parser.add_argument("--short", type=int, default=50)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--skip", nargs="*", default=[], choices=["beside", "behind", "streams"])
    parser.add_argument("--label", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the engine and memory")
    args = parser.parse_args()
    settings: dict[str, Any] = {name: yaml.safe_load(value) for name, value in (one.split("=", 1) for one in args.set)}

    def report(part: str, prompt: int, count: int, target_s: float | None, figures: dict[str, float]) -> None:
        for figure, value in figures.items():
            print(
                f"{args.label} {part} {figure}: {value:.3g}" + (f" (target {target_s} s)" if target_s else ""),
                flush=True,
            )
            if args.out is not None:
                append_row(args.out, Row(args.label, args.model, part, figure, value, prompt, count, target_s, now()))

    for number in range(args.repeat):
        with LLM(args.model, skip_tokenizer=True, **settings) as llm:
            client = Client(llm, seed=number)
            client.first_token_s(700)  # the first steps are slower
            if "beside" not in args.skip:
                report("beside", args.prompt, 1, None, beside(client, args.prompt))
            if "behind" not in args.skip:
                report("behind", args.long, 0, None, behind(client, args.long, args.short))
        if "streams" not in args.skip:
            for target_s in args.targets:
                batch = {"max_batch_size": args.streams + 1, "inter_token_target_s": target_s}
                with LLM(args.model, skip_tokenizer=True, **(batch | settings)) as llm:
                    client = Client(llm, seed=number)
                    client.first_token_s(700)
                    report("streams", args.long, args.streams, target_s, streams(client, args.long, args.streams))


if __name__ == "__main__":
    main()

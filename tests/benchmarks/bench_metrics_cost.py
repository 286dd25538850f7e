"""Cost of metrics for decode: one engine whose `/metrics` is scraped in every other window.

    python tests/benchmarks/bench_metrics_cost.py --out DIR [--model smollm2-135m] [--requests 4] [--interval-s 5]

The engine runs as in a worker, with the `/metrics` server in the same process, and an ingress' histograms
are fed by every event. Windows of ``--seconds`` alternate within one run, so that whatever else the machine does meets
both: in the ones a scraper asks every ``--interval-s`` (ours in `grafana/` asks every 15 s, so this is an upper
bound), in the others it is idle and no event is observed. ``cost`` is 1 - scraped / silent, of each pair of
neighbours; reported are its median and a 95 % interval of the median (bootstrap over the pairs).
"""

import argparse
import csv
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import httpx
import torch
from prometheus_client import start_http_server
from rich.console import Console
from rich.table import Table

from forecache.cluster.observe.metrics import Metrics, RequestTimer, registry_of
from forecache.workers.core.requests import GenerateRequest, SamplingParams
from forecache.workers.core.stats import ScorerStats, WorkerStats
from forecache.workers.llm import LLM

LIMIT = 0.01
WARM_UP_TOKENS = 32
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """One pair of neighbouring windows. Rates are of generated tokens per second."""

    pair: int
    silent_tokens_per_s: float
    scraped_tokens_per_s: float
    cost: float
    scrapes: int
    seconds: float
    requests: int
    model: str
    torch: str
    machine: str
    threads: int
    date: str


class Scraper:
    """A thread that asks for ``url`` every ``interval_s`` while it is on."""

    def __init__(self, url: str, interval_s: float) -> None:
        self.on, self.scrapes = threading.Event(), 0
        self._url, self._interval_s = url, interval_s
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with httpx.Client(trust_env=False) as client:
            while True:
                self.on.wait()
                page = client.get(self._url)
                assert page.status_code == 200 and "forecache_generation_tokens_total" in page.text
                self.scrapes += 1
                time.sleep(self._interval_s)


class Decoding:
    """Requests that go on decoding; one that ends is followed by another."""

    def __init__(self, llm: LLM, requests: int, prompt_tokens: int, metrics: Metrics) -> None:
        self._llm, self._metrics = llm, metrics
        self._prompt_tokens = prompt_tokens
        self._timers: dict[str, RequestTimer] = {}
        self._serial = 0
        self._random = random.Random(0)
        for _ in range(requests):
            self._add()

    def _add(self) -> None:
        self._serial += 1
        name = f"r{self._serial}"
        tokens = tuple(self._random.randrange(300, 1000) for _ in range(self._prompt_tokens))
        room = self._llm.engine.max_model_len - self._prompt_tokens
        sampling = SamplingParams(max_tokens=min(room, 100_000), ignore_eos=True, temperature=0.0)
        self._llm.engine.add_request(GenerateRequest(name, tokens, sampling))
        self._timers[name] = self._metrics.request()

    def until(self, done: Callable[[], bool], observe: bool) -> int:
        """Steps until ``done``; tokens generated."""
        tokens = 0
        while not done():
            for event in self._llm.engine.step():
                tokens += len(event.token_ids)
                if observe:
                    self._timers[event.request_id].observe(event)
                if event.finish_reason is not None:
                    assert event.finish_reason == "length", event.error
                    self._add()
        return tokens

    def rate(self, seconds: float, observe: bool) -> float:
        start = time.perf_counter()
        tokens = self.until(lambda: time.perf_counter() - start >= seconds, observe)
        return tokens / (time.perf_counter() - start)


def interval(costs: list[float]) -> tuple[float, float]:
    """95 % interval of the median, by resampling the pairs."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(costs, k=len(costs))) for _ in range(RESAMPLES))
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=14)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one window")
    parser.add_argument("--interval-s", type=float, default=5.0, help="between two scrapes")
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(args.model)
    with LLM(args.model, threads=args.threads) as llm:
        scorer = ScorerStats("bounds", "", 0)
        registry = registry_of(args.model, lambda: WorkerStats("w", "n", llm.engine.stats(), None, scorer))
        server, _ = start_http_server(0, "127.0.0.1", registry)
        scraper = Scraper(f"http://127.0.0.1:{server.server_port}/metrics", args.interval_s)
        decoding = Decoding(llm, args.requests, args.prompt_tokens, metrics)
        warm = WARM_UP_TOKENS * args.requests
        decoding.until(lambda: llm.engine.stats().counters.generated_tokens >= warm, observe=False)
        rows = []
        for pair in range(args.pairs):
            rates: dict[bool, float] = {}
            before = scraper.scrapes
            for scraped in (pair % 2 == 0, pair % 2 == 1):  # neither is always the first
                scraper.on.set() if scraped else scraper.on.clear()
                rates[scraped] = decoding.rate(args.seconds, observe=scraped)
            scraper.on.clear()
            rows.append(Row(
                pair, round(rates[False], 3), round(rates[True], 3), round(1 - rates[True] / rates[False], 5),
                scraper.scrapes - before, args.seconds, args.requests, args.model, torch.__version__,
                torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
                torch.get_num_threads(), datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            ))  # fmt: skip
            print(f"pair {pair}: {rates[False]:.1f} silent, {rates[True]:.1f} scraped", flush=True)
    file = args.out / "metrics-cost.csv"
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    costs = [row.cost for row in rows]
    low, high = interval(costs)
    median = statistics.median(costs)
    table = Table("silent tokens/s", "scraped tokens/s", "cost, median", "95 %", f"below {LIMIT:.0%}")
    table.add_row(
        f"{statistics.median(row.silent_tokens_per_s for row in rows):.2f}",
        f"{statistics.median(row.scraped_tokens_per_s for row in rows):.2f}",
        f"{median:.2%}",
        f"{low:.2%} to {high:.2%}",
        "yes" if median < LIMIT else "no",
    )
    Console().print(table)
    print(file)
    return 0 if median < LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())

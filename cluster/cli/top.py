"""`forecache top`: shows what a running cluster does, from two readings of `/metrics/cluster`."""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Self

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from forecache.workers.errors import ForecacheError

DEADLINE_S = 10.0
BAR_CELLS = 6
FULL, NEARLY_FULL = 0.95, 0.8
MIB = 2**20


class TopError(ForecacheError):
    """The cluster does not answer."""


@dataclass(frozen=True)
class Snapshot:
    """One reading. ``values``: process id → series name → value, summed over all other labels; ``components``: process
    id → component; ``scorers``: process id → what scores its chunks; ``time_s``: monotonic clock."""

    time_s: float
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    components: dict[str, str] = field(default_factory=dict)
    model: str = ""
    scorers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, page: str, time_s: float) -> Self:
        found = cls(time_s)
        model = ""
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                process = sample.labels.get("process", "")
                series = found.values.setdefault(process, {})
                series[sample.name] = series.get(sample.name, 0.0) + sample.value
                found.components[process] = sample.labels.get("component", "")
                model = sample.labels.get("model_name", model)
                if sample.name == "forecache_indexer_info":
                    found.scorers[process] = sample.labels["scorer"]
        return cls(time_s, found.values, found.components, model, found.scorers)

    def processes(self, component: str) -> list[str]:
        return sorted(name for name, kind in self.components.items() if kind == component)

    @property
    def answered(self) -> set[str]:
        """Processes that returned their own series."""
        return {name for name, series in self.values.items() if series.keys() - {"up"}}

    def value(self, name: str, process: str) -> float:
        return self.values.get(process, {}).get(name, 0.0)

    def total(self, name: str) -> float:
        return sum(series.get(name, 0.0) for series in self.values.values())


@dataclass(frozen=True)
class Change:
    """The change between two readings. Processes that are in only one of them have no rate."""

    before: Snapshot
    now: Snapshot

    def grown(self, name: str, process: str | None = None) -> float:
        """Growth of a counter, of one process or of all; a counter that fell was reset and counts as 0."""
        both = self.before.answered & self.now.answered
        if process is not None:
            both &= {process}
        return sum(max(0.0, self.now.value(name, one) - self.before.value(name, one)) for one in both)

    def rate(self, name: str, process: str | None = None) -> float:
        """Growth of a counter per second."""
        passed_s = self.now.time_s - self.before.time_s
        return self.grown(name, process) / passed_s if passed_s > 0 else 0.0

    def share(self, part: str, *whole: str, process: str | None = None) -> float | None:
        """``part`` / sum of ``whole`` between the readings; if they did not grow, since their start; ``None`` if they
        are all 0."""
        below = sum(self.grown(name, process) for name in whole)
        if below:
            return self.grown(part, process) / below
        of = self.now.total if process is None else lambda name: self.now.value(name, process)
        below = sum(of(name) for name in whole)
        return of(part) / below if below else None


def render(change: Change, url: str) -> RenderableType:
    """The tables of one view."""
    now = change.now
    parts: list[RenderableType] = [_summary(change, url), _workers(change), _tiers(change)]
    if now.processes("indexer"):
        parts.append(_indexers(change))
    return Group(*parts)


def _summary(change: Change, url: str) -> RenderableType:
    now = change.now
    up = sum(now.value("up", process) for process in now.values)
    scored = ", ".join(sorted(set(now.scorers.values())))
    title = f"{now.model or 'forecache'} at {url}, chunks scored: {scored or 'no worker'}"
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 1, 0, 0))
    for _ in range(4):
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
    running = now.total("forecache_num_requests_running")
    kept = sum(
        now.value("forecache_resident_ratio", one) * now.value("forecache_num_requests_running", one)
        for one in now.processes("worker")
    )
    coverage = change.share("forecache_attention_coverage_sum", "forecache_attention_coverage_count")
    hits = change.share("forecache_prefix_cache_hits_total", "forecache_prefix_cache_queries_total")
    rows = [
        ("running", f"{running:.0f}"),
        ("waiting", f"{now.total('forecache_num_requests_waiting'):.0f}"),
        ("tokens/s out", f"{change.rate('forecache_generation_tokens_total'):.1f}"),
        ("tokens/s in", f"{change.rate('forecache_prompt_tokens_total'):.1f}"),
        ("prefix hits", _percent(hits)),
        ("kept", _percent(kept / running if running else None)),
        ("coverage", _percent(coverage)),
        ("foreseen", _percent(change.share(
            "forecache_lookahead_hits_total", "forecache_lookahead_hits_total", "forecache_lookahead_misses_total"))),
        ("first token", _seconds(change.share(
            "forecache_time_to_first_token_seconds_sum", "forecache_time_to_first_token_seconds_count"))),
        ("next token", _seconds(change.share(
            "forecache_inter_token_latency_seconds_sum", "forecache_inter_token_latency_seconds_count"))),
        ("errors/s", f"{change.rate('forecache_errors_total'):.1f}"),
        ("processes", f"{up:.0f} / {len(now.values)}"),
    ]  # fmt: skip
    for start in range(0, len(rows), 4):
        table.add_row(*(cell for row in rows[start : start + 4] for cell in row))
    return table


def _workers(change: Change) -> RenderableType:
    def row(worker: str) -> Iterable[RenderableType]:
        now = change.now
        yield f"{now.value('forecache_num_requests_running', worker):.0f}"
        yield f"{now.value('forecache_num_requests_waiting', worker):.0f}"
        yield f"{change.rate('forecache_generation_tokens_total', worker):.1f}"
        yield _bar(now.value("forecache_hot_pool_usage_perc", worker))
        yield _percent(now.value("forecache_resident_ratio", worker))
        hits = change.share("forecache_prefix_cache_hits_total", "forecache_prefix_cache_queries_total", process=worker)
        yield _percent(hits)
        yield f"{change.rate('forecache_recalled_chunks_total', worker):.1f}"
        yield f"{change.rate('forecache_recall_bytes_total', worker) / MIB:.1f}"
        late = change.share("forecache_lookahead_late_total", "forecache_lookahead_windows_total", process=worker)
        yield _percent(late)

    columns = ("run", "wait", "tok/s", "hot pool", "kept", "hits", "recall/s", "MiB/s", "late")
    return _table("worker", columns, change.now, row)


def _tiers(change: Change) -> RenderableType:
    def row(tier: str) -> Iterable[RenderableType]:
        now = change.now
        yield _bar(now.value("forecache_memory_tier_usage_perc", tier), warn=False)
        yield _bar(now.value("forecache_memory_tier_promised_perc", tier))
        yield f"{now.value('forecache_memory_tier_disk_usage_perc', tier):.0%}"
        yield f"{now.value('forecache_memory_tier_pinned_slots', tier):.0f}"
        bad = now.value("forecache_memory_tier_bad_slots", tier)
        yield Text(f"{bad:.0f}", style="bold red" if bad else "")
        yield f"{change.rate('forecache_memory_tier_fetched_bytes_total', tier) / MIB:.1f}"
        moved = ("replicated", "moved", "spilled")
        yield f"{sum(change.rate(f'forecache_memory_tier_{name}_chunks_total', tier) for name in moved):.1f}"
        yield f"{change.rate('forecache_memory_tier_evicted_chunks_total', tier):.1f}"

    columns = ("used", "promised", "disk", "pinned", "bad", "MiB/s in", "sent/s", "evict/s")
    return _table("tier", columns, change.now, row)


def _indexers(change: Change) -> RenderableType:
    def row(indexer: str) -> Iterable[RenderableType]:
        yield f"{change.rate('forecache_indexer_predictions_total', indexer):.1f}"
        took = change.share(
            "forecache_indexer_predict_seconds_total", "forecache_indexer_predictions_total", process=indexer
        )
        yield _seconds(took)
        yield f"{change.now.value('forecache_indexer_waiting', indexer):.0f}"

    return _table("indexer", ("predictions/s", "each", "wait"), change.now, row)


def _table(
    component: str, columns: Iterable[str], now: Snapshot, row: Callable[[str], Iterable[RenderableType]]
) -> RenderableType:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(component, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for process in now.processes(component):
        if now.value("up", process):
            table.add_row(short(process), *row(process))
        else:
            table.add_row(short(process), Text("no answer", style="red"))
    return table


def short(process: str) -> str:
    """A process' name that fits a column: without the id of the run, and with the start of the node's id."""
    return re.sub(r"^[0-9a-f]{12}-(.*-[0-9a-f]{6}).*", r"\1", process)[-16:]


def _bar(share: float, warn: bool = True) -> Text:
    full = round(min(max(share, 0.0), 1.0) * BAR_CELLS)
    style = "green" if not warn or share < NEARLY_FULL else "yellow" if share < FULL else "red"
    return Text("█" * full, style=style) + Text("░" * (BAR_CELLS - full), style="dim") + Text(f" {share:4.0%}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def read(url: str) -> Snapshot:
    """Take a reading. Raises :class:`TopError` when the cluster does not answer."""
    try:
        answer = httpx.get(f"{url}/metrics/cluster", timeout=DEADLINE_S, trust_env=False)
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise TopError(f"{url}/metrics/cluster does not answer: {error}; check --url") from error
    return Snapshot.parse(answer.text, time.monotonic())


def run(url: str, interval_s: float, once: bool) -> int:
    """Show the cluster at ``url`` until Ctrl-C, or ``once``. Waits for a cluster that stops answering."""
    url, console = url.rstrip("/"), Console()
    before = read(url)
    time.sleep(interval_s)
    now = read(url)
    if once:
        console.print(render(Change(before, now), url))
        return 0
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(render(Change(before, now), url), refresh=True)
            time.sleep(interval_s)
            try:
                before, now = now, read(url)
            except TopError as error:
                live.update(Group(Text(str(error), style="red"), render(Change(before, now), url)), refresh=True)

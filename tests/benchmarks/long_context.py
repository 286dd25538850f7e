"""The measurements of `bench_long_context.py`, over one engine."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from client import BenchmarkError, Client, Steady, Track, steady
from harness import copy_bandwidth, host_bandwidth, machine_facts, now, percentiles, weight_bytes
from long_context_row import Row
from profiling import copy_share
from synthetic import SyntheticIndexer, make_template, scored_chunks, store_prompts

from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.selection import budget_chunks
from forecache.workers.core.stats import EngineCounters
from forecache.workers.llm import LLM

SYNTHETIC = "synthetic, one template chunk"
COMPUTED = "computed"
PROGRESS_S = 10.0
SUFFIX_TOKENS = 64


@dataclass(frozen=True)
class Options:
    """How to measure. ``settings`` is for the rows to show; at ``deadline_s`` (`time.perf_counter`) a prefill ends."""

    shape: str
    settings: str
    max_tokens: int
    concurrency: int | None
    turnovers: tuple[float, ...]
    repeat: int
    fill_threads: int
    deadline_s: float
    start_s: float


class Bench:
    """Measures rows one after another; the arena and the model stay."""

    def __init__(self, llm: LLM, indexer: SyntheticIndexer, selection: SelectionConfig, options: Options) -> None:
        self.llm = llm
        self.indexer = indexer
        self.options = options
        self.client = Client(llm.engine)
        self.device = llm.backbone.device
        self._fresh = itertools.count(1)
        self._selection = selection
        self._template = make_template(llm.cold_layout, llm.index_spec)
        self._weights = weight_bytes(llm.backbone.model)
        self._copy_bytes_per_s = copy_bandwidth(self.device)
        self._host_bytes_per_s = host_bandwidth(llm.memory.arena.chunks, self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the buffers that were copied
        self._facts: dict[str, Any] = machine_facts(self.device)

    def decode(self, context: int) -> Iterator[Row]:
        """As many requests of ``context`` tokens as fit, with every turnover in turn."""
        concurrency = self.concurrency(context)
        baseline: float | None = None
        for turnover in self.options.turnovers:
            tracks, fill_s = self.start_decoding(context, concurrency, turnover)
            row = self._decoded("decode", context, SYNTHETIC, tracks, baseline, fill_s=fill_s)
            if turnover == 0.0:
                baseline = row.settled_tokens_per_s
            yield row

    def start_decoding(self, context: int, concurrency: int, turnover: float | None) -> tuple[list[Track], float]:
        """Requests over stored prompts, and the seconds that storing them took."""
        prompts = [self._prompt(context, number) for number in range(concurrency)]
        fill_s = self._store(prompts)
        self.indexer.impose(turnover)
        return [self.client.add(prompt, self.options.max_tokens) for prompt in prompts], fill_s

    def prefill(self, context: int) -> Iterator[Row]:
        """One prompt of which nothing is stored."""
        self._begin()
        before = self.llm.engine.stats().counters
        track = self.client.add(self._prompt(context, 0, fresh=True), 1)
        self.client.finish()
        stats, ttft_s = track.account, track.account.time_to_first_token_s
        stall_s = self.llm.engine.stats().counters.prefetch_stall_s - before.prefetch_stall_s
        self._begin()
        share = None
        if self.device.type == "cuda":
            other = self.client.add(self._prompt(context, 1, fresh=True), 1)
            self.client.run_until(lambda: 2 * other.prefilled_tokens >= context)
            share = copy_share(self.client.step)
            self.client.cancel()
        yield self._row(
            "prefill",
            context,
            1,
            COMPUTED,
            cached_tokens=stats.cached_tokens,
            prefilled_tokens=stats.prompt_tokens - stats.cached_tokens,
            prefill_tokens_per_s=context / ttft_s,
            tflop_per_s=self._prefill_flop(context) / ttft_s / 1e12,
            ttft_p50_s=ttft_s,
            stall_s=stall_s,
            copy_share=share,
        )

    def resume(self, context: int) -> Iterator[Row]:
        """Sessions whose ``context`` tokens are in cold memory alone, and that go on with some tokens more."""
        session = self._prompt(context, 0)
        fill_s = self._store([[*session, 0]])
        turns = [session + self._prompt(SUFFIX_TOKENS, i, fresh=True) for i in range(self.options.repeat + 1)]
        self.indexer.impose(None)
        times = []
        for turn in turns:
            self.client.empty_hot_pool()
            track = self.client.add(turn, 1)
            self.client.finish()
            self._check_cached([track], context)
            times.append(track.account.time_to_first_token_s)
        p20, p50, p80 = percentiles(times[1:])  # the first one warms up
        history = (context // self.llm.config.chunk_tokens) * self.llm.cold_layout.nbytes
        yield self._row(
            "resume",
            context,
            1,
            SYNTHETIC,
            cached_tokens=track.account.cached_tokens,
            prefilled_tokens=track.account.prompt_tokens - track.account.cached_tokens,
            ttft_p20_s=p20,
            ttft_p50_s=p50,
            ttft_p80_s=p80,
            floor_s=history / self._host_bytes_per_s,
            fill_s=fill_s,
        )

    def real(self, context: int) -> Iterator[Row]:
        """Prefill of every token, then decode over it with the true predictions; what the deadline allows."""
        self._begin()
        self.indexer.impose(None)
        prompt = self._prompt(context, 0, fresh=True)
        start = time.perf_counter()
        track = self.client.add(prompt, self.options.max_tokens)
        self._watch_prefill(track)
        done, prefill_s = track.prefilled_tokens, time.perf_counter() - start
        note = ""
        if not track.token_s:
            # out of time: decode over what was computed, which a request with that much of the prompt finds stored
            note = f"time limit: {done} of {context} tokens were prefilled, then decoded over"
            self.client.cancel()
            self.llm.engine.flush()
            track = self.client.add(prompt[:done], self.options.max_tokens)
            self.client.run_until(lambda: bool(track.token_s))
        yield self._decoded(
            "real",
            context,
            COMPUTED,
            [track],
            None,
            ttft_p50_s=prefill_s if not note else None,
            prefilled_tokens=done,
            prefill_tokens_per_s=done / prefill_s,
            tflop_per_s=self._prefill_flop(done) / prefill_s / 1e12,
            note=note,
        )

    def concurrency(self, context: int) -> int:
        """As many requests as the arena and the hot pool hold, or fewer if so asked."""
        config, arena, pool = self.llm.config, self.llm.memory.arena, self.llm.engine.pool
        chunks = -(-(context + self.options.max_tokens) // config.chunk_tokens)
        budget = budget_chunks(chunks, config.keep_ratio, self._selection)
        # old and new set side by side, and what a window adds
        hot = budget + scored_chunks(chunks, config.keep_ratio, self._selection)
        hot += config.window_steps // config.chunk_tokens + 2
        fits = min(arena.slots // chunks, pool.num_slots // hot, config.max_batch_size)
        if fits < 1:
            raise BenchmarkError(
                f"{context} tokens need {chunks} cold and {hot} hot chunks, but there are {arena.slots} and "
                f"{pool.num_slots}: raise --cold-gib or --hot-gib"
            )
        return min(fits, self.options.concurrency or fits)

    def _decoded(
        self, name: str, context: int, kv: str, tracks: list[Track], baseline: float | None, **values: Any
    ) -> Row:
        """Decode to the end, and account for the time in which all of ``tracks`` did."""
        self.client.run_until(lambda: all(track.token_s for track in tracks))
        if kv == SYNTHETIC:
            print(f"{name} {context}: {len(tracks)} requests decode", flush=True)
        first_window = self.llm.config.window_steps
        self.client.run_until(lambda: _over(tracks) or all(len(track.token_s) > first_window for track in tracks))
        settled_from = self.llm.engine.stats().counters
        self.client.run_until(lambda: _over(tracks))
        settled_to = self.llm.engine.stats().counters
        self.client.finish()
        if kv == SYNTHETIC:
            self._check_cached(tracks, context - 1)
        window, settled = steady(tracks), steady(tracks, skip_tokens=first_window)
        stats = [track.account for track in tracks]
        resident = sum(one.resident_bytes for one in stats)
        floor_s = (self._weights + resident) / self._copy_bytes_per_s
        p20, p50, p80 = percentiles(window.gaps_s)
        firsts = percentiles([one.time_to_first_token_s for one in stats])
        times = dict(zip(("ttft_p20_s", "ttft_p50_s", "ttft_p80_s"), firsts, strict=True)) if kv == SYNTHETIC else {}
        return self._row(
            name,
            context,
            len(tracks),
            kv,
            kept_ratio=sum(one.keep_ratio for one in stats) / len(stats),
            late_windows=sum(one.late_windows for one in stats),
            steps=len(window.gaps_s),
            p20_ms=p20 * 1e3,
            p50_ms=p50 * 1e3,
            p80_ms=p80 * 1e3,
            floor_ms=floor_s * 1e3,
            over_floor=p50 / floor_s,
            tokens_per_s=window.tokens_per_s,
            settled_tokens_per_s=settled.tokens_per_s,
            loss_to_recall=None if baseline is None else 1 - settled.tokens_per_s / baseline,
            cached_tokens=min(one.cached_tokens for one in stats),
            resident_bytes=resident,
            **self._turnover(settled, len(tracks), settled_from, settled_to),
            **times,
            **values,
        )

    def _turnover(
        self, settled: Steady, concurrency: int, before: EngineCounters, after: EngineCounters
    ) -> dict[str, Any]:
        """What was recalled in the settled time, whose statistics at its begin and end are given."""
        turns = [turn for turn in self.indexer.turns if settled.start_s <= turn.at_s <= settled.end_s]
        windows = concurrency * len(settled.gaps_s) / self.llm.config.window_steps
        recalled = after.recalled_chunks - before.recalled_chunks
        scored = sum(turn.scored for turn in turns)
        recall_s = after.recall_s - before.recall_s
        return {
            "turnover_asked": self.indexer.turnover,
            "turnover": recalled / scored if scored else None,
            "turnover_per_window": recalled * len(turns) / scored / windows if scored else None,
            "turns": len(turns),
            "windows": windows,
            "predict_p50_ms": percentiles([turn.at_s - turn.asked_s for turn in turns])[1] * 1e3 if turns else None,
            "recalled_chunks": recalled,
            "recall_gb_per_s": (after.recall_bytes - before.recall_bytes) / recall_s / 1e9 if recall_s else None,
            "stall_s": after.prefetch_stall_s - before.prefetch_stall_s,
        }

    def _watch_prefill(self, track: Track) -> None:
        """Until the first token or the deadline, saying how far it is: a run that is cut off has its figures."""
        at = said = start = time.perf_counter()
        while not track.token_s and (at < self.options.deadline_s or track.prefilled_tokens == 0):
            self.client.step()
            at = time.perf_counter()
            if at - said >= PROGRESS_S or track.token_s:
                said, passed_s = at, at - start
                rate = self._prefill_flop(track.prefilled_tokens) / passed_s / 1e12
                print(f"prefill: {track.prefilled_tokens} tokens, {passed_s:.1f} s, {rate:.1f} TFLOP/s", flush=True)

    def _check_cached(self, tracks: Sequence[Track], stored: int) -> None:
        """Raises :class:`BenchmarkError` unless every request found all full chunks of ``stored`` tokens, but for the
        last tokens of its prompt, which are always computed."""
        for track in tracks:
            found = min(stored, track.prompt_tokens - self.llm.engine.windows.fresh_tokens)
            expected = found // self.llm.config.chunk_tokens * self.llm.config.chunk_tokens
            if track.account.cached_tokens != expected:
                raise BenchmarkError(f"a request found {track.account.cached_tokens} tokens stored, not {expected}")

    def _store(self, prompts: Sequence[Sequence[int]]) -> float:
        self._begin()
        return store_prompts(self.llm, prompts, self._template, self.options.fill_threads)

    def _begin(self) -> None:
        self.client.empty_hot_pool()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _prompt(self, tokens: int, number: int, *, fresh: bool = False) -> list[int]:
        """Random tokens: the same for equal arguments, or ``fresh`` ones."""
        seed = [tokens, number, next(self._fresh) if fresh else 0]
        vocabulary = self.llm.backbone.config.vocab_size
        tokens_of: list[int] = np.random.default_rng(seed).integers(0, vocabulary, tokens).tolist()
        return tokens_of

    def _prefill_flop(self, tokens: int) -> float:
        """Of the matrices and of causal attention."""
        geometry = self.llm.backbone.geometry
        attention = 2.0 * geometry.layers * geometry.heads * geometry.head_dim * tokens**2
        return 2.0 * self.llm.backbone.body_parameters * tokens + attention

    def _row(self, name: str, context: int, concurrency: int, kv: str, **values: Any) -> Row:
        config, options = self.llm.config, self.options
        on_gpu = self.device.type == "cuda"
        return Row(
            row=name,
            shape=options.shape,
            context=context,
            concurrency=concurrency,
            kv=kv,
            keep_ratio=config.keep_ratio,
            window_steps=config.window_steps,
            settings=options.settings,
            copy_gb_per_s=self._copy_bytes_per_s / 1e9,
            host_copy_gb_per_s=self._host_bytes_per_s / 1e9,
            weight_bytes=self._weights,
            hot_bytes=self.llm.engine.pool.memory.nbytes,
            arena_bytes=self.llm.memory.arena.description.file_bytes,
            gpu_peak_bytes=torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
            start_s=options.start_s,
            date=now(),
            **self._facts,
            **{name: _rounded(value) for name, value in values.items()},
        )


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _over(tracks: Sequence[Track]) -> bool:
    """Whether one of them has ended."""
    return any(track.stats is not None for track in tracks)

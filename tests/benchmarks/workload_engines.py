"""The engines that `bench_workloads.py` measures, in this process, and the loop that drives one through a row."""

import heapq
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from workload_rows import Prompts, Session, percentiles

from forecache.indexer.serving.config import IndexerConfig
from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams
from forecache.workers.errors import ForecacheError
from forecache.workers.llm import LLM

GIB = 1 << 30
LONGEST_STEPS = 5


@dataclass(frozen=True)
class News:
    """What one step brought one request. ``cached_tokens``: prompt tokens that were found stored, once known."""

    request_id: str
    token_ids: Sequence[int]
    finished: bool
    cached_tokens: int | None = None
    error: str | None = None


class MeasuredEngine(Protocol):
    """An engine in this process that takes requests between its steps."""

    def add(self, request_id: str, prompt: Sequence[int], answer_tokens: int, session_id: str | None) -> None:
        """Queue a greedy request whose answer has exactly ``answer_tokens``."""

    def step(self) -> list[News]:
        """Advance all requests; returns what is new, possibly nothing."""

    def memory(self) -> dict[str, int]:
        """What it has for K/V: by its own units, which the names say."""

    def close(self) -> None: ...


class ForecacheEngine:
    """forecache's `LLM`. ``keep_ratio``: of the requests added from now on.

    Args:
        model: directory of the model.
        manifest: its retrieval heads; ``None``: those that forecache has for this model.
        settings: fields of the engine's and the memory's configuration.
    """

    def __init__(self, model: str, manifest: Path | None, settings: dict[str, Any]) -> None:
        indexer = IndexerConfig() if manifest is None else IndexerConfig(manifest=str(manifest))
        self.llm = LLM(model, skip_tokenizer=True, indexer=indexer, **settings)
        self.keep_ratio = self.llm.config.keep_ratio

    def add(self, request_id: str, prompt: Sequence[int], answer_tokens: int, session_id: str | None) -> None:
        sampling = SamplingParams(max_tokens=answer_tokens, ignore_eos=True)
        cache = CacheOptions(keep_ratio=self.keep_ratio, session_id=session_id)
        self.llm.engine.add_request(GenerateRequest(request_id, tuple(prompt), sampling, cache))

    def step(self) -> list[News]:
        return [
            News(
                event.request_id,
                event.token_ids,
                event.finish_reason is not None,
                None if event.stats is None else event.stats.cached_tokens,
                event.error,
            )
            for event in self.llm.engine.step()
        ]

    def memory(self) -> dict[str, int]:
        pool, arena = self.llm.engine.pool, self.llm.memory.arena
        return {
            "hot_bytes": pool.num_slots * self.llm.backbone.layout.nbytes,
            "cold_bytes": arena.slots * self.llm.cold_layout.nbytes,
        }

    def close(self) -> None:
        self.llm.close()


class VllmEngine:
    """vLLM's engine, in this process, with the defaults of its server.

    Args:
        offload_bytes: CPU memory for K/V; ``None``: it offloads nothing.
        arguments: fields of vLLM's ``EngineArgs``, over those given here.
    """

    def __init__(self, model: str, offload_bytes: int | None, arguments: dict[str, Any]) -> None:
        from vllm import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        given: dict[str, Any] = {"model": model, "skip_tokenizer_init": True, "disable_log_stats": True}
        if offload_bytes is not None:
            given["kv_offloading_size"] = offload_bytes / GIB
        self._engine: Any = LLMEngine.from_engine_args(
            EngineArgs(**given | arguments), usage_context=UsageContext.OPENAI_API_SERVER
        )

    def add(self, request_id: str, prompt: Sequence[int], answer_tokens: int, session_id: str | None) -> None:
        from vllm import SamplingParams as VllmSamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = VllmSamplingParams(
            max_tokens=answer_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(request_id, {"prompt_token_ids": list(prompt)}, sampling)

    def step(self) -> list[News]:
        return [
            News(output.request_id, output.outputs[0].token_ids, output.finished, output.num_cached_tokens)
            for output in self._engine.step()
        ]

    def memory(self) -> dict[str, int]:
        cache = self._engine.vllm_config.cache_config
        return {"kv_tokens": cache.num_gpu_blocks * cache.block_size}

    def close(self) -> None:
        self._engine.engine_core.shutdown()


@dataclass
class Track:
    """One request of a row. Times are in seconds from the start of the row; ``token_s``: when each token came."""

    kind: str
    turn: int
    due_s: float
    prompt_tokens: int
    answer_tokens: int
    token_ids: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    cached_tokens: int | None = None
    error: str | None = None

    @property
    def first_token_s(self) -> float:
        return self.token_s[0] - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.token_s)]


@dataclass(frozen=True)
class Course:
    """A row as it went: its requests in the order they were sent, and the seconds of each step of the engine."""

    tracks: list[Track]
    total_s: float
    step_s: list[float]

    def figures(self) -> dict[str, Any]:
        """The figures of the row. Percentiles are in seconds; ``cached_tokens`` is of all prompts together."""
        good = [track for track in self.tracks if track.error is None]
        answered = sum(len(track.token_ids) for track in good)
        prompts = sum(track.prompt_tokens for track in good)
        cached = [track.cached_tokens for track in good if track.cached_tokens is not None]
        first_tokens_s = [track.token_s[0] for track in good]
        kinds = sorted({track.kind for track in good})
        return {
            "requests": len(self.tracks),
            "errors": dict(Counter(track.error for track in self.tracks if track.error is not None)),
            "total_s": round(self.total_s, 3),
            "prompt_tokens": prompts,
            "answer_tokens": answered,
            "cached_tokens": sum(cached) if cached else None,
            "prompt_tokens_per_s": round(prompts / self.total_s, 1),
            "answer_tokens_per_s": round(answered / self.total_s, 1),
            "first_token_s": percentiles([track.first_token_s for track in good]),
            "between_tokens_s": percentiles([gap for track in good for gap in track.gaps_s]),
            "first_token_s_by_kind": {
                kind: percentiles([track.first_token_s for track in good if track.kind == kind]) for kind in kinds
            },
            "beside": self._beside(),
            "after_last_first_token_s": round(self.total_s - max(first_tokens_s, default=0.0), 3),
            "steps": len(self.step_s),
            "step_p50_ms": round(statistics.median(self.step_s) * 1e3, 3),
            "longest_steps_s": [round(step_s, 3) for step_s in sorted(self.step_s)[-LONGEST_STEPS:]],
        }

    def _beside(self) -> dict[str, Any] | None:
        """Gaps between tokens of the streams before the document was sent, and those that overlap its prefill.

        ``None`` if the row has no streams, or the document no answer.
        """
        streams = [track for track in self.tracks if track.kind == "stream" and track.error is None]
        documents = [track for track in self.tracks if track.kind == "document" and track.error is None]
        if not streams or not documents:
            return None
        sent_s, first_token_s = documents[0].due_s, documents[0].token_s[0]
        gaps = [gap for track in streams for gap in pairwise(track.token_s)]
        return {
            "gaps_before_s": percentiles([later - earlier for earlier, later in gaps if later <= sent_s]),
            "gaps_during_s": percentiles(
                [later - earlier for earlier, later in gaps if later > sent_s and earlier < first_token_s]
            ),
            "streams_that_lasted": sum(track.token_s[-1] >= first_token_s for track in streams),
            "document_first_token_s": round(documents[0].first_token_s, 6),
        }


@dataclass
class _Progress:
    """A session under way: its history, the new tokens of each turn, and the turn that is next or running."""

    session: Session
    new_tokens: list[list[int]]
    history: list[int] = field(default_factory=list)
    turn: int = 0


def drive(engine: MeasuredEngine, sessions: Sequence[Session], prompts: Prompts, run: str) -> Course:
    """Send all turns of ``sessions`` when they are due, and step the engine until every answer is complete.

    Requests are added between two steps; one that falls due during a step waits for its end, which its time to first
    token includes. A session ends at its first error. ``run``: part of all request ids.
    """
    running = [_Progress(session, [prompts.draw(turn.new_tokens) for turn in session.turns]) for session in sessions]
    due = [(session.start_s, number) for number, session in enumerate(sessions) if session.after_tokens is None]
    heapq.heapify(due)
    waiting = {number: session.after_tokens for number, session in enumerate(sessions) if session.after_tokens}
    tracks: list[Track] = []
    live: dict[str, tuple[int, Track]] = {}
    step_s: list[float] = []
    begun = time.perf_counter()
    now_s = 0.0
    while due or live:
        if waiting and not due:
            fewest = min(len(track.token_ids) for track in tracks)
            for number in [number for number, tokens in waiting.items() if fewest >= tokens]:
                del waiting[number]
                heapq.heappush(due, (now_s, number))
        while due and due[0][0] <= now_s:
            due_s, number = heapq.heappop(due)
            progress = running[number]
            turn = progress.session.turns[progress.turn]
            progress.history += progress.new_tokens[progress.turn]
            name = f"{run}-{number}-{progress.turn}"
            kind = progress.session.kind
            track = Track(kind, progress.turn, due_s, len(progress.history), turn.answer_tokens)
            tracks.append(track)
            live[name] = (number, track)
            session_id = f"{run}-{number}" if len(progress.session.turns) > 1 else None
            try:
                engine.add(name, progress.history, turn.answer_tokens, session_id)
            except (ForecacheError, ValueError) as error:  # refused; vLLM raises the latter
                track.error = str(error)
                del live[name]
        if not live:
            if due:
                time.sleep(max(0.0, due[0][0] - (time.perf_counter() - begun)))
                now_s = time.perf_counter() - begun
            continue
        step_begun_s = time.perf_counter() - begun
        news = engine.step()
        now_s = time.perf_counter() - begun
        step_s.append(now_s - step_begun_s)
        for item in news:
            if item.request_id not in live:
                continue
            number, track = live[item.request_id]
            track.token_ids += item.token_ids
            track.token_s += [now_s] * len(item.token_ids)
            if item.cached_tokens is not None:
                track.cached_tokens = item.cached_tokens
            if item.finished:
                del live[item.request_id]
                track.error = item.error
                if track.error is None and len(track.token_ids) != track.answer_tokens:
                    track.error = f"{len(track.token_ids)} tokens instead of {track.answer_tokens}"
                progress = running[number]
                progress.history += track.token_ids
                progress.turn += 1
                if track.error is None and progress.turn < len(progress.session.turns):
                    heapq.heappush(due, (now_s, number))
    return Course(tracks, now_s, step_s)

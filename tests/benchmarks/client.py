"""Requests to an engine in this process, and when each of their tokens came."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from forecache.workers.core.requests import GenerateRequest, SamplingParams, SequenceStats
from forecache.workers.engine.engine import Engine


class BenchmarkError(RuntimeError):
    """What was measured is not what was asked for; the message says what to change."""


@dataclass
class Track:
    """One request. ``token_s``: when each token came, by `time.perf_counter`; ``stats`` once it is over."""

    prompt_tokens: int
    added_s: float
    prefilled_tokens: int = 0
    token_s: list[float] = field(default_factory=list)
    stats: SequenceStats | None = None

    @property
    def account(self) -> SequenceStats:
        assert self.stats is not None, "the request is still running"
        return self.stats


@dataclass(frozen=True)
class Steady:
    """The time in which all requests decode. ``gaps_s``: between successive tokens of the one that began last."""

    start_s: float
    end_s: float
    tokens: int
    gaps_s: tuple[float, ...]

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.duration_s


def steady(tracks: Sequence[Track], skip_tokens: int = 0) -> Steady:
    """From the moment the last request has its first token (and ``skip_tokens`` more) to when the first one ends.

    Raises :class:`BenchmarkError` if there is no such time.
    """
    last = max(tracks, key=lambda track: track.token_s[0])
    start = max(track.token_s[min(skip_tokens, len(track.token_s) - 1)] for track in tracks)
    end = min(track.token_s[-1] for track in tracks)
    if end <= start:
        raise BenchmarkError("one request was over before the last one decoded: raise --max-tokens")
    tokens = sum(start < at <= end for track in tracks for at in track.token_s)
    times = [at for at in last.token_s if start <= at <= end]
    gaps = tuple(later - earlier for earlier, later in pairwise(times))
    return Steady(start, end, tokens, gaps)


class Client:
    """Adds requests and steps the engine, as a server's loop would."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tracks: dict[str, Track] = {}
        self._added = 0

    def add(self, prompt: Sequence[int], max_tokens: int) -> Track:
        """Queue a greedy request that does not stop before ``max_tokens``."""
        request_id = f"bench-{self._added}"
        self._added += 1
        track = self._tracks[request_id] = Track(len(prompt), time.perf_counter())
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self._engine.add_request(GenerateRequest(request_id, tuple(prompt), sampling))
        return track

    def step(self) -> None:
        """One step of the engine. Raises :class:`BenchmarkError` when a request fails."""
        events = self._engine.step()
        now = time.perf_counter()
        for event in events:
            track = self._tracks[event.request_id]
            track.prefilled_tokens = max(track.prefilled_tokens, event.prefill_tokens_done)
            track.token_s += [now] * len(event.token_ids)
            if event.finish_reason is not None:
                track.stats = event.stats
                del self._tracks[event.request_id]
            if event.error is not None:
                raise BenchmarkError(f"a request failed: {event.error}")

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            if not self._tracks:
                raise BenchmarkError("the requests were over before what was waited for: raise --max-tokens")
            self.step()

    def finish(self) -> None:
        """Run until every request is over."""
        while self._tracks:
            self.step()

    def cancel(self) -> None:
        """End every request now."""
        for request_id in self._tracks:
            self._engine.cancel(request_id)
        self.finish()

    def empty_hot_pool(self) -> None:
        """Wait for write-backs, then evict: what comes next finds its chunks in cold memory only."""
        self._engine.flush()
        self._engine.pool.evict_all()

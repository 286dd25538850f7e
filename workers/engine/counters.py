"""What may be asked of the engine, and the account of what it did."""

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from forecache.workers.core.requests import FinishReason, GenerateRequest, SamplingParams, SequenceStats
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.stats import RECALL_BOUNDS_S, EngineStats
from forecache.workers.engine.scheduler import Scheduler
from forecache.workers.errors import InvalidRequestError
from forecache.workers.memory.client.protocol import ColdMemory
from forecache.workers.memory.hot.completions import Recalled
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.step.architecture import Backbone


def check_request(request: GenerateRequest, backbone: Backbone, cold_slots: int, *, text: bool) -> None:
    """Raise :class:`InvalidRequestError` for a request that can never be served; ``text``: there is a tokenizer."""
    vocabulary = int(backbone.config.vocab_size)
    _check_sampling(request.sampling, vocabulary, text=text)
    prompt, answer = len(request.prompt_token_ids), request.sampling.max_tokens
    limit, layout = backbone.max_model_len, backbone.layout
    if not prompt:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    if answer < 1:
        raise InvalidRequestError(f"max_tokens must be at least 1, not {answer}", param="max_tokens")
    if prompt + answer > limit:
        raise InvalidRequestError(
            f"the model's context is {limit} tokens, but the request asks for {prompt + answer}: "
            f"{prompt} in the prompt and up to {answer} in the answer.",
            param="messages",
        )
    if len(request.resume_token_ids) >= answer:
        raise InvalidRequestError(f"the answer is complete: {answer} tokens", param="resume_token_ids")
    for param, token_ids in (("prompt", request.prompt_token_ids), ("resume_token_ids", request.resume_token_ids)):
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocabulary):
            raise InvalidRequestError(f"a token id is outside the vocabulary of {vocabulary}", param=param)
    keep_ratio = request.cache.keep_ratio
    if keep_ratio is not None and not 0 < keep_ratio <= 1:
        raise InvalidRequestError(f"keep_ratio must be in (0, 1], not {keep_ratio}", param="forecache.keep_ratio")
    window_steps = request.cache.window_steps
    if window_steps is not None and window_steps < 1:
        raise InvalidRequestError(f"window must be at least 1 step, not {window_steps}", param="forecache.window")
    chunks = -(-(prompt + answer) // layout.chunk_tokens)
    if chunks > cold_slots:
        raise InvalidRequestError(
            f"prompt and answer may need {chunks} chunks of {layout.nbytes} bytes, but cold memory holds {cold_slots}. "
            "Shorten the prompt, lower max_tokens or raise --cold-bytes.",
            param="messages",
        )


def most_chunks(memory: ColdMemory, *, spreads: bool) -> int:
    """The most chunks that a request of this node can have, were all of its memory free: more than its arena holds,
    where sequences of the model are spread (``spreads``) and there are other nodes to spread them over."""
    return memory.arena.slots + (memory.arena.record_slots if spreads and memory.spread is not None else 0)


def _check_sampling(sampling: SamplingParams, vocabulary: int, *, text: bool) -> None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InvalidRequestError(f"temperature must be 0 or more, not {sampling.temperature}", param="temperature")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequestError(f"top_p must be in (0, 1], not {sampling.top_p}", param="top_p")
    if sampling.top_k < 0:
        raise InvalidRequestError(f"top_k must be 0 (all) or more, not {sampling.top_k}", param="top_k")
    if "" in sampling.stop:
        raise InvalidRequestError("a stop string is empty", param="stop")
    if sampling.stop and not text:
        raise InvalidRequestError("stop strings need a tokenizer, and this engine has none", param="stop")
    for name in ("presence_penalty", "frequency_penalty"):
        if not math.isfinite(value := getattr(sampling, name)):
            raise InvalidRequestError(f"{name} must be a finite number, not {value}", param=name)
    if sampling.logprobs is not None and sampling.logprobs < 0:
        raise InvalidRequestError(f"logprobs must be 0 or more, not {sampling.logprobs}", param="logprobs")
    for token, bias in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise InvalidRequestError(f"token id {token} is outside the vocabulary of {vocabulary}", "logit_bias")
        if not math.isfinite(bias):
            raise InvalidRequestError(f"a bias must be a finite number, not {bias}", "logit_bias")


def sequence_stats(seq: TokenSequence, chunk_bytes: int) -> SequenceStats:
    """The account a client gets of its request."""
    counters = seq.counters
    chunks = len(seq.chunks) + 1
    resident = chunks if seq.residency.streamed else len(seq.residency.slots) + 1
    arrived, admitted = counters.arrived_s, counters.admitted_s
    return SequenceStats(
        prompt_tokens=seq.prompt_len,
        cached_tokens=counters.cached_tokens,
        completion_tokens=len(seq.output_ids),
        context_chunks=chunks,
        resident_chunks=resident,
        recalled_chunks=counters.recalled_chunks,
        late_windows=counters.late_windows,
        keep_ratio=counters.kept_sum / counters.kept_steps if counters.kept_steps else 1.0,
        coverage=counters.coverage_sum / counters.coverages if counters.coverages else None,
        fallbacks=counters.fallbacks,
        context_bytes=chunks * chunk_bytes,
        resident_bytes=resident * chunk_bytes,
        queue_s=0.0 if admitted is None else admitted - arrived,
        locate_s=counters.locate_s,
        time_to_first_token_s=0.0 if counters.first_token_s is None else counters.first_token_s - arrived,
    )


def check_references(pool: HotPool, sequences: Iterable[TokenSequence]) -> None:
    """Raise ``AssertionError`` if the pool's references are not exactly those of ``sequences``."""
    held: dict[int, int] = {}
    for seq in sequences:
        residency = seq.residency
        for slot in itertools.chain(residency.slots.values(), seq.open_slots.values(), residency.incoming_slots):
            held[slot] = held.get(slot, 0) + 1
    for slot in range(pool.num_slots):
        assert pool.references(slot) == held.get(slot, 0), (
            f"slot {slot} has {pool.references(slot)} references, sequences hold {held.get(slot, 0)}"
        )


@dataclass
class EngineCounters:
    """Sums since start, named as in :class:`EngineStats`; the engine's thread writes, any may take :meth:`snapshot`."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    recalled_chunks: int = 0
    recall_bytes: int = 0
    recall_s: float = 0.0
    recall_buckets: tuple[int, ...] = (0,) * (len(RECALL_BOUNDS_S) + 1)
    written_back_chunks: int = 0
    written_back_bytes: int = 0
    write_back_s: float = 0.0
    lost_chunks: int = 0
    non_finite_steps: int = 0
    windows: int = 0
    late_windows: int = 0
    failed_predictions: int = 0
    event_hits: int = 0
    event_misses: int = 0
    fallbacks: int = 0
    refused_fallbacks: int = 0
    prefetch_stall_s: float = 0.0
    finished_requests: int = 0
    cancelled_requests: int = 0
    failed_requests: int = 0
    steps: int = 0
    step_s: float = 0.0

    def step(self, duration_s: float) -> None:
        self.steps += 1
        self.step_s += duration_s

    def recall(self, done: Recalled) -> None:
        self.recalled_chunks += done.recalled_chunks
        self.recall_bytes += done.recalled_bytes
        self.recall_s += done.duration_s
        at, counts = bisect_left(RECALL_BOUNDS_S, done.duration_s), self.recall_buckets
        self.recall_buckets = (*counts[:at], counts[at] + 1, *counts[at + 1 :])
        self.lost_chunks += len(done.lost)

    def leave(self, seq: TokenSequence, reason: FinishReason) -> None:
        """``seq`` ended for ``reason``."""
        self.windows += seq.counters.windows
        self.late_windows += seq.counters.late_windows
        self.failed_predictions += seq.counters.failed_predictions
        self.event_hits += seq.counters.event_hits
        self.event_misses += seq.counters.event_misses
        self.fallbacks += seq.counters.fallbacks
        self.refused_fallbacks += seq.counters.refused_fallbacks
        if reason == "cancelled":
            self.cancelled_requests += 1
        elif reason == "error":
            self.failed_requests += 1
        else:
            self.finished_requests += 1

    def snapshot(self, pool: HotPool, scheduler: Scheduler) -> EngineStats:
        running = list(scheduler.running)
        ratios = [seq.resident_share for seq in running if seq.residency.decode_steps]
        return EngineStats(
            running=len(running),
            waiting=len(scheduler.waiting),
            prefill_tokens_left=sum(
                seq.prefill_target - seq.num_computed for seq in running if seq.state is State.PREFILL
            ),
            prefilled_tokens=scheduler.prefilled_tokens,
            prefilled_prompts=scheduler.prefilled_prompts,
            prefill_s=scheduler.prefill_s,
            hot_slots=pool.num_slots,
            hot_slots_used=pool.used,
            hot_slots_referenced=pool.referenced,
            chunk_bytes=pool.layout.nbytes,
            resident_ratio=sum(ratios) / len(ratios) if ratios else 1.0,
            evicted_chunks=pool.evicted_chunks,
            **vars(self),
        )

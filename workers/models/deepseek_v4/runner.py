"""Runs steps of a DeepSeek-V4 model; what :class:`.model_runner.ModelRunner` is to Llama-like ones."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from forecache.indexer.flashmemory.checkpoint import FlashMemoryIndexer
from forecache.indexer.records.index_spec import IndexSpec, encode_chunk
from forecache.workers.core.prompt_logprobs import score, targets_of
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Capture, Plan
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.deepseek_v4.graph import FixedSteps, run_model
from forecache.workers.models.deepseek_v4.layout import FixedRow, StepLayout, put
from forecache.workers.models.deepseek_v4.queries import RetrieverQueries
from forecache.workers.models.deepseek_v4.shape import DeepseekV4Shape
from forecache.workers.models.deepseek_v4.state import SequenceStates
from forecache.workers.models.deepseek_v4.step import V4Batch, V4Stream
from forecache.workers.models.step.architecture import Backbone
from forecache.workers.models.step.graphs import batch_buckets
from forecache.workers.models.step.in_flight_step import CapturedTensors, RunningStep, Written
from forecache.workers.models.step.logits import LogitAdjuster, logprobs_of
from forecache.workers.models.step.sampler import sample

logger = logging.getLogger(__name__)


class DeepseekV4Runner:
    """The model on its device, with the pool it writes into, the arena it may stream from and its sequences' states.

    ``max_rows`` sequences at most have a state at a time; a snapshot of it is kept behind every ``snapshot_tokens``
    tokens. ``retriever``: the trained retrievers of its target layers; without them its own Lightning Indexer asks.
    """

    def __init__(
        self,
        backbone: Backbone,
        pool: HotPool,
        arena: Arena | None,
        spec: IndexSpec,
        *,
        max_rows: int = 1,
        retriever: FlashMemoryIndexer | None = None,
        snapshot_tokens: int = 4096,
    ) -> None:
        shape = DeepseekV4Shape.of(backbone.config)
        self._model = backbone.model
        self._device = backbone.device
        self._spec = spec
        self._queries = RetrieverQueries(backbone.model, shape, spec, retriever, max_rows)
        self._target_rows = torch.tensor(self._queries.targets, device=self._device)
        self._chunk_tokens = backbone.layout.chunk_tokens
        self._snapshot_tokens = max(snapshot_tokens // self._chunk_tokens, 1) * self._chunk_tokens
        self._hot, self._cold = _views(backbone.layout, pool.memory), {}
        self._arena = arena
        if arena is not None:
            self._cold = _views(backbone.layout, arena.chunks)
        self._states = SequenceStates(shape, max_rows, backbone.dtype, backbone.device)
        self._max_tokens = backbone.max_model_len
        self._fixed: FixedSteps | None = None
        self._layout = StepLayout(shape, self._states, pool, self._chunk_tokens)
        self._snapshots: dict[str, dict[int, Tensor]] = {}
        self._last_tokens = torch.zeros(max_rows + 8, dtype=torch.int64, device=self._device)
        self._last_rows: dict[str, int] = {}
        self._adjuster = LogitAdjuster(int(backbone.config.vocab_size), self._device)

    @property
    def snapshot_nbytes(self) -> int:
        """Bytes of a snapshot of one sequence's state."""
        return self._states.snapshot_nbytes

    @torch.inference_mode()
    def launch(self, plan: Plan, aborted: Callable[[], bool] = lambda: False) -> RunningStep:
        """Run ``plan``; every chunk it writes has its slot in the sequence's ``open_slots``.

        Raises :class:`.attention.StepAbortedError` when ``aborted`` turns true on the way: then no state has changed
        that the step would not write again.
        """
        fixed = None if self._fixed is None else self._fixed.run(self._fixed_rows(plan))
        streams: tuple[V4Stream, ...] = ()
        if fixed is not None:
            told, sampled = fixed, list(plan.decode)
            assert self._fixed is not None
            non_finite = self._fixed.non_finite
        else:
            batch, sampled = self._lay_out(plan, aborted)
            told, streams, non_finite = run_model(self._model, batch), batch.streams, batch.non_finite
        scored, logits = score(plan.streams, told[len(sampled) :]), told[: len(sampled)]
        for stream in streams:
            stream.past.read_to_verify(self._cold.get("hca"))
            stream.commit()
        self._keep_snapshots(plan, streams)
        positions = [seq.num_computed + tokens for seq, tokens in zip(sampled, _tokens(plan, sampled), strict=True)]
        adjusted = self._adjuster.adjust(logits, sampled)
        drawn, best = sample(adjusted, [seq.sampling for seq in sampled], positions)
        self._last_tokens[: len(drawn)] = drawn
        self._last_rows = {seq.request_id: row for row, seq in enumerate(sampled)}
        tokens = self._last_tokens[: len(sampled)]
        self._adjuster.drawn(tokens, sampled, positions)
        captured = [self._capture(request) for request in plan.captures]
        probes = {
            part.sequence.request_id: stream.probe
            for part, stream in zip(plan.streams, streams, strict=True)
            if stream.probe is not None
        }
        logprobs = logprobs_of(logits, tokens, sampled)
        cold = [stream.past.reads for stream in streams]
        return RunningStep(
            sampled, tokens, best, logits, logprobs, scored, plan.captures, captured, probes, cold, self._arena,
            Written.by(plan, non_finite),
        )  # fmt: skip

    @torch.inference_mode()
    def warm_up(self, *, max_batch_size: int, max_chunks: int, cuda_graphs: bool | None, torch_compile: bool) -> None:
        """On a GPU, capture decode steps, so that no request waits for it; layers are not compiled."""
        if torch_compile:
            logger.info("layers of DeepSeek-V4 are not compiled: --torch-compile changes nothing")
        if cuda_graphs is False or (cuda_graphs is None and self._device.type != "cuda"):
            return
        start = time.perf_counter()
        self._fixed = self.fixed_steps(batch_buckets(max_batch_size), max_chunks)
        logger.info("%d CUDA graphs after %.1f s", self._fixed.count, time.perf_counter() - start)

    @torch.inference_mode()
    def fixed_steps(self, buckets: Sequence[int], max_chunks: int) -> FixedSteps:
        """Decode steps of as many rows as ``buckets`` say; captured now, so no sequence may be known yet."""
        nothing = torch.zeros(0, dtype=torch.int64, device=self._device)
        return FixedSteps(
            self._model,
            self._batch(nothing, nothing, nothing),
            self._chunk_tokens,
            self._queries.histories,
            self._last_tokens,
            buckets=buckets,
            max_chunks=max_chunks,
            max_tokens=self._max_tokens,
        )

    def wipe(self, seq: TokenSequence) -> None:
        """What the last step computed of ``seq`` is not finite: whoever gets the place of its state next must not find
        that there."""
        self._states.wipe(seq)

    def forget(self, seq: TokenSequence) -> None:
        """``seq`` left, or starts over."""
        self._adjuster.forget(seq.request_id)
        self._states.forget(seq)
        self._queries.histories.forget(seq)
        self._snapshots.pop(seq.request_id, None)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` when lines or pages of states, or lines of hidden states, are lost, or belong to
        two."""
        self._states.check_integrity()
        self._queries.histories.check_integrity()

    def index_record(self, slot: int) -> Tensor:
        """The index keys of the completed chunk in ``slot``: uint8 [spec.nbytes]."""
        with torch.inference_mode():
            return encode_chunk(self._spec, self._hot["index"][slot, self._target_rows])

    def snapshot(self, seq: TokenSequence, stop: int) -> Tensor | None:
        """The state of ``seq`` behind its token ``stop - 1``, uint8 [snapshot_nbytes], if it was kept."""
        return self._snapshots.get(seq.request_id, {}).get(stop)

    @torch.inference_mode()
    def resume(self, seq: TokenSequence, snapshot: Tensor) -> None:
        """``seq``, whose chunks are known, goes on behind them with ``snapshot``."""
        stop = len(seq.chunks) * self._chunk_tokens
        hca = None
        if "hca" in self._hot:
            hca = self._layout.past(seq, stop).gather(self._hot["hca"], self._cold.get("hca"), slice(None))
        self._states.restore(seq, stop, snapshot.to(self._device), hca)
        self._snapshots[seq.request_id] = {stop: snapshot}

    def _lay_out(self, plan: Plan, aborted: Callable[[], bool]) -> tuple[V4Batch, list[TokenSequence]]:
        owners = [*plan.decode, *(part.sequence for part in plan.streams)]
        counts = [*(1 for _ in plan.decode), *(part.tokens for part in plan.streams)]
        tokens: list[int] = []
        positions: list[int] = []
        waiting: list[tuple[int, int]] = []
        sampled, logits_rows = list(plan.decode), list(range(len(plan.decode)))
        scored_rows: list[int] = []
        kept: list[tuple[int, int, int]] = []
        streams = []
        rows = self._layout.rows(plan.decode) if plan.decode else None
        for number, (seq, count) in enumerate(zip(owners, counts, strict=True)):
            span = range(seq.num_computed, seq.num_computed + count)
            line, remembered = self._queries.histories.begin(seq, span.start, span.stop)
            kept += [(len(tokens) + at - span.start, line, at) for at in remembered]
            if number >= len(plan.decode):
                part = plan.streams[number - len(plan.decode)]
                probe = None
                if part.probe and span.stop == seq.prefill_target:
                    probe = self._queries.probe(seq, span.stop, -(-span.stop // self._chunk_tokens))
                wanted = self._wanted(seq, span.start, span.stop)
                streams.append(self._layout.stream(part, len(tokens), wanted, probe))
                scored_rows += range(len(tokens), len(tokens) + len(targets_of(part)))
                if part.draws:
                    sampled.append(seq)
                    logits_rows.append(len(tokens) + count - 1)
            if span.start >= len(seq.token_ids):
                waiting.append((len(tokens), self._last_rows[seq.request_id]))
                tokens.append(0)
            else:
                tokens += seq.token_ids[span.start : span.stop]
            positions += span
        token_ids = put(tokens, self._device)
        if waiting:
            to, source = zip(*waiting, strict=True)
            token_ids[list(to)] = self._last_tokens[list(source)]
        batch = replace(
            self._batch(token_ids, put(positions, self._device), put(logits_rows + scored_rows, self._device)),
            rows=rows,
            streams=tuple(streams),
            hidden=self._queries.histories.rows(kept),
            aborted=aborted,
        )
        return batch, sampled

    def _batch(self, token_ids: Tensor, positions: Tensor, logits_rows: Tensor) -> V4Batch:
        """A step over these tokens, int64 each, that attends to nothing yet."""
        return V4Batch(
            token_ids=token_ids,
            positions=positions,
            logits_rows=logits_rows,
            states=self._states,
            entries=self._hot["entries"],
            index=self._hot["index"],
            hca=self._hot.get("hca"),
            cold_entries=self._cold.get("entries"),
            cold_index=self._cold.get("index"),
            non_finite=torch.zeros(len(token_ids), dtype=torch.uint8, device=self._device),
        )

    def _fixed_rows(self, plan: Plan) -> list[FixedRow]:
        """The rows of ``plan`` for a step of fixed shape; none where it is of another."""
        if plan.streams:
            return []
        return [
            self._layout.fixed_row(
                seq,
                self._last_rows[seq.request_id] if seq.num_computed >= len(seq.token_ids) else None,
                self._queries.histories.begin(seq, seq.num_computed, seq.num_computed + 1)[0],
            )
            for seq in plan.decode
        ]

    def _wanted(self, seq: TokenSequence, first: int, stop: int) -> list[int]:
        """Positions behind which a step over ``first`` to ``stop`` of ``seq`` is to keep a snapshot: every so many
        tokens for everybody, and the last end of a chunk for its session."""
        size = self._chunk_tokens
        every = range((first // self._snapshot_tokens + 1) * self._snapshot_tokens, stop + 1, self._snapshot_tokens)
        wanted = set(every)
        last = stop // size * size
        if seq.cache.session_id is not None and last > first:
            wanted.add(last)
        return sorted(wanted)

    def _keep_snapshots(self, plan: Plan, streams: Sequence[V4Stream]) -> None:
        """Of each sequence those of its newest step that took any. A decode step may come to nothing, since the token
        before it turns out to be the last: until the next one the newest older snapshot stays too."""
        for seq in plan.decode:
            stop, kept = seq.num_computed + 1, self._snapshots.get(seq.request_id, {})
            while len(kept) > 1:
                del kept[min(kept)]
            if self._wanted(seq, stop - 1, stop):
                kept[stop] = self._states.snapshot(self._states.line(seq, stop), stop)
                self._snapshots[seq.request_id] = kept
        for part, stream in zip(plan.streams, streams, strict=True):
            if stream.kept:
                self._snapshots[part.sequence.request_id] = stream.snapshots()

    def _capture(self, request: Capture) -> CapturedTensors:
        """What level 1 is asked with, and records."""
        records = torch.zeros((0, self._spec.nbytes), dtype=torch.uint8)
        if request.local_slots:
            records = torch.stack([self.index_record(slot) for slot in request.local_slots])
        queries, weights = self._queries.ask(request.sequence, request.position)
        # the open chunk is always resident: no softmax needs to know of it
        return CapturedTensors(queries, torch.zeros_like(weights), records, weights=weights)


def _tokens(plan: Plan, sequences: Sequence[TokenSequence]) -> list[int]:
    """Of each of ``sequences``, how many tokens ``plan`` computes."""
    counts = {part.sequence.request_id: part.tokens for part in plan.streams}
    return [counts.get(seq.request_id, 1) for seq in sequences]


def _views(layout: ChunkLayout, memory: Tensor) -> dict[str, Tensor]:
    return {field.name: layout.view(memory, field.name) for field in layout.fields}

"""Runs steps of a DeepSeek-V4 model; what :class:`.model_runner.ModelRunner` is to Llama-like ones."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from forecache.indexer.flashmemory.checkpoint import FlashMemoryIndexer
from forecache.indexer.records.index_spec import IndexSpec, encode_chunk
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Capture, Plan
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.deepseek_v4.graph import FixedSteps, run_model
from forecache.workers.models.deepseek_v4.layout import FixedRow, StepLayout
from forecache.workers.models.deepseek_v4.queries import RetrieverQueries
from forecache.workers.models.deepseek_v4.shape import DeepseekV4Shape
from forecache.workers.models.deepseek_v4.state import SequenceStates
from forecache.workers.models.deepseek_v4.step import V4Batch, V4Stream
from forecache.workers.models.step.architecture import Backbone
from forecache.workers.models.step.graphs import batch_buckets
from forecache.workers.models.step.in_flight_step import CapturedTensors
from forecache.workers.models.step.packing import pack, put
from forecache.workers.models.step.runner import Forward, Runner

logger = logging.getLogger(__name__)


class DeepseekV4Runner(Runner):
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
        super().__init__(int(backbone.config.vocab_size), backbone.device, arena, max_rows)
        self._model = backbone.model
        self._spec = spec
        self._queries = RetrieverQueries(backbone.model, shape, spec, retriever, max_rows)
        self._target_rows = torch.tensor(self._queries.targets, device=self._device)
        self._chunk_tokens = backbone.layout.chunk_tokens
        self._snapshot_tokens = max(snapshot_tokens // self._chunk_tokens, 1) * self._chunk_tokens
        self._hot, self._cold = _views(backbone.layout, pool.memory), {}
        if arena is not None:
            self._cold = _views(backbone.layout, arena.chunks)
        self._states = SequenceStates(shape, max_rows, backbone.dtype, backbone.device)
        self._max_tokens = backbone.max_model_len
        self._fixed: FixedSteps | None = None
        self._layout = StepLayout(shape, self._states, pool, self._chunk_tokens)
        self._snapshots: dict[str, dict[int, Tensor]] = {}

    @property
    def snapshot_nbytes(self) -> int:
        """Bytes of a snapshot of one sequence's state."""
        return self._states.snapshot_nbytes

    def _forward_plan(self, plan: Plan, aborted: Callable[[], bool]) -> Forward:
        logits = None if self._fixed is None else self._fixed.run(self._fixed_rows(plan))
        if logits is not None:
            assert self._fixed is not None
            self._keep_snapshots(plan, ())
            return Forward(list(plan.decode), logits, self._fixed.non_finite)
        batch, sampled = self._lay_out(plan, aborted)
        logits = run_model(self._model, batch)
        for stream in batch.streams:
            stream.past.read_to_verify(self._cold.get("hca"))
            stream.commit()
        self._keep_snapshots(plan, batch.streams)
        probes = {
            part.sequence.request_id: stream.probe
            for part, stream in zip(plan.streams, batch.streams, strict=True)
            if stream.probe is not None
        }
        cold = [stream.past.reads for stream in batch.streams]
        return Forward(sampled, logits, batch.non_finite, cold=cold, probes=probes)

    @torch.inference_mode()
    def warm_up(
        self,
        *,
        max_batch_size: int,
        max_step_tokens: int,
        max_chunks: int,
        cuda_graphs: bool | None,
        torch_compile: bool,
    ) -> None:
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
        """Make decode steps of fixed shape for ``buckets`` rows, and capture them. No sequence may exist yet."""
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
        """Zero the state of ``seq``, whose last step was not finite, before another sequence gets its place."""
        self._states.wipe(seq)

    def forget(self, seq: TokenSequence) -> None:
        super().forget(seq)
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
        """Let ``seq`` continue from ``snapshot``, after its known chunks."""
        stop = len(seq.chunks) * self._chunk_tokens
        hca = None
        if "hca" in self._hot:
            hca = self._layout.past(seq, stop).gather(self._hot["hca"], self._cold.get("hca"), slice(None))
        self._states.restore(seq, stop, snapshot.to(self._device), hca)
        self._snapshots[seq.request_id] = {stop: snapshot}

    def _lay_out(self, plan: Plan, aborted: Callable[[], bool]) -> tuple[V4Batch, list[TokenSequence]]:
        rows = self._layout.rows(plan.decode) if plan.decode else None
        packed = pack(plan, self._last_rows, self._queries.histories)
        streams = []
        for part, start in zip(plan.streams, packed.starts, strict=True):
            seq, first, stop = part.sequence, part.sequence.num_computed, part.sequence.num_computed + part.tokens
            probe = None
            if part.probe and stop == seq.prefill_target:
                probe = self._queries.probe(seq, stop, -(-stop // self._chunk_tokens))
            streams.append(self._layout.stream(part, start, self._wanted(seq, first, stop), probe))
        batch = replace(
            self._batch(
                packed.token_ids(self._last_tokens),
                put(packed.positions, self._device),
                put(packed.logits_rows + packed.scored_rows, self._device),
            ),
            rows=rows,
            streams=tuple(streams),
            hidden=self._queries.histories.rows(packed.kept),
            aborted=aborted,
        )
        return batch, packed.sampled

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
        """The rows of ``plan`` for a step of fixed shape; empty if the plan does not fit one."""
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
        """Positions after which a step over ``first`` to ``stop`` of ``seq`` keeps a snapshot.

        These are every ``snapshot_tokens`` for all sequences, and the last end of a chunk for the sequence's session.
        """
        size = self._chunk_tokens
        every = range((first // self._snapshot_tokens + 1) * self._snapshot_tokens, stop + 1, self._snapshot_tokens)
        wanted = set(every)
        last = stop // size * size
        if seq.cache.session_id is not None and last > first:
            wanted.add(last)
        return sorted(wanted)

    def _keep_snapshots(self, plan: Plan, streams: Sequence[V4Stream]) -> None:
        """Keep the snapshots of the newest step of each sequence that made any.

        A decode step may be discarded, if the token before it turns out to be the last. So the newest older snapshot is
        kept until the next step.
        """
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

    def _captured(self, request: Capture, forward: Forward) -> CapturedTensors:
        """The queries for choosing chunks, and the records of chunks that are not stored."""
        records = torch.zeros((0, self._spec.nbytes), dtype=torch.uint8)
        if request.local_slots:
            records = torch.stack([self.index_record(slot) for slot in request.local_slots])
        queries, weights = self._queries.ask(request.sequence, request.position)
        # the open chunk is always resident: no softmax needs to know of it
        return CapturedTensors(queries, torch.zeros_like(weights), records, weights=weights)


def _views(layout: ChunkLayout, memory: Tensor) -> dict[str, Tensor]:
    return {field.name: layout.view(memory, field.name) for field in layout.fields}

"""Runs steps: lays out the packed batch, calls the transformers model, draws tokens, fetches what the host needs."""

import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from forecache.indexer.records.index_spec import IndexSpec, encode_chunk
from forecache.indexer.serving.lookahead import LookaheadScorer
from forecache.workers.core.prompt_logprobs import Scored, score, targets_of
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Capture, DecodeRow, DecodeRows, Plan, StreamPart
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.dense.attention import QueryCapture, StepBatch, StreamRows
from forecache.workers.models.dense.compiled_layers import (
    MIN_TOKENS,
    check_compiled_once,
    compile_layers,
    compiled_graphs,
)
from forecache.workers.models.dense.graph import DecodeGraphs
from forecache.workers.models.dense.prompt_probe import MassProbe
from forecache.workers.models.dense.remote_past import RemotePast
from forecache.workers.models.dense.streamed_past import PastReader, PieceBuffers, Store, StreamedPast
from forecache.workers.models.step.architecture import Backbone
from forecache.workers.models.step.hidden_history import NOBODYS_LINE, HiddenHistory
from forecache.workers.models.step.in_flight_step import CapturedTensors, RunningStep, Written
from forecache.workers.models.step.logits import LogitAdjuster, logprobs_of
from forecache.workers.models.step.runner import Stateless
from forecache.workers.models.step.sampler import draw_rows, sample

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = (37, 101)
"""No dimension of a model: dynamo takes equal sizes for the same size, and compiles again where they part."""


class ModelRunner(Stateless):
    """The model on its device, with the pool it writes into and the arena it may stream from.

    ``max_rows`` sequences at most are sampled in one step; ``cold_layout`` is the arena's, where it is not the pool's;
    ``remote`` reads chunks of other nodes.
    ``spec``: the model's own retrieval heads; ``lookahead``: the trained indexer that scores beside them.
    """

    def __init__(
        self,
        backbone: Backbone,
        pool: HotPool,
        arena: Arena | None,
        spec: IndexSpec,
        max_rows: int = 1,
        cold_layout: ChunkLayout | None = None,
        lookahead: LookaheadScorer | None = None,
        remote: RemotePast | None = None,
    ) -> None:
        self._backbone = backbone
        self._model = backbone.model
        self._device = backbone.device
        self._pool = pool
        self._arena = arena
        self._remote = remote
        self._hot = _store(backbone.layout, pool.memory)
        self._cold = None if arena is None else _store(cold_layout or backbone.layout, arena.chunks)
        self._spec = spec
        self._graphs: DecodeGraphs | None = None
        self._min_tokens = 1
        self._last_tokens = torch.zeros(max_rows + 8, dtype=torch.int64, device=self._device)
        self._last_rows: dict[str, int] = {}
        self._adjuster = LogitAdjuster(int(backbone.config.vocab_size), self._device)
        self._query_heads = _heads_by_layer(spec, self._device)
        self._key_layers = torch.tensor([layer for layer, _ in spec.kv_heads], device=self._device)
        self._key_heads = torch.tensor([head for _, head in spec.kv_heads], device=self._device)
        rows = spec if lookahead is None else lookahead.spec
        self._query_to_kv = torch.tensor(rows.query_to_kv, device=self._device)
        self._lookahead = None if lookahead is None else lookahead.to(self._device)
        self._histories: HiddenHistory | None = None
        if lookahead is not None:
            layers = lookahead.manifest.target_layers
            self._histories = HiddenHistory(self._model, layers, lookahead.steps, max_rows)
        self._buffers: PieceBuffers | None = None

    @torch.inference_mode()
    def launch(self, plan: Plan, aborted: Callable[[], bool] = lambda: False) -> RunningStep:
        """Enqueue ``plan``; every chunk it writes has its slot in the sequence's ``open_slots``.

        On a GPU this returns while the step runs. Raises :class:`.attention.StepAbortedError` when ``aborted`` turns
        true on the way.
        """
        rows = [self._decode_row(seq) for seq in plan.decode]
        pasts: tuple[StreamedPast, ...] = ()
        probes, scored = dict[str, MassProbe](), tuple[Scored, ...]()
        if self._graphs is not None and not plan.streams and self._graphs.takes(rows):
            replayed = self._graphs.replay(rows)
            logits, best, queries = replayed.logits, replayed.best, replayed.queries
            non_finite = replayed.non_finite
            sampled = list(plan.decode)
            adjusted = self._adjuster.adjust(logits, sampled)
            if adjusted is not logits:
                self._last_tokens[: len(sampled)] = adjusted.argmax(-1)
            positions = [seq.num_computed + 1 for seq in sampled]
            draw_rows(adjusted, [seq.sampling for seq in sampled], positions, self._last_tokens[: len(sampled)])
        else:
            batch, sampled, pasts, probes = self._lay_out(plan, rows, aborted)
            logits = self._forward(batch)
            scored, logits = score(plan.streams, logits[len(sampled) :]), logits[: len(sampled)]
            positions = [seq.num_computed + plan.tokens_of(seq) for seq in sampled]
            adjusted = self._adjuster.adjust(logits, sampled)
            drawn, best = sample(adjusted, [seq.sampling for seq in sampled], positions)
            self._last_tokens[: len(drawn)] = drawn
            queries = {} if batch.capture is None else batch.capture.queries
            assert batch.non_finite is not None
            non_finite = batch.non_finite
        self._last_rows = {seq.request_id: row for row, seq in enumerate(sampled)}
        tokens = self._last_tokens[: len(sampled)]
        self._adjuster.drawn(tokens, sampled, positions)
        captured = [self._capture(request, queries) for request in plan.captures]
        return RunningStep(
            sampled,
            tokens,
            best,
            logits,
            logprobs_of(logits, tokens, sampled),
            scored,
            plan.captures,
            captured,
            probes,
            [past.cold for past in pasts],
            self._arena,
            Written.by(plan, non_finite),
        )

    @torch.inference_mode()
    def warm_up(self, *, max_batch_size: int, max_chunks: int, cuda_graphs: bool | None, torch_compile: bool) -> None:
        """On a GPU, compile the layers and capture decode steps, so that no request waits for either.

        Raises :class:`ForecacheError` when batch sizes or layers can't share what was compiled.
        """
        start = time.perf_counter()
        if torch_compile:
            compile_layers(self._model, self._backbone.geometry)
            self._min_tokens = MIN_TOKENS
        first: list[int] = []
        for tokens in WARM_UP_TOKENS if torch_compile else WARM_UP_TOKENS[:1]:
            self._forward(self._padding(tokens))
            first.append(compiled_graphs())
        if cuda_graphs is not False:
            self._graphs = DecodeGraphs(
                self._model,
                self._hot,
                self._query_heads,
                self._last_tokens,
                max_batch_size=max_batch_size,
                max_chunks=max_chunks,
                histories=self._histories,
            )
        if torch_compile:
            check_compiled_once(first[0], compiled_graphs())
        logger.info("warmed up in %.1f s", time.perf_counter() - start)

    def forget(self, seq: TokenSequence) -> None:
        """``seq`` left, or starts over: nothing more is asked of its last steps, and its weights on logits can go."""
        self._adjuster.forget(seq.request_id)
        if self._histories is not None:
            self._histories.forget(seq)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` when what is kept of sequences' last steps contradicts itself."""
        if self._histories is not None:
            self._histories.check_integrity()

    def index_record(self, slot: int) -> Tensor:
        """The index keys of the completed chunk in ``slot``: uint8 [spec.nbytes]."""
        with torch.inference_mode():
            return encode_chunk(self._spec, self._index_keys(slot))

    def _index_keys(self, slot: int) -> Tensor:
        """[kv heads of the spec, chunk_tokens, head_dim]."""
        keys = self._hot.kv[slot, self._key_layers, 0, self._key_heads]
        if self._hot.scale is None:
            return keys
        return keys.float() * self._hot.scale[slot, self._key_layers, 0, self._key_heads, None, None]

    def _capture(self, request: Capture, queries: dict[int, Tensor]) -> CapturedTensors:
        """Queries, log-sum-exp over the tail, and records; see :class:`.step.Captured`."""
        by_layer = {layer: iter(q[request.row].unbind(0)) for layer, q in queries.items()}
        mine = torch.stack([next(by_layer[layer]) for layer, _ in self._spec.query_heads])
        records = torch.zeros((0, self._spec.nbytes), dtype=torch.uint8)
        if request.local_slots:
            records = torch.stack([encode_chunk(self._spec, self._index_keys(slot)) for slot in request.local_slots])
        position = request.position
        if self._lookahead is None or self._histories is None:
            positions = torch.full((len(mine),), position, device=self._device)
            return CapturedTensors(mine, self._local_lse(request, mine, positions), records)
        # an older query also saw what is complete by now; where that is not hot any more, nobody knows how much
        steps = self._histories.length(request.sequence, position)
        steps = min(steps, position + 2 - request.first_recent * self._spec.chunk_tokens)
        hidden = self._histories.last(request.sequence, position, steps)
        rows = torch.cat([self._lookahead.queries(hidden, position), mine])
        lse = self._local_lse(request, rows, self._lookahead.positions(position, steps))
        return CapturedTensors(rows, lse, records, hidden[-1], steps)

    def _local_lse(self, request: Capture, queries: Tensor, positions: Tensor) -> Tensor:
        """Log-sum-exp of ``queries`` [rows, head_dim], made at ``positions`` [rows], over the tokens that each saw
        beside the chunks that were complete then: float32 [rows]."""
        size, first = self._spec.chunk_tokens, request.first_recent * self._spec.chunk_tokens
        keys = torch.cat([self._index_keys(slot) for slot in request.recent_slots], 1)
        keys = keys[:, : request.position + 1 - first].float()
        logits = torch.einsum("hd,htd->ht", queries, keys[self._query_to_kv]) * self._spec.scale
        tokens = torch.arange(first, request.position + 1, device=self._device)
        at = positions.unsqueeze(1)
        return logits.masked_fill((tokens > at) | (tokens < (at + 1) // size * size), -torch.inf).logsumexp(1)

    def _forward(self, batch: StepBatch) -> Tensor:
        """float32 [logits rows, vocab]."""
        output = self._model(
            input_ids=batch.token_ids.unsqueeze(0),
            position_ids=batch.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=batch.logits_rows,
            forecache=batch,
        )
        logits: Tensor = output.logits[0].float()
        return logits

    def _decode_row(self, seq: TokenSequence) -> DecodeRow:
        awaited = seq.num_computed >= len(seq.token_ids)
        offset = seq.num_computed % seq.chunk_tokens
        table = seq.block_row()
        return DecodeRow(
            token=-1 if awaited else seq.token_ids[seq.num_computed],
            source=self._last_rows[seq.request_id] if awaited else -1,
            position=seq.num_computed,
            slot=int(table[-1]),
            offset=offset,
            context_len=(len(table) - 1) * seq.chunk_tokens + offset + 1,
            table=table,
            version=(seq.holder, seq.residency.version),  # request ids come again
            line=self._line(seq),
        )

    def _line(self, seq: TokenSequence) -> int:
        at, histories = seq.num_computed, self._histories
        return NOBODYS_LINE if histories is None else histories.begin(seq, at, at + 1)[0]

    def _lay_out(
        self, plan: Plan, rows: list[DecodeRow], aborted: Callable[[], bool]
    ) -> tuple[StepBatch, list[TokenSequence], tuple[StreamedPast, ...], dict[str, MassProbe]]:
        tokens = [row.token for row in rows]
        places = [(row.position, row.slot, row.offset) for row in rows]
        sampled, logits_rows = list(plan.decode), list(range(len(rows)))
        streams: list[StreamRows] = []
        pasts: list[StreamedPast] = []
        probes: dict[str, MassProbe] = {}
        kept = [(number, row.line, row.position) for number, row in enumerate(rows)]
        scored_rows: list[int] = []
        for part in plan.streams:
            seq, start = part.sequence, len(tokens)
            span = range(seq.num_computed, seq.num_computed + part.tokens)
            tokens += seq.token_ids[span.start : span.stop] if span.start < len(seq.token_ids) else [-1]
            places += [(i, seq.open_slots[i // seq.chunk_tokens], i % seq.chunk_tokens) for i in span]
            if self._histories is not None:
                line, positions_kept = self._histories.begin(seq, span.start, span.stop)
                kept += [(start + i - span.start, line, i) for i in positions_kept]
            if part.draws:
                sampled.append(seq)
                logits_rows.append(len(tokens) - 1)
            scored_rows += range(start, start + len(targets_of(part)))
            if part.probe:
                probes[seq.request_id] = self._probe(part)
            streams.append(self._stream_rows(part, start, probes.get(seq.request_id)))
            pasts.append(
                StreamedPast.of(seq, self._pool, self._arena, self._hot, self._cold, self._device, self._remote)
            )
        padding = max(self._min_tokens - len(tokens), 0)
        tokens += [0] * padding
        places += [(0, -1, 0)] * padding
        positions, slots, offsets = self._put(np.array(places).T)
        token_ids = self._put(np.array(tokens))
        waiting = [i for i, token in enumerate(tokens) if token < 0]
        if waiting:
            owners = [*plan.decode, *(part.sequence for part in plan.streams)]
            sources = [self._last_rows[owners[i].request_id] for i in waiting]
            token_ids[waiting] = self._last_tokens[sources]
        capture = None
        if plan.captures:
            capture = QueryCapture(torch.arange(len(rows), device=self._device), self._query_heads)
        past = None
        if streams:
            if self._device.type == "cuda" and self._buffers is None:
                geometry = self._backbone.geometry
                self._buffers = PieceBuffers(geometry.kv_heads, geometry.head_dim, self._backbone.dtype, self._device)
            segments = [past.segments for past in pasts]
            past = PastReader(segments, self._backbone.geometry.layers, self._backbone.dtype, self._buffers)
        batch = StepBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            offsets=offsets,
            logits_rows=self._put(np.array(logits_rows + scored_rows, dtype=np.int64)),
            pool=self._hot,
            decode=self._table_of(rows) if rows else None,
            streams=tuple(streams),
            past=past,
            capture=capture,
            hidden=None if self._histories is None else self._histories.rows(kept),
            non_finite=torch.zeros(len(tokens), dtype=torch.uint8, device=self._device),
            aborted=aborted,
        )
        return batch, sampled, tuple(pasts), probes

    def _padding(self, tokens: int) -> StepBatch:
        """A batch that computes and keeps nothing."""
        zeros = torch.zeros(tokens, dtype=torch.int64, device=self._device)
        table = DecodeRows(torch.zeros(tokens, 1, dtype=torch.int32, device=self._device), zeros.to(torch.int32))
        return StepBatch(zeros, zeros, zeros - 1, zeros, zeros[:1], self._hot, table)

    def _put(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)

    def _table_of(self, rows: Sequence[DecodeRow]) -> DecodeRows:
        table = np.zeros((len(rows), max(len(row.table) for row in rows)), dtype=np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row.table)] = row.table
        return DecodeRows(self._put(table), self._put(np.array([row.context_len for row in rows], dtype=np.int32)))

    def _stream_rows(self, part: StreamPart, start: int, probe: MassProbe | None) -> StreamRows:
        seq = part.sequence
        slots = [seq.open_slots[len(seq.chunks)]] if seq.tail_tokens else []
        open_slot = self._put(np.array(slots, dtype=np.int64))
        return StreamRows(start, start + part.tokens, open_slot, seq.tail_tokens, len(seq.chunks), probe)

    def _probe(self, part: StreamPart) -> MassProbe:
        seq = part.sequence
        chunks = -(-(seq.num_computed + part.tokens) // seq.chunk_tokens)
        return MassProbe(self._query_heads, part.probe, chunks, seq.chunk_tokens, self._backbone.geometry.scale)


def _store(layout: ChunkLayout, memory: Tensor) -> Store:
    names = {field.name for field in layout.fields}
    return Store(layout.view(memory, "kv"), layout.view(memory, "scale") if "scale" in names else None)


def _heads_by_layer(spec: IndexSpec, device: torch.device) -> dict[int, Tensor]:
    """layer → its query heads, in the order the spec lists them."""
    heads: dict[int, list[int]] = {}
    for layer, head in spec.query_heads:
        heads.setdefault(layer, []).append(head)
    return {layer: torch.tensor(members, device=device) for layer, members in heads.items()}

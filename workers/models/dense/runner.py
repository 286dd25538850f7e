"""Runs steps: lays out the packed batch, calls the transformers model, draws tokens, fetches what the host needs."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forecache.indexer.records.index_spec import IndexSpec, encode_chunk
from forecache.indexer.serving.lookahead import LookaheadScorer
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Capture, DecodeRow, DecodeRows, Plan, StreamPart
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.dense.attention import PromptRows, QueryCapture, StepBatch, StreamRows, run_model
from forecache.workers.models.dense.compiled_layers import (
    MIN_TOKENS,
    check_compiled_once,
    compile_layers,
    compiled_graphs,
)
from forecache.workers.models.dense.graph import DecodeGraphs
from forecache.workers.models.dense.mixed_graph import MixedGraphs, PackedTokens, PromptTable
from forecache.workers.models.dense.prompt_probe import ChunkMass, MassProbe, ProbedHeads, ProbedPrompt
from forecache.workers.models.dense.remote_past import RemotePast
from forecache.workers.models.dense.streamed_past import PastReader, PieceBuffers, Store, StreamedPast
from forecache.workers.models.step.architecture import Backbone
from forecache.workers.models.step.graphs import OutputBuffers
from forecache.workers.models.step.hidden_history import SPARE_LINE, HiddenHistory
from forecache.workers.models.step.in_flight_step import CapturedTensors
from forecache.workers.models.step.packing import PackedStep, pack, padded, put
from forecache.workers.models.step.runner import Forward, PastLostError, Runner, StepAbortedError

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = (37, 101)
"""No dimension of a model: dynamo takes equal sizes for the same size, and compiles again where they part."""


class ModelRunner(Runner):
    """The model on its device, with the pool it writes into and the arena it may stream from.

    ``max_rows`` sequences at most are sampled in one step; ``cold_layout`` is the arena's, if it differs from the
    pool's; ``remote`` reads chunks of other nodes.
    ``spec``: the model's own retrieval heads; ``lookahead``: the trained indexer that scores in addition to them.
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
        super().__init__(int(backbone.config.vocab_size), backbone.device, arena, max_rows)
        self._backbone = backbone
        self._model = backbone.model
        self._pool = pool
        self._remote = remote
        self._hot = _store(backbone.layout, pool.memory)
        self._cold = None if arena is None else _store(cold_layout or backbone.layout, arena.chunks)
        self._spec = spec
        self._graphs: DecodeGraphs | None = None
        self._mixed: MixedGraphs | None = None
        self._min_tokens = 1
        self._query_heads = _heads_by_layer(spec, self._device)
        geometry = backbone.geometry
        self._probed_heads = ProbedHeads(
            self._query_heads, geometry.heads // geometry.kv_heads, geometry.scale, self._device
        )
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
        if self._device.type == "cuda" and (arena is not None or remote is not None):
            # at once, so that they are counted before the hot pool is sized
            self._buffers = PieceBuffers(geometry.kv_heads, geometry.head_dim, backbone.dtype, self._device)

    def _forward_plan(self, plan: Plan, aborted: Callable[[], bool]) -> Forward:
        if self._graphs is not None and not plan.streams:
            rows = [self._decode_row(seq) for seq in plan.decode]
            if self._graphs.takes(rows):
                replayed = self._graphs.replay(rows)
                sampled = list(plan.decode)
                return Forward(sampled, replayed.logits, replayed.non_finite, replayed.best, replayed.queries)
        packed = pack(plan, self._last_rows, self._histories)
        pasts = [self._past(part.sequence) for part in plan.streams]
        if plan.streams and (forward := self._replay_mixed(plan, packed, pasts)) is not None:
            return forward
        probes = {
            part.sequence.request_id: self._probe(part, past)
            for part, past in zip(plan.streams, pasts, strict=True)
            if part.probe
        }
        batch = self._lay_out(plan, packed, pasts, probes, aborted)
        try:
            logits = self._forward(batch)
        except (StepAbortedError, PastLostError):
            if batch.past is not None:
                batch.past.abandon()
            raise
        queries = {} if batch.capture is None else batch.capture.queries
        assert batch.non_finite is not None
        cold = [past.cold for past in pasts]
        return Forward(packed.sampled, logits, batch.non_finite, queries=queries, cold=cold, probes=probes)

    def _replay_mixed(self, plan: Plan, packed: PackedStep, pasts: Sequence[StreamedPast]) -> Forward | None:
        """Run ``plan`` as a step of fixed shape; ``None`` if it has none."""
        if self._mixed is None or packed.scored_rows or any(past.segments for past in pasts):
            return None
        rows = [self._decode_row(seq) for seq in plan.decode]
        prompts = [
            PromptTable(np.array(slots, np.int32), past_len, start, start + part.tokens, part.probe)
            for part, start, (slots, past_len) in zip(
                plan.streams, packed.starts, self._prompt_pasts(plan.streams, pasts), strict=True
            )
        ]
        if not self._mixed.takes(rows, prompts, len(packed.logits_rows)):
            return None
        output = self._mixed.replay(self._packed_tokens(plan, packed), rows, prompts, packed.logits_rows)
        probes: dict[str, ChunkMass] = {}
        probed = [(part, past) for part, past in zip(plan.streams, pasts, strict=True) if part.probe]
        if probed:
            of_prompts = [_probed_prompt(part, past) for part, past in probed]
            masses = self._probed_heads.masses(output.probe_queries, output.probe_lse, of_prompts, self._hot)
            probes = {part.sequence.request_id: mass for (part, _), mass in zip(probed, masses, strict=True)}
        return Forward(
            packed.sampled, output.logits, output.non_finite, output.best, queries=output.queries, probes=probes
        )

    def _packed_tokens(self, plan: Plan, packed: PackedStep) -> PackedTokens:
        count = len(packed.tokens)
        sources, lines = np.full(count, -1), np.full(count, SPARE_LINE)
        for at, row in packed.awaited:
            sources[at] = row
        for at, line, _ in packed.kept:
            lines[at] = line
        slots, offsets = _places(plan)
        return PackedTokens(np.array(packed.tokens), sources, np.array(packed.positions), slots, offsets, lines)

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
            outputs = OutputBuffers()
            self._graphs = DecodeGraphs(
                self._model,
                self._hot,
                self._query_heads,
                self._last_tokens,
                max_batch_size=max_batch_size,
                max_chunks=max_chunks,
                outputs=outputs,
                histories=self._histories,
            )
            self._mixed = MixedGraphs(
                self._model,
                self._hot,
                self._query_heads,
                self._last_tokens,
                max_tokens=max_step_tokens,
                max_rows=max_batch_size,
                max_chunks=max_chunks,
                max_prompt_chunks=-(-self._backbone.max_model_len // self._spec.chunk_tokens),
                outputs=outputs,
                histories=self._histories,
            )
        if torch_compile:
            check_compiled_once(first[0], compiled_graphs())
        logger.info("warmed up in %.1f s", time.perf_counter() - start)

    def forget(self, seq: TokenSequence) -> None:
        super().forget(seq)
        if self._histories is not None:
            self._histories.forget(seq)

    def check_integrity(self) -> None:
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

    def _captured(self, request: Capture, forward: Forward) -> CapturedTensors:
        """Queries, log-sum-exp over the tail, and records; see :class:`.step.Captured`."""
        by_layer = {layer: iter(q[request.row].unbind(0)) for layer, q in forward.queries.items()}
        mine = torch.stack([next(by_layer[layer]) for layer, _ in self._spec.query_heads])
        records = torch.zeros((0, self._spec.nbytes), dtype=torch.uint8)
        if request.local_slots:
            records = torch.stack([encode_chunk(self._spec, self._index_keys(slot)) for slot in request.local_slots])
        position = request.position
        if self._lookahead is None or self._histories is None:
            positions = torch.full((len(mine),), position, device=self._device)
            return CapturedTensors(mine, self._local_lse(request, mine, positions), records)
        # older queries also attended to chunks that were open then. Leave out queries whose open chunk is not hot any
        # more: their attention to it can't be computed
        steps = self._histories.length(request.sequence, position)
        steps = min(steps, position + 2 - request.first_recent * self._spec.chunk_tokens)
        hidden = self._histories.last(request.sequence, position, steps)
        rows = torch.cat([self._lookahead.queries(hidden, position), mine])
        lse = self._local_lse(request, rows, self._lookahead.positions(position, steps))
        return CapturedTensors(rows, lse, records, hidden[-1], steps)

    def _local_lse(self, request: Capture, queries: Tensor, positions: Tensor) -> Tensor:
        """Log-sum-exp of each query over the tokens that were not in a complete chunk at its position: float32 [rows].

        ``queries`` [rows, head_dim] were made at ``positions`` [rows].
        """
        size, first = self._spec.chunk_tokens, request.first_recent * self._spec.chunk_tokens
        keys = torch.cat([self._index_keys(slot) for slot in request.recent_slots], 1)
        keys = keys[:, : request.position + 1 - first].float()
        logits = torch.einsum("hd,htd->ht", queries, keys[self._query_to_kv]) * self._spec.scale
        tokens = torch.arange(first, request.position + 1, device=self._device)
        at = positions.unsqueeze(1)
        return logits.masked_fill((tokens > at) | (tokens < (at + 1) // size * size), -torch.inf).logsumexp(1)

    def _forward(self, batch: StepBatch) -> Tensor:
        """float32 [logits rows, vocab]."""
        return run_model(self._model, batch)

    def _decode_row(self, seq: TokenSequence) -> DecodeRow:
        awaited = seq.num_computed >= len(seq.token_ids)
        table = seq.block_row()
        return DecodeRow(
            token=-1 if awaited else seq.token_ids[seq.num_computed],
            source=self._last_rows[seq.request_id] if awaited else -1,
            position=seq.num_computed,
            slot=int(table[-1]),
            offset=seq.num_computed % seq.chunk_tokens,
            context_len=_context_len(seq, len(table)),
            table=table,
            version=(seq.holder, seq.residency.version),  # request ids come again
            line=self._line(seq),
        )

    def _line(self, seq: TokenSequence) -> int:
        at, histories = seq.num_computed, self._histories
        return SPARE_LINE if histories is None else histories.begin(seq, at, at + 1)[0]

    def _lay_out(
        self,
        plan: Plan,
        packed: PackedStep,
        pasts: Sequence[StreamedPast],
        probes: Mapping[str, MassProbe],
        aborted: Callable[[], bool],
    ) -> StepBatch:
        streams = [
            StreamRows(number, start, start + part.tokens, probes.get(part.sequence.request_id))
            for number, (part, past, start) in enumerate(zip(plan.streams, pasts, packed.starts, strict=True))
            if past.segments or part.probe
        ]
        padding = max(self._min_tokens - len(packed.tokens), 0)
        slots, offsets = _places(plan)
        capture = None
        if plan.captures:
            capture = QueryCapture(torch.arange(len(plan.decode), device=self._device), self._query_heads)
        return StepBatch(
            token_ids=packed.token_ids(self._last_tokens, padding=padding),
            positions=put([*packed.positions, *[0] * padding], self._device),
            slots=put(np.pad(slots, (0, padding), constant_values=-1), self._device),
            offsets=put(np.pad(offsets, (0, padding)), self._device),
            logits_rows=put(packed.logits_rows + packed.scored_rows, self._device),
            pool=self._hot,
            decode=self._decode_rows(plan.decode) if plan.decode else None,
            prompts=self._prompt_rows(plan.streams, pasts, packed) if plan.streams else None,
            streams=tuple(streams),
            past=self._past_reader(pasts) if any(past.segments for past in pasts) else None,
            capture=capture,
            hidden=None if self._histories is None else self._histories.rows(packed.kept),
            non_finite=torch.zeros(len(packed.tokens) + padding, dtype=torch.uint8, device=self._device),
            aborted=aborted,
        )

    def _padding(self, tokens: int) -> StepBatch:
        """A batch that computes and keeps nothing."""
        zeros = torch.zeros(tokens, dtype=torch.int64, device=self._device)
        table = DecodeRows(torch.zeros(tokens, 1, dtype=torch.int32, device=self._device), zeros.to(torch.int32))
        return StepBatch(zeros, zeros, zeros - 1, zeros, zeros[:1], self._hot, table)

    def _decode_rows(self, sequences: Sequence[TokenSequence]) -> DecodeRows:
        tables = [seq.block_row() for seq in sequences]
        lens = [_context_len(seq, len(table)) for seq, table in zip(sequences, tables, strict=True)]
        return DecodeRows(padded(tables, self._device), put(lens, self._device, np.int32))

    def _past(self, seq: TokenSequence) -> StreamedPast:
        return StreamedPast.of(seq, self._pool, self._arena, self._hot, self._cold, self._device, self._remote)

    def _past_reader(self, pasts: Sequence[StreamedPast]) -> PastReader:
        segments = [past.segments for past in pasts]
        return PastReader(segments, self._backbone.geometry.layers, self._backbone.dtype, self._buffers)

    def _prompt_rows(
        self, streams: Sequence[StreamPart], pasts: Sequence[StreamedPast], packed: PackedStep
    ) -> PromptRows:
        tables, lens = zip(*self._prompt_pasts(streams, pasts), strict=True)
        starts = [*packed.starts, packed.starts[-1] + streams[-1].tokens]
        return PromptRows(
            padded(tables, self._device), put(lens, self._device, np.int32), put(starts, self._device, np.int32)
        )

    @staticmethod
    def _prompt_pasts(streams: Sequence[StreamPart], pasts: Sequence[StreamedPast]) -> Iterator[tuple[list[int], int]]:
        """Slots in the pool that each stream reads, its open chunk's last, and the tokens in them."""
        for part, past in zip(streams, pasts, strict=True):
            seq = part.sequence
            open_slot = [seq.open_slots[len(seq.chunks)]] if seq.tail_tokens else []
            yield [*past.hot.values(), *open_slot], len(past.hot) * seq.chunk_tokens + seq.tail_tokens

    def _probe(self, part: StreamPart, past: StreamedPast) -> MassProbe:
        seq = part.sequence
        return MassProbe(
            self._query_heads,
            part.probe,
            past.hot | seq.open_slots,
            seq.num_computed + part.tokens,
            seq.chunk_tokens,
            self._backbone.geometry.scale,
            self._device,
        )


def _probed_prompt(part: StreamPart, past: StreamedPast) -> ProbedPrompt:
    seq, stop = part.sequence, part.sequence.num_computed + part.tokens
    slots = past.hot | seq.open_slots
    chunks = range(-(-stop // seq.chunk_tokens))
    return ProbedPrompt(np.array([slots[number] for number in chunks], np.int32), stop, part.probe)


def _places(plan: Plan) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pool slot of each packed token, and its place in the slot's chunk: int64 [tokens] each."""
    owners = [*((seq, 1) for seq in plan.decode), *((part.sequence, part.tokens) for part in plan.streams)]
    slots, offsets = [], []
    for seq, count in owners:
        size = seq.chunk_tokens
        positions = np.arange(seq.num_computed, seq.num_computed + count)
        first, last = positions[0] // size, positions[-1] // size
        of_chunk = np.array([seq.open_slots[number] for number in range(first, last + 1)])
        slots.append(of_chunk[positions // size - first])
        offsets.append(positions % size)
    return np.concatenate(slots), np.concatenate(offsets)


def _context_len(seq: TokenSequence, table: int) -> int:
    """Tokens that a decode row of ``seq`` reads in ``table`` slots, its new one, in the last of them, included."""
    return (table - 1) * seq.chunk_tokens + seq.num_computed % seq.chunk_tokens + 1


def _store(layout: ChunkLayout, memory: Tensor) -> Store:
    names = {field.name for field in layout.fields}
    return Store(layout.view(memory, "kv"), layout.view(memory, "scale") if "scale" in names else None)


def _heads_by_layer(spec: IndexSpec, device: torch.device) -> dict[int, Tensor]:
    """layer → its query heads, in the order the spec lists them."""
    heads: dict[int, list[int]] = {}
    for layer, head in spec.query_heads:
        heads.setdefault(layer, []).append(head)
    return {layer: torch.tensor(members, device=device) for layer, members in heads.items()}

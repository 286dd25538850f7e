"""Runs one step: lays out the packed batch, calls the transformers model, returns logits and what was captured."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from forecache.indexer.index_keys import IndexSpec, encode_chunk
from forecache.workers.decode.attention import (
    DecodeRows,
    MassProbe,
    QueryCapture,
    Segment,
    StepBatch,
    StreamRows,
)
from forecache.workers.decode.backbone import Backbone
from forecache.workers.decode.cuda_graph import DecodeGraphs
from forecache.workers.decode.sequence import Sequence
from forecache.workers.memory.arena import Arena
from forecache.workers.memory.hot_pool import HotPool


@dataclass(frozen=True)
class StreamPart:
    """The next ``tokens`` of ``sequence``, attending to its whole past; ``probe`` asks for the last ones' attention."""

    sequence: Sequence
    tokens: int
    probe: bool = False


@dataclass(frozen=True)
class Plan:
    """One step's work: ``decode`` sequences take one token over their resident set; ``capture`` are those of them, by
    position, whose queries the indexer wants."""

    decode: tuple[Sequence, ...]
    streams: tuple[StreamPart, ...]
    capture: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.decode) + sum(part.tokens for part in self.streams)


@dataclass(frozen=True)
class StepOutput:
    """``logits``: float32 [rows, vocab] for the ``sampled`` sequences; ``queries``: float32 [captured, query heads,
    head_dim]; ``masses``: float32 [chunks] for each probed stream, by request id."""

    sampled: tuple[Sequence, ...]
    logits: torch.Tensor
    queries: torch.Tensor | None
    masses: dict[str, torch.Tensor]


class ModelRunner:
    """The model on its device, with the pool it writes into and the arena it may stream from."""

    def __init__(self, backbone: Backbone, pool: HotPool, arena: Arena | None, spec: IndexSpec) -> None:
        self._model = backbone.model
        self._layout = backbone.layout
        self._device = backbone.device
        self._pool = pool
        self._kv = pool.view("kv")
        self._cold_kv = None if arena is None else backbone.layout.view(arena.chunks, "kv")
        self._spec = spec
        self._graphs: DecodeGraphs | None = None
        self._query_heads = _heads_by_layer(spec, self._device)
        self._key_layers = torch.tensor([layer for layer, _ in spec.kv_heads], device=self._device)
        self._key_heads = torch.tensor([head for _, head in spec.kv_heads], device=self._device)

    @torch.inference_mode()
    def run(self, plan: Plan, aborted: Callable[[], bool]) -> StepOutput:
        """Compute ``plan``; every chunk it writes has its slot in the sequence's ``open_slots``.

        Raises :class:`.attention.StepAbortedError` when ``aborted`` turns true on the way.
        """
        batch, sampled, probes = self._lay_out(plan, aborted)
        if self._graphs is not None and self._graphs.takes(batch):
            logits, captured = self._graphs.replay(batch)
            if batch.capture is not None:
                batch.capture.queries = {layer: q[batch.capture.rows] for layer, q in captured.items()}
        else:
            output = self._model(
                input_ids=batch.token_ids.unsqueeze(0),
                position_ids=batch.positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=batch.logits_rows,
                forecache=batch,
            )
            logits = output.logits[0].float()
        queries = None if batch.capture is None else self._in_spec_order(batch.capture)
        masses = {request_id: probe.mass for request_id, probe in probes.items()}
        return StepOutput(sampled, logits, queries, masses)

    @torch.inference_mode()
    def capture_graphs(self, *, max_batch_size: int, max_chunks: int) -> None:
        """On CUDA, from now on run decode steps as graphs; see :class:`.cuda_graph.DecodeGraphs`."""
        self._graphs = DecodeGraphs(
            self._model, self._kv, self._query_heads, max_batch_size=max_batch_size, max_chunks=max_chunks
        )

    def index_record(self, slot: int) -> torch.Tensor:
        """The index keys of the completed chunk in ``slot``: uint8 [spec.nbytes]."""
        with torch.inference_mode():
            return encode_chunk(self._spec, self._kv[slot, self._key_layers, 0, self._key_heads])

    @torch.inference_mode()
    def local_lse(self, queries: torch.Tensor, slot: int, tokens: int) -> torch.Tensor:
        """Log-sum-exp of ``queries`` [query heads, head_dim] over the first ``tokens`` keys in ``slot``.

        float32 [query heads]; for the tail of a sequence, which has no index record.
        """
        owner = torch.tensor(self._spec.query_to_kv, device=queries.device)
        keys = self._kv[slot, self._key_layers, 0, self._key_heads, :tokens].float()[owner]
        return (torch.einsum("hd,htd->ht", queries, keys) * self._spec.scale).logsumexp(-1)

    def _in_spec_order(self, capture: QueryCapture) -> torch.Tensor:
        """Captured queries [rows, query heads, head_dim], heads as in the index spec."""
        by_layer = {layer: iter(queries.unbind(1)) for layer, queries in capture.queries.items()}
        return torch.stack([next(by_layer[layer]) for layer, _ in self._spec.query_heads], dim=1)

    def _lay_out(
        self, plan: Plan, aborted: Callable[[], bool]
    ) -> tuple[StepBatch, tuple[Sequence, ...], dict[str, MassProbe]]:
        positions: list[np.ndarray] = []
        tokens: list[int] = []
        slots: list[int] = []
        sampled: list[Sequence] = []
        logits_rows: list[int] = []
        streams: list[StreamRows] = []
        probes: dict[str, MassProbe] = {}
        parts = [(seq, 1) for seq in plan.decode] + [(part.sequence, part.tokens) for part in plan.streams]
        start = 0
        for index, (seq, count) in enumerate(parts):
            span = np.arange(seq.num_computed, seq.num_computed + count)
            positions.append(span)
            tokens += seq.token_ids[seq.num_computed : seq.num_computed + count]
            slots += [seq.open_slots[chunk] for chunk in (span // seq.chunk_tokens).tolist()]
            if seq.num_computed + count == len(seq.token_ids):
                sampled.append(seq)
                logits_rows.append(start + count - 1)
            if index >= len(plan.decode):
                part = plan.streams[index - len(plan.decode)]
                probe = self._probe(seq, count) if part.probe else None
                if probe is not None:
                    probes[seq.request_id] = probe
                streams.append(self._stream_rows(seq, start, count, probe))
            start += count
        position = torch.from_numpy(np.concatenate(positions)).to(self._device)
        capture = None
        if plan.capture:
            capture = QueryCapture(torch.tensor(plan.capture, device=self._device), self._query_heads)
        batch = StepBatch(
            token_ids=torch.tensor(tokens, device=self._device),
            positions=position,
            slots=torch.tensor(slots, device=self._device),
            offsets=position % self._layout.chunk_tokens,
            logits_rows=torch.tensor(logits_rows, dtype=torch.int64, device=self._device),
            kv=self._kv,
            decode=self._decode_rows(plan.decode) if plan.decode else None,
            streams=tuple(streams),
            capture=capture,
            aborted=aborted,
        )
        return batch, tuple(sampled), probes

    def _decode_rows(self, sequences: Seq[Sequence]) -> DecodeRows:
        rows = [
            [*(seq.resident[i] for i in sorted(seq.resident)), seq.open_slots[len(seq.chunks)]] for seq in sequences
        ]
        table = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
        lens = [
            (len(row) - 1) * seq.chunk_tokens + seq.tail_tokens + 1 for row, seq in zip(rows, sequences, strict=True)
        ]
        return DecodeRows(
            torch.from_numpy(table).to(self._device),
            torch.tensor(lens, dtype=torch.int32, device=self._device),
        )

    def _stream_rows(self, seq: Sequence, start: int, count: int, probe: MassProbe | None) -> StreamRows:
        hot: list[tuple[int, int]] = []
        cold: list[tuple[int, int]] = []
        for number, chunk in enumerate(seq.chunks):
            slot = seq.resident.get(number)
            if slot is None:
                slot = self._pool.lookup(chunk.key)
            if slot is not None:
                hot.append((number, slot))
            else:
                assert chunk.ref is not None, f"chunk {number} of {seq.request_id} is neither hot nor in the arena"
                cold.append((number, chunk.ref.slot))
        segments = []
        for kv, entries in ((self._kv, hot), (self._cold_kv, cold)):
            if entries:
                assert kv is not None, "chunks are cold but there is no arena"
                numbers, places = torch.tensor(entries, device=self._device).unbind(1)
                segments.append(Segment(kv, places.contiguous(), numbers.contiguous()))
        open_slot = seq.open_slots[len(seq.chunks)] if seq.tail_tokens else 0
        return StreamRows(start, start + count, tuple(segments), open_slot, seq.tail_tokens, len(seq.chunks), probe)

    def _probe(self, seq: Sequence, count: int) -> MassProbe:
        chunks = -(-(seq.num_computed + count) // seq.chunk_tokens)
        return MassProbe(self._query_heads, min(count, PROBE_QUERIES), torch.zeros(chunks, device=self._device))


PROBE_QUERIES = 4
"""Last prompt tokens whose attention chooses the first resident set."""


def _heads_by_layer(spec: IndexSpec, device: torch.device) -> dict[int, torch.Tensor]:
    """layer → its query heads, in the order the spec lists them."""
    heads: dict[int, list[int]] = {}
    for layer, head in spec.query_heads:
        heads.setdefault(layer, []).append(head)
    return {layer: torch.tensor(members, device=device) for layer, members in heads.items()}

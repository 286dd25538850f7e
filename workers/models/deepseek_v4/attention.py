"""DeepSeek-V4's attention over chunks: what transformers' modules compute, reading and writing the hot pool.

The modules keep their weights and their class's other methods; called without a step of ours they do what they did.
Entries that a token completes are written first, so that it may select them itself, as in transformers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, apply_rotary_pos_emb

from forecache.kernels.attention import ops
from forecache.kernels.csa import ops as csa
from forecache.kernels.csa.prefill import attend_prefill, score_entries_of_one
from forecache.workers.models.deepseek_v4.shape import CSA, HCA, DeepseekV4Shape
from forecache.workers.models.deepseek_v4.step import Places, V4Batch, V4Rows, V4Stream
from forecache.workers.models.step.runner import StepAbortedError

SCORES = 1 << 26
"""Scores of a stream's tokens held at a time: 256 MiB."""
WINDOW_PART, CSA_PART, INDEX_PART = range(3)
"""Parts of a snapshot, in the order of :meth:`.state.SequenceStates.rings`."""


class ServedAttention(DeepseekV4Attention):
    """Attention of one layer; ``number`` counts it among those of its kind. Made by :func:`serve_attention`."""

    number: int

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: dict[str, tuple[Tensor, Tensor]],
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        forecache: V4Batch | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden_states`` [1, tokens, hidden] of the packed step ``forecache``.

        Raises :class:`.runner.StepAbortedError` between two layers when the step is no longer wanted.
        """
        if forecache is None:
            output, weights = super().forward(
                hidden_states, position_embeddings, position_ids, attention_mask, past_key_values, **kwargs
            )
            return output, weights
        batch = forecache
        if batch.aborted():
            raise StepAbortedError
        cos, sin = position_embeddings[self.rope_layer_type]
        tokens = hidden_states.shape[1]
        residual = self.q_a_norm(self.q_a_proj(hidden_states))
        q = self.q_b_norm(self.q_b_proj(residual).view(1, tokens, -1, self.head_dim).transpose(1, 2))
        q = apply_rotary_pos_emb(q, cos, sin)[0].transpose(0, 1)
        kv = self.kv_norm(self.kv_proj(hidden_states)).unsqueeze(1)
        kv = apply_rotary_pos_emb(kv, cos, sin)[0, 0]
        inputs = _Inputs(self, hidden_states, residual, position_embeddings["compress"], kv)
        for kept in inputs.kept:
            ops.flag_non_finite(kept, batch.non_finite)
        out = torch.empty_like(q)
        count = 0 if batch.rows is None else len(batch.rows)
        if batch.rows is not None:
            out[:count] = self._attend_rows(q[:count], inputs, batch, batch.rows)
        for stream in batch.streams:
            own = slice(stream.start, stream.stop)
            out[own] = self._attend_stream(q[own], own, inputs, batch, stream)
        attended = apply_rotary_pos_emb(out.transpose(0, 1).unsqueeze(0), cos, -sin).transpose(1, 2)
        grouped = self.o_a_proj(attended.reshape(1, tokens, self.config.o_groups, -1)).flatten(2)
        return self.o_b_proj(grouped), None

    def _attend_rows(self, q: Tensor, inputs: "_Inputs", batch: V4Batch, rows: V4Rows) -> Tensor:
        compressor: Any = self.compressor
        states, own = batch.states, slice(0, len(rows))
        window = states.window[:, self.layer_idx]
        window[rows.lines, rows.positions % window.shape[1]] = inputs.kv[own]
        if self.layer_type == CSA:
            index = compressor.indexer
            entries, keys = batch.entries[:, self.number], batch.index[:, self.number]
            closed = rows.csa
            for module, ring, pool, projected in (
                (compressor, states.csa[:, self.number], entries, inputs.projected),
                (index, states.index[:, self.number], keys, inputs.index_projected),
            ):
                ring[rows.lines, rows.positions % ring.shape[1]] = projected[own]
                if len(closed.rows):
                    recent = _recent(ring, rows.lines[closed.rows], closed.firsts + module.compress_rate)
                    pool[closed.slots, closed.places] = new = _overlapping(module, recent, closed.firsts)
                    _mark_rows(batch, rows, closed, new)
            index_q, weights = inputs.index_queries(own)
            scores = csa.score_entries(index_q, weights, keys, rows.table, rows.lens)
            selected = csa.top_entries(scores, index.index_topk)
            table, lens = rows.table, rows.lens
        elif self.layer_type == HCA:
            closed, ring = rows.hca, states.hca[:, self.number]
            ring[rows.lines, rows.positions % ring.shape[1]] = inputs.projected[own]
            if len(closed.rows):
                recent = _recent(ring, rows.lines[closed.rows], closed.firsts + ring.shape[1])
                new = _compressed(compressor, recent, closed.firsts)
                _store_hca(batch, closed, self.number, new)
                _mark_rows(batch, rows, closed, new)
            entries, table, lens, selected = states.pages[:, self.number], rows.hca_table, rows.hca_lens, None
        else:
            near = csa.attend_entries(q, window, rows.lines.unsqueeze(1), rows.window_lens, self.scaling)
            return csa.merge_with_sinks([near], self.sinks, q.dtype)
        return csa.csa_decode(
            q, entries, table, lens, window, rows.lines, rows.window_lens, self.sinks, self.scaling, selected=selected
        )

    def _attend_stream(self, q: Tensor, own: slice, inputs: "_Inputs", batch: V4Batch, stream: V4Stream) -> Tensor:
        compressor: Any = self.compressor
        states, line = batch.states, stream.line
        ring = states.window[line, self.layer_idx]
        window = stream.extend(ring, inputs.kv[own], len(ring), WINDOW_PART)
        entries = lens = selected = None
        seen = torch.arange(stream.first + 1, stream.first + stream.tokens + 1, device=q.device)
        if self.layer_type == CSA:
            index = compressor.indexer
            fields = (batch.entries, batch.index)
            for module, own_ring, pool, projected, part in (
                (compressor, states.csa[line, self.number], fields[0], inputs.projected, CSA_PART),
                (index, states.index[line, self.number], fields[1], inputs.index_projected, INDEX_PART),
            ):
                rows = stream.extend(own_ring, projected[own], module.compress_rate, part)
                new = _overlapping_in_order(module, rows, stream)
                pool[stream.csa.slots, self.number, stream.csa.places] = new
                _mark_stream(batch, stream, new)
            total = (stream.first + stream.tokens) // index.compress_rate
            keys = stream.past.gather(batch.index, batch.cold_index, self.number)[:total]
            index_q, weights = inputs.index_queries(own)
            visible, size = seen // index.compress_rate, max(1, SCORES // max(total, 1))
            parts = []
            for start in range(0, len(index_q), size):
                some = slice(start, start + size)
                scores = score_entries_of_one(index_q[some], weights[some], keys, visible[some])
                parts.append(csa.top_entries(scores, index.index_topk))
            selected = torch.cat(parts)
            if stream.probe is not None:
                stream.probe.see(self.number, keys)
            entries = stream.past.gather(batch.entries, batch.cold_entries, self.number)[:total]
        elif self.layer_type == HCA:
            rate = compressor.compress_rate
            rows = stream.extend(states.hca[line, self.number], inputs.projected[own], 0, None)
            closed, skipped = stream.hca, min(stream.first, rate) - stream.first % rate
            recent = rows[skipped : skipped + len(closed.slots) * rate].view(-1, rate, rows.shape[1])
            if len(closed.slots):
                new = _compressed(compressor, recent, closed.firsts)
                _store_hca(batch, closed, self.number, new)
                _mark_stream(batch, stream, new)
            lens = seen // rate
            entries = states.pages[stream.hca_pages, self.number].flatten(0, 1)
            entries = entries[: (stream.first + stream.tokens) // rate]
        return attend_prefill(
            q, window, states.shape.window, self.sinks, self.scaling, entries=entries, lens=lens, selected=selected
        )


class _Inputs:
    """Inputs of one layer's parts: projections of all packed tokens, computed when first needed."""

    def __init__(
        self, layer: ServedAttention, hidden: Tensor, residual: Tensor, rotary: tuple[Tensor, Tensor], kv: Tensor
    ) -> None:
        self.hidden = hidden[0]
        self.kv = kv
        self._residual = residual
        self._rotary = rotary
        self._layer = layer
        self.kept = [kv]
        """All that is kept of the tokens, [tokens, width] each, but for the entries that are made of it."""
        compressor: Any = layer.compressor
        if compressor is not None:
            self.projected = _projected(compressor, self.hidden)
            self.kept.append(self.projected)
        if layer.layer_type == CSA:
            index = compressor.indexer
            self.index_projected = _projected(index, self.hidden)
            self.kept.append(self.index_projected)
            queries = index.q_b_proj(residual).view(1, len(self.hidden), -1, index.head_dim).transpose(1, 2)
            self._queries = apply_rotary_pos_emb(queries, *rotary)[0].transpose(0, 1)
            scorer = index.scorer
            constant = scorer.softmax_scale * scorer.weights_scaling
            self._weights = scorer.weights_proj(self.hidden).float() * constant

    def index_queries(self, own: slice) -> tuple[Tensor, Tensor]:
        """The Lightning Indexer's queries [tokens, heads, dim] and their weights, float32 [tokens, heads]."""
        return self._queries[own], self._weights[own]


def _projected(compressor: Any, hidden: Tensor) -> Tensor:
    """(kv, gate) of each token: [tokens, 2 * width]."""
    return torch.cat([compressor.kv_proj(hidden), compressor.gate_proj(hidden)], 1)


def _recent(ring: Tensor, lines: Tensor, stops: Tensor) -> Tensor:
    """The last rows of ``ring`` [lines, length, width] before the positions ``stops``, in order: [n, length, width]."""
    length = ring.shape[1]
    places = (stops.unsqueeze(1) + torch.arange(-length, 0, device=ring.device)) % length
    return ring[lines.unsqueeze(1), places]


def _compressed(compressor: Any, rows: Tensor, firsts: Tensor) -> Tensor:
    """Entries [n, dim] of HCA from ``rows`` [n, rate, 2 * dim], the (kv, gate) of the tokens they stand for."""
    kv, gate = rows.chunk(2, 2)
    return _pooled(compressor, kv, gate + compressor.position_bias, firsts)


def _overlapping(compressor: Any, rows: Tensor, firsts: Tensor) -> Tensor:
    """Entries, or index keys, [n, dim] of CSA from ``rows`` [n, 2 * rate, 4 * dim]: (kv, gate) of the tokens before,
    and of those they stand for. The first half of each is for the next entry, the second for the own one."""
    rate, dim = compressor.compress_rate, compressor.head_dim
    kv, gate = rows.view(-1, 2, rate, 4 * dim).chunk(2, 3)
    gate = gate + compressor.position_bias
    kv = torch.cat([kv[:, 0, :, :dim], kv[:, 1, :, dim:]], 1)
    gate = torch.cat([gate[:, 0, :, :dim], gate[:, 1, :, dim:]], 1)
    # nothing comes before the first
    nothing = (firsts == 0).view(-1, 1, 1) & (torch.arange(2 * rate, device=rows.device) < rate).view(1, -1, 1)
    return _pooled(compressor, kv.masked_fill(nothing, 0), gate.masked_fill(nothing, -torch.inf), firsts)


def _overlapping_in_order(compressor: Any, rows: Tensor, stream: V4Stream) -> Tensor:
    """The entries that ``stream`` completes, [n, dim], from ``rows`` [past + tokens, 4 * dim] as of its ``extend``."""
    rate, count = compressor.compress_rate, len(stream.csa.slots)
    if not count:
        return rows.new_empty(0, compressor.head_dim)
    begin = len(rows) - stream.tokens - stream.first % rate - rate
    if begin < 0:  # only at the start: nothing comes before the first
        rows, begin = torch.nn.functional.pad(rows, (0, 0, -begin, 0)), 0
    groups = rows[begin : begin + (count + 1) * rate].view(count + 1, rate, rows.shape[1])
    return _overlapping(compressor, torch.cat([groups[:-1], groups[1:]], 1), stream.csa.firsts)


def _pooled(compressor: Any, kv: Tensor, gate: Tensor, firsts: Tensor) -> Tensor:
    """Σ softmax(gate) ⊙ kv over the tokens, normed and rotated to ``firsts``: [n, tokens, dim] → [n, dim]."""
    weights = gate.softmax(1, dtype=torch.float32).to(kv.dtype)
    pooled = compressor.kv_norm((kv * weights).sum(1)).unsqueeze(0)
    cos, sin = compressor.rotary_emb(pooled, position_ids=firsts.unsqueeze(0), layer_type=compressor.rope_layer_type)
    rotated: Tensor = apply_rotary_pos_emb(pooled.unsqueeze(1), cos, sin)[0, 0]
    return rotated


def _mark_rows(batch: V4Batch, rows: V4Rows, closed: Places, entries: Tensor) -> None:
    """Mark those of the decode rows of ``closed`` whose new ``entries``, one each, are complete and not finite."""
    if closed.closing is not None:  # what the others are made of may be left from another sequence
        entries = entries.masked_fill(~closed.closing.unsqueeze(1), 0)
    if len(closed.rows) == len(rows):  # they are in order, so these are all
        ops.flag_non_finite(entries, batch.non_finite[: len(rows)])
        return
    wrong = torch.zeros(len(closed.rows), dtype=torch.uint8, device=entries.device)
    ops.flag_non_finite(entries, wrong)
    batch.non_finite[closed.rows] |= wrong


def _mark_stream(batch: V4Batch, stream: V4Stream, entries: Tensor) -> None:
    """Mark ``stream`` if one of its new ``entries`` is not finite."""
    if len(entries):
        wrong = torch.zeros(len(entries), dtype=torch.uint8, device=entries.device)
        ops.flag_non_finite(entries, wrong)
        batch.non_finite[stream.start] |= wrong.amax()


def _store_hca(batch: V4Batch, closed: Any, number: int, entries: Tensor) -> None:
    """Store HCA entries in the sequence's pages, and in the chunk."""
    assert batch.hca is not None
    batch.hca[closed.slots, number, closed.places] = entries
    batch.states.pages[closed.pages, number, closed.page_places] = entries


def serve_attention(model: PreTrainedModel) -> DeepseekV4Shape:
    """Have the attention layers of ``model``, a ``DeepseekV4ForCausalLM``, read our steps; returns its shape."""
    shape = DeepseekV4Shape.of(model.config)
    numbers = {**{layer: layer for layer in range(len(shape.kinds))}, **shape.csa, **shape.hca}
    layers: Any = model.base_model.layers
    for layer, block in enumerate(layers):
        attention: nn.Module = block.self_attn
        attention.__class__ = ServedAttention
        assert isinstance(attention, ServedAttention)
        attention.number = numbers[layer]
    return shape

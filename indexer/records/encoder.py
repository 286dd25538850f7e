"""The trained Memory Indexer: a dual encoder that starts as the model's own retrieval heads and learns to look ahead.

The keys are the index records that the server stores anyway. The queries come from hidden states of the current step
and of some earlier ones. As in the training-free scorer, each query puts a share of its attention on every chunk. A
chunk's score is the logarithm of a weighted mean of these shares, with weights computed from the hidden states, plus a
correction by a small network, whose inputs are all shares, the neighbouring chunks and the chunk's place. The network's
last layer starts at zero, so the untrained indexer scores by the mean share of the retrieval heads over the last steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.queries import QueryProjection

LEAST_LOG_SHARE = -16.0
SIBLING_LOG_WEIGHT = -3.0
"""Log weight, before training, of heads that are not retrieval heads."""
SHARE_UNIT = 4.0
"""Unit of log shares as features of the network, which makes them of order one."""
PLACE_FEATURES = 4


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of an indexer.

    ``history``: how many steps back queries are taken, 0 first; ``context``, ``units``: widths of the network;
    ``reach``: chunks to either side that a chunk's score may depend on. Raises ValueError if ``history`` is invalid.
    """

    history: tuple[int, ...] = (0, 3, 7, 12, 18, 26, 36, 48)
    context: int = 48
    units: int = 160
    reach: int = 4

    def __post_init__(self) -> None:
        if not self.history or self.history[0] != 0 or list(self.history) != sorted(set(self.history)):
            raise ValueError(f"history is {self.history}; it must begin with 0 and ascend")


class MemoryIndexer(nn.Module):
    """Scores chunks for the coming window.

    ``retrieval_heads``: the training-free score uses this many of the projection's heads, the first ones.
    """

    def __init__(
        self, projection: QueryProjection, target_layers: int, retrieval_heads: int, shape: EncoderShape
    ) -> None:
        super().__init__()
        heads, _, hidden = projection.weight.shape
        self.projection = projection
        self.retrieval_heads = retrieval_heads
        self.shape = shape
        shares = 2 * heads * len(shape.history)
        self.context_norm = nn.LayerNorm(target_layers * hidden, elementwise_affine=False)
        self.context = nn.Linear(target_layers * hidden, shape.context)
        self.into = nn.Linear(shares + PLACE_FEATURES + shape.context, shape.units)
        self.around = nn.Conv1d(shape.units, shape.units, 2 * shape.reach + 1, padding=shape.reach, groups=shape.units)
        self.inner = nn.Linear(shape.units, shape.units)
        self.out = nn.Linear(shape.units, 1)
        self.dropout = nn.Dropout(0.0)  # training sets the rate
        queries = heads * len(shape.history)
        self.gate = nn.Linear(shape.context, queries)
        self.sharpness = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.gate.weight)
        retrieving = torch.arange(heads).repeat(len(shape.history)) < retrieval_heads
        with torch.no_grad():
            self.gate.bias.copy_(torch.where(retrieving, 0.0, SIBLING_LOG_WEIGHT))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        with torch.no_grad():
            self.around.weight.zero_()
            self.around.weight[:, :, shape.reach] = 1
            nn.init.zeros_(self.around.bias)  # type: ignore[arg-type]

    def queries(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """``hidden`` [steps, target layers, hidden] → float32 [steps, heads, head_dim], RoPE applied."""
        queries: Tensor = self.projection(hidden, positions)
        return queries

    def forward(self, log_shares: Tensor, hidden: Tensor, complete: Tensor, tail: Tensor) -> Tensor:
        """Logits [predictions, chunks]; those of chunks from ``complete`` on are meaningless.

        ``log_shares``: float32 [predictions, history, heads, chunks], log of the share of the attention that each
        query puts on each chunk, -inf past the complete ones; ``hidden``: [predictions, target layers, hidden] of the
        current step; ``complete``: int64 [predictions]; ``tail``: float32 [predictions], filled part of the last chunk.
        """
        chunks = log_shares.shape[3]
        shares = log_shares.clamp(min=LEAST_LOG_SHARE).flatten(1, 2) / SHARE_UNIT
        numbers = torch.arange(chunks, device=shares.device)
        behind = complete.unsqueeze(1) - 1 - numbers
        is_complete = behind >= 0
        # relative to the best chunk except the sink, whose share says little about the others
        scored = shares.masked_fill(~(is_complete & (numbers > 0)).unsqueeze(1), LEAST_LOG_SHARE / SHARE_UNIT)
        relative = shares - scored.amax(2, keepdim=True)
        place = torch.stack(
            [
                behind.clamp(min=0).add(1).log2() / SHARE_UNIT,
                (numbers + 1) / complete.unsqueeze(1),
                complete.unsqueeze(1).add(1).log2().expand(-1, chunks) / SHARE_UNIT,
                tail.unsqueeze(1).expand(-1, chunks),
            ],
            1,
        )
        context = torch.tanh(self.context(self.context_norm(hidden.float().flatten(1))))
        features = [shares, relative, place, context.unsqueeze(2).expand(-1, -1, chunks)]
        units = self.into(torch.cat(features, 1).transpose(1, 2)).transpose(1, 2)
        units = nn.functional.gelu(self.around(units * is_complete.unsqueeze(1))).transpose(1, 2)
        correction = self.out(self.dropout(nn.functional.gelu(self.inner(self.dropout(units))))).squeeze(2)
        weights = self.gate(context).log_softmax(1).unsqueeze(2)
        expected = (shares * SHARE_UNIT * self.sharpness.exp() + weights).logsumexp(1)
        logits: Tensor = expected + correction
        return logits


def decode_records(spec: IndexSpec, records: Tensor) -> Tensor:
    """Keys of index records: uint8 [chunks, record bytes] → float32 [KV heads, chunks · chunk_tokens, head_dim]."""
    keys, scales = spec.stored_keys(records).float(), spec.stored_scales(records)
    if scales is not None:
        keys = keys * scales.unsqueeze(3)
    return keys.transpose(0, 1).flatten(1, 2)


def chunk_log_shares(spec: IndexSpec, keys: Tensor, queries: Tensor, positions: Tensor) -> Tensor:
    """Log of each query's attention share on each chunk: float32 [steps, heads, chunks], differentiable.

    ``keys``: from :func:`decode_records`; ``queries``: float32 [steps, heads, head_dim]; ``positions``: int64 [steps].
    A query sees the tokens up to its position. Chunks that are incomplete at that position have -inf, but their tokens
    are part of the softmax.
    """
    tokens = keys.shape[1]
    scaled = queries * spec.scale
    ahead = torch.arange(tokens, device=keys.device) > positions.unsqueeze(1)
    parts: list[Tensor] = []
    order: list[int] = []
    for kv, members in enumerate(spec.queries_of_kv):
        # in mixed precision the product is bf16, but sums need float32
        logits = torch.einsum("shd,td->sht", scaled[:, list(members)], keys[kv]).float()
        logits = logits.masked_fill(ahead.unsqueeze(1), -torch.inf)
        parts.append(_lse(logits.view(*logits.shape[:2], -1, spec.chunk_tokens)))
        order.extend(members)
    lse = torch.cat(parts, 1)[:, torch.tensor(order, device=keys.device).argsort()]
    shares = lse - lse.logsumexp(2, keepdim=True)
    complete = (positions + 1) // spec.chunk_tokens
    open_chunk = torch.arange(lse.shape[2], device=keys.device) >= complete.unsqueeze(1)
    return shares.masked_fill(open_chunk.unsqueeze(1), -torch.inf)


def _lse(logits: Tensor) -> Tensor:
    """Log-sum-exp over the last axis. Where all inputs are -inf the gradient is 0 instead of NaN."""
    top = logits.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    return (logits - top).exp().sum(-1).clamp(min=torch.finfo(logits.dtype).tiny).log() + top.squeeze(-1)


def run_starts(rows: Tensor, runs: Tensor) -> Tensor:
    """First row of the run that each of ``rows`` belongs to; both int64 [rows]. ``runs``: int64 [runs, 2]."""
    starts = runs[:, 0].to(rows.device).contiguous()
    return starts[torch.searchsorted(starts, rows.contiguous(), right=True) - 1]


def history_rows(rows: Tensor, runs: Tensor, history: Sequence[int]) -> Tensor:
    """Rows of the steps ``history`` back, int64 [rows, history]. A run's first row replaces rows before it."""
    start = run_starts(rows, runs)
    back = torch.tensor(history, device=rows.device)
    return torch.maximum(rows.unsqueeze(1) - back, start.unsqueeze(1))

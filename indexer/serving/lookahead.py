"""The trained indexer as serving asks it: queries of the last steps, then scores from the records' log-sum-exps."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from forecache.indexer.records.checkpoint import CheckpointManifest
from forecache.indexer.records.encoder import MemoryIndexer


@dataclass(frozen=True)
class Asked:
    """What one prediction is made from, all on one device.

    ``lse``: float32 [rows, chunks] of the queries of :attr:`LookaheadScorer.spec` over the complete chunks, -inf where
    a record could not be read; ``local_lse``: float32 [rows], over the tokens that a row's step saw beside the chunks
    that were complete by then; ``hidden``: [target layers, hidden] of the newest step, at ``position``; ``steps``: how
    many steps of history there were.
    """

    lse: Tensor
    local_lse: Tensor
    hidden: Tensor
    position: int
    steps: int


class LookaheadScorer:
    """Scores chunks with a trained indexer.

    ``spec`` describes the queries it needs: those of the trained projection, step by step of the history and heads
    within a step, then those of the model's own retrieval heads at the newest step, which ``own`` describes alone. Both
    read the same records.

    A prediction is made in two halves, which may run in different processes: :meth:`queries` beside the model, and
    ``chunk_lse(spec, records, queries)`` followed by :meth:`scores` where the records are mapped.
    """

    def __init__(self, indexer: MemoryIndexer, manifest: CheckpointManifest) -> None:
        self._indexer = indexer.eval().requires_grad_(False)
        self.manifest = manifest
        self.history = manifest.history
        heads, retrieving = manifest.index_spec, manifest.retrieval_heads
        self.own = replace(
            heads, query_heads=heads.query_heads[:retrieving], query_to_kv=heads.query_to_kv[:retrieving]
        )
        self.spec = replace(
            heads,
            query_heads=heads.query_heads * len(self.history) + self.own.query_heads,
            query_to_kv=heads.query_to_kv * len(self.history) + self.own.query_to_kv,
        )
        self._heads = len(heads.query_heads)
        self._back = torch.tensor(self.history, device=next(indexer.parameters()).device)

    def to(self, device: torch.device) -> Self:
        """The same scorer with its weights on ``device``."""
        if self._back.device == device:
            return self
        moved = copy.copy(self)
        moved._indexer = copy.deepcopy(self._indexer).to(device)
        moved._back = self._back.to(device)
        return moved

    @property
    def steps(self) -> int:
        """How many of the last steps' hidden states must be kept."""
        return self.history[-1] + 1

    @property
    def rows(self) -> int:
        """Queries of the trained projection: the first rows of :attr:`spec`."""
        return len(self.history) * self._heads

    @torch.inference_mode()
    def queries(self, hidden: Tensor, position: int) -> Tensor:
        """Queries of the trained projection, float32 [history · heads, head_dim], RoPE applied.

        ``hidden``: [n ≥ 1, target layers, hidden], the inputs of the query projections at the last n ≤ ``steps`` steps,
        oldest first; ``position``: that of the newest. The oldest stands for steps before it. Nothing is waited for.
        """
        back = self._back.clamp(max=len(hidden) - 1)
        queries: Tensor = self._indexer.queries(hidden[len(hidden) - 1 - back], position - back)
        return queries.flatten(0, 1)

    def positions(self, position: int, steps: int) -> Tensor:
        """Positions of the steps that the rows of ``spec`` are the queries of: int64 [rows]."""
        asked = position - self._back.clamp(max=steps - 1)
        newest = asked[:1].expand(len(self.own.query_heads))
        return torch.cat([asked.repeat_interleave(self._heads), newest])

    def seen_chunks(self, position: int, steps: int) -> list[int]:
        """Complete chunks at the steps of the first :attr:`rows` rows, ``steps`` as of :class:`Asked`: [rows]."""
        seen = [(position - min(back, steps - 1) + 1) // self.spec.chunk_tokens for back in self.history]
        return [chunks for chunks in seen for _ in range(self._heads)]

    @torch.inference_mode()
    def scores(self, asked: Sequence[Asked]) -> list[Tensor]:
        """Scores, float32 [chunks], of each of ``asked``, in one pass; larger is needed sooner, any may be negative.

        Raises ValueError where there are not as many chunks as its position says.
        """
        size, rows = self.spec.chunk_tokens, self.rows
        chunks = [one.lse.shape[1] for one in asked]
        shares = self._back.new_full((len(asked), rows, max(chunks)), -torch.inf, dtype=torch.float32)
        complete, tail = (self._back.new_zeros(len(asked), dtype=kind) for kind in (torch.int64, torch.float32))
        for place, (one, count) in enumerate(zip(asked, chunks, strict=True)):
            if (one.position + 1) // size != count:
                raise ValueError(f"{count} chunks of {size} tokens can't be complete at position {one.position}")
            seen = (self.positions(one.position, one.steps)[:rows] + 1) // size
            shares[place, :, :count] = self._log_shares(one.lse, one.local_lse, seen)
            complete[place] = count
            tail[place] = (one.position + 1 - count * size) / size
        by_step = shares.view(len(asked), len(self.history), self._heads, -1)
        logits = self._indexer(by_step, torch.stack([one.hidden for one in asked]), complete, tail)
        return [row[:count] for row, count in zip(logits.unbind(0), chunks, strict=True)]

    @torch.inference_mode()
    def padded_scores(
        self, lse: Tensor, local_lse: Tensor, hidden: Tensor, seen: Tensor, complete: Tensor, tail: Tensor
    ) -> Tensor:
        """Scores of one prediction, float32 [columns], of which those past the chunks mean nothing.

        As :meth:`scores`, but all that changes between predictions is on the device: ``lse``: float32 [rows, columns],
        -inf past the chunks; ``seen``: int64 [:attr:`rows`], as of :meth:`seen_chunks`; ``complete``: int64 [1], how
        many chunks there are; ``tail``: float32 [1], how full the open chunk is. Nothing is waited for.
        """
        by_step = self._log_shares(lse, local_lse, seen).view(1, len(self.history), self._heads, -1)
        logits: Tensor = self._indexer(by_step, hidden.unsqueeze(0), complete, tail)
        return logits.squeeze(0)

    def _log_shares(self, lse: Tensor, local_lse: Tensor, seen: Tensor) -> Tensor:
        """Log of each trained query's share on each chunk, float32 [:attr:`rows`, chunks]. A chunk that was completed
        since an older query was made has none from it: it saw the tokens."""
        later = torch.arange(lse.shape[1], device=lse.device) >= seen.unsqueeze(1)
        lse = lse[: self.rows].masked_fill(later, -torch.inf)
        total = torch.logaddexp(lse.logsumexp(1), local_lse[: self.rows])
        return lse - total.clamp(min=torch.finfo(total.dtype).min).unsqueeze(1)

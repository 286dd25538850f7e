"""Predictions of the trained indexer while serving: queries of the last steps, then scores from log-sum-exps."""

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
    """Inputs of one prediction, all on one device.

    ``lse``: float32 [rows, chunks], log-sum-exps of the queries of :attr:`LookaheadScorer.spec` over the complete
    chunks, -inf if a record could not be read; ``local_lse``: float32 [rows], over the tokens that a row's step saw
    outside chunks complete at that step; ``hidden``: [target layers, hidden] of the newest step, at ``position``;
    ``steps``: number of steps of history.
    """

    lse: Tensor
    local_lse: Tensor
    hidden: Tensor
    position: int
    steps: int


class LookaheadScorer:
    """Scores chunks with a trained indexer.

    ``spec`` describes the queries of a prediction: first those of the trained projection, for each step of the history
    and each head, then those of the model's retrieval heads at the newest step. ``own`` describes the latter alone.
    Both read the same records.

    A prediction has two parts, which may run in different processes: :meth:`queries` in the model's process, and
    ``chunk_lse(spec, records, queries)`` followed by :meth:`scores` in a process that maps the records.
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
        """Number of last steps whose hidden states must be kept."""
        return self.history[-1] + 1

    @property
    def rows(self) -> int:
        """Queries of the trained projection: the first rows of :attr:`spec`."""
        return len(self.history) * self._heads

    @torch.inference_mode()
    def queries(self, hidden: Tensor, position: int) -> Tensor:
        """Queries of the trained projection, float32 [history · heads, head_dim], RoPE applied.

        ``hidden``: [n ≥ 1, target layers, hidden], the inputs of the query projections at the last n ≤ ``steps`` steps,
        oldest first; ``position``: position of the newest. The oldest replaces steps before it. Does not synchronise.
        """
        back = self._back.clamp(max=len(hidden) - 1)
        queries: Tensor = self._indexer.queries(hidden[len(hidden) - 1 - back], position - back)
        return queries.flatten(0, 1)

    def positions(self, position: int, steps: int) -> Tensor:
        """Positions of the steps of the queries of ``spec``: int64 [rows]."""
        asked = position - self._back.clamp(max=steps - 1)
        newest = asked[:1].expand(len(self.own.query_heads))
        return torch.cat([asked.repeat_interleave(self._heads), newest])

    def seen_chunks(self, position: int, steps: int) -> list[int]:
        """Chunks complete at the step of each of the first :attr:`rows` queries. ``steps``: see :class:`Asked`."""
        seen = [(position - min(back, steps - 1) + 1) // self.spec.chunk_tokens for back in self.history]
        return [chunks for chunks in seen for _ in range(self._heads)]

    @torch.inference_mode()
    def scores(self, asked: Sequence[Asked]) -> list[Tensor]:
        """Scores, float32 [chunks], for each of ``asked``, in one forward pass. Larger is needed sooner.

        Raises ValueError if the number of chunks does not fit the position.
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
        """Scores of one prediction, float32 [columns]; columns past the chunks are meaningless.

        Like :meth:`scores`, but for CUDA graphs: everything that changes between predictions is on the device, and
        nothing synchronises. ``lse``: float32 [rows, columns], -inf past the chunks; ``seen``: int64 [:attr:`rows`],
        from :meth:`seen_chunks`; ``complete``: int64 [1], number of chunks; ``tail``: float32 [1], filled share of the
        open chunk.
        """
        by_step = self._log_shares(lse, local_lse, seen).view(1, len(self.history), self._heads, -1)
        logits: Tensor = self._indexer(by_step, hidden.unsqueeze(0), complete, tail)
        return logits.squeeze(0)

    def _log_shares(self, lse: Tensor, local_lse: Tensor, seen: Tensor) -> Tensor:
        """Log of each trained query's attention share on each chunk, float32 [:attr:`rows`, chunks].

        -inf for chunks completed after the query's step: their tokens are part of the query's ``local_lse``.
        """
        later = torch.arange(lse.shape[1], device=lse.device) >= seen.unsqueeze(1)
        lse = lse[: self.rows].masked_fill(later, -torch.inf)
        total = torch.logaddexp(lse.logsumexp(1), local_lse[: self.rows])
        return lse - total.clamp(min=torch.finfo(total.dtype).min).unsqueeze(1)

"""The trained indexer as serving asks it: queries of the last steps, then scores from the records' log-sum-exps."""

from dataclasses import replace

import torch
from torch import Tensor

from forecache.indexer.checkpoint import CheckpointManifest
from forecache.indexer.encoder import MemoryIndexer


class LookaheadScorer:
    """Scores one sequence's chunks. ``spec`` describes its queries, step by step of the history, heads within a step.

    A prediction is made in two halves, which may run in different processes: :meth:`queries` beside the model, and
    ``chunk_lse(spec, records, queries)`` followed by :meth:`scores` where the records are mapped.
    """

    def __init__(self, indexer: MemoryIndexer, manifest: CheckpointManifest) -> None:
        self._indexer = indexer.eval()
        self.history = manifest.history
        own = manifest.index_spec
        self.spec = replace(
            own,
            query_heads=own.query_heads * len(self.history),
            query_to_kv=own.query_to_kv * len(self.history),
        )

    @property
    def steps(self) -> int:
        """How many of the last steps' hidden states must be kept."""
        return self.history[-1] + 1

    @torch.inference_mode()
    def queries(self, hidden: Tensor, position: int) -> Tensor:
        """Queries of ``spec``, float32 [history · heads, head_dim], RoPE applied.

        ``hidden``: [n ≥ 1, target layers, hidden], the inputs of the query projections at the last n ≤ ``steps`` steps,
        oldest first; ``position``: that of the newest. The oldest stands for steps before it.
        """
        back = torch.tensor(self.history, device=hidden.device).clamp(max=len(hidden) - 1)
        queries: Tensor = self._indexer.queries(hidden[len(hidden) - 1 - back], position - back)
        return queries.flatten(0, 1)

    @torch.inference_mode()
    def scores(self, lse: Tensor, local_lse: Tensor, hidden: Tensor, tail_tokens: int) -> Tensor:
        """Scores float32 [chunks]; larger is needed sooner.

        ``lse``: float32 [history · heads, chunks] of ``spec``'s queries over the complete chunks; ``local_lse``:
        float32 [history · heads] over the ``tail_tokens`` tokens after them; ``hidden``: [target layers, hidden] of the
        newest step.
        """
        log_shares = lse - torch.logaddexp(lse.logsumexp(1), local_lse).unsqueeze(1)
        by_step = log_shares.view(1, len(self.history), -1, lse.shape[1])
        complete = torch.tensor([lse.shape[1]], device=lse.device)
        tail = torch.tensor([tail_tokens / self.spec.chunk_tokens], device=lse.device)
        scores: Tensor = self._indexer(by_step, hidden.unsqueeze(0), complete, tail)
        return scores[0]

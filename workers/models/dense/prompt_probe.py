"""Which chunks the last tokens of a prompt attend to: the first resident set is chosen by it (docs/architecture.md)."""

import torch
from torch import Tensor


class MassProbe:
    """Collects, layer by layer, the attention of the last ``queries`` tokens of a stream at some heads.

    ``heads``: layer → int64 [heads] to look at. ``mass``: float32 [chunks], the largest share that one of them, for one
    of the tokens, puts on the chunk, to a thousandth: many are nearly 1, and rounding, which depends on where prefill
    was cut, must not choose among them.
    """

    def __init__(self, heads: dict[int, Tensor], queries: int, chunks: int, chunk_tokens: int, scale: float) -> None:
        self.heads = heads
        self.queries = queries
        self.chunk_tokens = chunk_tokens
        self.scale = scale
        self.mass = torch.zeros(chunks, device=next(iter(heads.values())).device)
        self._q: Tensor | None = None
        self._all_heads = 0
        self._seen: list[tuple[Tensor, Tensor]] = []

    def begin(self, layer: int, q: Tensor) -> bool:
        """A layer's attention starts, with ``q`` [tokens, heads, head_dim]. Returns whether it is to be seen."""
        heads = self.heads.get(layer)
        if heads is None:
            return False
        self._q, self._all_heads = q[-self.queries :][:, heads].transpose(0, 1), q.shape[1]
        self._seen = []
        return True

    def see(self, layer: int, chunks: Tensor, k: Tensor, *, own: bool = False) -> None:
        """Keys ``k`` [kv_heads, n, head_dim] of ``chunks`` int64, whole but maybe the last; read before it returns.

        ``own``: the last of them are the stream's new ones, of which a token sees those before it and its own.
        """
        assert self._q is not None
        keys = k[self.heads[layer] // (self._all_heads // k.shape[0])]
        logits = torch.bmm(self._q.float(), keys.float().transpose(1, 2)) * self.scale
        if own:
            tokens = torch.arange(k.shape[1], device=k.device)
            later = tokens > tokens[-self._q.shape[1] :].unsqueeze(1)
            logits = logits.masked_fill(later, -torch.inf)
        missing = len(chunks) * self.chunk_tokens - k.shape[1]
        logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        by_chunk = logits.view(*logits.shape[:2], len(chunks), self.chunk_tokens)
        self._seen.append((chunks, by_chunk.logsumexp(-1)))

    def finish(self, layer: int, lse: Tensor) -> None:
        """The layer is over; ``lse`` float32 [tokens, heads] is that of the whole attention."""
        whole = lse[-self.queries :][:, self.heads[layer]].T.unsqueeze(-1)
        for chunks, chunk_lse in self._seen:
            mass = (chunk_lse - whole).exp().amax(dim=(0, 1)).round(decimals=3)
            self.mass[chunks] = torch.maximum(self.mass[chunks], mass)
        self._q, self._seen = None, []

"""Which chunks the last tokens of a prompt attend to: the first resident set is chosen by it (docs/architecture.md)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from forecache.kernels.attention import ops
from forecache.workers.models.dense.streamed_past import Store


class MassProbe:
    """Collects, layer by layer, the attention of the last ``queries`` tokens of a stream at some heads.

    ``heads``: layer → int64 [heads] to look at. ``hot``: chunk number → slot of the chunks in the pool, those of the
    stream's new tokens included. ``stop``: tokens of the sequence after the step. ``mass``: float32 [chunks], the
    largest share that one of the heads, for one of the tokens, puts on the chunk, to a thousandth: many are nearly 1,
    and rounding, which depends on where prefill was cut, must not choose among them.
    """

    def __init__(
        self,
        heads: dict[int, Tensor],
        queries: int,
        hot: Mapping[int, int],
        stop: int,
        chunk_tokens: int,
        scale: float,
        device: torch.device,
    ) -> None:
        self.heads = heads
        self.queries = queries
        self.chunk_tokens = chunk_tokens
        self.scale = scale
        self.mass = torch.zeros(-(-stop // chunk_tokens), device=device)
        numbers = sorted(hot)
        self._numbers = torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
        self._slots = torch.tensor([hot[number] for number in numbers], dtype=torch.int64).to(device, non_blocking=True)
        tokens = (self._numbers.unsqueeze(1) * chunk_tokens + torch.arange(chunk_tokens, device=device)).flatten()
        self._later = tokens > torch.arange(stop - queries, stop, device=device).unsqueeze(1)
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

    def see_captured(
        self, queries: Mapping[int, Tensor], lse: Mapping[int, Tensor], pool: Store, all_heads: int
    ) -> None:
        """All layers at once, after the step: of its probed tokens, by layer, ``queries`` [queries, heads, head_dim]
        and ``lse`` float32 [queries, heads], of a model with ``all_heads`` query heads. The whole past is in ``pool``.
        """
        for layer, q in queries.items():
            self._q, self._all_heads, self._seen = q.transpose(0, 1), all_heads, []
            self._finish(layer, pool, lse[layer])

    def see(self, layer: int, chunks: Tensor, k: Tensor) -> None:
        """Keys ``k`` [kv_heads, n, head_dim] of whole ``chunks``, int64, outside the pool; read before it returns."""
        self._seen.append((chunks, self._by_chunk(self._logits(layer, k))))

    def finish(self, layer: int, pool: Store, lse: Tensor) -> None:
        """The layer is over: its new keys are in ``pool``. ``lse``: float32 [tokens, heads], of the whole attention."""
        self._finish(layer, pool, lse[-self.queries :][:, self.heads[layer]])

    def _finish(self, layer: int, pool: Store, lse: Tensor) -> None:
        """``lse``: float32 [queries, heads to look at]."""
        assert self._q is not None
        k, _ = ops.gather_layer(pool.kv, layer, self._slots, scale=pool.scale, dtype=self._q.dtype)
        logits = self._logits(layer, k).masked_fill(self._later, -torch.inf)
        self._seen.append((self._numbers, self._by_chunk(logits)))
        whole = lse.T.unsqueeze(-1)
        for chunks, chunk_lse in self._seen:
            mass = (chunk_lse - whole).exp().amax(dim=(0, 1)).round(decimals=3)
            self.mass[chunks] = torch.maximum(self.mass[chunks], mass)
        self._q, self._seen = None, []

    def _by_chunk(self, logits: Tensor) -> Tensor:
        """Log-sum-exp of whole chunks: float32 [heads, queries, chunks]."""
        return logits.view(*logits.shape[:2], -1, self.chunk_tokens).logsumexp(-1)

    def _logits(self, layer: int, k: Tensor) -> Tensor:
        """float32 [heads, queries, keys]."""
        assert self._q is not None
        keys = k[self.heads[layer] // (self._all_heads // k.shape[0])]
        return torch.bmm(self._q.float(), keys.float().transpose(1, 2)) * self.scale

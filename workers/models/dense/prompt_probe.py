"""Which chunks the last tokens of a prompt attend to: the first resident set is chosen by it (docs/architecture.md)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forecache.kernels.attention import ops
from forecache.workers.models.dense.streamed_past import Store
from forecache.workers.models.step.packing import padded, put

PIECE_TOKENS = 16384
"""Tokens of the hot past that are gathered at once."""


@dataclass(frozen=True)
class ChunkMass:
    """``mass``: float32 [chunks], as :class:`MassProbe` has it."""

    mass: Tensor


@dataclass(frozen=True)
class ProbedPrompt:
    """A prompt that is wholly in the pool after a step: ``slots`` int32 [chunks] in order, ``stop`` tokens in them, of
    which the last ``queries`` are probed."""

    slots: npt.NDArray[np.int32]
    stop: int
    queries: int


class ProbedHeads:
    """The heads whose attention is probed, as `ops.chunk_mass` takes them.

    ``heads``: layer → int64 [heads]; ``group``: query heads of a KV head.
    """

    def __init__(self, heads: Mapping[int, Tensor], group: int, scale: float, device: torch.device) -> None:
        self._scale = scale
        self._device = device
        self._layers = torch.cat([torch.full_like(of_layer, layer) for layer, of_layer in heads.items()])
        self._kv_heads = torch.cat([of_layer // group for of_layer in heads.values()])
        self._order = list(heads)

    def masses(
        self,
        queries: Mapping[int, Tensor],
        lse: Mapping[int, Tensor],
        prompts: Sequence[ProbedPrompt],
        pool: Store,
    ) -> list[ChunkMass]:
        """What each of ``prompts`` attends to. By layer: ``queries`` [rows, heads, head_dim] of their probed tokens,
        one prompt after another, and ``lse`` float32 [rows, heads]."""
        counts = [prompt.queries for prompt in prompts]
        positions = np.concatenate([np.arange(prompt.stop - prompt.queries, prompt.stop) for prompt in prompts])
        mass = ops.chunk_mass(
            torch.cat([queries[layer] for layer in self._order], 1),
            torch.cat([lse[layer] for layer in self._order], 1),
            pool.kv,
            self._layers,
            self._kv_heads,
            padded([prompt.slots for prompt in prompts], self._device),
            put(positions, self._device),
            put([0, *np.cumsum(counts)], self._device, np.int32),
            self._scale,
            k_scale=None if pool.scale is None else pool.scale[:, :, 0],
        )
        return [ChunkMass(row[: len(prompt.slots)]) for row, prompt in zip(mass, prompts, strict=True)]


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

    def see(self, layer: int, chunks: Tensor, k: Tensor) -> None:
        """Keys ``k`` [kv_heads, n, head_dim] of whole ``chunks``, int64, outside the pool; read before it returns."""
        self._seen.append((chunks, self._by_chunk(self._logits(layer, k))))

    def finish(self, layer: int, pool: Store, lse: Tensor) -> None:
        """The layer is over: its new keys are in ``pool``. ``lse``: float32 [tokens, heads], of the whole attention."""
        assert self._q is not None
        size = max(PIECE_TOKENS // self.chunk_tokens, 1)
        for first in range(0, len(self._numbers), size):
            piece = slice(first, first + size)
            k, _ = ops.gather_layer(pool.kv, layer, self._slots[piece], scale=pool.scale, dtype=self._q.dtype)
            later = self._later[:, first * self.chunk_tokens : (first + size) * self.chunk_tokens]
            logits = self._logits(layer, k).masked_fill(later, -torch.inf)
            self._seen.append((self._numbers[piece], self._by_chunk(logits)))
        whole = lse[-self.queries :][:, self.heads[layer]].T.unsqueeze(-1)
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

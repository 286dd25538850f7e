"""The attention of a prompt's last tokens, against plain causal attention, for any split of prefill into steps."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from forecache.kernels.attention import ops
from forecache.workers.models.dense.attention import PromptRows, StreamRows, _attend_prompts, _finish_stream
from forecache.workers.models.dense.prompt_probe import MassProbe
from forecache.workers.models.dense.streamed_past import PastReader, Segment, Store
from forecache.workers.residency.window import PROBE_TOKENS

CHUNK, HEADS, KV_HEADS, DIM = 16, 4, 2, 8
LOOKED_AT = torch.tensor([0, 3])
SCALE = 1.5


def causal_logits(q: Tensor, k: Tensor) -> Tensor:
    """float64 [heads, tokens, tokens]."""
    logits = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(HEADS // KV_HEADS, 1)) * SCALE
    return logits.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)


def whole_lse(q: Tensor, k: Tensor) -> Tensor:
    """float64 [tokens, heads]."""
    return causal_logits(q, k).logsumexp(-1).T


def expected_mass(q: Tensor, k: Tensor) -> np.ndarray:
    """The largest share that any of the last tokens puts on each chunk, over all heads: float64 [chunks]."""
    shares = causal_logits(q, k)[LOOKED_AT].softmax(-1)[:, -PROBE_TOKENS:]
    by_chunk = torch.nn.functional.pad(shares, (0, -len(q) % CHUNK)).unflatten(2, (-1, CHUNK)).sum(-1)
    return by_chunk.amax((0, 1)).numpy()


@given(
    tokens=st.integers(1, 150),
    cuts=st.lists(st.integers(1, 149), max_size=3),
    cold=st.sets(st.integers(0, 9)),
    seed=st.integers(0, 99),
)
def test_mass_is_that_of_causal_attention_however_a_prompt_is_cut(
    tokens: int, cuts: list[int], cold: set[int], seed: int
) -> None:
    """Full chunks in ``cold`` are read outside the pool."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    bounds = sorted({0, tokens, *(cut for cut in cuts if cut < tokens)})
    mass = np.zeros(-(-tokens // CHUNK))
    shape = (len(mass), 1, 2, KV_HEADS, CHUNK, DIM)
    pool, arena = Store(torch.full(shape, torch.nan)), Store(torch.full(shape, torch.nan))
    order = torch.randperm(len(mass), generator=generator)  # chunk → slot
    for start, stop in pairwise(bounds):
        places = torch.arange(start, stop)
        for store in (pool, arena):
            ops.store_kv(k[start:stop], v[start:stop], store.kv, 0, order[places // CHUNK], places % CHUNK)
        queries = stop - max(start, tokens - PROBE_TOKENS)
        if queries <= 0:
            continue
        full = range(start // CHUNK)
        away = torch.tensor([chunk for chunk in full if chunk in cold], dtype=torch.int64)
        hot = {chunk: int(order[chunk]) for chunk in range(-(-stop // CHUNK)) if chunk not in away}
        probe = MassProbe({0: LOOKED_AT}, queries, hot, stop, CHUNK, SCALE, q.device)
        past = [slot for chunk, slot in hot.items() if chunk < -(-start // CHUNK)]
        prompts = PromptRows(
            torch.tensor([past], dtype=torch.int32).reshape(1, -1),
            torch.tensor([start - len(away) * CHUNK], dtype=torch.int32),
            torch.tensor([0, stop - start], dtype=torch.int32),
        )
        part = q[start:stop]
        out, lse = _attend_prompts(part, k[start:stop], v[start:stop], 0, pool, prompts, SCALE)
        batch: Any = SimpleNamespace(
            pool=pool, past=PastReader([[Segment(arena, order[away], away)]], 1, q.dtype, None)
        )
        _finish_stream(part, out, lse, 0, StreamRows(0, 0, stop - start, probe), batch, SCALE)
        mass[: len(probe.mass)] = np.maximum(mass[: len(probe.mass)], probe.mass.numpy())
        np.testing.assert_allclose(lse, whole_lse(q[:stop], k[:stop])[start:], rtol=0, atol=1e-5)
    np.testing.assert_allclose(mass, expected_mass(q, k), rtol=0, atol=6e-4)

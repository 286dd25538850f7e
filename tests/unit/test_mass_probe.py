"""The attention of a prompt's last tokens, against plain causal attention, for any split of prefill into steps."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from forecache.workers.models.dense.attention import StreamRows, _attend_stream
from forecache.workers.models.dense.prompt_probe import MassProbe
from forecache.workers.residency.window import PROBE_TOKENS

CHUNK, HEADS, KV_HEADS, DIM, LAYER = 16, 4, 2, 8, 3
LOOKED_AT = torch.tensor([0, 3])
SCALE = 1.5


def expected_mass(q: Tensor, k: Tensor) -> np.ndarray:
    """The largest share that any of the last tokens puts on each chunk, over all heads: float64 [chunks]."""
    tokens = len(q)
    keys = k.double().repeat_interleave(HEADS // KV_HEADS, 1)[:, LOOKED_AT]
    logits = torch.einsum("qhd,khd->hqk", q.double()[:, LOOKED_AT], keys) * SCALE
    shares = logits.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1)[:, -PROBE_TOKENS:]
    by_chunk = torch.nn.functional.pad(shares, (0, -tokens % CHUNK)).unflatten(2, (-1, CHUNK)).sum(-1)
    return by_chunk.amax((0, 1)).numpy()


def past_of(k: Tensor, v: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """K/V [kv_heads, tokens, dim] before ``start``, as a stream reads them: whole chunks, then the open one."""
    whole = start // CHUNK * CHUNK
    if whole:
        yield torch.arange(whole // CHUNK), k[:, :whole], v[:, :whole]
    if start > whole:
        yield torch.empty(0, dtype=torch.int64), k[:, whole:start], v[:, whole:start]


@given(tokens=st.integers(1, 150), cuts=st.lists(st.integers(1, 149), max_size=3), seed=st.integers(0, 99))
def test_mass_is_that_of_causal_attention_however_a_prompt_is_cut(tokens: int, cuts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(tokens, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))
    bounds = sorted({0, tokens, *(cut for cut in cuts if cut < tokens)})
    mass = np.zeros(-(-tokens // CHUNK))
    for start, stop in pairwise(bounds):
        queries = stop - max(start, tokens - PROBE_TOKENS)
        if queries <= 0:
            continue
        probe = MassProbe({LAYER: LOOKED_AT}, queries, -(-stop // CHUNK), CHUNK, SCALE)
        stream = StreamRows(start, stop, torch.empty(0, dtype=torch.int64), start % CHUNK, start // CHUNK, probe)
        part, past = slice(start, stop), past_of(k.transpose(0, 1), v.transpose(0, 1), start)
        _attend_stream(q[part], k[part], v[part], LAYER, stream, past, SCALE)
        mass[: len(probe.mass)] = np.maximum(mass[: len(probe.mass)], probe.mass.numpy())
    np.testing.assert_allclose(mass, expected_mass(q, k), rtol=0, atol=6e-4)

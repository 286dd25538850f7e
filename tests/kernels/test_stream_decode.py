"""Decode attention in one wave of equal shares, and fp8 read as pairs, against float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from forecache.kernels.attention import decode as triton_kernel
from forecache.kernels.common.tuning import DecodeConfig

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
INTERPRETED = not torch.cuda.is_available()
GPU = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA GPU: too large for Triton's interpreter")

Error = Callable[[Tensor, Tensor], float]
Poison = Callable[[], Any]
MakeCase = Callable[..., Any]


@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stream", [False, True], ids=["split", "stream"])
@pytest.mark.parametrize("shape", [(8, 2, 128, 32, 2), (3, 1, 80, 20, 3), (9, 3, 64, 16, 3)], ids=str)
def test_fp8_read_as_pairs(
    shape: tuple[int, ...],
    stream: bool,
    q_dtype: torch.dtype,
    device: torch.device,
    relative_error: Error,
    make_case: MakeCase,
) -> None:
    """With the scales as the hot pool has them, and queries of very different sizes."""
    _, kv_heads, _, chunk_tokens, max_chunks = shape
    lens = [0, 1, chunk_tokens - 1, max_chunks * chunk_tokens]
    case = make_case(shape, q_dtype, lens, device, kv_dtype=torch.float8_e4m3fn)
    case.q[1] *= 100
    case.q[2] *= 1e-3
    slots, layers = case.kv.shape[:2]
    memory = torch.rand(slots, layers * 2 * kv_heads + 8, device=device).add(0.5) * 1e-2
    scale = memory[:, :-8].unflatten(1, (layers, 2, kv_heads))
    config = DecodeConfig(16, 4, 2, 5, stream=stream, pairs=True)
    for scales in ({}, {"k_scale": scale[:, :, 0], "v_scale": scale[:, :, 1]}):
        out, lse = triton_kernel.sparse_decode(*case.arguments(), **scales, config=config)
        factor = scale[..., None, None] if scales else 1
        expected = replace(case, kv=case.kv.float() * factor).expected()
        for i in (1, 2, 3):  # each by itself: the largest would hide the others
            assert relative_error(out[i], expected[0][i]) < TOLERANCE[q_dtype]
            assert relative_error(lse[i], expected[1][i]) < TOLERANCE[q_dtype]
        assert (out[0] == 0).all() and (lse[0] == -math.inf).all()


@pytest.mark.parametrize("shares", [1, 7, 64])
@pytest.mark.parametrize("lens", [[0, 0], [1, 0, 40, 111, 0, 16, 112], [0, 5]], ids=str)
def test_shares_of_ragged_rows(
    lens: list[int],
    shares: int,
    device: torch.device,
    poisoned: Poison,
    relative_error: Error,
    make_case: MakeCase,
) -> None:
    """Shares that begin and end anywhere, are larger than rows, or more than there are blocks."""
    if not INTERPRETED:
        shares = -(-shares // 16)  # there it is a number for each multiprocessor
    case = make_case((4, 2, 80, 16, 7), torch.float32, lens, device)
    config = DecodeConfig(16, 4, 2, shares, stream=True)
    results = []
    for _ in range(2):
        with poisoned():
            results.append(triton_kernel.sparse_decode(*case.arguments(), config=config))
    (out, lse), again = results
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1]), "the order of merging is fixed"
    expected_out, expected_lse = case.expected()
    live = [i for i, length in enumerate(lens) if length]
    assert all((out[i] == 0).all() and (lse[i] == -math.inf).all() for i in set(range(len(lens))) - set(live))
    if live:
        assert relative_error(out[live], expected_out[live]) < 1e-5
        assert relative_error(lse[live], expected_lse[live]) < 1e-5


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(64, 4, 3, 3, stream=True, pairs=True),
        DecodeConfig(64, 4, 4, 2, stream=True, pairs=True),
        DecodeConfig(32, 4, 4, 4, stream=True, pairs=True),
        DecodeConfig(64, 8, 3, 1, stream=True, pairs=True),
    ],
    ids=str,
)
@pytest.mark.parametrize(("group", "head_dim"), [(4, 128), (7, 128), (3, 64), (2, 256), (40, 128)])
def test_stream_at_gpu_sizes(
    group: int,
    head_dim: int,
    config: DecodeConfig,
    kv_dtype: torch.dtype,
    device: torch.device,
    relative_error: Error,
    make_case: MakeCase,
) -> None:
    """Replays of a captured launch whose lengths and slots change are right and alike."""
    if head_dim * group > 128 * 7 or head_dim > 128:  # registers for one program where the accumulator is large
        config = replace(config, programs_per_sm=1, num_stages=2)
    case = make_case((2 * group, 2, head_dim, 64, 64), torch.bfloat16, [4096, 0, 4095, 65, 2000], device, kv_dtype)
    case.kv.copy_(torch.randn(case.kv.shape))
    triton_kernel.sparse_decode(*case.arguments(), config=config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = triton_kernel.sparse_decode(*case.arguments(), config=config)
    for lens in ([4096, 0, 4095, 65, 2000], [1, 2, 3, 4, 5], [4096] * 5, [0, 0, 0, 0, 77]):
        case.context_lens.copy_(torch.tensor(lens))
        case.block_table.copy_(torch.randperm(case.kv.shape[0])[: 5 * 64].view(5, 64))
        graph.replay()
        first = out.clone()
        for _ in range(20):
            out.fill_(math.nan)
            graph.replay()
            assert torch.equal(out, first), "the order of merging is fixed"
        expected_out, expected_lse = case.expected()
        live = [i for i, length in enumerate(lens) if length]
        assert relative_error(out, expected_out) < 1e-2
        assert relative_error(lse[live], expected_lse[live]) < 1e-2

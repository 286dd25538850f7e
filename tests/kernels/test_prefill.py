"""Dense attention of a block over itself and over segments of the past, and the mass it puts on chunks."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from forecache.kernels.attention import prefill, reference

Error = Callable[[Tensor, Tensor], float]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = [(9, 3, 64), (4, 1, 80), (2, 2, 128), (4, 2, 192)]  # heads, kv_heads, head_dim


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, first_position: int | None) -> tuple[Tensor, Tensor]:
    """float64 attention; query ``i`` sees keys up to ``first_position + i``, or all."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    group = q.shape[1] // k.shape[0]
    logits = torch.einsum("qhd,hnd->hqn", q, k.repeat_interleave(group, 0)) * scale
    if first_position is not None:
        visible = torch.arange(k.shape[1]) <= torch.arange(q.shape[0])[:, None] + first_position
        logits = logits.masked_fill(~visible, -math.inf)
    out = torch.einsum("hqn,hnd->qhd", logits.softmax(-1), v.repeat_interleave(group, 0))
    return out, logits.logsumexp(-1).T


def make(
    tokens: int, keys: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, head_dim = shape
    q = torch.randn(heads, tokens, head_dim).transpose(0, 1)  # as a projection's view: not contiguous
    k, v = torch.randn(kv_heads, keys, head_dim), torch.randn(kv_heads, keys, head_dim)
    return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "keys", "causal"), [(1, 1, True), (37, 37, True), (70, 70, True), (1, 50, False), (37, 200, False)]
)
def test_block_equals_float64(
    tokens: int,
    keys: int,
    causal: bool,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    relative_error: Error,
) -> None:
    q, k, v = make(tokens, keys, shape, dtype, device)
    out, lse = prefill.attend_block(q, k, v, 0.2, causal=causal)
    expected_out, expected_lse = dense(q, k, v, 0.2, 0 if causal else None)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert relative_error(out, expected_out) < TOLERANCE[dtype]
    assert relative_error(lse, expected_lse) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_segments_equal_the_whole(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, relative_error: Error
) -> None:
    """Past segments in another order, one of them empty, one not contiguous."""
    q, k, v = make(40, 240, shape, dtype, device)
    cuts = [(64, 200), (0, 1), (1, 64), (5, 5)]
    past = ((k[:, a:b], v[:, a:b]) for a, b in cuts)
    out, lse = prefill.prefill_attention(q, k[:, 200:], v[:, 200:], past, 0.2)
    expected_out, expected_lse = dense(q, k, v, 0.2, 200)
    assert out.dtype == dtype and out.shape == q.shape
    assert relative_error(out, expected_out) < TOLERANCE[dtype]
    assert relative_error(lse, expected_lse) < TOLERANCE[dtype]


def test_no_past_is_the_block_alone(device: torch.device) -> None:
    q, k, v = make(17, 17, SHAPES[0], torch.float32, device)
    out, lse = prefill.prefill_attention(q, k, v, [], 0.2)
    alone_out, alone_lse = prefill.attend_block(q, k, v, 0.2, causal=True)
    assert torch.equal(out, alone_out) and torch.equal(lse, alone_lse)


def test_a_missing_segment_changes_the_result(device: torch.device, relative_error: Error) -> None:
    q, k, v = make(16, 116, SHAPES[0], torch.float32, device)
    out, _ = prefill.prefill_attention(q, k[:, 100:], v[:, 100:], [(k[:, :50], v[:, :50])], 0.2)
    assert relative_error(out, dense(q, k, v, 0.2, 100)[0]) > 0.05


@pytest.mark.parametrize("limit", [1, 100, 1 << 26])
def test_exact_attention_in_blocks_of_rows(
    limit: int, monkeypatch: pytest.MonkeyPatch, device: torch.device, relative_error: Error
) -> None:
    monkeypatch.setattr(reference, "_MAX_LOGITS", limit)
    q, k, v = make(20, 20, (4, 4, 64), torch.float32, device)
    out, lse = reference.attend_exact(q.transpose(0, 1), k, v, 0.2, torch.arange(20, device=device))
    expected_out, expected_lse = dense(q, k, v, 0.2, 0)
    assert relative_error(out.transpose(0, 1), expected_out) < 1e-5
    assert relative_error(lse.T, expected_lse) < 1e-5


def test_causal_needs_as_many_keys_as_queries(device: torch.device) -> None:
    q, k, v = make(5, 6, SHAPES[0], torch.float32, device)
    with pytest.raises(AssertionError, match="as many keys"):
        prefill.attend_block(q, k, v, 0.2, causal=True)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(32, 8, 128), (24, 8, 96), (16, 1, 64), (8, 8, 256)], ids=str)
def test_streamed_prefill_at_gpu_sizes(
    dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device, relative_error: Error
) -> None:
    q, k, v = make(512, 4608, shape, dtype, device)
    past = [(k[:, a : a + 1024], v[:, a : a + 1024]) for a in range(0, 4096, 1024)]
    out, lse = prefill.prefill_attention(q, k[:, 4096:], v[:, 4096:], past, shape[2] ** -0.5)
    expected_out, expected_lse = dense(q, k, v, shape[2] ** -0.5, 4096)
    assert relative_error(out, expected_out) < TOLERANCE[dtype]
    assert relative_error(lse, expected_lse) < TOLERANCE[dtype]

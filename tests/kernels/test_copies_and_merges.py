"""store_kv, gather_layer and merge_partials, reference and Triton."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from forecache.kernels.attention import gather_layer, merge_partials, ops, reference, store_kv

Error = Callable[[Tensor, Tensor], float]
Poison = Callable[[], Any]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        return reference
    return SimpleNamespace(
        store_kv=store_kv.store_kv,
        gather_layer=gather_layer.gather_layer,
        merge_partials=merge_partials.merge_partials,
    )


def make_pool(dtype: torch.dtype, device: torch.device, kv_heads: int, head_dim: int, chunk_tokens: int) -> Tensor:
    """``[7, 3, 2, kv_heads, chunk_tokens, head_dim]`` with rows longer than the field."""
    row = 3 * 2 * kv_heads * chunk_tokens * head_dim
    memory = torch.randn(7, row + 64).to(dtype).to(device)
    return memory[:, :row].view(7, 3, 2, kv_heads, chunk_tokens, head_dim)


def as_bytes(x: Tensor) -> Tensor:
    """Compares bit by bit, for dtypes without `torch.equal` too."""
    return x.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(3, 64), (1, 80), (8, 128)])
@pytest.mark.parametrize("layer", [2, torch.tensor(2), torch.tensor([2], dtype=torch.int32)], ids=str)
def test_store_writes_its_places_and_nothing_else(
    kernels: Any, dtype: torch.dtype, kv_heads: int, head_dim: int, layer: int | Tensor, device: torch.device
) -> None:
    pool = make_pool(dtype, device, kv_heads, head_dim, chunk_tokens=16)
    # as the projections leave them: one row holds more than the keys
    source = torch.randn(6, 2, kv_heads, head_dim + 16, device=device)[..., :head_dim]
    source = source.to(dtype).to(torch.float32 if dtype.itemsize == 1 else dtype)
    slots, offsets = torch.tensor([4, 4, -1, 0, 6, -1]), torch.tensor([0, 15, 3, 7, 8, 0])
    expected = pool.cpu().float()
    for i, (slot, offset) in enumerate(zip(slots.tolist(), offsets.tolist(), strict=True)):
        if slot >= 0:
            expected[slot, 2, :, :, offset] = source[i].cpu().float()
    index = layer.to(device) if isinstance(layer, Tensor) else layer
    kernels.store_kv(source[:, 0], source[:, 1], pool, index, slots.to(device), offsets.to(device))
    assert torch.equal(as_bytes(pool), as_bytes(expected.to(dtype)))


def test_store_rounds_and_saturates_in_fp8(kernels: Any, device: torch.device) -> None:
    if kernels is not reference and device.type == "cpu":
        pytest.skip("Triton's interpreter converts to fp8 by its own rule, unlike the GPU")
    pool = make_pool(torch.float8_e4m3fn, device, 1, 64, chunk_tokens=16)
    k, v = torch.randn(1, 1, 64, device=device), torch.full((1, 1, 64), -1e4, device=device)
    where = torch.zeros(1, dtype=torch.int64, device=device)
    kernels.store_kv(k, v, pool, 0, where, where)
    assert torch.equal(pool[0, 0, 0, 0, 0].float(), k[0, 0].to(torch.float8_e4m3fn).float())
    assert (pool[0, 0, 1, 0, 0].float() == -448).all()


def test_store_of_no_tokens(kernels: Any, device: torch.device) -> None:
    pool = make_pool(torch.float32, device, 2, 64, chunk_tokens=16)
    before = pool.clone()
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    kernels.store_kv(pool.new_empty(0, 2, 64), pool.new_empty(0, 2, 64), pool, 1, nothing, nothing)
    assert torch.equal(pool, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "head_dim", "chunk_tokens"), [(3, 64, 16), (1, 80, 20), (2, 128, 64)])
@pytest.mark.parametrize("layer", [1, torch.tensor(1)], ids=str)
def test_gather_keeps_order(
    kernels: Any,
    dtype: torch.dtype,
    kv_heads: int,
    head_dim: int,
    chunk_tokens: int,
    layer: int | Tensor,
    device: torch.device,
    poisoned: Poison,
) -> None:
    pool = make_pool(dtype, device, kv_heads, head_dim, chunk_tokens)
    slots = torch.tensor([5, 0, 6, 6])
    index = layer.to(device) if isinstance(layer, Tensor) else layer
    with poisoned():
        k, v = kernels.gather_layer(pool, index, slots.to(device))
    for part, x in enumerate((k, v)):
        assert x.is_contiguous() and x.dtype == dtype
        expected = torch.cat([pool[slot, 1, part].float() for slot in slots.tolist()], dim=1)
        assert torch.equal(as_bytes(x.float()), as_bytes(expected))


def test_gather_of_no_chunks(kernels: Any, device: torch.device) -> None:
    pool = make_pool(torch.float32, device, 2, 64, chunk_tokens=16)
    k, v = kernels.gather_layer(pool, 1, torch.empty(0, dtype=torch.int64, device=device))
    assert k.shape == v.shape == (2, 0, 64)


@pytest.mark.gpu
@NEEDS_GPU
def test_gather_reads_pinned_host_memory() -> None:
    pool = torch.randn(32, 4, 2, 8, 64, 128).to(torch.bfloat16).pin_memory()
    slots = torch.randperm(32)[:20]
    for on_gpu, on_cpu in zip(
        ops.gather_layer(pool, 3, slots.cuda()), reference.gather_layer(pool, 3, slots), strict=True
    ):
        assert on_gpu.is_cuda and torch.equal(on_gpu.cpu(), on_cpu)


def partials(rows: tuple[int, ...], head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention over 5 and over 9 keys, and over the 14 of both, in float64."""
    q, k, v = torch.randn(*rows, 1, head_dim), torch.randn(14, head_dim), torch.randn(14, head_dim)
    logits = (q.double() @ k.T.double())[..., 0, :]
    parts = []
    for keys in (slice(0, 5), slice(5, 14), slice(0, 14)):
        part = logits[..., keys]
        parts += [part.softmax(-1) @ v[keys].double(), part.logsumexp(-1)]
    out_a, lse_a, out_b, lse_b, out, lse = parts
    return out_a, lse_a, out_b, lse_b, out, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [(1,), (70, 3), (4, 2, 5)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_merge_equals_attention_over_both(
    kernels: Any,
    rows: tuple[int, ...],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    poisoned: Poison,
    relative_error: Error,
) -> None:
    out_a, lse_a, out_b, lse_b, expected_out, expected_lse = partials(rows, head_dim)
    arguments = [x.to(device) for x in (out_a.to(dtype), lse_a.float(), out_b.to(dtype), lse_b.float())]
    with poisoned():
        out, lse = kernels.merge_partials(*arguments)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert relative_error(out, expected_out) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert relative_error(lse, expected_lse) < 1e-5


def test_merge_of_strided_parts(kernels: Any, device: torch.device, relative_error: Error) -> None:
    out_a, lse_a, out_b, lse_b, expected_out, expected_lse = partials((6, 4), 64)
    arguments = [x.float().to(device).transpose(0, 1) for x in (out_a, lse_a)]
    out, lse = kernels.merge_partials(*arguments, *(x.float().to(device).transpose(0, 1) for x in (out_b, lse_b)))
    assert relative_error(out, expected_out.transpose(0, 1)) < 1e-5
    assert relative_error(lse, expected_lse.T) < 1e-5


def test_merge_into_a_wider_sum(kernels: Any, device: torch.device, relative_error: Error) -> None:
    """A float32 sum takes a bfloat16 part and stays float32."""
    out_a, lse_a, out_b, lse_b, expected_out, _ = partials((8,), 64)
    out, _ = kernels.merge_partials(
        out_a.float().to(device), lse_a.float().to(device), out_b.bfloat16().to(device), lse_b.float().to(device)
    )
    assert out.dtype == torch.float32
    assert relative_error(out, expected_out) < 1e-2


def test_merge_with_empty_parts(kernels: Any, device: torch.device) -> None:
    out_a, lse_a = torch.randn(3, 64, device=device), torch.tensor([1.0, -math.inf, -math.inf], device=device)
    out_b, lse_b = torch.randn(3, 64, device=device), torch.tensor([-math.inf, 2.0, -math.inf], device=device)
    out, lse = kernels.merge_partials(out_a, lse_a, out_b, lse_b)
    assert torch.allclose(out[0], out_a[0]) and torch.allclose(out[1], out_b[1])
    assert (out[2] == 0).all()
    assert lse.tolist() == [1.0, 2.0, -math.inf]


def test_merge_of_far_apart_parts(kernels: Any, device: torch.device) -> None:
    out_a, out_b = torch.randn(1, 64, device=device), torch.randn(1, 64, device=device)
    low, high = torch.tensor([-500.0], device=device), torch.tensor([500.0], device=device)
    out, lse = kernels.merge_partials(out_a, low, out_b, high)
    assert torch.allclose(out, out_b) and lse.item() == 500.0

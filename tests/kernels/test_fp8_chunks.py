"""Chunks to and from fp8, and new tokens into fp8 chunks whose scales grow, reference and Triton.

Triton's interpreter rounds to fp8 differently from the GPU. So most inputs need no rounding, and results are compared
bit by bit; inputs that are rounded run in the reference and on a GPU.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from forecache.kernels.attention import reference, store_kv
from forecache.kernels.chunks import quantize_chunks
from forecache.kernels.chunks import reference as chunk_reference

Error = Callable[[Tensor, Tensor], float]
FP8 = torch.float8_e4m3fn
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SHAPES = [(2, 64, 16), (1, 80, 20), (3, 128, 64), (1, 256, 64)]  # kv_heads, head_dim, chunk_tokens
LAYERS = 3
REFERENCE = SimpleNamespace(
    store_kv=reference.store_kv,
    quantize_chunks=chunk_reference.quantize_chunks,
    dequantize_chunks=chunk_reference.dequantize_chunks,
)


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        return REFERENCE
    return SimpleNamespace(
        store_kv=store_kv.store_kv,
        quantize_chunks=quantize_chunks.quantize_chunks,
        dequantize_chunks=quantize_chunks.dequantize_chunks,
    )


def skip_if_rounding_is_not_the_gpus(kernels: Any, device: torch.device) -> None:
    if kernels is not REFERENCE and device.type == "cpu":
        pytest.skip("Triton's interpreter converts to fp8 by its own rule, unlike the GPU")


def grid(*shape: int) -> Tensor:
    """Random numbers that fp8 holds, float32; the last axis has the largest of them."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    codes[..., torch.randint(shape[-1], ())] = 0xFE  # -448
    return codes.view(FP8).float()


def coarse_grid(*shape: int) -> Tensor:
    """Of `grid` the numbers from 4 to 448: they stay exact when divided by 64."""
    codes = torch.randint(9 << 3, 0x7F, shape, dtype=torch.uint8) | torch.randint(2, shape, dtype=torch.uint8) << 7
    codes[..., torch.randint(shape[-1], ())] = 0xFE
    return codes.view(FP8).float()


def powers_of_two(*shape: int) -> Tensor:
    return torch.exp2(torch.randint(-6, 6, shape).float())


def empty_chunks(slots: int, heads: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN chunks ``[slots, layers, 2, kv_heads, chunk_tokens, head_dim]`` with layers and heads far apart."""
    kv_heads, head_dim, chunk_tokens = heads
    row = (kv_heads + 1) * chunk_tokens * head_dim
    memory = torch.full((slots, 2 * (LAYERS + 1) * row + 64), torch.nan).to(dtype)
    chunk = chunk_tokens * head_dim
    strides = (memory.stride(0), row, (LAYERS + 1) * row, chunk, head_dim, 1)  # the parts outside the layers
    return memory.as_strided((slots, LAYERS, 2, kv_heads, chunk_tokens, head_dim), strides)


def bits(x: Tensor) -> Tensor:
    return x.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_quantize_and_back(kernels: Any, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    kv_heads, head_dim, chunk_tokens = heads
    shape = (LAYERS, 2, kv_heads)
    scales, values = powers_of_two(2, *shape), grid(2, *shape, chunk_tokens * head_dim)
    values[1, 1, 0, 0] = 0
    scales[1, 1, 0, 0] = 1
    values = values.unflatten(-1, (chunk_tokens, head_dim))
    chunks = (values * scales[..., None, None]).to(dtype)
    source = empty_chunks(4, heads, dtype)
    source[torch.tensor([2, 0])] = chunks
    source = source.to(device)
    small, back = empty_chunks(5, heads, FP8).to(device), empty_chunks(3, heads, dtype).to(device)
    untouched = small.cpu()
    scale = torch.full((5, *shape, 2), torch.nan, device=device)[..., 0]

    kernels.quantize_chunks(
        source, torch.tensor([2, 0], device=device), small, scale, torch.tensor([1, 4], device=device)
    )
    written = torch.tensor([1, 4])
    assert torch.equal(scale.cpu()[written], scales) and scale.cpu()[[0, 2, 3]].isnan().all()
    assert torch.equal(bits(small.cpu().float()[written]), bits(values))
    assert torch.equal(bits(small.cpu()[[0, 2, 3]]), bits(untouched[[0, 2, 3]]))

    kernels.dequantize_chunks(
        small, scale, torch.tensor([4, 1, 4], device=device), back, torch.tensor([0, 2, 1], device=device)
    )
    assert torch.equal(bits(back), bits(chunks[[1, 1, 0]]))


def test_no_chunks(kernels: Any, device: torch.device) -> None:
    wide, small = torch.ones(2, 1, 2, 1, 16, 64, device=device), torch.ones(2, 1, 2, 1, 16, 64, device=device).to(FP8)
    scale, nothing = torch.ones(2, 1, 2, 1, device=device), torch.empty(0, dtype=torch.int64, device=device)
    kernels.quantize_chunks(wide, nothing, small, scale, nothing)
    kernels.dequantize_chunks(small, scale, nothing, wide, nothing)
    kernels.store_kv(wide[:0, 0, 0, :, 0], wide[:0, 0, 1, :, 0], small, 0, nothing, nothing, scale=scale)
    assert (wide == 1).all() and (small.float() == 1).all() and (scale == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantized_values_are_near(
    kernels: Any, dtype: torch.dtype, device: torch.device, relative_error: Error
) -> None:
    """e4m3 keeps 3 bits of the mantissa: at most 2^-4 off, or half of the smallest step, 2^-10 of the scale."""
    skip_if_rounding_is_not_the_gpus(kernels, device)
    heads = (2, 128, 64)
    source = torch.randn(3, LAYERS, 2, 2, 64, 128).to(dtype).to(device)
    source[1] *= 1e-3
    where = torch.arange(3, device=device)
    small, scale = torch.empty_like(source, dtype=FP8), torch.empty(3, LAYERS, 2, 2, device=device)
    kernels.quantize_chunks(source, where, small, scale, where)
    wide = empty_chunks(3, heads, torch.float32).to(device)
    kernels.dequantize_chunks(small, scale, where, wide, where)
    exact = source.cpu().double()
    allowed = torch.maximum(exact.abs() * 2**-4, scale.cpu().double()[..., None, None] * 2**-10)
    assert ((wide.cpu().double() - exact).abs() <= allowed * (1 + 1e-5)).all()
    assert torch.allclose(scale.cpu().double(), exact.abs().amax((-1, -2)) / 448, rtol=1e-6)
    assert relative_error(wide, exact) < 0.03


def test_tiny_and_huge_magnitudes_stay_finite(kernels: Any, device: torch.device) -> None:
    skip_if_rounding_is_not_the_gpus(kernels, device)
    source = torch.randn(1, 2, 2, 1, 16, 64, device=device)
    source[:, 0] *= 1e-40
    source[:, 1] *= 1e37
    where = torch.zeros(1, dtype=torch.int64, device=device)
    small, scale = torch.empty_like(source, dtype=FP8), torch.empty(1, 2, 2, 1, device=device)
    kernels.quantize_chunks(source, where, small, scale, where)
    assert small.float().isfinite().all() and scale.isfinite().all()
    assert (small[:, 1].float().abs().amax((-1, -2)) == 448).all()


def make_pool(device: torch.device, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Seven chunks and their scales, of numbers that need no rounding."""
    kv_heads, head_dim, chunk_tokens = heads
    kv = empty_chunks(7, heads, FP8)
    kv.copy_(coarse_grid(7, LAYERS, 2, kv_heads, chunk_tokens, head_dim) / 16)
    return kv.to(device), torch.exp2(torch.randint(-2, 3, (7, LAYERS, 2, kv_heads, 2)).float()).to(device)[..., 0]


@pytest.mark.parametrize("heads", SHAPES, ids=str)
@pytest.mark.parametrize("layer", [1, torch.tensor(1), torch.tensor([1], dtype=torch.int32)], ids=str)
def test_store_keeps_the_largest_scale(
    kernels: Any, heads: tuple[int, int, int], layer: int | Tensor, device: torch.device
) -> None:
    """Tokens of four chunks: a whole new one, a longer one, one whose scales stay and one token; padding between."""
    kv_heads, head_dim, chunk_tokens = heads
    runs = [(4, 0, chunk_tokens), (-1, 5, 2), (2, 3, 7), (6, 9, 2), (-1, 0, 1), (0, chunk_tokens - 1, 1)]
    slots = torch.tensor([slot for slot, _, count in runs for _ in range(count)])
    offsets = torch.tensor([first + i for _, first, count in runs for i in range(count)])
    kv, scale = make_pool(device, heads)
    scale[2, 1] = 0.25  # grows by a power of two, so that older tokens need no rounding (they are 28 at most)
    scale[6, 1] = 64
    scale[0, 1, 0], scale[0, 1, 1] = 64, 0.5  # keys keep theirs, values do not
    new = coarse_grid(
        len(slots), 2, kv_heads, head_dim
    )  # each token's largest is 448: a chunk's new tokens need a scale of 1
    source = torch.zeros(len(slots), 2, kv_heads, head_dim + 16).to(device)
    source[..., :head_dim] = new
    expected_kv, expected_scale = kv.cpu().float(), scale.cpu().clone()
    at = 0
    for slot, first, count in runs:
        if slot >= 0:
            old = expected_scale[slot, 1].clone() if first else torch.zeros(2, kv_heads)
            fresh = old.clamp(min=1)
            expected_scale[slot, 1] = fresh
            expected_kv[slot, 1, :, :, :first] *= (old / fresh)[..., None, None]
            tokens = new[at : at + count].permute(1, 2, 0, 3) / fresh[..., None, None]
            expected_kv[slot, 1, :, :, first : first + count] = tokens
        at += count
    assert torch.equal(expected_kv, expected_kv.to(FP8).float()), "nothing here needs rounding"

    index = layer.to(device) if isinstance(layer, Tensor) else layer
    keys, values = source[:, 0, :, :head_dim], source[:, 1, :, :head_dim]
    kernels.store_kv(keys, values, kv, index, slots.to(device), offsets.to(device), scale=scale)
    assert torch.equal(scale.cpu(), expected_scale)
    assert torch.equal(bits(kv), bits(expected_kv.to(FP8)))


def test_storing_in_pieces_rounds_little(kernels: Any, device: torch.device, relative_error: Error) -> None:
    """Growing tokens, two at a time: the scale ends as that of all at once; rounded once they would be 0.026 off."""
    skip_if_rounding_is_not_the_gpus(kernels, device)
    k, v = (
        torch.randn(40, 2, 64, device=device) * torch.linspace(0.1, 2, 40, device=device)[:, None, None] for _ in "kv"
    )
    kv = empty_chunks(3, (2, 64, 64), FP8).to(device)
    scale = torch.full((3, LAYERS, 2, 2), torch.nan, device=device)
    for first in range(0, 40, 2):
        slots, offsets = torch.tensor([2, 2], device=device), torch.tensor([first, first + 1], device=device)
        kernels.store_kv(k[first : first + 2], v[first : first + 2], kv, 0, slots, offsets, scale=scale)
    exact = torch.stack((k, v)).cpu().double().transpose(1, 2)
    assert torch.allclose(scale[2, 0].cpu().double(), exact.abs().amax((2, 3)) / 448, rtol=1e-6)
    stored = kv[2, 0, :, :, :40].cpu().double() * scale[2, 0].cpu().double()[:, :, None, None]
    assert relative_error(stored, exact) < 0.06
    assert kv[2, 0, :, :, 40:].float().isnan().all() and scale[:2].isnan().all() and scale[2, 1:].isnan().all()


@pytest.mark.gpu
@NEEDS_GPU
def test_captured_store_follows_its_inputs() -> None:
    """Slots, offsets, the layer and the values change between replays of one captured launch."""
    device = torch.device("cuda")
    kv, scale = make_pool(device, (2, 64, 64))
    twin, twin_scale = kv.cpu(), scale.cpu()
    k, v = torch.zeros(4, 2, 64, device=device), torch.zeros(4, 2, 64, device=device)
    layer, slots = torch.tensor(0, device=device), torch.full((4,), -1, device=device)
    offsets = torch.zeros(4, dtype=torch.int64, device=device)
    store_kv.store_kv(k, v, kv, layer, slots, offsets, scale=scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        store_kv.store_kv(k, v, kv, layer, slots, offsets, scale=scale)
    for step in range(12):
        layer.fill_(step % 2)
        slots.copy_(torch.tensor([3, -1, 1, 6]))
        offsets.fill_(step)
        k.normal_(std=1 + step)
        v.normal_(std=1 + step)
        graph.replay()
        where = slots.cpu(), offsets.cpu()
        reference.store_kv(k.cpu(), v.cpu(), twin, step % 2, *where, scale=twin_scale)
    assert torch.equal(scale.cpu(), twin_scale)
    assert torch.equal(bits(kv), bits(twin))

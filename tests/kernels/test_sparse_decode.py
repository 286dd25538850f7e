"""Decode attention over a block table, reference and Triton, against float64."""

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from forecache.kernels.attention import decode as triton_kernel
from forecache.kernels.attention import reference
from forecache.kernels.common.tuning import DecodeConfig

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
INTERPRETED = not torch.cuda.is_available()
GPU = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA GPU: too large for Triton's interpreter")
SMALL = DecodeConfig(block_tokens=16, num_warps=4, num_stages=2, programs_per_sm=12)
LARGE = DecodeConfig(block_tokens=64, num_warps=4, num_stages=2, programs_per_sm=4)
STREAM = DecodeConfig(block_tokens=16, num_warps=4, num_stages=2, programs_per_sm=5, stream=True, pairs=True)

Error = Callable[[Tensor, Tensor], float]
Poison = Callable[[], Any]
MakeCase = Callable[..., Any]


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    chunk_tokens: int
    max_chunks: int


SHAPES = [
    Shape(heads=9, kv_heads=3, head_dim=64, chunk_tokens=64, max_chunks=3),
    Shape(heads=4, kv_heads=4, head_dim=80, chunk_tokens=16, max_chunks=7),
    Shape(heads=17, kv_heads=1, head_dim=96, chunk_tokens=32, max_chunks=4),
    Shape(heads=8, kv_heads=2, head_dim=128, chunk_tokens=64, max_chunks=2),
    Shape(heads=2, kv_heads=1, head_dim=192, chunk_tokens=20, max_chunks=3),
    Shape(heads=3, kv_heads=1, head_dim=256, chunk_tokens=100, max_chunks=2),
]


def ragged(shape: Shape) -> list[int]:
    """Nothing, one token, one short of a chunk, everything."""
    return [0, 1, shape.chunk_tokens - 1, shape.max_chunks * shape.chunk_tokens]


@pytest.fixture(params=["reference", "split-small", "split-large", "stream"])
def decode(request: pytest.FixtureRequest) -> Callable[..., tuple[Tensor, Tensor]]:
    """`sparse_decode` in all its forms."""
    if request.param == "reference":
        return reference.sparse_decode
    config = {"split-small": SMALL, "split-large": LARGE, "stream": STREAM}[request.param]
    return partial(triton_kernel.sparse_decode, config=config)


def skip_if_not_interpretable(decode: Callable[..., Any], dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16 and decode is not reference.sparse_decode:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot; runs on a GPU")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_equals_float64(
    decode: Callable[..., tuple[Tensor, Tensor]],
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    poisoned: Poison,
    relative_error: Error,
    make_case: MakeCase,
) -> None:
    skip_if_not_interpretable(decode, dtype)
    case = make_case(shape, dtype, ragged(shape), device)
    with poisoned():
        out, lse = decode(*case.arguments())
    expected_out, expected_lse = case.expected()
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all()
    assert relative_error(out[1:], expected_out[1:]) < TOLERANCE[dtype]
    assert relative_error(lse[1:], expected_lse[1:]) < TOLERANCE[dtype]


@pytest.mark.parametrize("index", [torch.tensor(1), torch.tensor([1]), torch.tensor(1, dtype=torch.int32)], ids=str)
def test_layer_can_be_a_tensor(
    decode: Callable[..., tuple[Tensor, Tensor]], index: Tensor, device: torch.device, make_case: MakeCase
) -> None:
    case = make_case(SHAPES[0], torch.float32, [100, 7], device)
    q, kv, layer, *rest = case.arguments()
    for by_int, by_tensor in zip(decode(q, kv, layer, *rest), decode(q, kv, index.to(device), *rest), strict=True):
        assert torch.equal(by_int, by_tensor)


def test_all_chunks_equal_dense_attention_and_few_do_not(
    decode: Callable[..., tuple[Tensor, Tensor]], device: torch.device, relative_error: Error, make_case: MakeCase
) -> None:
    """Chunks of one sequence, scattered over the pool; then the same with half of them left out."""
    shape = Shape(heads=4, kv_heads=2, head_dim=64, chunk_tokens=16, max_chunks=8)
    case = make_case(shape, torch.float32, [128], device)
    k, v = reference.gather_layer(case.kv.cpu(), case.layer, case.block_table[0].cpu().long())
    dense = torch.nn.functional.scaled_dot_product_attention(
        case.q[0].cpu().double().unsqueeze(1), k.double().repeat_interleave(2, 0),
        v.double().repeat_interleave(2, 0), scale=case.scale,
    )[:, 0]  # fmt: skip
    everything, _ = decode(*case.arguments())
    assert relative_error(everything[0], dense) < 1e-5

    case.block_table[0, :4] = case.block_table[0, [0, 3, 5, 6]]
    case.context_lens.fill_(64)
    few, _ = decode(*case.arguments())
    assert relative_error(few[0], dense) > 0.05
    assert relative_error(few[0], case.expected()[0][0]) < 1e-5


def test_order_of_chunks_does_not_matter(
    decode: Callable[..., tuple[Tensor, Tensor]], device: torch.device, relative_error: Error, make_case: MakeCase
) -> None:
    case = make_case(SHAPES[1], torch.float32, [112], device)
    forward, _ = decode(*case.arguments())
    case.block_table = case.block_table.flip(1).contiguous()
    backward, _ = decode(*case.arguments())
    assert relative_error(backward, forward) < 1e-5


def test_large_logits_do_not_overflow(
    decode: Callable[..., tuple[Tensor, Tensor]], device: torch.device, relative_error: Error, make_case: MakeCase
) -> None:
    case = make_case(SHAPES[0], torch.float32, [192, 70], device)
    case.scale = 100.0
    out, lse = decode(*case.arguments())
    expected_out, expected_lse = case.expected()
    assert relative_error(out, expected_out) < 1e-4
    assert relative_error(lse, expected_lse) < 1e-5


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_pool_with_scales(
    decode: Callable[..., tuple[Tensor, Tensor]],
    q_dtype: torch.dtype,
    device: torch.device,
    relative_error: Error,
    make_case: MakeCase,
) -> None:
    skip_if_not_interpretable(decode, q_dtype)
    shape = SHAPES[3]
    case = make_case(shape, q_dtype, [100, 128, 3], device, kv_dtype=torch.float8_e4m3fn)
    slots, layers = case.kv.shape[:2]
    memory = torch.rand(slots, layers * 2 * shape.kv_heads + 8, device=device) + 0.5
    scale = memory[:, :-8].unflatten(1, (layers, 2, shape.kv_heads))  # as the hot pool has them
    k_scale, v_scale = scale[:, :, 0], scale[:, :, 1]
    out, lse = decode(*case.arguments(), k_scale=k_scale, v_scale=v_scale)
    scales = scale[..., None, None]
    scaled = replace(case, kv=case.kv.float() * scales)
    expected_out, expected_lse = scaled.expected()
    assert relative_error(out, expected_out) < TOLERANCE[q_dtype]
    assert relative_error(lse, expected_lse) < TOLERANCE[q_dtype]


def test_pool_of_more_than_two_billion_elements(
    decode: Callable[..., tuple[Tensor, Tensor]], device: torch.device, relative_error: Error, make_case: MakeCase
) -> None:
    """The far slot's first element has a number past 2^31; of the memory only its pages are touched."""
    slot_stride = 1 << 30
    memory = torch.empty(2 * slot_stride + 4096, dtype=torch.float16, device=device)
    kv = memory.as_strided((3, 1, 2, 1, 16, 64), (slot_stride, 2048, 1024, 1024, 64, 1))
    kv[2] = torch.randn(kv.shape[1:]).to(kv)
    case = replace(
        make_case(Shape(2, 1, 64, 16, 1), torch.float16, [16], device),
        kv=kv,
        layer=0,
        block_table=torch.tensor([[2]], dtype=torch.int32, device=device),
    )
    out, _ = decode(*case.arguments())
    near = replace(case, kv=kv[2:].contiguous(), block_table=torch.zeros_like(case.block_table))
    assert relative_error(out, near.expected()[0]) < TOLERANCE[torch.float16]


def test_wrong_shapes_are_refused(device: torch.device, make_case: MakeCase) -> None:
    q, kv, _, table, lens, scale = make_case(SHAPES[0], torch.float32, [5], device).arguments()
    with pytest.raises(AssertionError, match="layer 2 of 2"):
        triton_kernel.sparse_decode(q, kv, 2, table, lens, scale)
    with pytest.raises(AssertionError, match="do not divide"):
        triton_kernel.sparse_decode(q[:, :8], kv, 0, table, lens, scale)
    with pytest.raises(AssertionError, match="does not fit"):
        triton_kernel.sparse_decode(q[..., :32], kv, 0, table, lens, scale)
    with pytest.raises(AssertionError, match="contiguous"):
        triton_kernel.sparse_decode(q, kv.transpose(4, 5).contiguous().transpose(4, 5), 0, table, lens, scale)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"),
    list(itertools.product(TOLERANCE, [64, 80, 96, 128, 192, 256], [1, 4, 8, 40])),
)
def test_tuned_settings_at_gpu_sizes(
    dtype: torch.dtype, head_dim: int, group: int, device: torch.device, relative_error: Error, make_case: MakeCase
) -> None:
    shape = Shape(2 * group, 2, head_dim, chunk_tokens=64, max_chunks=64)
    case = make_case(shape, dtype, [4096, 0, 4095, 65, 2000], device)
    out, lse = triton_kernel.sparse_decode(*case.arguments())
    expected_out, expected_lse = case.expected()
    live = torch.tensor([0, 2, 3, 4])
    assert relative_error(out, expected_out) < TOLERANCE[dtype]
    assert relative_error(lse[live.to(device)], expected_lse[live]) < TOLERANCE[dtype]


@pytest.mark.gpu
@GPU
def test_captured_graph_follows_its_inputs(device: torch.device, relative_error: Error, make_case: MakeCase) -> None:
    """Lengths, slots and the layer change between replays of one captured launch."""
    shape = Shape(8, 2, 128, chunk_tokens=64, max_chunks=32)
    case = make_case(shape, torch.bfloat16, [2048, 2048], device)
    case.kv.copy_(torch.randn(case.kv.shape))
    layer = torch.tensor(1, device=device)
    q, kv, _, table, lens, scale = case.arguments()
    triton_kernel.sparse_decode(q, kv, layer, table, lens, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = triton_kernel.sparse_decode(q, kv, layer, table, lens, scale)
    for new_layer, new_lens in ((0, [1, 2048]), (1, [777, 64]), (0, [1500, 1501])):
        layer.fill_(new_layer)
        lens.copy_(torch.tensor(new_lens))
        table.copy_(torch.randperm(kv.shape[0])[: table.numel()].view_as(table))
        graph.replay()
        case.layer = new_layer
        expected_out, expected_lse = case.expected()
        assert relative_error(out, expected_out) < 1e-2
        assert relative_error(lse, expected_lse) < 1e-2


def test_reference_and_triton_take_the_same_arguments() -> None:
    ours, theirs = (inspect.signature(m.sparse_decode).parameters for m in (reference, triton_kernel))
    assert [*ours, "config"] == [*theirs]

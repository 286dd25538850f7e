"""Attention of packed prompt tokens over the pool and themselves, reference and Triton, against float64."""

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from forecache.kernels.attention import ops, reference
from forecache.kernels.attention import ragged_prefill as triton_kernel
from forecache.kernels.common.tuning import PREFILL_VARIANTS, PrefillConfig

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
INTERPRETED = not torch.cuda.is_available()
GPU = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA GPU: too large for Triton's interpreter")
CONFIGS = {
    "small": PrefillConfig(rows=32, block_tokens=16, num_warps=4, num_stages=2),
    "two-pages": PrefillConfig(rows=64, block_tokens=64, num_warps=4, num_stages=2),
    "descriptors": PrefillConfig(rows=32, block_tokens=32, num_warps=4, num_stages=2, descriptors=True),
}

Error = Callable[[Tensor, Tensor], float]
Poison = Callable[[], Any]
Prefill = Callable[..., tuple[Tensor, Tensor]]


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    chunk_tokens: int


class Part(NamedTuple):
    """One sequence of a case."""

    past: int
    tokens: int


SHAPES = [
    Shape(heads=9, kv_heads=3, head_dim=64, chunk_tokens=16),
    Shape(heads=2, kv_heads=2, head_dim=80, chunk_tokens=32),
    Shape(heads=4, kv_heads=1, head_dim=96, chunk_tokens=20),
    Shape(heads=8, kv_heads=2, head_dim=128, chunk_tokens=64),
    Shape(heads=40, kv_heads=1, head_dim=64, chunk_tokens=32),
    Shape(heads=2, kv_heads=1, head_dim=256, chunk_tokens=32),
]


@dataclass
class Case:
    """Packed prompts with NaN everywhere but in what may be read."""

    q: Tensor
    k: Tensor
    v: Tensor
    kv: Tensor
    layer: int
    block_table: Tensor
    past_lens: Tensor
    starts: Tensor
    scale: float

    def arguments(self) -> tuple[Any, ...]:
        return (
            *(self.q, self.k, self.v, self.kv, self.layer),
            *(self.block_table, self.past_lens, self.starts, self.scale),
        )

    def expected(self) -> tuple[Tensor, Tensor]:
        """out and lse in float64, on the CPU."""
        q, k, v, kv = (x.cpu().double() for x in (self.q, self.k, self.v, self.kv))
        group, chunk_tokens = q.shape[1] // k.shape[1], kv.shape[4]
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
        bounds = self.starts.tolist()
        for i, past in enumerate(self.past_lens.tolist()):
            own = slice(bounds[i], bounds[i + 1])
            tokens = own.stop - own.start
            if not tokens:
                continue
            slots = self.block_table[i].cpu().long()[: math.ceil(past / chunk_tokens)]
            keys, values = (
                torch.cat((past_kv[:, :past], x[own].transpose(0, 1)), 1).repeat_interleave(group, 0)
                for past_kv, x in zip(kv[slots, self.layer].permute(1, 2, 0, 3, 4).flatten(2, 3), (k, v), strict=True)
            )
            logits = torch.einsum("qhd,hnd->qhn", q[own], keys) * self.scale
            future = torch.arange(past + tokens) > past + torch.arange(tokens)[:, None]
            logits = logits.masked_fill(future[:, None], -math.inf)
            out[own] = torch.einsum("qhn,hnd->qhd", logits.softmax(-1), values)
            lse[own] = logits.logsumexp(-1)
        return out, lse


def make_case(
    shape: Shape,
    parts: list[Part],
    dtype: torch.dtype,
    device: torch.device,
    *,
    before: int = 0,
    after: int = 0,
    kv_dtype: torch.dtype | None = None,
    max_chunks: int = 0,
) -> Case:
    """``before``, ``after``: tokens that belong to no sequence."""
    heads, kv_heads, head_dim, chunk_tokens = shape
    layers, layer = 2, 1
    chunks = [math.ceil(part.past / chunk_tokens) for part in parts]
    width = max(max_chunks, *chunks) if chunks else max_chunks
    slots = sum(chunks) + 3
    row = layers * 2 * kv_heads * chunk_tokens * head_dim
    memory = torch.full((slots, row + 64), math.nan)  # rows are longer than the field, as in the hot pool
    kv = memory[:, :row].view(slots, layers, 2, kv_heads, chunk_tokens, head_dim)
    table = torch.full((len(parts), width), slots - 1, dtype=torch.int32)
    free = torch.randperm(slots).tolist()
    for i, part in enumerate(parts):
        for chunk in range(chunks[i]):
            slot = table[i, chunk] = free.pop()
            tokens = min(chunk_tokens, part.past - chunk * chunk_tokens)
            kv[slot, layer, :, :, :tokens] = torch.randn(2, kv_heads, tokens, head_dim)
    bounds = [before, *itertools.accumulate((part.tokens for part in parts), initial=0)]
    starts = [bounds[0], *(before + stop for stop in bounds[2:])]
    tokens = starts[-1] + after
    # as projections' views, and all that belongs to no sequence is NaN
    packed = torch.full((tokens, heads + 2 * kv_heads, head_dim), math.nan)
    packed[before : starts[-1]] = torch.randn(starts[-1] - before, heads + 2 * kv_heads, head_dim)
    q, k, v = packed.to(dtype).to(device).split((heads, kv_heads, kv_heads), 1)
    memory = memory.to(kv_dtype or dtype).to(device)
    return Case(
        q=q,
        k=k,
        v=v,
        kv=memory[:, :row].view(kv.shape),
        layer=layer,
        block_table=table.to(device),
        past_lens=torch.tensor([part.past for part in parts], dtype=torch.int32, device=device),
        starts=torch.tensor(starts, dtype=torch.int32, device=device),
        scale=2 * head_dim**-0.5,
    )


def ragged(shape: Shape) -> list[Part]:
    """No past and a part of a chunk, an empty sequence, whole chunks and one token, chunks and a part of one."""
    chunk, group = shape.chunk_tokens, shape.heads // shape.kv_heads
    few, many = (max(1, 4 * n // max(4, group)) for n in (11, 29))  # the interpreter is slow
    return [Part(0, few), Part(chunk + 5, 0), Part(2 * chunk, 1), Part(3 * chunk + chunk // 2 + 1, many), Part(1, 2)]


KERNELS = {
    "reference": reference.ragged_prefill,
    **{name: partial(triton_kernel.ragged_prefill, config=config) for name, config in CONFIGS.items()},
    "splits": partial(triton_kernel.ragged_prefill, config=CONFIGS["two-pages"], splits=3),
}


@pytest.fixture(params=KERNELS)
def any_prefill(request: pytest.FixtureRequest) -> Prefill:
    """`ragged_prefill` in all its forms."""
    return KERNELS[request.param]


@pytest.fixture(params=["reference", "splits"])
def prefill(request: pytest.FixtureRequest) -> Prefill:
    """The reference, and the Triton kernels with most of their code in use: the interpreter is slow."""
    return KERNELS[request.param]


def check(
    case: Case, result: tuple[Tensor, Tensor], relative_error: Error, tolerance: float, expected: Any = None
) -> None:
    (out, lse), (expected_out, expected_lse) = result, expected or case.expected()
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    live = (expected_lse[:, 0] > -math.inf).to(out.device)
    assert (out[~live] == 0).all() and (lse[~live] == -math.inf).all()
    assert relative_error(out[live], expected_out[live.cpu()]) < tolerance
    assert relative_error(lse[live], expected_lse[live.cpu()]) < tolerance


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), (SHAPES[0], torch.float16), (SHAPES[3], torch.bfloat16)],
    ids=str,
)
def test_packed_prompts_equal_float64(
    any_prefill: Prefill,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    poisoned: Poison,
    relative_error: Error,
) -> None:
    if INTERPRETED and dtype == torch.bfloat16 and any_prefill is not reference.ragged_prefill:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot; runs on a GPU")
    case = make_case(shape, ragged(shape), dtype, device, before=3, after=5)
    with poisoned():
        result = any_prefill(*case.arguments())
    check(case, result, relative_error, TOLERANCE[dtype])


@pytest.mark.parametrize("number", range(3))
def test_random_lengths_equal_float64(
    prefill: Prefill, number: int, device: torch.device, poisoned: Poison, relative_error: Error
) -> None:
    torch.manual_seed(number)
    shape = SHAPES[number % len(SHAPES)]
    sequences, before, after = (int(torch.randint(low, high, ())) for low, high in ((1, 5), (0, 20), (0, 20)))
    past = torch.randint(0, 4 * shape.chunk_tokens, (sequences,)) * torch.randint(0, 2, (sequences,))
    tokens = torch.randint(0, 30, (sequences,))
    parts = [Part(*lengths) for lengths in zip(past.tolist(), tokens.tolist(), strict=True)]
    case = make_case(shape, parts, torch.float32, device, before=before, after=after, max_chunks=5)
    with poisoned():
        result = prefill(*case.arguments())
    check(case, result, relative_error, 1e-5)


@pytest.mark.parametrize(
    ("parts", "before", "after"),
    [([], 5, 0), ([Part(40, 0), Part(0, 0)], 0, 0), ([Part(0, 0)], 7, 33), ([Part(0, 1)], 0, 0)],
    ids=["no-sequences", "no-tokens", "padding-alone", "one-token"],
)
def test_little_or_nothing_to_do(
    prefill: Prefill,
    parts: list[Part],
    before: int,
    after: int,
    device: torch.device,
    poisoned: Poison,
) -> None:
    case = make_case(SHAPES[0], parts, torch.float32, device, before=before, after=after)
    with poisoned():
        out, lse = prefill(*case.arguments())
    if parts == [Part(0, 1)]:  # attends to itself
        torch.testing.assert_close(out[0], case.v[0].repeat_interleave(3, 0))
    else:
        assert (out == 0).all() and (lse == -math.inf).all() and out.shape == case.q.shape


@pytest.mark.parametrize("index", [torch.tensor(1), torch.tensor([1]), torch.tensor(1, dtype=torch.int32)], ids=str)
def test_layer_can_be_a_tensor(prefill: Prefill, index: Tensor, device: torch.device) -> None:
    q, k, v, kv, layer, *rest = make_case(SHAPES[0], [Part(20, 9)], torch.float32, device).arguments()
    by_int, by_tensor = (prefill(q, k, v, kv, one, *rest) for one in (layer, index.to(device)))
    for expected, actual in zip(by_int, by_tensor, strict=True):
        assert torch.equal(expected, actual)


def test_all_chunks_equal_dense_attention_and_few_do_not(
    prefill: Prefill, device: torch.device, relative_error: Error
) -> None:
    """A prompt of 128 tokens, the first 96 stored in scattered chunks; then the same with half of those left out."""
    case = make_case(Shape(4, 2, 64, 16), [Part(96, 32)], torch.float32, device)
    past = reference.gather_layer(case.kv.cpu(), case.layer, case.block_table[0].cpu().long())
    k, v = (
        torch.cat((stored, own.cpu().transpose(0, 1)), 1).double().repeat_interleave(2, 0)
        for stored, own in zip(past, (case.k, case.v), strict=True)
    )
    q = torch.zeros(4, 128, 64, dtype=torch.float64)
    q[:, 96:] = case.q.cpu().transpose(0, 1)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=case.scale)[:, 96:]
    everything, _ = prefill(*case.arguments())
    assert relative_error(everything.transpose(0, 1), dense) < 1e-5

    case.block_table[0, :3] = case.block_table[0, [5, 0, 3]]
    case.past_lens.fill_(48)
    few, _ = prefill(*case.arguments())
    assert relative_error(few.transpose(0, 1), dense) > 0.05
    assert relative_error(few, case.expected()[0]) < 1e-5


def test_order_of_chunks_does_not_matter(prefill: Prefill, device: torch.device, relative_error: Error) -> None:
    case = make_case(SHAPES[0], [Part(96, 20)], torch.float32, device)
    forward, _ = prefill(*case.arguments())
    case.block_table = case.block_table.flip(1).contiguous()
    backward, _ = prefill(*case.arguments())
    assert relative_error(backward, forward) < 1e-5


def test_prompts_packed_together_equal_each_alone(
    prefill: Prefill, device: torch.device, relative_error: Error
) -> None:
    case = make_case(SHAPES[0], [Part(50, 20), Part(0, 33), Part(17, 1)], torch.float32, device)
    together, _ = prefill(*case.arguments())
    bounds = case.starts.tolist()
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        alone = replace(
            case,
            **{name: getattr(case, name)[start:stop] for name in ("q", "k", "v")},
            block_table=case.block_table[i : i + 1],
            past_lens=case.past_lens[i : i + 1],
            starts=torch.tensor([0, stop - start], dtype=torch.int32, device=device),
        )
        assert relative_error(prefill(*alone.arguments())[0], together[start:stop]) < 1e-6


def test_a_segment_read_elsewhere_merges_to_the_whole(
    prefill: Prefill, device: torch.device, relative_error: Error
) -> None:
    """Half of the past is attended to apart, without the tokens' own keys, as cold chunks are."""
    shape = Shape(4, 2, 64, 16)
    case = make_case(shape, [Part(96, 21)], torch.float32, device)
    near = replace(case, block_table=case.block_table[:, 3:].contiguous(), past_lens=case.past_lens - 48)
    far_k, far_v = reference.gather_layer(case.kv, case.layer, case.block_table[0, :3].long())
    rows = case.q.unflatten(1, (2, 2)).transpose(0, 1).flatten(1, 2)
    far_out, far_lse = (
        x.unflatten(1, (21, 2)).transpose(0, 1).flatten(1, 2)
        for x in reference.attend_exact(rows, far_k, far_v, case.scale)
    )
    merged = ops.merge_partials(*prefill(*near.arguments()), far_out, far_lse)
    check(case, merged, relative_error, 1e-5)


def test_large_logits_do_not_overflow(prefill: Prefill, device: torch.device, relative_error: Error) -> None:
    case = make_case(SHAPES[0], [Part(70, 30), Part(0, 20)], torch.float32, device)
    case.scale = 100.0
    check(case, prefill(*case.arguments()), relative_error, 1e-4)


@pytest.mark.parametrize("q_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_pool_with_scales(
    prefill: Prefill, q_dtype: torch.dtype, device: torch.device, relative_error: Error
) -> None:
    if INTERPRETED and q_dtype == torch.bfloat16 and prefill is not reference.ragged_prefill:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot; runs on a GPU")
    shape = Shape(8, 2, 64, 32)
    parts = [Part(100, 11), Part(0, 5), Part(128, 20)]
    case = make_case(shape, parts, q_dtype, device, after=2, kv_dtype=torch.float8_e4m3fn)
    slots, layers = case.kv.shape[:2]
    memory = torch.full((slots, layers * 2 * shape.kv_heads + 8), math.nan, device=device)
    scale = memory[:, :-8].unflatten(1, (layers, 2, shape.kv_heads))  # as the hot pool has them
    used = torch.cat([row[: math.ceil(part.past / 32)] for row, part in zip(case.block_table, parts, strict=True)])
    scale[used.long()] = torch.rand(len(used), *scale.shape[1:], device=device) + 0.5
    result = prefill(*case.arguments(), k_scale=scale[:, :, 0], v_scale=scale[:, :, 1])
    expected = replace(case, kv=case.kv.float() * scale[..., None, None]).expected()
    check(case, result, relative_error, TOLERANCE[q_dtype], expected)


def test_pool_of_more_than_two_billion_elements(prefill: Prefill, device: torch.device, relative_error: Error) -> None:
    """The far slot's first element has a number past 2^31; of the memory only its pages are touched."""
    slot_stride = 1 << 30
    memory = torch.empty(2 * slot_stride + 4096, dtype=torch.float16, device=device)
    kv = memory.as_strided((3, 1, 2, 1, 16, 64), (slot_stride, 2048, 1024, 1024, 64, 1))
    kv[2] = torch.randn(kv.shape[1:]).to(kv)
    case = replace(
        make_case(Shape(2, 1, 64, 16), [Part(16, 5)], torch.float16, device),
        kv=kv,
        layer=0,
        block_table=torch.tensor([[2]], dtype=torch.int32, device=device),
    )
    near = replace(case, kv=kv[2:].contiguous(), block_table=torch.zeros_like(case.block_table))
    check(case, prefill(*case.arguments()), relative_error, TOLERANCE[torch.float16], near.expected())


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    q, k, v, kv, layer, table, lens, starts, scale = make_case(
        SHAPES[0], [Part(16, 9)], torch.float32, device
    ).arguments()
    for backend in (reference.ragged_prefill, triton_kernel.ragged_prefill):
        with pytest.raises(AssertionError, match="layer 2 of 2"):
            backend(q, k, v, kv, 2, table, lens, starts, scale)
        with pytest.raises(AssertionError, match="do not divide"):
            backend(q[:, :8], k, v, kv, layer, table, lens, starts, scale)
        with pytest.raises(AssertionError, match="does not fit"):
            backend(q[..., :32], k, v, kv, layer, table, lens, starts, scale)
        with pytest.raises(AssertionError, match="starts"):
            backend(q, k, v, kv, layer, table, lens, starts[:1], scale)
        with pytest.raises(AssertionError, match=r"k \(5"):
            backend(q, k[:5], v, kv, layer, table, lens, starts, scale)
        with pytest.raises(AssertionError, match="both scaled or neither"):
            backend(q, k, v, kv, layer, table, lens, starts, scale, k_scale=torch.ones(kv.shape[0], 2, 3))
    with pytest.raises(AssertionError, match="not positive"):
        triton_kernel.ragged_prefill(q, k, v, kv, layer, table, lens, starts, -1.0)


def test_reference_and_triton_take_the_same_arguments() -> None:
    ours, theirs = (inspect.signature(m.ragged_prefill).parameters for m in (reference, triton_kernel))
    assert [*ours, "config", "splits"] == [*theirs] and [*ours] == [*inspect.signature(ops.ragged_prefill).parameters]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("variant", [None, *PREFILL_VARIANTS])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "chunk_tokens"),
    [
        *((dtype, dim, 4, 64) for dtype, dim in itertools.product(TOLERANCE, [64, 80, 96, 128, 192, 256])),
        *((torch.bfloat16, 128, group, 64) for group in (1, 3, 7, 8, 40, 200)),
        *((torch.bfloat16, 128, 4, chunk_tokens) for chunk_tokens in (16, 100, 256, 1024)),
    ],
)
def test_tuned_settings_at_gpu_sizes(
    variant: str | None,
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    chunk_tokens: int,
    device: torch.device,
    poisoned: Poison,
    relative_error: Error,
) -> None:
    if variant is not None and (dtype.itemsize != 2 or head_dim > 128):
        pytest.skip("the variants are for 16-bit queries with heads of up to 128")
    shape = Shape(2 * group, 2, head_dim, chunk_tokens)
    parts = [Part(2048, 300), Part(0, 513), Part(1000, 0), Part(777, 1), Part(4095, 130)]
    case = make_case(shape, parts, dtype, device, before=8, after=71)
    config = None if variant is None else PREFILL_VARIANTS[variant]
    with poisoned():
        result = triton_kernel.ragged_prefill(*case.arguments(), config=config)
    check(case, result, relative_error, TOLERANCE[dtype])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("tokens", [1, 60, 300])
def test_few_tokens_share_a_long_past_among_programs(
    tokens: int, device: torch.device, poisoned: Poison, relative_error: Error
) -> None:
    shape = Shape(32, 8, 128, 64)
    case = make_case(shape, [Part(20000, tokens), Part(30, 2)], torch.bfloat16, device, after=3)
    with poisoned():
        result = triton_kernel.ragged_prefill(*case.arguments())
    check(case, result, relative_error, 1e-2)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("variant", PREFILL_VARIANTS)
def test_captured_graph_follows_its_inputs(variant: str, device: torch.device, relative_error: Error) -> None:
    """Lengths, slots, the layer and where prompts begin change between replays of one captured launch."""
    parts = [Part(2048, 512), Part(2048, 256), Part(2048, 256)]
    case = make_case(Shape(8, 2, 128, 64), parts, torch.bfloat16, device)
    case.kv.copy_(torch.randn(case.kv.shape))
    layer = torch.tensor(1, device=device)
    prefill = partial(triton_kernel.ragged_prefill, config=PREFILL_VARIANTS[variant])
    arguments = (*case.arguments()[:4], layer, *case.arguments()[5:])
    prefill(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = prefill(*arguments)
    for case.layer, past, starts in (
        (0, [1, 2048, 0], [0, 512, 768, 1024]),
        (1, [777, 64, 2000], [8, 9, 9, 900]),
        (0, [100, 0, 1], [8, 8, 8, 8]),
        (1, [2048, 2047, 1025], [1, 700, 1000, 1024]),
    ):
        layer.fill_(case.layer)
        case.past_lens.copy_(torch.tensor(past))
        case.starts.copy_(torch.tensor(starts))
        case.block_table.copy_(torch.randperm(len(case.kv))[: case.block_table.numel()].view_as(case.block_table))
        graph.replay()
        if starts[0] == starts[-1]:
            assert (result[0] == 0).all() and (result[1] == -math.inf).all()
        else:
            check(case, result, relative_error, 1e-2)

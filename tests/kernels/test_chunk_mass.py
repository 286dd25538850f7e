"""The share of attention that the last tokens of prompts put on chunks, reference and Triton, against float64."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from forecache.kernels.attention import chunk_mass as triton_kernel
from forecache.kernels.attention import ops, reference

INTERPRETED = not torch.cuda.is_available()
GPU = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA GPU: too large for Triton's interpreter")
ROUNDED = 6e-4  # half of the last decimal, and rounding errors
Mass = Callable[..., Tensor]
Poison = Callable[[], Any]
LAYERS, KV_HEADS = 3, 2
PAIRS = [(0, 1), (2, 0), (2, 1)]  # layer and KV head


@pytest.fixture(params=["reference", "triton"])
def chunk_mass(request: pytest.FixtureRequest) -> Mass:
    return reference.chunk_mass if request.param == "reference" else triton_kernel.chunk_mass


@dataclass
class Case:
    """Prompts whose keys are all in the pool, with NaN everywhere but in what may be read, and their last tokens."""

    q: Tensor
    lse: Tensor
    kv: Tensor
    block_table: Tensor
    positions: Tensor
    starts: Tensor
    scale: float
    expected: Tensor

    def call(self, chunk_mass: Mass, **options: Tensor) -> Tensor:
        layers, heads = torch.tensor(PAIRS, device=self.q.device).T.contiguous()
        return chunk_mass(
            *(self.q, self.lse, self.kv, layers, heads, self.block_table, self.positions, self.starts, self.scale),
            **options,
        )


def make_case(
    prompts: list[tuple[int, int]],
    head_dim: int,
    chunk_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kv_dtype: torch.dtype | None = None,
    scales: Tensor | None = None,
) -> Case:
    """``prompts``: tokens of each, and how many of the last ones are looked at. ``scales``: of every slot's keys."""
    chunks = [math.ceil(tokens / chunk_tokens) for tokens, _ in prompts]
    slots, width, scale = sum(chunks) + 3, max(chunks) + 2, 1.5 * head_dim**-0.5
    row = LAYERS * 2 * KV_HEADS * chunk_tokens * head_dim
    memory = torch.full((slots, row + 64), math.nan)  # rows are longer than the field, as in the hot pool
    kv = memory[:, :row].view(slots, LAYERS, 2, KV_HEADS, chunk_tokens, head_dim)
    table = torch.full((len(prompts), width), -1, dtype=torch.int32)
    free = torch.randperm(slots).tolist()
    for i, (tokens, _) in enumerate(prompts):
        for chunk in range(chunks[i]):
            slot = table[i, chunk] = free.pop()
            stored = min(chunk_tokens, tokens - chunk * chunk_tokens)
            kv[slot, :, 0, :, :stored] = torch.randn(LAYERS, KV_HEADS, stored, head_dim)
    memory = memory.to(kv_dtype or dtype)
    kv = memory[:, :row].view(kv.shape)
    rows = sum(count for _, count in prompts)
    q = torch.randn(rows, len(PAIRS), head_dim).to(dtype)
    lse, positions, starts = torch.empty(rows, len(PAIRS), dtype=torch.float64), [], [0]
    expected = torch.zeros(table.shape, dtype=torch.float64)
    for i, (tokens, count) in enumerate(prompts):
        own = slice(starts[-1], starts[-1] + count)
        last = range(tokens - count, tokens)
        for pair, (layer, head) in enumerate(PAIRS):
            used = table[i, : chunks[i]].long()
            keys = kv.double()[used, layer, 0, head]
            if scales is not None:
                keys = keys * scales[used, layer, head].double()[:, None, None]
            logits = q[own, pair].double() @ keys.flatten(0, 1)[:tokens].T * scale
            logits = logits.masked_fill(torch.arange(tokens) > torch.tensor(last)[:, None], -math.inf)
            lse[own, pair] = logits.logsumexp(1)
            shares = torch.nn.functional.pad(logits.softmax(1), (0, -tokens % chunk_tokens))
            if count:
                mass = shares.unflatten(1, (-1, chunk_tokens)).sum(2).amax(0)
                expected[i, : chunks[i]] = torch.maximum(expected[i, : chunks[i]], mass)
        positions += last
        starts.append(own.stop)
    return Case(
        q=q.to(device),
        lse=lse.float().to(device),
        kv=memory.to(device)[:, :row].view(kv.shape),
        block_table=table.to(device),
        positions=torch.tensor(positions, device=device, dtype=torch.int64),
        starts=torch.tensor(starts, dtype=torch.int32, device=device),
        scale=scale,
        expected=expected,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head_dim", "chunk_tokens"), [(64, 16), (80, 20), (128, 64), (256, 48)])
def test_mass_equals_float64(
    chunk_mass: Mass, head_dim: int, chunk_tokens: int, dtype: torch.dtype, device: torch.device, poisoned: Poison
) -> None:
    """One token, none looked at, whole chunks, an open chunk; more rows than a product has."""
    if INTERPRETED and dtype == torch.bfloat16 and chunk_mass is not reference.chunk_mass:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot; runs on a GPU")
    prompts = [(1, 1), (chunk_tokens, 0), (3 * chunk_tokens, 8), (2 * chunk_tokens + 5, 37)]
    case = make_case(prompts, head_dim, chunk_tokens, dtype, device)
    with poisoned():
        mass = case.call(chunk_mass)
    assert mass.dtype == torch.float32 and mass.shape == case.expected.shape
    torch.testing.assert_close(mass.cpu().double(), case.expected, rtol=0, atol=ROUNDED)
    assert torch.equal(mass, mass.round(decimals=3))
    assert mass[0, 0] == 1 and (mass[1] == 0).all(), "one token attends to itself; of the second prompt none is asked"


@pytest.mark.parametrize("chunk_tokens", [256, 1000])
def test_chunks_larger_than_a_block(chunk_mass: Mass, chunk_tokens: int, device: torch.device) -> None:
    case = make_case([(chunk_tokens + 300, 5)], 64, chunk_tokens, torch.float32, device)
    torch.testing.assert_close(case.call(chunk_mass).cpu().double(), case.expected, rtol=0, atol=ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_keys_are_scaled(chunk_mass: Mass, dtype: torch.dtype, device: torch.device) -> None:
    if INTERPRETED and dtype == torch.bfloat16 and chunk_mass is not reference.chunk_mass:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16 in tl.dot; runs on a GPU")
    scale = torch.rand(12, LAYERS, 2, KV_HEADS) + 0.5
    prompts = [(16 * 5 + 3, 9), (40, 2)]
    case = make_case(prompts, 64, 16, dtype, device, kv_dtype=torch.float8_e4m3fn, scales=scale[:, :, 0])
    mass = case.call(chunk_mass, k_scale=scale.to(device)[:, :, 0])
    torch.testing.assert_close(mass.cpu().double(), case.expected, rtol=0, atol=ROUNDED)
    unscaled = case.call(chunk_mass)
    assert (unscaled.cpu() - case.expected).abs().max() > 0.05


def test_rows_see_nothing_after_them(chunk_mass: Mass, device: torch.device) -> None:
    """What comes later in the pool changes nothing, in the row's own chunk and in those after it."""
    case = make_case([(50, 1)], 64, 16, torch.float32, device)
    case.positions.fill_(20)
    before = case.call(chunk_mass)
    case.kv[case.block_table[0, 1].long(), :, :, :, 5:] = math.nan
    case.kv[case.block_table[0, 2:4].long()] = math.nan
    assert torch.equal(case.call(chunk_mass), before)
    assert (before[0, 2:] == 0).all() and (before[0, :2] > 0).all()


def test_no_sequences_and_no_chunks(chunk_mass: Mass, device: torch.device) -> None:
    case = make_case([(5, 1)], 64, 16, torch.float32, device)
    case.q, case.lse, case.positions = case.q[:0], case.lse[:0], case.positions[:0]
    case.block_table, case.starts = case.block_table[:0], case.starts[:1]
    assert case.call(chunk_mass).shape == (0, 3)
    case.block_table, case.starts = torch.empty(2, 0, dtype=torch.int32, device=device), case.starts.new_zeros(3)
    assert case.call(chunk_mass).shape == (2, 0)


def test_wrong_arguments_are_refused(chunk_mass: Mass, device: torch.device) -> None:
    case = make_case([(5, 2)], 64, 16, torch.float32, device)
    arguments = case.q, case.lse
    for name, wrong, message in (
        ("q", case.q[..., :32], "does not fit"),
        ("q", case.q[:, :2], "2 pairs"),
        ("lse", case.lse[:1], "lse"),
        ("lse", case.lse.double(), "float64"),
    ):
        case.q, case.lse = arguments
        setattr(case, name, wrong)
        with pytest.raises(AssertionError, match=message):
            case.call(chunk_mass)


def test_reference_and_triton_take_the_same_arguments() -> None:
    signatures = [[*inspect.signature(m.chunk_mass).parameters] for m in (reference, triton_kernel, ops)]
    assert signatures[0] == signatures[1] == signatures[2]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mass_at_gpu_sizes(dtype: torch.dtype, device: torch.device, poisoned: Poison) -> None:
    case = make_case([(4000, 32), (8192, 32), (7, 7)], 128, 64, dtype, device)
    with poisoned():
        mass = case.call(triton_kernel.chunk_mass)
    torch.testing.assert_close(mass.cpu().double(), case.expected, rtol=0, atol=ROUNDED)


@pytest.mark.gpu
@GPU
def test_captured_graph_follows_its_inputs(device: torch.device) -> None:
    case = make_case([(4000, 32), (3000, 32)], 128, 64, torch.bfloat16, device)
    case.call(triton_kernel.chunk_mass)
    layers, heads = torch.tensor(PAIRS, device=device).T.contiguous()
    arguments = case.q, case.lse, case.kv, layers, heads, case.block_table, case.positions, case.starts, case.scale
    triton_kernel.chunk_mass(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mass = triton_kernel.chunk_mass(*arguments)
    for _ in range(2):
        new = make_case([(3900, 20), (2000, 44)], 128, 64, torch.bfloat16, device)
        for name in ("q", "lse", "positions", "starts"):
            getattr(case, name).copy_(getattr(new, name))
        case.kv[: len(new.kv)].copy_(new.kv)
        case.block_table.fill_(-1)
        case.block_table[:, : new.block_table.shape[1]].copy_(new.block_table)
        graph.replay()
        width = new.expected.shape[1]
        torch.testing.assert_close(mass[:, :width].cpu().double(), new.expected, rtol=0, atol=ROUNDED)

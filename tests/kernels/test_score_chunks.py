"""Log-sum-exp of queries over index records, reference and Triton, against float64 and the indexer's own on the CPU."""

from collections.abc import Callable
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from forecache.indexer.records.index_spec import IndexSpec, encode_chunks
from forecache.indexer.records.scores import chunk_lse
from forecache.kernels.chunks import ops, reference, score_chunks
from forecache.kernels.common.columns import Columns, fits_columns

Poison = Callable[[], Any]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
SHAPES = [  # dtype, queries of each KV head, chunk_tokens, head_dim
    (torch.int8, (1, 2, 1), 64, 128),
    (torch.int8, (4,), 16, 64),
    (torch.int8, (1, 7), 20, 80),
    (torch.int8, (2,), 160, 128),  # more than one tile, the last one partly filled
    (torch.float16, (1, 1), 1, 256),  # as bounds are
    (torch.bfloat16, (3, 1), 16, 96),
    (torch.float8_e4m3fn, (1, 2), 16, 64),
    (torch.float32, (2,), 5, 12),
    # enough queries for products on tensor cores
    (torch.int8, (25, 9), 64, 64),
    (torch.int8, (40, 0, 3), 20, 80),
    (torch.int8, (33,), 160, 128),
    (torch.float16, (17,), 16, 96),
    (torch.bfloat16, (16,), 16, 256),
    (torch.float32, (12, 20), 48, 24),
    (torch.float32, (40,), 5, 12),
]


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        return reference
    return SimpleNamespace(score_chunks=score_chunks.score_chunks)


class Case:
    """Records of 7 chunks, in rows that are longer than they are, and what is to come out, in float64."""

    def __init__(self, dtype: torch.dtype, groups: tuple[int, ...], tokens: int, dim: int) -> None:
        keys = 3 * torch.randn(7, len(groups), tokens, dim)
        stored, scales = keys.to(dtype), torch.ones(7, len(groups), tokens, dtype=torch.float16)
        if dtype == torch.int8:
            scales = torch.rand(7, len(groups), tokens).add(0.5).div(32).half()
            stored = (keys / scales[..., None]).round().clamp(-127, 127).to(dtype)
        parts = [stored.flatten(1).view(torch.uint8)]
        if dtype == torch.int8:
            parts.append(scales.flatten(1).view(torch.uint8))
        self.end = sum(part.shape[1] for part in parts)
        padding = torch.full((7, -self.end % 64 + 64), 255, dtype=torch.uint8)  # NaN, were it read
        self.records = torch.cat([*parts, padding], 1)
        self.queries = torch.randn(sum(groups), dim) / dim**0.5
        self.starts = torch.tensor([0, *accumulate(groups)], dtype=torch.int32)
        self.options: dict[str, Any] = {"chunk_tokens": tokens, "dtype": dtype}
        heads = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
        self.keys = (stored.to(torch.float32).double() * scales.double()[..., None])[:, heads]
        self.lse = self.of_float64()

    def of_float64(self) -> Tensor:
        return torch.einsum("nqtd,qd->qnt", self.keys, self.queries.double()).logsumexp(2)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return self.records.to(device), self.queries.to(device), self.starts.to(device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_sum_exp_is_that_of_float64(kernels: Any, shape: Any, device: torch.device, poisoned: Poison) -> None:
    case = Case(*shape)
    records, queries, starts = case.on(device)
    slots = torch.tensor([5, 0, 6, 6, 2], device=device)
    with poisoned():
        lse = kernels.score_chunks(records, slots, queries, starts, **case.options)
    assert lse.dtype == torch.float32 and lse.device.type == device.type
    torch.testing.assert_close(lse.cpu().double(), case.lse[:, slots.cpu()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[8], SHAPES[11], SHAPES[13]], ids=str)
def test_queries_may_be_of_any_size(kernels: Any, shape: Any, device: torch.device) -> None:
    """Also where they are multiplied in float16, which holds no number of 2^16."""
    factors = torch.tensor([2.0**-40, 1.0, 2.0**20, 0.0])
    case = Case(*shape)
    case.queries *= factors[torch.arange(len(case.queries)) % 4, None]
    case.lse = case.of_float64()
    records, queries, starts = case.on(device)
    lse = kernels.score_chunks(records, torch.arange(7, device=device), queries, starts, **case.options)
    torch.testing.assert_close(lse.cpu().double(), case.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_read_can_be_kept(kernels: Any, shape: Any, device: torch.device) -> None:
    case = Case(*shape)
    records, queries, starts = case.on(device)
    copies = torch.full_like(records[:4], 9)
    slots, rows = torch.tensor([5, 0, 2], device=device), torch.tensor([3, -1, 0], device=device)
    lse = kernels.score_chunks(records, slots, queries, starts, **case.options, copies=copies, copy_slots=rows)
    torch.testing.assert_close(lse.cpu().double(), case.lse[:, slots.cpu()], rtol=1e-5, atol=1e-5)
    assert torch.equal(copies[[3, 0], : case.end], records[[5, 2], : case.end])
    assert (copies[[1, 2]] == 9).all() and (copies[:, case.end :] == 9).all(), "nothing else is written"
    again = kernels.score_chunks(copies, rows[[0, 2]], queries, starts, **case.options)
    torch.testing.assert_close(again, lse[:, [0, 2]])


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4], SHAPES[8], SHAPES[11]], ids=str)
def test_what_is_read_and_where_it_goes_may_be_decided_on_the_device(
    kernels: Any, shape: Any, device: torch.device
) -> None:
    """Slots past the span's ends are anything, even of no row."""
    case = Case(*shape)
    records, queries, starts = case.on(device)
    slots = torch.tensor([1 << 40, 5, 0, 2, -7, 3], device=device)
    columns, rows = torch.tensor([9, 4, 1, 5, 9, 9], device=device), torch.tensor([9, 3, -1, 0, 9, 9], device=device)
    for begin, end in ((1, 4), (2, 3), (2, 2), (5, 6)):
        if (begin, end) == (5, 6):
            columns[5], rows[5] = 2, -1
        copies = torch.full_like(records[:4], 9)
        lse = torch.full((len(queries), 6), -torch.inf, device=device)
        into = Columns(lse, columns, torch.tensor([begin, end], device=device))
        found = kernels.score_chunks(
            records, slots, queries, starts, **case.options, copies=copies, copy_slots=rows, into=into
        )
        assert found is lse
        read = range(begin, end)
        expected = torch.full((len(queries), 6), -torch.inf, dtype=torch.float64)
        for i in read:
            expected[:, int(columns[i])] = case.lse[:, int(slots[i])]
        torch.testing.assert_close(lse.cpu().double(), expected, rtol=1e-5, atol=1e-5)
        kept = [i for i in read if rows[i] >= 0]
        assert torch.equal(copies[rows[kept], : case.end], records[slots[kept], : case.end])
        others = [row for row in range(4) if row not in rows[kept].tolist()]
        assert (copies[others] == 9).all(), "nothing else is written"


def test_a_chunk_of_more_than_one_tile_goes_to_no_columns(device: torch.device) -> None:
    case = Case(*SHAPES[3])
    records, queries, starts = case.on(device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    into = Columns(torch.zeros(2, 1, device=device), slots, torch.tensor([0, 1], device=device))
    assert fits_columns(64, 256) and fits_columns(1, 12) and not fits_columns(160, 128) and not fits_columns(129, 65)
    with pytest.raises(AssertionError, match="exceed one tile"):
        score_chunks.score_chunks(records, slots, queries, starts, **case.options, into=into)


def test_no_chunks(kernels: Any, device: torch.device) -> None:
    case = Case(*SHAPES[0])
    records, queries, starts = case.on(device)
    slots = torch.empty(0, dtype=torch.int64, device=device)
    assert kernels.score_chunks(records, slots, queries, starts, **case.options).shape == (4, 0)


def test_a_head_without_queries_is_passed_over(kernels: Any, device: torch.device) -> None:
    case = Case(torch.int8, (2, 2, 2), 16, 64)
    records, queries, _ = case.on(device)
    starts = torch.tensor([0, 2, 2, 4], dtype=torch.int32, device=device)
    rows = queries[[0, 1, 4, 5]].contiguous()
    lse = kernels.score_chunks(records, torch.arange(7, device=device), rows, starts, **case.options)
    torch.testing.assert_close(lse.cpu().double(), case.lse[[0, 1, 4, 5]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [SHAPES[0], (torch.int8, (25, 9), 64, 64)], ids=str)
def test_large_logits_neither_overflow_nor_vanish(kernels: Any, shape: Any, device: torch.device) -> None:
    case = Case(*shape)
    records, queries, starts = case.on(device)
    lse = kernels.score_chunks(records, torch.arange(7, device=device), queries * 100, starts, **case.options)
    assert lse.isfinite().all() and (lse > 100).any()


def test_rows_beyond_two_billion_bytes(kernels: Any, device: torch.device) -> None:
    """Of the memory only the pages of two rows are touched."""
    case = Case(torch.int8, (1, 1), 16, 64)
    records, queries, starts = case.on(device)
    nbytes, stride = records.shape[1], 3 << 30
    far = torch.empty(stride + nbytes, dtype=torch.uint8, device=device).as_strided((2, nbytes), (stride, 1))
    far[1] = records[4]
    lse = kernels.score_chunks(far, torch.tensor([1], device=device), queries, starts, **case.options)
    torch.testing.assert_close(lse.cpu().double(), case.lse[:, [4]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_it_is_what_the_indexer_computes_on_the_cpu(kernels: Any, dtype: torch.dtype, device: torch.device) -> None:
    query_heads, kv_heads = ((0, 1), (3, 0), (3, 5), (5, 2)), ((0, 0), (3, 0), (3, 1))
    spec = IndexSpec("tokens", query_heads, kv_heads, (0, 1, 1, 2), 128, 64, 128**-0.5, dtype)
    records = encode_chunks(spec, torch.randn(9, 3, 64, 128))
    queries = 4 * torch.randn(4, 128)
    starts = torch.tensor([0, 1, 3, 4], dtype=torch.int32)
    lse = kernels.score_chunks(
        records.to(device),
        torch.arange(9, device=device),
        (queries * spec.scale).to(device),
        starts.to(device),
        chunk_tokens=64,
        dtype=dtype,
    )
    torch.testing.assert_close(lse.cpu(), chunk_lse(spec, records, queries), rtol=1e-5, atol=1e-4)


def test_wrong_tables_are_refused(device: torch.device) -> None:
    case = Case(*SHAPES[0])
    records, queries, starts = case.on(device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    for backend in (reference, score_chunks):
        with pytest.raises(AssertionError, match="a record has"):
            backend.score_chunks(records[:, : case.end - 1], slots, queries, starts, **case.options)
        with pytest.raises(AssertionError, match="floating point or int8"):
            backend.score_chunks(records, slots, queries, starts, chunk_tokens=64, dtype=torch.int16)
        with pytest.raises(AssertionError, match="both a table and its rows"):
            backend.score_chunks(records, slots, queries, starts, **case.options, copies=records)
        with pytest.raises(AssertionError, match="start at 16 bytes"):
            backend.score_chunks(records[:, 8:], slots, queries, starts, chunk_tokens=63, dtype=torch.int8)


@pytest.mark.gpu
@NEEDS_GPU
def test_registered_host_memory_is_read_in_place_and_kept() -> None:
    case = Case(*SHAPES[0])
    registered = case.records.clone().share_memory_()
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(registered.data_ptr(), registered.nbytes, 0)) == 0
    try:
        _, queries, starts = case.on(torch.device("cuda"))
        slots, rows = torch.tensor([5, 2, 0], device="cuda"), torch.tensor([0, -1, 1], device="cuda")
        copies = torch.zeros(2, case.records.shape[1], dtype=torch.uint8, device="cuda")
        lse = ops.score_chunks(registered, slots, queries, starts, **case.options, copies=copies, copy_slots=rows)
        torch.testing.assert_close(lse.cpu().double(), case.lse[:, [5, 2, 0]], rtol=1e-5, atol=1e-5)
        assert torch.equal(copies[:, : case.end].cpu(), case.records[[5, 0], : case.end])
    finally:
        torch.cuda.synchronize()
        runtime.cudaHostUnregister(registered.data_ptr())

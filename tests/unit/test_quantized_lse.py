"""Log-sum-exps with 16-bit queries: accurate up to rounding, and float32 where 16 bits fail."""

import math
from collections.abc import Iterator

import pytest
import torch

from forecache.indexer.records.encoder import decode_records
from forecache.indexer.records.index_spec import IndexSpec, encode_chunks
from forecache.indexer.records.quantized_lse import LEAST_CHUNKS, TASK_CHUNKS, quantized_chunk_lse, serves
from forecache.indexer.records.scores import chunk_lse, exact_chunk_lse

CHUNKS, TOKENS, DIM = 2 * TASK_CHUNKS + 37, 16, 32
QUERY_TO_KV = (2, 0, 2, 3, 1, 2, 2)
QUERY_HEADS = tuple((layer, 0) for layer in range(len(QUERY_TO_KV)))
KV_HEADS = ((0, 0), (0, 2), (3, 0), (5, 1))
SPEC = IndexSpec("tokens", QUERY_HEADS, KV_HEADS, QUERY_TO_KV, DIM, TOKENS, DIM**-0.5, torch.int8)


@pytest.fixture
def records() -> torch.Tensor:
    shape = (CHUNKS, len(KV_HEADS), TOKENS, DIM)
    return encode_chunks(SPEC, 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def queries() -> torch.Tensor:
    """Queries of different sizes; one has a component much larger than the others."""
    queries = torch.randn(len(QUERY_HEADS), DIM, generator=torch.Generator().manual_seed(1))
    queries *= torch.tensor([0.1, 1, 2, 3, 1, 4, 0]).unsqueeze(1)
    queries[1, 5] = 20
    return queries


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def expect_near(lse: torch.Tensor, records: torch.Tensor, queries: torch.Tensor) -> None:
    """Check that errors are at most those of queries whose components are all off by half a step, the worst way."""
    exact = exact_chunk_lse(SPEC, records, queries)
    sums = decode_records(SPEC, records).abs().sum(2).view(len(KV_HEADS), -1, TOKENS).amax(2)
    steps = queries.abs().amax(1, keepdim=True) * SPEC.scale / 127 / 254
    bound = sums[list(QUERY_TO_KV)] * steps / 2
    assert ((lse - exact).abs() <= bound + 1e-6 * exact.abs().clamp(min=1)).all()
    # errors of components are of either sign: far less in most places
    assert (lse - exact).square().mean().sqrt() < 0.2 * bound.square().mean().sqrt()


def test_they_are_near_the_exact_ones(records: torch.Tensor, queries: torch.Tensor, threads: int) -> None:
    lse = quantized_chunk_lse(SPEC, records, queries, None)
    assert lse.shape == (len(QUERY_HEADS), CHUNKS) and lse.dtype == torch.float32
    torch.testing.assert_close(lse[6], torch.full((CHUNKS,), math.log(TOKENS)), rtol=1e-6, atol=0)
    expect_near(lse, records, queries)
    assert torch.get_num_threads() == threads


def test_slots_pick_rows_of_a_table(records: torch.Tensor, queries: torch.Tensor, threads: int) -> None:
    slots = torch.randperm(CHUNKS, generator=torch.Generator().manual_seed(2))[: CHUNKS - 9]
    picked = quantized_chunk_lse(SPEC, records, queries, slots)
    torch.testing.assert_close(picked, quantized_chunk_lse(SPEC, records, queries, None)[:, slots], rtol=0, atol=0)


def test_where_float32_ends_the_exact_ones_are_taken(
    records: torch.Tensor, queries: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of several hundred: in one chunk, of either sign, and in all chunks."""
    monkeypatch.setattr("forecache.indexer.records.scores.serves", lambda *_given: True)
    keys = torch.randn(CHUNKS, len(KV_HEADS), TOKENS, DIM)
    keys[7] = 40 * queries[5].sign()
    keys[300] = -40 * queries[5].sign()
    extreme = encode_chunks(SPEC, keys)
    quantized = quantized_chunk_lse(SPEC, extreme, queries, None)
    assert quantized[:, [7, 300]].isnan().any(0).all() and quantized[:, :7].isfinite().all()
    exact = exact_chunk_lse(SPEC, extreme, queries)
    for slots in (None, torch.arange(CHUNKS).flip(0)):
        lse = chunk_lse(SPEC, extreme, queries, slots)
        expected = exact if slots is None else exact.flip(1)
        lost = [7, 300] if slots is None else [CHUNKS - 8, CHUNKS - 301]
        torch.testing.assert_close(lse[:, lost], expected[:, lost])
        assert lse.isfinite().all() and (lse - expected).abs().max() < 5e-3
    torch.testing.assert_close(
        chunk_lse(SPEC, records, 1000 * queries)[1:6], exact_chunk_lse(SPEC, records, 1000 * queries)[1:6],
        rtol=1e-3, atol=1e-3,
    )  # fmt: skip


def test_a_half_written_record_spoils_itself_alone(
    records: torch.Tensor, queries: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forecache.indexer.records.scores.serves", lambda *_given: True)
    before = chunk_lse(SPEC, records, queries)
    records[11] = 255  # NaN scales
    after = chunk_lse(SPEC, records, queries)
    others = torch.arange(CHUNKS) != 11
    assert torch.equal(after[:, others], before[:, others]) and after[:, 11].isnan().any()


def test_few_chunks_and_other_records_are_read_the_exact_way(records: torch.Tensor, queries: torch.Tensor) -> None:
    few = records[: LEAST_CHUNKS - 1]
    assert torch.equal(chunk_lse(SPEC, few, queries), exact_chunk_lse(SPEC, few, queries))
    floats = IndexSpec("tokens", QUERY_HEADS, KV_HEADS, QUERY_TO_KV, DIM, TOKENS, DIM**-0.5, torch.bfloat16)
    bounds = IndexSpec.bounds(2, 4, 2, DIM, chunk_tokens=TOKENS)
    for spec in (floats, bounds):
        assert not serves(spec, records, CHUNKS)
    with pytest.raises(ValueError, match="queries have shape"):
        chunk_lse(SPEC, records, queries[:2])

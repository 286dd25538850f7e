"""Index records and their scores against attention in float64, and predictions over an arena."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forecache.indexer.records.index_spec import IndexSpec, encode_chunk, encode_chunks
from forecache.indexer.records.scores import EVENT_SHARE, chunk_lse, event_mass, head_shares, scores_and_events
from forecache.indexer.serving.protocol import Prediction, PredictRequest
from forecache.indexer.serving.scorer import LocalIndexer

QUERY_HEADS = ((3, 1), (0, 0), (3, 0), (5, 2), (0, 5))
KV_HEADS = ((0, 0), (0, 2), (3, 0), (5, 1))
QUERY_TO_KV = (2, 0, 2, 3, 1)
HEAD_DIM = 16
CHUNK_TOKENS = 8


def score_chunks(
    spec: IndexSpec, records: torch.Tensor, queries: torch.Tensor, local_lse: torch.Tensor
) -> torch.Tensor:
    """The scores of chunks from their records, float32 [chunks]."""
    return scores_and_events(spec, chunk_lse(spec, records, queries), local_lse)[0]


def tokens_spec(dtype: torch.dtype) -> IndexSpec:
    return IndexSpec("tokens", QUERY_HEADS, KV_HEADS, QUERY_TO_KV, HEAD_DIM, CHUNK_TOKENS, 0.25, dtype)


def random_keys(chunks: int, heads: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(chunks, heads, CHUNK_TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def random_queries(heads: int, seed: int = 1) -> torch.Tensor:
    return 2 * torch.randn(heads, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def exact_scores(spec: IndexSpec, keys: torch.Tensor, queries: torch.Tensor, local_lse: torch.Tensor) -> torch.Tensor:
    """Softmax over every key and the local part, per query head; mass per chunk; maximum over heads. float64."""
    best = torch.zeros(len(keys), dtype=torch.float64)
    for row, kv in enumerate(spec.query_to_kv):
        logits = keys[:, kv].double().flatten(0, 1) @ queries[row].double() * spec.scale
        weights = torch.cat([logits, local_lse[row : row + 1].double()]).softmax(0)[:-1]
        best = torch.maximum(best, weights.view(len(keys), -1).sum(1))
    return best


def test_a_bounds_spec_covers_every_head() -> None:
    spec = IndexSpec.bounds(6, 6, 3, HEAD_DIM, chunk_tokens=CHUNK_TOKENS)
    assert len(spec.query_heads) == 36
    assert spec.kv_heads == tuple((layer, kv) for layer in range(6) for kv in range(3))
    assert spec.query_to_kv[:6] == (0, 0, 1, 1, 2, 2)
    assert spec.scale == HEAD_DIM**-0.5
    assert spec.nbytes == 18 * 2 * HEAD_DIM * 2


def test_record_sizes() -> None:
    assert tokens_spec(torch.float32).nbytes == 4 * CHUNK_TOKENS * HEAD_DIM * 4
    assert tokens_spec(torch.int8).nbytes == 4 * CHUNK_TOKENS * HEAD_DIM + 4 * CHUNK_TOKENS * 2
    assert IndexSpec("tokens", ((0, 0),), ((0, 0),), (0,), 12, 5, 1.0, torch.int8).nbytes == 128  # 60 + 10, rounded up


def test_fingerprint_names_the_bytes() -> None:
    spec = tokens_spec(torch.int8)
    fewer_queries = IndexSpec("tokens", ((5, 2),), KV_HEADS, (3,), HEAD_DIM, CHUNK_TOKENS, 1.0, torch.int8)
    assert spec.fingerprint == fewer_queries.fingerprint
    assert spec.fingerprint != tokens_spec(torch.bfloat16).fingerprint
    assert spec.fingerprint != IndexSpec.bounds(6, 6, 3, HEAD_DIM, chunk_tokens=CHUNK_TOKENS).fingerprint


def stored_keys(spec: IndexSpec, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that ``records`` hold, float64 [chunks, kv_heads, tokens, head_dim], and the largest error of each that its
    dtype explains."""
    shape = (len(records), len(spec.kv_heads), spec.chunk_tokens)
    keys = records[:, : spec.key_nbytes].view(spec.dtype).view(*shape, spec.head_dim).double()
    if spec.dtype.is_floating_point:
        return keys, keys.abs() * torch.finfo(spec.dtype).eps
    end = spec.key_nbytes + spec.scale_nbytes
    scales = records[:, spec.key_nbytes : end].view(torch.float16).view(*shape, 1).double()
    # half a step; of the largest a little more, since the scale is rounded too
    steps = 0.5 + 127 * torch.finfo(torch.float16).eps * (keys.abs() == 127)
    return keys * scales, scales * steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@settings(max_examples=20, deadline=None)
@given(chunks=st.integers(1, 70), seed=st.integers(0, 1000), local=st.booleans())
def test_token_scores_are_the_attention_mass_on_the_keys_as_stored(
    dtype: torch.dtype, chunks: int, seed: int, local: bool
) -> None:
    spec = tokens_spec(dtype)
    keys, queries = random_keys(chunks, len(KV_HEADS), seed), random_queries(len(QUERY_HEADS), seed + 1)
    lse = torch.linspace(-1, 4, len(QUERY_HEADS)) if local else torch.full((len(QUERY_HEADS),), -torch.inf)
    records = encode_chunks(spec, keys)
    stored, errors = stored_keys(spec, records)
    assert ((stored - keys).abs() <= errors).all()
    scores = score_chunks(spec, records, queries, lse)
    assert scores.dtype == torch.float32
    expected = exact_scores(spec, stored, queries, lse)
    # logits reach 14, which float32 has to 1e-6
    assert (scores - expected).norm() <= 5e-6 * expected.norm()


def test_blocks_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tokens_spec(torch.int8)
    records = encode_chunks(spec, random_keys(50, len(KV_HEADS)))
    queries, lse = random_queries(len(QUERY_HEADS)), torch.zeros(len(QUERY_HEADS))
    whole = score_chunks(spec, records, queries, lse)
    monkeypatch.setattr("forecache.indexer.records.scores.BLOCK_BYTES", 7 * spec.nbytes)
    torch.testing.assert_close(score_chunks(spec, records, queries, lse), whole)


def test_slots_pick_rows_of_a_table() -> None:
    spec = tokens_spec(torch.int8)
    table = encode_chunks(spec, random_keys(30, len(KV_HEADS)))
    queries, slots = random_queries(len(QUERY_HEADS)), torch.tensor([7, 2, 29, 11])
    picked = chunk_lse(spec, table, queries, slots)
    torch.testing.assert_close(picked, chunk_lse(spec, table[slots], queries))


def test_one_chunk_is_encoded_like_many() -> None:
    spec = tokens_spec(torch.int8)
    keys = random_keys(3, len(KV_HEADS))
    assert torch.equal(encode_chunk(spec, keys[1]), encode_chunks(spec, keys)[1])


def test_int8_keeps_zeros_and_takes_half_precision() -> None:
    spec = tokens_spec(torch.int8)
    keys = random_keys(2, len(KV_HEADS)).bfloat16()
    keys[0] = 0
    records = encode_chunks(spec, keys)
    scores = score_chunks(spec, records, random_queries(len(QUERY_HEADS)), torch.zeros(len(QUERY_HEADS)))
    assert scores.isfinite().all()
    assert not records[0, : spec.key_nbytes].any()


def test_no_chunks_have_no_scores() -> None:
    spec = tokens_spec(torch.int8)
    empty = torch.empty(0, spec.nbytes, dtype=torch.uint8)
    lse = torch.zeros(len(QUERY_HEADS))
    assert score_chunks(spec, empty, random_queries(len(QUERY_HEADS)), lse).shape == (0,)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_bounds_rank_by_what_no_key_exceeds(seed: int) -> None:
    spec = replace(IndexSpec.bounds(1, 1, 1, HEAD_DIM, chunk_tokens=CHUNK_TOKENS), dtype=torch.float32)
    keys, query = random_keys(20, 1, seed), random_queries(1, seed + 1)
    scores = score_chunks(spec, encode_chunks(spec, keys), query, torch.full((1,), -torch.inf)).double()
    products = keys[:, 0].double() * query[0].double() * spec.scale
    bound = products.amax(1).sum(1)
    assert (products.sum(2).amax(1) <= bound).all()
    torch.testing.assert_close(scores, bound.softmax(0), rtol=1e-4, atol=1e-7)


def test_bounds_are_averaged_over_heads() -> None:
    spec = replace(IndexSpec.bounds(2, 4, 2, HEAD_DIM, chunk_tokens=CHUNK_TOKENS), dtype=torch.float32)
    records, queries = encode_chunks(spec, random_keys(9, 4)), random_queries(8)
    scores = score_chunks(spec, records, queries, torch.full((8,), -torch.inf))
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


def test_wrong_shapes_are_refused() -> None:
    spec = tokens_spec(torch.int8)
    with pytest.raises(ValueError, match="keys have shape"):
        encode_chunks(spec, random_keys(2, len(KV_HEADS) + 1))
    with pytest.raises(ValueError, match="queries have shape"):
        score_chunks(spec, torch.empty(0, spec.nbytes, dtype=torch.uint8), random_queries(2), torch.zeros(2))
    with pytest.raises(ValueError, match="query_to_kv"):
        IndexSpec("tokens", QUERY_HEADS, KV_HEADS, (0,), HEAD_DIM, CHUNK_TOKENS, 1.0, torch.int8)
    with pytest.raises(ValueError, match="floating point"):
        replace(IndexSpec.bounds(1, 1, 1, HEAD_DIM, chunk_tokens=CHUNK_TOKENS), dtype=torch.int8)


class Table:
    """A fake arena with index records; ``overwrites`` slots are overwritten while they are read."""

    def __init__(self, spec: IndexSpec, keys: torch.Tensor) -> None:
        self.index_fingerprint = spec.fingerprint
        self.index = encode_chunks(spec, keys)
        self.generations = np.arange(len(keys), dtype=np.uint64) + 100
        self.overwrites: list[int] = []
        self.reads = 0

    def sound_records(self, slots: np.ndarray, generations: np.ndarray) -> np.ndarray:
        return np.ones(len(slots), dtype=np.bool_)

    def generation(self, slots: np.ndarray) -> np.ndarray:
        self.reads += 1
        if self.reads > 1 and self.overwrites:
            for slot in self.overwrites:
                self.generations[slot] += 1
                self.index[slot] = 255  # int8 -1 with a NaN scale
            self.overwrites = []
        now: np.ndarray = self.generations[slots]
        return now


def make_request(table: Table, slots: list[int], records: Sequence[torch.Tensor] = ()) -> PredictRequest:
    """A prediction request; ``records`` belong to the slots given as -1."""
    index_slots = np.array(slots, dtype=np.int64)
    generations = np.where(index_slots >= 0, table.generations[index_slots].astype(np.int64), 0)
    queries = random_queries(len(QUERY_HEADS)).numpy()
    local = (
        np.stack([record.numpy() for record in records]) if records else np.zeros((0, table.index.shape[1]), np.uint8)
    )
    return PredictRequest(
        "s", "arena", index_slots, generations, queries, np.zeros(len(QUERY_HEADS), np.float32), local
    )


def ask(table: Table, request: PredictRequest) -> Prediction:
    indexer = LocalIndexer(tokens_spec(torch.int8), 1, lambda _path: table)
    try:
        future: Future[Prediction] = indexer.predict(request)
        return future.result(30)
    finally:
        indexer.close()


@pytest.fixture
def table() -> Table:
    return Table(tokens_spec(torch.int8), random_keys(20, len(KV_HEADS)))


def expected_scores(table: Table, request: PredictRequest, slots: list[int]) -> np.ndarray:
    spec = tokens_spec(torch.int8)
    rows, queries = table.index[slots], torch.from_numpy(request.queries)
    return score_chunks(spec, rows, queries, torch.from_numpy(request.local_lse)).numpy()


def test_chunks_are_scored_in_their_order_wherever_their_records_are(table: Table) -> None:
    request = make_request(table, [4, -1, 19, 0, -1], [table.index[7], table.index[3]])
    prediction = ask(table, request)
    assert prediction.sequence_id == "s"
    assert prediction.missing == ()
    np.testing.assert_allclose(prediction.scores, expected_scores(table, request, [4, 7, 19, 0, 3]), rtol=1e-5)


def test_events_are_counted_of_every_head_that_puts_enough_on_one_chunk(table: Table) -> None:
    request = make_request(table, [4, -1, 19, 0, -1], [table.index[7], table.index[3]])
    request.queries[:] *= 4  # sharp attention: some heads look at one chunk alone
    spec, expected = tokens_spec(torch.int8), np.zeros(5)
    rows, queries = table.index[[4, 7, 19, 0, 3]], torch.from_numpy(request.queries)
    shares = head_shares(chunk_lse(spec, rows, queries), torch.from_numpy(request.local_lse)).double()
    for head in range(len(QUERY_HEADS)):
        for chunk in range(5):
            if shares[head, chunk] >= EVENT_SHARE:
                expected[chunk] += float(shares[head, chunk])
    assert 0 < (expected > 0).sum() < 5
    found = ask(table, request).event_mass
    assert found is not None
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_missing_chunk_has_no_events_and_bounds_have_none_at_all(table: Table) -> None:
    request = make_request(table, [4, 5, 6])
    table.generations[5] += 1
    prediction = ask(table, request)
    assert prediction.missing == (1,) and prediction.event_mass is not None and prediction.event_mass[1] == 0
    spec = IndexSpec.bounds(6, 6, 3, HEAD_DIM, chunk_tokens=CHUNK_TOKENS)
    bounds = Table(spec, random_keys(4, len(spec.kv_heads)))
    queries, lse = random_queries(36).numpy(), np.zeros(36, np.float32)
    slots, generations = np.arange(4), bounds.generations[:4].astype(np.int64)
    asked = PredictRequest("s", "arena", slots, generations, queries, lse, np.zeros((0, spec.nbytes), np.uint8))
    indexer = LocalIndexer(spec, 1, lambda _path: bounds)
    try:
        assert indexer.predict(asked).result(30).event_mass is None
    finally:
        indexer.close()


@given(
    heads=st.integers(1, 6),
    chunks=st.integers(1, 9),
    sharpness=st.floats(0.1, 10),
    seed=st.integers(0, 2**31),
)
def test_event_mass_is_of_attention_and_knows_no_later_chunk(
    heads: int, chunks: int, sharpness: float, seed: int
) -> None:
    lse = sharpness * torch.randn(heads, chunks, generator=torch.Generator().manual_seed(seed))
    shares = head_shares(lse, torch.zeros(heads))
    mass = event_mass(shares)
    assert mass.shape == (chunks,)
    assert (mass >= 0).all() and float(mass.sum()) <= heads * (1 + 1e-5)
    assert torch.equal(mass > 0, (shares >= EVENT_SHARE).any(0))
    assert (shares.sum(0) >= mass).all()
    for known in range(1, chunks):
        # a head's attention on what came later, seen from a step before it: nothing
        before = lse.clone()
        before[:, known:] = -torch.inf
        early = event_mass(head_shares(before, torch.zeros(heads)))
        torch.testing.assert_close(early[:known], event_mass(head_shares(lse[:, :known], torch.zeros(heads))))
        assert (early[known:] == 0).all()


def test_a_chunk_with_neither_slot_nor_record_is_an_error(table: Table) -> None:
    with pytest.raises(ValueError, match="1 chunks have no slot, but 0 records"):
        ask(table, make_request(table, [4, -1]))


def test_a_slot_of_another_generation_is_missing(table: Table) -> None:
    request = make_request(table, [4, 5, 6])
    table.generations[5] += 1
    prediction = ask(table, request)
    assert prediction.missing == (1,)
    np.testing.assert_allclose(prediction.scores[[0, 2]], expected_scores(table, request, [4, 6]), rtol=1e-5)
    assert prediction.scores[1] == 0


def test_a_slot_overwritten_while_it_is_read_spoils_no_other(table: Table) -> None:
    request = make_request(table, [4, 5, 6])
    expected = expected_scores(table, request, [4, 6])
    table.overwrites = [5]
    prediction = ask(table, request)
    assert prediction.missing == (1,)
    np.testing.assert_allclose(prediction.scores[[0, 2]], expected, rtol=1e-5)


def test_a_slot_past_the_arena_is_missing(table: Table) -> None:
    request = make_request(table, [4, 5])
    request.index_slots[1] = 20
    assert ask(table, request).missing == (1,)


def test_read_only_arrays_are_taken(table: Table) -> None:
    request = make_request(table, [1, 2])
    for array in (
        request.index_slots,
        request.generations,
        request.queries,
        request.local_lse,
        request.local_records,
    ):
        array.flags.writeable = False
    assert (ask(table, request).scores > 0).all()


def test_an_arena_of_other_index_keys_is_refused(table: Table) -> None:
    request = make_request(table, [1])
    table.index_fingerprint = "another"
    with pytest.raises(ValueError, match="same manifest"):
        ask(table, request)


def test_an_arena_is_mapped_once_and_again_after_something_was_missing(table: Table) -> None:
    mapped: list[str] = []

    def attach(path: str) -> Table:
        mapped.append(path)
        return table

    indexer = LocalIndexer(tokens_spec(torch.int8), 1, attach)
    good, bad = make_request(table, [1]), make_request(table, [2])
    bad.generations[0] += 1
    for request in (good, good, bad, good):
        indexer.predict(request).result(30)
    indexer.close()
    assert mapped == ["arena", "arena"]


def test_the_callers_threads_are_left_alone(table: Table) -> None:
    before = torch.get_num_threads()
    indexer = LocalIndexer(tokens_spec(torch.int8), before + 1, lambda _path: table)
    assert torch.get_num_threads() == before
    indexer.close()

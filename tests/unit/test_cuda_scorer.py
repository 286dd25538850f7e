"""Predictions with a cache of index records, on the GPU if there is one, equal those of the CPU."""

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forecache.indexer.records.index_spec import IndexSpec, encode_chunks
from forecache.indexer.serving.config import IndexerConfig
from forecache.indexer.serving.cuda_scorer import CudaIndexer, RecordCache
from forecache.indexer.serving.protocol import Indexer, PredictRequest
from forecache.indexer.serving.scorer import LocalIndexer
from forecache.workers.llm import LLM
from forecache.workers.memory.hot.cuda_host import RegisteredMemory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUERY_HEADS = ((3, 1), (0, 0), (3, 0), (5, 2), (0, 5))
KV_HEADS = ((0, 0), (0, 2), (3, 0), (5, 1))
INT8 = IndexSpec("tokens", QUERY_HEADS, KV_HEADS, (2, 0, 2, 3, 1), 32, 16, 0.25, torch.int8)
SPECS = {
    "int8": INT8,
    "bfloat16": IndexSpec("tokens", QUERY_HEADS, KV_HEADS, (2, 0, 2, 3, 1), 32, 16, 0.25, torch.bfloat16),
    "bounds": IndexSpec.bounds(2, 6, 3, 32, chunk_tokens=16),
}
SLOTS = 20
ALL = 1 << 20
"""More bytes than the records of a table have."""


class Table:
    """A fake arena with ``SLOTS`` index records; ``overwrites`` slots are overwritten while they are read."""

    def __init__(self, spec: IndexSpec) -> None:
        self.spec = spec
        self.index_fingerprint = spec.fingerprint
        shared = np.ndarray((SLOTS, spec.nbytes), np.uint8, mmap.mmap(-1, SLOTS * spec.nbytes))
        self.index = torch.from_numpy(shared)  # whole pages: CUDA registers them
        self.generations = np.arange(SLOTS, dtype=np.uint64) + 100
        self.overwrites: list[int] = []
        self.reads = 0
        self._random = torch.Generator().manual_seed(0)
        self.index[:] = self.new_records(SLOTS)

    def new_records(self, count: int) -> torch.Tensor:
        shape = (max(count, 1), len(self.spec.kv_heads), self.spec.chunk_tokens, self.spec.head_dim)
        return encode_chunks(self.spec, torch.randn(shape, generator=self._random))[:count]

    def renew(self, slot: int) -> None:
        """Overwrite a slot, as for a new owner."""
        self.generations[slot] += 1
        self.index[slot] = self.new_records(1)[0]

    def sound_records(self, slots: np.ndarray, generations: np.ndarray) -> np.ndarray:
        return np.ones(len(slots), dtype=np.bool_)

    def generation(self, slots: np.ndarray) -> np.ndarray:
        self.reads += 1
        if self.reads > 1 and self.overwrites:
            for slot in self.overwrites:
                self.generations[slot] += 1
                self.index[slot] = 255  # NaN scales
            self.overwrites = []
        now: np.ndarray = self.generations[slots]
        return now

    def request(self, slots: Sequence[int], records: Sequence[torch.Tensor] = (), seed: int = 1) -> PredictRequest:
        """A prediction request; ``records`` belong to the slots given as -1."""
        index_slots = np.array(slots, dtype=np.int64)
        heads, generator = len(self.spec.query_heads), torch.Generator().manual_seed(seed)
        nothing = torch.zeros(0, self.spec.nbytes, dtype=torch.uint8)
        self.reads = 0
        return PredictRequest(
            "s",
            "arena",
            index_slots,
            np.where(index_slots >= 0, self.generations[index_slots % SLOTS].astype(np.int64), 0),
            2 * torch.randn(heads, self.spec.head_dim, generator=generator).numpy(),
            torch.randn(heads, generator=generator).numpy(),
            (torch.stack(list(records)) if records else nothing).numpy(),
        )


@contextmanager
def opened(table: Table, device_bytes: int, graph_chunks: int = 0) -> Iterator[CudaIndexer]:
    indexer = CudaIndexer(table.spec, table, DEVICE, device_bytes, RegisteredMemory, graph_chunks=graph_chunks)
    try:
        yield indexer
        indexer.check_integrity()
    finally:
        indexer.close()


def expect_local_answer(indexer: CudaIndexer, table: Table, request: PredictRequest) -> None:
    """Check that ``indexer`` gives the result of a `LocalIndexer` on the same table."""
    local = LocalIndexer(table.spec, 1, lambda _path: table)
    expected = local.predict(request).result(30)
    local.close()
    prediction = indexer.predict(request).result(60)
    assert (prediction.sequence_id, prediction.missing) == (expected.sequence_id, expected.missing)
    assert prediction.scores.dtype == np.float32
    np.testing.assert_allclose(prediction.scores, expected.scores, rtol=1e-4, atol=1e-7)
    assert (prediction.event_mass is None) == (expected.event_mass is None)
    if prediction.event_mass is not None and expected.event_mass is not None:
        np.testing.assert_allclose(prediction.event_mass, expected.event_mass, rtol=1e-4, atol=1e-7)


@pytest.fixture
def table() -> Table:
    return Table(INT8)


launches = pytest.mark.parametrize("graph_chunks", [0, SLOTS], ids=["calls", "graphs"])
"""On a CPU nothing is captured, but read and scored as a graph would."""


@launches
@pytest.mark.parametrize("rows", [0, 3, SLOTS])
@pytest.mark.parametrize("kind", SPECS)
def test_it_answers_as_the_cpu_does(kind: str, rows: int, graph_chunks: int) -> None:
    table = Table(SPECS[kind])
    with opened(table, rows * table.spec.nbytes, graph_chunks) as indexer:
        for slots in ([4, 7, 19, 0], [7, -1, 3, -1, 4], [-1], [], [4, 7, 19, 0, 3, 11], [5, -1] * 70):
            records = list(table.new_records(slots.count(-1)))
            for seed in (1, 2):
                expect_local_answer(indexer, table, table.request(slots, records, seed))


@launches
def test_a_record_is_read_from_the_arena_once(table: Table, graph_chunks: int) -> None:
    request = table.request([4, 5, 6])
    with opened(table, ALL, graph_chunks) as indexer:
        first = indexer.predict(request).result(60)
        table.index[[4, 5, 6]] = table.new_records(3)  # which no owner of an arena would do
        np.testing.assert_allclose(indexer.predict(request).result(60).scores, first.scores, rtol=1e-4)
    with opened(table, 0, graph_chunks) as indexer:
        assert not np.allclose(indexer.predict(request).result(60).scores, first.scores, rtol=1e-4), "nothing is kept"


@launches
def test_a_slot_that_was_written_anew_is_read_anew(table: Table, graph_chunks: int) -> None:
    with opened(table, ALL, graph_chunks) as indexer:
        old = table.request([4, 5, 6])
        expect_local_answer(indexer, table, old)
        table.renew(5)
        assert indexer.predict(old).result(60).missing == (1,), "though its record is still in GPU memory"
        expect_local_answer(indexer, table, old)
        expect_local_answer(indexer, table, table.request([4, 5, 6]))


@launches
@pytest.mark.parametrize("rows", [0, SLOTS])
def test_a_slot_overwritten_while_it_is_read_spoils_nothing_and_is_not_kept(
    table: Table, rows: int, graph_chunks: int
) -> None:
    request = table.request([4, 5, 6])
    left = table.request([4, 6])
    with opened(table, rows * INT8.nbytes, graph_chunks) as indexer:
        expected = indexer.predict(left).result(60).scores
        table.reads, table.overwrites = 0, [5]
        prediction = indexer.predict(request).result(60)
        assert prediction.missing == (1,) and prediction.scores[1] == 0
        assert indexer._cache.find(request.index_slots[[1]], request.generations[[1]]) == -1
        np.testing.assert_allclose(prediction.scores[[0, 2]], expected, rtol=1e-4)
        # the owner now finishes writing the slot's new record
        table.index[5] = table.new_records(1)[0]
        expect_local_answer(indexer, table, table.request([4, 5, 6]))


@launches
def test_a_kept_slot_overwritten_while_it_is_read_is_missing(table: Table, graph_chunks: int) -> None:
    request = table.request([4, 5, 6])
    with opened(table, ALL, graph_chunks) as indexer:
        indexer.predict(request).result(60)
        table.reads, table.overwrites = 0, [5]
        assert indexer.predict(request).result(60).missing == (1,)


@launches
def test_a_slot_past_the_arena_is_missing(table: Table, graph_chunks: int) -> None:
    with opened(table, ALL, graph_chunks) as indexer:
        expect_local_answer(indexer, table, table.request([SLOTS]))
        expect_local_answer(indexer, table, table.request([4, SLOTS]))


def test_what_makes_no_sense_is_an_error_and_the_next_request_is_not(table: Table) -> None:
    request = table.request([4, 5])
    request = replace(request, queries=request.queries[:2])
    with opened(table, ALL) as indexer:
        with pytest.raises(ValueError, match="1 chunks have no slot, but 0 records"):
            indexer.predict(table.request([4, -1])).result(60)
        with pytest.raises(ValueError, match="queries have shape"):
            indexer.predict(request).result(60)
        expect_local_answer(indexer, table, table.request([4, 5]))


def test_an_arena_of_other_index_keys_is_refused(table: Table) -> None:
    table.index_fingerprint = "another"
    with pytest.raises(ValueError, match="same manifest"):
        CudaIndexer(INT8, table, DEVICE, ALL, RegisteredMemory)


@launches
def test_read_only_arrays_are_taken(table: Table, graph_chunks: int) -> None:
    request = table.request([1, -1], list(table.new_records(1)))
    for array in (
        request.index_slots,
        request.generations,
        request.queries,
        request.local_lse,
        request.local_records,
    ):
        array.flags.writeable = False
    with opened(table, ALL, graph_chunks) as indexer:
        expect_local_answer(indexer, table, request)


def test_a_closed_indexer_takes_no_requests(table: Table) -> None:
    indexer = CudaIndexer(INT8, table, DEVICE, ALL, RegisteredMemory)
    indexer.close()
    indexer.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        indexer.predict(table.request([1]))


@settings(max_examples=25 if DEVICE.type == "cpu" else 10, deadline=None)
@given(
    rows=st.integers(0, SLOTS + 3),
    graph_chunks=st.sampled_from([0, SLOTS]),
    steps=st.lists(
        st.tuples(st.lists(st.integers(0, SLOTS - 1), max_size=6), st.lists(st.integers(-1, SLOTS), max_size=12)),
        min_size=1,
        max_size=6,
    ),
)
def test_whatever_changes_hands_its_answers_stay_those_of_the_cpu(
    rows: int, graph_chunks: int, steps: list[tuple[list[int], list[int]]]
) -> None:
    table = Table(INT8)
    with opened(table, rows * INT8.nbytes, graph_chunks) as indexer:
        old = table.request([0, 1, 2])
        for renewed, slots in steps:
            for slot in renewed:
                table.renew(slot)
            expect_local_answer(indexer, table, table.request(slots, list(table.new_records(slots.count(-1)))))
            expect_local_answer(indexer, table, old)
            indexer.check_integrity()


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(0, 9),
    steps=st.lists(
        st.tuples(st.lists(st.integers(0, 20), max_size=8), st.integers(0, 3), st.booleans()), min_size=1, max_size=12
    ),
)
def test_the_cache_finds_what_was_kept_and_not_claimed_since(
    rows: int, steps: list[tuple[list[int], int, bool]]
) -> None:
    cache = RecordCache(rows, 64, torch.device("cpu"))
    model: dict[int, tuple[int, int]] = {}  # row → slot, generation
    for slots, generation, kept in steps:
        asked, generations = np.array(slots, dtype=np.int64), np.full(len(slots), generation)
        for slot, row in zip(slots, cache.find(asked, generations).tolist(), strict=True):
            assert (model.get(row) == (slot, generation)) == (row >= 0)
        for slot in range(21):
            found = cache.find(np.array([slot]), np.array([generation]))[0]
            assert (found >= 0) == ((slot, generation) in model.values())
        claimed = cache.claim(asked)
        taken = claimed[claimed >= 0].tolist()
        assert len(set(taken)) == len(taken) == min(len({slot % rows for slot in slots}) if rows else 0, rows)
        for row in taken:
            model.pop(row, None)
        if kept:
            own = claimed >= 0
            cache.keep(claimed[own], asked[own], generations[own])
            model |= {row: (slot, generation) for row, slot in zip(taken, asked[own].tolist(), strict=True)}
        cache.check_integrity()


@pytest.mark.parametrize(
    ("device", "model", "expected"), [("auto", "cpu", "cpu"), ("auto", "cuda", "cuda"), ("cpu", "cuda", "cpu")]
)
def test_predictions_are_made_where_the_model_is_unless_told_otherwise(device: str, model: str, expected: str) -> None:
    assert IndexerConfig.model_validate({"device": device}).device_type(model) == expected


def generate(model: Path, device: str) -> Indexer:
    """Run one prompt of 21 chunks with a small budget; returns the engine's indexer."""
    with (
        TemporaryDirectory(prefix="indexer-test-", dir="/dev/shm") as directory,
        LLM(
            str(model),
            skip_tokenizer=True,
            dtype="float32",
            chunk_tokens=16,
            window_steps=16,
            keep_ratio=0.4,
            min_resident_tokens=0,
            hot_bytes=64 * 3 * 2 * 2 * 16 * 16 * 4,
            cold_bytes=4 << 20,
            arena_dir=Path(directory),
            torch_compile=False,
            late_policy="wait",
            indexer=IndexerConfig.model_validate({"device": device}),
        ) as llm,
    ):
        prompt = [3 + number * number % 250 for number in range(340)]
        answer = llm.generate([prompt], max_tokens=40, ignore_eos=True)[0]
        assert len(answer.token_ids) == 40
        assert llm.engine.stats().counters.windows > 0 and llm.engine.stats().counters.failed_predictions == 0
        return llm._indexer


def test_an_engine_on_a_cpu_asks_the_cpu(tiny_model: Path) -> None:
    if DEVICE.type == "cpu":
        assert isinstance(generate(tiny_model, "auto"), LocalIndexer)
    assert isinstance(generate(tiny_model, "cpu"), LocalIndexer)


NEEDS_GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")


@pytest.mark.gpu
@NEEDS_GPU
def test_an_engine_on_a_gpu_asks_the_gpu(tiny_model: Path) -> None:
    indexer = generate(tiny_model, "auto")
    assert isinstance(indexer, CudaIndexer)
    indexer.check_integrity()


@pytest.mark.gpu
@NEEDS_GPU
@launches
@pytest.mark.parametrize("rows", [0, SLOTS])
def test_it_waits_for_no_other_stream(table: Table, rows: int, graph_chunks: int) -> None:
    with opened(table, rows * INT8.nbytes, graph_chunks) as indexer:
        requests = [table.request(slots, list(table.new_records(1))) for slots in ([3, 4, -1], [3, -1, 9, 4])]
        steps = torch.cuda.Stream()
        with torch.cuda.stream(steps):
            torch.cuda._sleep(1 << 32)  # seconds of other work
            futures = [indexer.predict(request) for request in requests]
            answers = [future.result(60) for future in futures]
        assert not steps.query(), "it answered before the other work was done"
        assert all(np.isfinite(answer.scores).all() and not answer.missing for answer in answers)
        steps.synchronize()


@pytest.mark.gpu
@NEEDS_GPU
def test_the_arenas_pages_are_let_go(table: Table) -> None:
    registered: list[torch.Tensor] = []
    closed: list[torch.Tensor] = []

    class Recorded(RegisteredMemory):
        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__(tensor)
            self.tensor = tensor
            registered.append(tensor)

        def close(self) -> None:
            super().close()
            closed.append(self.tensor)

    make: Callable[[torch.Tensor], Recorded] = Recorded
    CudaIndexer(INT8, table, DEVICE, ALL, make).close()
    assert len(registered) == len(closed) == 1
    assert registered[0] is closed[0] is table.index
    RegisteredMemory(table.index).close()  # not refused: the pages are free

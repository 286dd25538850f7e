"""The trained indexer in serving gives the scores of training, wherever records are and in any batch."""

import mmap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from forecache.indexer.records.checkpoint import CheckpointManifest
from forecache.indexer.records.encoder import EncoderShape, MemoryIndexer, decode_records
from forecache.indexer.records.index_spec import encode_chunks
from forecache.indexer.records.queries import QueryProjection
from forecache.indexer.records.scores import chunk_lse, event_mass, head_shares, scores_and_events
from forecache.indexer.records.shards import RecordedDocument
from forecache.indexer.serving.cuda_scorer import CudaIndexer
from forecache.indexer.serving.lookahead import LookaheadScorer
from forecache.indexer.serving.protocol import Indexer, Prediction, PredictRequest, StepState
from forecache.indexer.serving.scorer import LocalIndexer
from forecache.indexer.training.training_data import predict_rows
from forecache.workers.memory.hot.cuda_host import RegisteredMemory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CHUNK_TOKENS, HEAD_DIM, HIDDEN, CHUNKS = 8, 16, 24, 20
TOKENS = CHUNKS * CHUNK_TOKENS
SHAPE = EncoderShape(history=(0, 1, 3, 11, 20), context=4, units=8, reach=1)
"""More steps than a chunk has tokens: older queries were made when fewer chunks were complete."""


def make_scorer() -> LookaheadScorer:
    """A scorer with random weights, so that every weight has an effect."""
    torch.manual_seed(0)
    manifest = CheckpointManifest(
        model_type="llama",
        model_name="made-up",
        weights_fingerprint="00",
        layers=4,
        attention_heads=4,
        kv_heads=2,
        head_dim=HEAD_DIM,
        hidden_size=HIDDEN,
        scale=HEAD_DIM**-0.5,
        rope_scaling=1.1,
        chunk_tokens=CHUNK_TOKENS,
        query_norm_eps=None,
        target_layers=(1, 3),
        query_heads=((3, 0), (1, 2), (3, 1), (1, 3)),
        retrieval_heads=2,
        index_kv_heads=((1, 1), (3, 0)),
        index_fingerprint="",
        history=SHAPE.history,
        context=SHAPE.context,
        units=SHAPE.units,
        reach=SHAPE.reach,
        recording={},
        training={},
    )
    projection = QueryProjection(
        torch.randn(4, HEAD_DIM, HIDDEN) * HIDDEN**-0.5,
        torch.randn(4, HEAD_DIM) / 4,
        10000 ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM),
        (1, 0, 1, 0),
        rope_scaling=1.1,
    )
    indexer = MemoryIndexer(projection, 2, 2, SHAPE)
    for weight in (indexer.out.weight, indexer.gate.weight, indexer.around.weight):
        torch.nn.init.normal_(weight)
    return LookaheadScorer(indexer, manifest)


SCORER = make_scorer()


def make_document() -> RecordedDocument:
    """A document with a step at every position, and only the fields that predictions read."""
    generator = torch.Generator().manual_seed(1)
    nothing = torch.zeros(0)
    return RecordedDocument(
        task="prose",
        text="numbers",
        split="eval",
        answer=(0, 0),
        answer_step=-1,
        positions=torch.arange(TOKENS),
        runs=torch.tensor([[0, TOKENS]]),
        hidden=torch.randn(TOKENS, 2, HIDDEN, generator=generator).half(),
        records=encode_chunks(SCORER.spec, torch.randn(CHUNKS, 2, CHUNK_TOKENS, HEAD_DIM, generator=generator)),
        event_offsets=nothing,
        event_chunk=nothing,
        event_head=nothing,
        event_share=nothing,
        peak_share=nothing,
        bounds_score=nothing,
    )


DOCUMENT = make_document()
KEYS = decode_records(SCORER.spec, DOCUMENT.records)


class Table:
    """The index part of an arena that holds the document's records, chunk n in slot n + 3."""

    index_fingerprint = SCORER.spec.fingerprint

    def __init__(self) -> None:
        shape = (CHUNKS + 3, SCORER.spec.nbytes)
        self.index = torch.from_numpy(np.ndarray(shape, np.uint8, mmap.mmap(-1, shape[0] * shape[1])))
        self.index[3:] = DOCUMENT.records
        self.generations = np.arange(len(self.index), dtype=np.uint64)

    def sound_records(self, slots: np.ndarray, generations: np.ndarray) -> np.ndarray:
        return np.ones(len(slots), dtype=np.bool_)

    def generation(self, slots: np.ndarray) -> np.ndarray:
        now: np.ndarray = self.generations[slots]
        return now


def request_at(position: int, *, local: Sequence[int] = ()) -> PredictRequest:
    """A worker's request after the step at ``position``; it includes the records of the chunks ``local``."""
    steps = min(SCORER.steps, position + 1)
    own = torch.randn(2, HEAD_DIM, generator=torch.Generator().manual_seed(position))
    queries = torch.cat([SCORER.queries(DOCUMENT.hidden[position + 1 - steps : position + 1], position), own])
    lse = []
    for query, kv, at in zip(queries, SCORER.spec.query_to_kv, SCORER.positions(position, steps).tolist(), strict=True):
        seen = KEYS[kv, (at + 1) // CHUNK_TOKENS * CHUNK_TOKENS : at + 1]
        lse.append((seen @ query * SCORER.spec.scale).logsumexp(0))
    chunks = (position + 1) // CHUNK_TOKENS
    numbers = np.arange(chunks)
    slots = np.where(np.isin(numbers, local), -1, numbers + 3)
    return PredictRequest(
        f"at {position}",
        "arena",
        slots,
        np.where(slots < 0, 0, slots),
        queries.numpy(),
        torch.stack(lse).numpy(),
        DOCUMENT.records[list(local)].numpy(),
        StepState(position, steps, DOCUMENT.hidden[position].numpy()),
    )


def on_cpu(table: Table) -> Indexer:
    return LocalIndexer(SCORER.own, 1, lambda _path: table, SCORER)


def on_device(table: Table) -> Indexer:
    return CudaIndexer(SCORER.own, table, DEVICE, 7 * SCORER.spec.nbytes, RegisteredMemory, SCORER)


def as_graphs(table: Table) -> CudaIndexer:
    return CudaIndexer(SCORER.own, table, DEVICE, 7 * SCORER.spec.nbytes, RegisteredMemory, SCORER, graph_chunks=CHUNKS)


Make = Callable[[Table], Indexer]
makes = [on_cpu, *(pytest.param(make, marks=pytest.mark.gpu) for make in (on_device, as_graphs))]
both = pytest.mark.parametrize("make", makes)


def as_trained(position: int) -> torch.Tensor:
    found = predict_rows(SCORER._indexer, SCORER.manifest.index_spec, DOCUMENT, torch.tensor([position]))
    return found.logits[0, : int(found.complete[0])]


@both
def test_scores_are_those_of_training(make: Make) -> None:
    """From the first complete chunk on, at every place within a chunk, wherever records are."""
    indexer = make(Table())
    for position in [*range(7, 70), TOKENS - 2, TOKENS - 1]:
        chunks = (position + 1) // CHUNK_TOKENS
        for local in ([], [chunks - 1], [0, *range(2, chunks, 3)]):
            prediction = indexer.predict(request_at(position, local=local)).result(60)
            assert prediction.missing == () and prediction.scores.dtype == np.float32
            torch.testing.assert_close(torch.from_numpy(prediction.scores), as_trained(position), atol=2e-4, rtol=2e-4)
    indexer.close()


def test_a_short_history_is_stood_for_by_its_oldest_step() -> None:
    first, same = (SCORER.queries(DOCUMENT.hidden[40:41], 40).view(len(SHAPE.history), 4, -1)[n] for n in (0, -1))
    torch.testing.assert_close(first, same)
    assert SCORER.positions(40, 2).tolist() == [40] * 4 + [39] * 16 + [40] * 2
    assert SCORER.steps == 21 and SCORER.positions(40, 21)[::4].tolist() == [40, 39, 37, 29, 20, 40]


def test_the_models_own_heads_are_the_last_rows() -> None:
    """Alone they give the training-free score over the same records."""
    assert SCORER.own.query_heads == ((3, 0), (1, 2)) and SCORER.own.fingerprint == SCORER.spec.fingerprint
    asked = request_at(50)
    own = replace(asked, queries=asked.queries[-2:], local_lse=asked.local_lse[-2:], state=None)
    with_own_alone = LocalIndexer(SCORER.own, 1, lambda _path: Table())
    scores = with_own_alone.predict(own).result(60).scores
    with_own_alone.close()
    lse = chunk_lse(SCORER.spec, DOCUMENT.records[:6], torch.tensor(asked.queries))
    expected = scores_and_events(SCORER.own, lse[-2:], torch.tensor(asked.local_lse[-2:]))[0]
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-5)


@both
def test_retrieval_events_are_those_of_the_models_own_heads(make: Make) -> None:
    indexer = make(Table())
    seen = 0.0
    for position in range(20, 60, 3):
        asked = request_at(position)
        chunks = len(asked.index_slots)
        lse = chunk_lse(SCORER.spec, DOCUMENT.records[:chunks], torch.tensor(asked.queries))[-2:]
        expected = event_mass(head_shares(lse, torch.tensor(asked.local_lse[-2:])))
        found = indexer.predict(asked).result(60).event_mass
        assert found is not None
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4)
        seen += float(expected.sum())
    indexer.close()
    assert seen > 0


@both
def test_what_can_not_be_read_scores_least(make: Make) -> None:
    table = Table()
    indexer = make(table)
    indexer.predict(request_at(79)).result(60)
    table.generations[[3, 7]] += 50
    prediction = indexer.predict(request_at(79)).result(60)
    indexer.close()
    assert prediction.missing == (0, 4)
    assert np.isfinite(prediction.scores).all()
    assert set(np.flatnonzero(prediction.scores == prediction.scores.min())) >= {0, 4}
    table.generations[:] += 50
    indexer = make(table)
    nothing = indexer.predict(request_at(79)).result(60)
    indexer.close()
    assert nothing.missing == tuple(range(10)) and np.isfinite(nothing.scores).all()


@both
def test_no_chunk_has_no_score(make: Make) -> None:
    indexer = make(Table())
    assert indexer.predict(request_at(3)).result(60).scores.shape == (0,)
    indexer.close()


def test_requests_that_wait_are_answered_together_as_they_would_be_alone() -> None:
    """One pass over contexts of all lengths, with invalid and withdrawn requests among them."""
    passes: list[int] = []

    class Counted(LookaheadScorer):
        def scores(self, asked: Sequence[object]) -> list[torch.Tensor]:  # type: ignore[override]
            passes.append(len(asked))
            return super().scores(asked)  # type: ignore[arg-type]

    indexer = LocalIndexer(SCORER.own, 1, lambda _path: Table(), Counted(SCORER._indexer, SCORER.manifest))
    hold: Future[None] = Future()
    indexer._pool.submit(hold.result)
    positions = [11, 90, 47, 8, 150, 33, 100]
    answers = [indexer.predict(request_at(position)) for position in positions]
    wrong = [
        indexer.predict(replace(request_at(20), state=None)),
        indexer.predict(replace(request_at(20), state=StepState(30, 2, DOCUMENT.hidden[20].numpy()))),
        indexer.predict(replace(request_at(20), queries=request_at(20).queries[:3])),
    ]
    withdrawn = indexer.predict(request_at(60))
    assert withdrawn.cancel()
    late = indexer.predict(request_at(64))
    hold.set_result(None)
    for position, answer in zip([*positions, 64], [*answers, late], strict=True):
        scores = torch.from_numpy(answer.result(60).scores)
        torch.testing.assert_close(scores, as_trained(position), atol=2e-4, rtol=2e-4)
    for answer, reason in zip(
        wrong, ["whether the indexer is trained", "2 chunks at position 30", "queries have shape"], strict=True
    ):
        with pytest.raises(ValueError, match=reason):
            answer.result(60)
    assert passes == [8]
    indexer.close()


def test_what_waits_when_an_indexer_closes_is_withdrawn() -> None:
    indexer = on_cpu(Table())
    assert isinstance(indexer, LocalIndexer)
    hold: Future[None] = Future()
    indexer._pool.submit(hold.result)
    waiting: Future[Prediction] = indexer.predict(request_at(20))
    hold.set_result(None)
    indexer.close()
    assert waiting.cancelled() or waiting.result(0).sequence_id == "at 20"
    with pytest.raises(RuntimeError, match="shutdown"):
        indexer.predict(request_at(20))


@both
def test_requests_for_another_indexer_are_refused(make: Make) -> None:
    free = LocalIndexer(SCORER.own, 1, lambda _path: Table())
    with pytest.raises(ValueError, match="whether the indexer is trained"):
        free.predict(request_at(20)).result(60)
    free.close()
    indexer = make(Table())
    with pytest.raises(ValueError, match="whether the indexer is trained"):
        indexer.predict(replace(request_at(20), state=None)).result(60)
    indexer.predict(request_at(20)).result(60)
    indexer.close()


@pytest.mark.gpu
def test_graphs_of_all_sizes_answer_as_single_launches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of all lengths in turn, also longer than the largest graph, with changing records."""
    monkeypatch.setattr("forecache.indexer.serving.static_prediction.CHUNK_BUCKETS", (2, 4, 8, 16))
    requests = []
    for position in np.random.default_rng(0).permutation(np.arange(7, TOKENS)).tolist():
        chunks = (position + 1) // CHUNK_TOKENS
        requests.append(request_at(position, local=range(position % 3, chunks, 1 + position % 5)))
    answers: list[list[Prediction]] = []
    for make in (as_graphs, on_device):  # one after the other: both page-lock the table
        indexer = make(Table())
        answers.append([indexer.predict(request).result(60) for request in requests])
        indexer.close()
    for found, expected in zip(*answers, strict=True):
        assert found.missing == expected.missing == ()
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
        assert found.event_mass is not None and expected.event_mass is not None
        np.testing.assert_allclose(found.event_mass, expected.event_mass, rtol=1e-4, atol=1e-6)


NEEDS_GPU = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")


@pytest.mark.gpu
@NEEDS_GPU
def test_a_graph_computes_exactly_what_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request by its graph and by separate launches, with other requests in between."""
    monkeypatch.setattr("forecache.indexer.serving.static_prediction.CHUNK_BUCKETS", (2, 4, 8, 16, 32))
    indexer = as_graphs(Table())
    assert indexer._static is not None
    graphs, none = indexer._static._graphs, {}
    assert sorted(graphs) == [2, 4, 8, 16, 32]
    positions = np.random.default_rng(1).permutation(np.arange(7, TOKENS)).tolist()
    requests = [request_at(position, local=range(position % 4, position // 8, 3)) for position in positions]
    answers: list[list[Prediction]] = []
    for given in (graphs, none, graphs):
        indexer._static._graphs = given
        answers.append([future.result(60) for future in [indexer.predict(request) for request in requests]])
    indexer.close()
    for first, second, third in zip(*answers, strict=True):
        for other in (second, third):
            np.testing.assert_array_equal(first.scores, other.scores)
            assert first.event_mass is not None and other.event_mass is not None
            np.testing.assert_array_equal(first.event_mass, other.event_mass)


@pytest.mark.gpu
@NEEDS_GPU
def test_graphs_are_captured_and_replayed_beside_other_work() -> None:
    """Another thread allocates, launches and synchronizes meanwhile, as decode steps do."""
    stop, rounds = threading.Event(), [0]

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                size = 64 + rounds[0] % 64
                a = torch.full((size, size), 0.5, device=DEVICE)
                assert float((a @ a).sum().cpu()) == size**3 / 4
                rounds[0] += 1

    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(work)
        try:
            for _ in range(3):
                indexer = as_graphs(Table())
                before = rounds[0]
                for position in (*range(7, TOKENS, 9), TOKENS - 1):
                    scores = torch.from_numpy(indexer.predict(request_at(position)).result(60).scores)
                    torch.testing.assert_close(scores, as_trained(position), atol=2e-4, rtol=2e-4)
                indexer.close()
                assert rounds[0] > before
        finally:
            stop.set()
        worker.result(60)

"""`min_resident_tokens`: short contexts are attended whole, longer ones keep at least as much, and slots suffice."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from small_llm import CHUNK_BYTES, open_llm

from forecache.cluster.dispatch.admission import ResidentEstimate
from forecache.cluster.http.openai_types import CompletionRequest
from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.protocol import Indexer, Prediction, PredictRequest
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import CacheOptions, GenerateRequest, Policy, SamplingParams
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.errors import InvalidRequestError
from forecache.workers.llm import LLM
from forecache.workers.memory.format.keys import root_key
from forecache.workers.residency.budgets import Budgets, Reservations

CHUNK = 16
KEEP = 0.2
PARTIAL: tuple[Policy, ...] = ("lookahead", "recency", "random")


def sequence(
    tokens: int, *, least: int, answer: int = 1, policy: Policy = "lookahead", keep: float = KEEP
) -> TokenSequence:
    return TokenSequence(
        GenerateRequest("r", (5,) * (tokens - answer), SamplingParams(max_tokens=answer)),
        holder="r",
        root=root_key("x"),
        chunk_tokens=CHUNK,
        keep_ratio=keep,
        policy=policy,
        min_resident_tokens=least,
    )


def budgets(pool_slots: int = 1000, **settings: Any) -> Budgets:
    config = EngineConfig(chunk_tokens=CHUNK, window_steps=32, keep_ratio=KEEP, **settings)
    return Budgets(config, SelectionConfig(), Reservations(pool_slots))


def budget_of(tokens: int, *, least: int, pool_slots: int = 1000, **more: Any) -> int:
    seq = sequence(tokens, least=least, **more)
    return budgets(pool_slots).first(seq, seq.max_chunks)


@pytest.mark.parametrize("policy", PARTIAL)
def test_a_context_up_to_it_is_kept_whole_and_the_next_keeps_as_much(policy: Policy) -> None:
    assert budget_of(640, least=640, policy=policy) == 40
    assert budget_of(639, least=640, policy=policy) == 40
    assert budget_of(641, least=640, policy=policy) == 40  # of 41 chunks
    assert budget_of(641, least=0, policy=policy) == 9
    assert budget_of(641, least=630, policy=policy) == 40  # a chunk is kept or not
    assert budget_of(5000, least=640, policy=policy) == 63, "a fifth of 313 chunks is more"


def test_full_attention_and_the_least_budget_stay_as_they_are() -> None:
    assert budget_of(5000, least=640, policy="full") == 313
    assert budget_of(5000, least=1, keep=0.001) == SelectionConfig().min_chunks


def test_a_sequence_that_is_kept_whole_reserves_its_chunks_and_no_more() -> None:
    made = budgets()
    assert made.slots(sequence(640, least=640), 1) == 40 + 1
    # 40 chunks, 20 that a swap replaces, two windows' worth and the open one: all of its 42 are fewer
    assert made.slots(sequence(656, least=640), 1) == 41 + 1
    assert made.slots(sequence(1600, least=640), 1) == 40 + 20 + 2 + 2


@given(tokens=st.integers(2, 3000), least=st.integers(0, 3000), keep=st.floats(0.01, 1), pool_slots=st.integers(1, 300))
def test_it_never_makes_a_sequence_exceed_the_pool(tokens: int, least: int, keep: float, pool_slots: int) -> None:
    """Whatever it is, a sequence that has a resident set without it has one with it, and a larger one at least."""
    made = budgets(pool_slots)
    without, seq = sequence(tokens, least=0, keep=keep), sequence(tokens, least=least, keep=keep)
    assume(made.slots(without, 1) <= pool_slots)
    assert made.slots(seq, 1) <= pool_slots
    assert made.first(without, seq.max_chunks) <= made.first(seq, seq.max_chunks) <= seq.max_chunks
    if tokens <= least and seq.max_chunks < pool_slots:
        assert made.first(seq, seq.max_chunks) == seq.max_chunks


@given(least=st.integers(0, 2000), keep=st.floats(0.01, 1), pool_slots=st.integers(100, 300))
def test_the_budget_never_falls_as_a_context_grows(least: int, keep: float, pool_slots: int) -> None:
    seq = sequence(1600, least=least, keep=keep)
    made = budgets(pool_slots)
    found = [made.first(seq, chunks) for chunks in range(seq.max_chunks + 1)]
    assert found == sorted(found)


def test_decode_graphs_are_as_wide_as_it() -> None:
    wide, narrow = budgets(min_resident_tokens=640), budgets(min_resident_tokens=0)
    assert wide.widest_table(1600) - narrow.widest_table(1600) == 40 - 20
    assert wide.widest_table(160_000) == narrow.widest_table(160_000)


def test_tenants_are_counted_what_it_keeps() -> None:
    engine = EngineConfig(chunk_tokens=CHUNK, keep_ratio=KEEP, min_resident_tokens=640)
    resident = ResidentEstimate(engine, SelectionConfig(), 100)
    assert resident.nbytes(640, CacheOptions()) == resident.nbytes(1600, CacheOptions()) == 40 * 100
    assert resident.nbytes(1600, CacheOptions(min_resident_tokens=0)) == 20 * 100
    assert resident.nbytes(1600, CacheOptions(min_resident_tokens=800)) == 50 * 100


def test_requests_may_name_it() -> None:
    body = {"model": "m", "prompt": "x", "forecache": {"min_resident_tokens": 0}}
    assert CompletionRequest.model_validate(body).cache().min_resident_tokens == 0
    del body["forecache"]
    assert CompletionRequest.model_validate(body).cache().min_resident_tokens is None


class Watched:
    """The indexer; notes of how many chunks each prediction is."""

    def __init__(self, inner: Indexer) -> None:
        self.inner = inner
        self.chunks: list[int] = []

    def predict(self, request: PredictRequest) -> Any:
        self.chunks.append(len(request.index_slots))
        return self.inner.predict(request)

    def close(self) -> None:
        self.inner.close()


assert Prediction  # what `predict` of the protocol returns in a future

LEAST = 320
PROMPT, ANSWER = 250, 200


def run(llm: LLM, prompt: list[int], answer: int = ANSWER, **cache: Any) -> tuple[list[int], TokenSequence]:
    """The tokens of the answer, and the sequence as it was at its end."""
    sampling = SamplingParams(max_tokens=answer, ignore_eos=True)
    llm.engine.add_request(GenerateRequest("r", tuple(prompt), sampling, CacheOptions(**cache)))
    [seq] = llm.engine._sequences.values()
    tokens: list[int] = []
    while not llm.engine.idle:
        for event in llm.engine.step():
            tokens += event.token_ids
        assert llm.engine.windows.budgets.spare_slots >= 0
        assert len(seq.residency.slots) + len(seq.open_slots) <= max(seq.residency.reserved_slots, 1) + 3
    return tokens, seq


@pytest.fixture(scope="module")
def prompt(tiny_model: Path) -> list[int]:
    return [(number * 31 + number // 7) % 250 + 1 for number in range(PROMPT)]


@pytest.mark.parametrize("policy", PARTIAL)
@pytest.mark.parametrize("overlap", [False, True])
def test_an_answer_is_exact_until_its_context_outgrows_it(
    tiny_model: Path, prompt: list[int], policy: Policy, overlap: bool
) -> None:
    watched: list[Watched] = []

    def wrap(inner: Indexer) -> Indexer:
        watched.append(Watched(inner))
        return watched[0]

    with open_llm(
        tiny_model,
        keep_ratio=KEEP,
        late_policy="wait",
        lead_steps=2,
        overlap_steps=overlap,
        min_resident_tokens=LEAST,
        wrap_indexer=wrap,
    ) as llm:
        exact, _ = run(llm, prompt, policy="full", cache_salt="full")
        tokens, seq = run(llm, prompt, policy=policy, cache_salt="partial")
        sparse, _ = run(llm, prompt, policy=policy, cache_salt="sparse", min_resident_tokens=0)
    # the token after the last that fits is drawn from a context of LEAST tokens
    whole = LEAST - PROMPT + 1
    assert tokens[:whole] == exact[:whole]
    assert sparse[:whole] != exact[:whole], "the tiny model does not notice what it can't see"
    kept = LEAST // CHUNK
    assert all(chunk.exact for chunk in seq.chunks[:kept]), "other requests may reuse them"
    assert not seq.chunks[-1].exact and seq.counters.windows >= 1 and seq.counters.late_windows == 0
    assert seq.counters.kept_sum / seq.counters.kept_steps < 1
    if policy == "lookahead":
        assert watched[0].chunks and min(count for count in watched[0].chunks[: seq.counters.windows]) > kept - 1


def test_no_set_is_predicted_while_all_chunks_stay(tiny_model: Path, prompt: list[int]) -> None:
    """Also where the request may come to have more: most answers end long before `max_tokens`."""
    watched: list[Watched] = []

    def wrap(inner: Indexer) -> Indexer:
        watched.append(Watched(inner))
        return watched[0]

    with open_llm(tiny_model, keep_ratio=KEEP, min_resident_tokens=LEAST, wrap_indexer=wrap) as llm:
        llm.engine.add_request(
            GenerateRequest("r", tuple(prompt), SamplingParams(max_tokens=400, ignore_eos=True), CacheOptions())
        )
        [seq] = llm.engine._sequences.values()
        while seq.num_computed < LEAST - 2 * CHUNK:
            llm.engine.step()
        assert watched[0].chunks == [] and not seq.partial and seq.counters.windows == 0
        assert seq.residency.boundary > seq.residency.decode_steps
        llm.engine.cancel("r")
        while not llm.engine.idle:
            llm.engine.step()


def test_a_short_context_is_exact_to_its_end_and_reserves_its_chunks(tiny_model: Path, prompt: list[int]) -> None:
    with open_llm(tiny_model, keep_ratio=KEEP, min_resident_tokens=LEAST) as llm:
        exact, _ = run(llm, prompt, LEAST - PROMPT, policy="full", cache_salt="full")
        tokens, seq = run(llm, prompt, LEAST - PROMPT)
    assert tokens == exact and all(chunk.exact for chunk in seq.chunks)
    assert seq.counters.kept_sum == seq.counters.kept_steps
    assert seq.max_chunks == LEAST // CHUNK


def test_a_pool_that_is_too_small_shrinks_the_set_and_streams_nothing(tiny_model: Path, prompt: list[int]) -> None:
    with open_llm(tiny_model, hot_chunks=16, keep_ratio=KEEP, min_resident_tokens=4096) as llm:
        assert llm.engine.pool.memory.nbytes == 16 * CHUNK_BYTES
        tokens, seq = run(llm, prompt)
    assert len(tokens) == ANSWER and not seq.residency.streamed
    assert seq.max_chunks > 16 and 0 < seq.counters.kept_sum / seq.counters.kept_steps < 1


def test_a_negative_number_is_refused(tiny_model: Path, prompt: list[int]) -> None:
    with open_llm(tiny_model) as llm, pytest.raises(InvalidRequestError, match="0 or more, not -1"):
        llm.engine.add_request(GenerateRequest("r", tuple(prompt), cache=CacheOptions(min_resident_tokens=-1)))

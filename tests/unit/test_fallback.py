"""Fallback: coverage of retrieval events, budgets that double when it is low, and full attention in the end."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forecache.indexer.records.manifest import CalibrationRecord, RetrievalHead, RetrievalManifest
from forecache.indexer.serving.config import IndexerConfig
from forecache.indexer.serving.protocol import Indexer, Prediction, PredictRequest
from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams
from forecache.workers.core.step_plan import Captured, Plan
from forecache.workers.engine.engine import Engine
from forecache.workers.llm import LLM
from forecache.workers.models.step.in_flight_step import RunningStep
from forecache.workers.residency.budgets import measure
from forecache.workers.residency.window import WindowCycle

CHUNK = 16
CHUNK_BYTES = 3 * 2 * 2 * CHUNK * 16 * 4
TOKENS = 40
FIRST_BUDGET = 8

Events = Callable[[int, npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""(how many predictions a sequence had before, its scores [chunks], infinite where resident) → event mass [chunks]."""


def unlooked_for(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Retrieval events on the chunk of the first half with the smallest score, which is not resident."""
    events = np.zeros(len(scores), dtype=np.float32)
    events[2 + np.argmin(scores[2 : len(scores) // 2])] = 2
    return events


def none(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.zeros(len(scores), dtype=np.float32)


def at_first(times: int) -> Events:
    """Events on chunks that are not resident in the first ``times`` predictions, and then none."""
    return lambda number, scores: unlooked_for(scores) if number < times else none(scores)


@dataclass
class Eventful:
    """Returns the result of ``inner`` with synthetic ``events``, which its scores then follow."""

    inner: Indexer
    events: Events
    engine: Engine | None = None
    asked: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def predict(self, request: PredictRequest) -> Future[Prediction]:
        with self.lock:
            number = self.asked.get(request.sequence_id, 0)
            self.asked[request.sequence_id] = number + 1
        found = self.inner.predict(request).result(30)
        assert self.engine is not None
        scores = found.scores.copy()
        resident = self.engine._sequences[request.sequence_id].residency.slots
        scores[[chunk for chunk in resident if chunk < len(scores)]] = np.inf
        mass = self.events(number, scores)
        answer: Future[Prediction] = Future()
        answer.set_result(replace(found, scores=np.maximum(found.scores, mass), event_mass=mass))
        return answer

    def close(self) -> None:
        self.inner.close()


@contextmanager
def opened(model: Path, arena_dir: Path, events: Events, *, hot_chunks: int = 100, **more: Any) -> Iterator[LLM]:
    defaults: dict[str, Any] = {
        "keep_ratio": 0.2,
        "min_resident_tokens": 0,
        "dtype": "float32",
        "device": "cpu",
        "chunk_tokens": CHUNK,
        "window_steps": 16,
        "cold_bytes": 4 << 20,
        "late_policy": "wait",
        "fallback": True,
    }
    eventful: list[Eventful] = []

    def wrap(inner: Indexer) -> Indexer:
        eventful.append(Eventful(inner, events))
        return eventful[0]

    with LLM(
        str(model),
        skip_tokenizer=True,
        arena_dir=arena_dir,
        hot_bytes=hot_chunks * CHUNK_BYTES,
        wrap_indexer=wrap,
        **(defaults | more),
    ) as llm:
        eventful[0].engine = llm.engine
        yield llm
        llm.engine.flush()
        llm.engine.flush()
        llm.engine.check_integrity()
        llm.memory.check_integrity()
        assert llm.engine.pool.referenced == 0
        assert llm.memory.stats().held_slots == 0


def add(llm: LLM, name: str, prompt: Sequence[int], tokens: int = TOKENS, cache: CacheOptions | None = None) -> None:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    llm.engine.add_request(GenerateRequest(name, tuple(prompt), sampling, cache or CacheOptions()))


def generate(llm: LLM, prompts: list[list[int]], tokens: int = TOKENS) -> list[Any]:
    return llm.generate(prompts, max_tokens=tokens, ignore_eos=True)


@given(
    mass=st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0, 2.5]), max_size=12),
    kept=st.lists(st.booleans(), min_size=12, max_size=12),
    sinks=st.integers(0, 3),
    recency=st.integers(0, 5),
    more=st.integers(0, 11),
)
def test_coverage_is_a_share_and_grows_with_the_set(
    mass: list[float], kept: list[bool], sinks: int, recency: int, more: int
) -> None:
    events, resident = np.array(mass, dtype=np.float32), np.array(kept[: len(mass)], dtype=np.bool_)
    found = measure(events, resident, sinks=sinks, recency=recency)
    assert (found.share is None) == (found.hits + found.misses == 0)
    assert found.share is None or 0 <= found.share <= 1
    assert found.hits + found.misses == sum(m > 0 for m in mass[sinks : max(len(mass) - recency, sinks)])
    everything = measure(events, np.ones_like(resident), sinks=sinks, recency=recency)
    assert everything.share in (None, 1.0) and everything.misses == 0
    if more < len(mass):
        resident[more] = True
        larger = measure(events, resident, sinks=sinks, recency=recency)
        assert larger.share is None or found.share is None or larger.share >= found.share
    # what always is resident says nothing
    events[:sinks] = 9
    events[len(mass) - min(recency, len(mass)) :] = 9
    assert measure(events, resident, sinks=sinks, recency=recency).mass == pytest.approx(found.mass)


@pytest.mark.parametrize("overlap_steps", [False, True])
def test_low_coverage_doubles_the_budget_and_brings_the_chunks_in(
    tiny_model: Path, prompts: list[list[int]], arena_dir: Path, overlap_steps: bool
) -> None:
    with opened(tiny_model, arena_dir, at_first(1), overlap_steps=overlap_steps) as llm:
        add(llm, "r", prompts[2], tokens=80)
        (seq,) = llm.engine._sequences.values()
        sizes: dict[int, tuple[int, int]] = {}
        stats = None
        while stats is None:
            stats = next((e.stats for e in llm.engine.step() if e.finish_reason is not None), None)
            sizes[seq.residency.decode_steps] = (len(seq.residency.slots), seq.residency.reserved_slots)
            llm.engine.check_integrity()
        assert stats.coverage == 0.0 and stats.fallbacks == 1
        assert llm.engine.stats().counters.event_misses == 1
    first, widest, last = sizes[1], max(sizes.values()), sizes[80 - 1]
    assert first[0] <= FIRST_BUDGET
    # at once: not only at the second step, its boundary
    assert sizes[2][0] >= 2 * FIRST_BUDGET and widest[1] > first[1]
    # half of it would have done since: it is given back
    assert last[0] <= FIRST_BUDGET + 80 // CHUNK
    assert last[1] == first[1]
    assert 0.3 < stats.keep_ratio < 0.7


def test_one_glance_of_one_head_is_no_reason(tiny_model: Path, prompts: list[list[int]], arena_dir: Path) -> None:
    with opened(tiny_model, arena_dir, lambda _, scores: unlooked_for(scores) * np.float32(0.45)) as llm:
        answer = generate(llm, [prompts[2]], tokens=12)[0]
    assert answer.stats.coverage < 0.5 and answer.stats.fallbacks == 0


def test_the_account_is_kept_without_fallback_too(tiny_model: Path, prompts: list[list[int]], arena_dir: Path) -> None:
    with opened(tiny_model, arena_dir, at_first(2), fallback=False) as llm:
        answer = generate(llm, [prompts[2]], tokens=20)[0]
        assert answer.stats.coverage is not None and answer.stats.coverage < 1
        assert answer.stats.fallbacks == 0
        assert answer.stats.resident_chunks <= FIRST_BUDGET + 20 // CHUNK + 2


def test_a_model_without_retrieval_heads_is_not_measured(
    tiny_model: Path, prompts: list[list[int]], arena_dir: Path
) -> None:
    with LLM(
        str(tiny_model), skip_tokenizer=True, arena_dir=arena_dir, chunk_tokens=CHUNK, cold_bytes=4 << 20, fallback=True
    ) as llm:
        stats = generate(llm, [prompts[2]])[0].stats
    assert stats.coverage is None and stats.fallbacks == 0


def manifest(path: Path) -> Path:
    """A manifest that names three heads of the tiny model."""
    calibration = CalibrationRecord(
        documents=0, tasks=(), min_tokens=0, max_tokens=0, chunk_tokens=CHUNK, seed=0, events=0.0,
        torch_version="", transformers_version="", date="",
    )  # fmt: skip
    heads = tuple(RetrievalHead(layer=layer, head=head, score=0.5) for layer, head in ((0, 1), (1, 3), (2, 0)))
    made = RetrievalManifest(
        model_type="llama", layers=3, attention_heads=4, kv_heads=2, head_dim=16, heads=heads, calibration=calibration
    )
    path.write_text(made.model_dump_json(), encoding="utf-8")
    return path


def test_coverage_is_that_of_the_set_which_the_step_read(
    tiny_model: Path, prompts: list[list[int]], arena_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real events of heads of the tiny model, compared with each step's block table."""
    captured, shares = WindowCycle.captured, []

    def note(self: WindowCycle, found: Captured) -> None:
        residency = found.request.sequence.residency
        before = residency.pending
        captured(self, found)
        turn = residency.pending
        if turn is not None and turn is not before:
            assert turn.future is not None and turn.resident is not None
            events = turn.future.result(30).event_mass
            assert events is not None and len(events) == turn.chunks
            looked = range(1, turn.chunks - max(1, int(max(8, -(-turn.chunks // 5)) / 3)))
            if mass := sum(float(events[n]) for n in looked):
                shares.append(sum(float(events[n]) for n in looked if turn.resident[n]) / mass)

    monkeypatch.setattr(WindowCycle, "captured", note)
    with LLM(
        str(tiny_model),
        skip_tokenizer=True,
        arena_dir=arena_dir,
        device="cpu",
        chunk_tokens=CHUNK,
        window_steps=8,
        keep_ratio=0.2,
        min_resident_tokens=0,
        late_policy="wait",
        cold_bytes=4 << 20,
        indexer=IndexerConfig(manifest=str(manifest(arena_dir / "heads.json"))),
    ) as llm:
        stats = generate(llm, [prompts[2]], tokens=80)[0].stats
    assert len(shares) >= 2, "the tiny model's heads never look back"
    assert stats.coverage == pytest.approx(np.mean(shares), abs=1e-6)


def test_a_pool_without_spare_slots_refuses_and_nobody_suffers(
    tiny_model: Path, prompts: list[list[int]], arena_dir: Path
) -> None:
    # two sequences of 8 + 4 + 3 slots each: nothing is left over, and either could grow to 27 if it were alone
    with opened(tiny_model, arena_dir, at_first(9), hot_chunks=30, max_batch_size=2) as llm:
        answers = generate(llm, [prompts[2], prompts[2][1:]], tokens=20)
        assert llm.engine.stats().counters.refused_fallbacks > 0
    assert [len(answer.token_ids) for answer in answers] == [20, 20]
    assert all(answer.stats.coverage < 1 for answer in answers)


def test_the_last_step_is_full_attention_streamed(tiny_model: Path, prompts: list[list[int]], arena_dir: Path) -> None:
    """Once the sets of a large pool hold all chunks, a small pool that streams gives the same tokens."""
    tokens, chunks = {}, -(-(len(prompts[2]) + TOKENS) // CHUNK)
    for hot_chunks in (64, chunks):
        with opened(
            tiny_model, arena_dir, at_first(1), keep_ratio=0.58, hot_chunks=hot_chunks, overlap_steps=False
        ) as llm:
            add(llm, "r", prompts[2])
            (seq,) = llm.engine._sequences.values()
            tokens[hot_chunks], stats = [], None
            while stats is None:
                for event in llm.engine.step():
                    tokens[hot_chunks] += event.token_ids
                    stats = event.stats
                llm.engine.check_integrity()
            assert stats.fallbacks == 1
            assert seq.residency.streamed == (hot_chunks < 64)
            # a large pool gives it back later, a streamed sequence goes on as it is
            assert stats.keep_ratio > (0.6 if hot_chunks == 64 else 0.95)
    # the sets of the large pool were whole at the first four boundaries
    same = 8
    assert tokens[64][:same] == tokens[chunks][:same]


def test_an_answer_that_began_to_be_streamed_is_gone_on_with(
    tiny_model: Path, prompts: list[list[int]], arena_dir: Path
) -> None:
    """The tokens decoded before the switch are decoded again, and so are the streamed ones."""
    chunks = -(-(len(prompts[2]) + TOKENS) // CHUNK)
    with opened(tiny_model, arena_dir, at_first(1), keep_ratio=0.58, hot_chunks=chunks) as llm:
        tokens: dict[str, list[int]] = {}
        for name, sent in (("whole", 0), ("resumed", 30)):
            sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
            resume = tuple(tokens["whole"][:sent]) if sent else ()
            llm.engine.add_request(GenerateRequest(name, tuple(prompts[2]), sampling, CacheOptions(), resume))
            (seq,) = llm.engine._sequences.values()
            tokens[name] = list(resume)
            while not llm.engine.idle:
                tokens[name] += [token for event in llm.engine.step() for token in event.token_ids]
                assert seq.awaited_tokens <= 1
            assert seq.residency.streamed
        assert tokens["resumed"] == tokens["whole"] and len(tokens["whole"]) == TOKENS


def test_others_go_on_while_one_is_streamed(tiny_model: Path, prompts: list[list[int]], arena_dir: Path) -> None:
    def only_of_one(number: int, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return unlooked_for(scores) if len(scores) > 15 else none(scores)

    expected: list[list[int]] = []
    for together in (False, True):
        with opened(tiny_model, arena_dir, only_of_one, keep_ratio=0.58, hot_chunks=24 + 16) as llm:
            if not together:
                expected = [generate(llm, [prompt])[0].token_ids for prompt in (prompts[0], prompts[1])]
                continue
            add(llm, "streamed", prompts[2] * 2, tokens=TOKENS)
            add(llm, "a", prompts[0])
            add(llm, "b", prompts[1])
            tokens: dict[str, list[int]] = {"streamed": [], "a": [], "b": []}
            streamed = set()
            while any(len(made) < TOKENS for made in tokens.values()):
                for event in llm.engine.step():
                    tokens[event.request_id] += event.token_ids
                streamed |= {seq.request_id for seq in llm.engine._sequences.values() if seq.residency.streamed}
                llm.engine.check_integrity()
            assert streamed == {"streamed"}
            assert [tokens["a"], tokens["b"]] == expected


@pytest.mark.parametrize("fallback", [False, True])
def test_a_step_that_is_aborted_costs_nobody_the_prediction_it_was_to_bring(
    tiny_model: Path, prompts: list[list[int]], arena_dir: Path, fallback: bool
) -> None:
    """A client disconnects during a long step that would bring predictions for others: they request them again."""
    with opened(tiny_model, arena_dir, lambda _, scores: none(scores), fallback=fallback, hot_chunks=200) as llm:
        [expected] = generate(llm, [prompts[2]])
        engine, aborted = llm.engine, list[Plan]()
        launch = engine._runner.launch

        def leave(plan: Plan, is_aborted: Callable[[], bool]) -> RunningStep:
            if plan.captures and plan.streams and not aborted:
                aborted.append(plan)
                engine.cancel("leaving")
            return launch(plan, is_aborted)

        engine._runner.launch = leave  # type: ignore[method-assign]
        add(llm, "staying", prompts[2])
        tokens: list[int] = []
        for _ in range(20 * TOKENS):
            tokens += [token for event in engine.step() for token in event.token_ids if event.request_id == "staying"]
            if tokens and not aborted and "leaving" not in engine._sequences:
                add(llm, "leaving", prompts[2][1:] * 4)
            if engine.idle:
                break
        assert aborted and tokens == expected.token_ids


workload = st.lists(
    st.tuples(
        st.integers(1, 250),  # prompt tokens
        st.integers(1, 30),  # answer tokens
        st.sampled_from([0.1, 0.3, 0.6]),
        st.integers(0, 40),  # steps before it arrives
        st.one_of(st.none(), st.integers(0, 60)),  # steps after which it is cancelled
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=15, deadline=None)
@given(
    plan=workload,
    hot_chunks=st.integers(6, 50),
    late_policy=st.sampled_from(["keep", "wait"]),
    overlap_steps=st.booleans(),
    seed=st.integers(0, 100),
)
def test_sound_whatever_the_heads_look_for(
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    plan: list[Any],
    hot_chunks: int,
    late_policy: str,
    overlap_steps: bool,
    seed: int,
) -> None:
    """Every request ends, complete or cancelled, within its reserved slots, while budgets double, halve and stream."""

    def events(number: int, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        rng = np.random.default_rng([seed, number, len(scores)])
        return (3 * rng.random(len(scores)) * (rng.random(len(scores)) > 0.7)).astype(np.float32)

    ends: set[str] = set()
    with opened(
        tiny_model,
        tmp_path_factory.mktemp("arena"),
        events,
        hot_chunks=hot_chunks,
        late_policy=late_policy,
        overlap_steps=overlap_steps,
        max_batch_size=4,
    ) as llm:
        step = 0
        while len(ends) < len(plan):
            for i, (prompt, answer, ratio, arrives, cancelled) in enumerate(plan):
                if arrives == step:
                    ids = np.random.default_rng(i % 3).integers(3, 256, prompt).tolist()
                    add(llm, f"r{i}", ids, answer, CacheOptions("lookahead", ratio))
                if cancelled is not None and step == arrives + cancelled:
                    llm.engine.cancel(f"r{i}")
            ends |= {event.request_id for event in llm.engine.step() if event.finish_reason is not None}
            llm.engine.check_integrity()
            assert llm.engine.windows.budgets.spare_slots >= 0
            step += 1
            assert step < 3000, f"no progress: {ends}"

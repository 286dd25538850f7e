"""The engine in one process on a tiny model: exact against transformers, and consistent after any fault."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams, TokenEvent
from forecache.workers.core.step_plan import DecodeRow
from forecache.workers.errors import ForecacheError, InvalidRequestError
from forecache.workers.llm import LLM
from forecache.workers.memory.hot.completions import RecallItem
from forecache.workers.memory.hot.prefetcher import Prefetcher
from forecache.workers.models.dense.runner import ModelRunner

Reference = Callable[[list[int], int], list[int]]
CHUNK_BYTES = 3 * 2 * 2 * 16 * 16 * 4
TOKENS = 40


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "overlapping"], autouse=True)
def overlap_steps(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test with sequential steps, and with overlapping steps."""
    defaults = EngineConfig.for_device

    def for_device(config: EngineConfig, device: str) -> EngineConfig:
        return defaults(config.model_copy(update={"overlap_steps": request.param}), device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineConfig, "for_device", for_device)
        yield


@contextmanager
def open_llm(model: Path, *, hot_chunks: int = 64, **settings: Any) -> Iterator[LLM]:
    """An LLM with 16-token chunks; checks at the end that nothing leaked."""
    defaults: dict[str, Any] = {
        "keep_ratio": 1.0,
        "min_resident_tokens": 0,
        "dtype": "float32",
        "chunk_tokens": 16,
        "cold_bytes": 4 << 20,
        "window_steps": 16,
        "torch_compile": False,  # on a GPU: test_compiled_layers.py is for that
    }
    # memory-backed, as in serving: CUDA can register nothing else
    with TemporaryDirectory(prefix="engine-test-", dir="/dev/shm") as directory:
        with LLM(
            str(model),
            skip_tokenizer=True,
            hot_bytes=hot_chunks * CHUNK_BYTES,
            arena_dir=Path(directory),
            **(defaults | settings),
        ) as llm:
            yield llm
            settle(llm)
            assert llm.engine.pool.referenced == 0
            assert llm.memory.stats().held_slots == 0
        assert not list(Path(directory).glob("forecache-*"))


def settle(llm: LLM) -> None:
    """Wait for running copies and releases; then nothing may run."""
    llm.engine.flush()
    llm.engine.flush()  # a sequence leaves only after its recall, and its release follows then
    stats = llm.engine.stats()
    assert stats.running == stats.waiting == llm.engine.pool.dirty == 0
    llm.engine.check_integrity()
    llm.memory.check_integrity()


def run(llm: LLM, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    return [answer.token_ids for answer in llm.generate(prompts, max_tokens=TOKENS, ignore_eos=True, **options)]


@pytest.fixture(scope="module")
def expected(reference: Reference, prompts: list[list[int]]) -> list[list[int]]:
    return [reference(prompt, TOKENS) for prompt in prompts]


def test_one_by_one(tiny_model: Path, prompts: list[list[int]], expected: list[list[int]]) -> None:
    with open_llm(tiny_model) as llm:
        assert [run(llm, [prompt])[0] for prompt in prompts] == expected


def test_in_one_batch(tiny_model: Path, prompts: list[list[int]], expected: list[list[int]]) -> None:
    with open_llm(tiny_model) as llm:
        assert run(llm, prompts) == expected


def test_a_request_id_that_comes_again_names_another_sequence(
    tiny_model: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """State on the device is not mistaken for that of an earlier request with the same id."""
    with open_llm(tiny_model) as llm:
        runner, tables = llm.engine._runner, dict[object, bytes]()
        assert isinstance(runner, ModelRunner)
        decode_row = runner._decode_row

        def noted(seq: Any) -> DecodeRow:
            row = decode_row(seq)
            assert tables.setdefault(row.version, row.table.tobytes()) == row.table.tobytes()
            return row

        runner._decode_row = noted  # type: ignore[method-assign]
        for prompt, answer in zip(prompts, expected, strict=True):
            sampling = SamplingParams(max_tokens=4, ignore_eos=True)
            llm.engine.add_request(GenerateRequest("again", tuple(prompt), sampling))
            tokens: list[int] = []
            while not llm.engine.idle:
                tokens += [token for event in llm.engine.step() for token in event.token_ids]
            assert tokens == answer[:4]


def test_after_every_hot_slot_was_evicted(
    tiny_model: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with open_llm(tiny_model) as llm:
        run(llm, prompts)
        settle(llm)
        before = llm.engine.stats()
        assert before.prefilled_tokens == sum(map(len, prompts)) and before.prefilled_prompts == len(prompts)
        assert 0 < before.prefill_s < before.counters.step_s
        assert llm.engine.pool.evict_all() > 0
        assert llm.engine.pool.used == 0
        answers = llm.generate(prompts, max_tokens=TOKENS, ignore_eos=True)
        after = llm.engine.stats()
    assert after.prefilled_tokens - before.prefilled_tokens == sum((len(prompt) - 1) % 16 + 1 for prompt in prompts)
    assert after.prefill_tokens_left == 0
    assert [answer.token_ids for answer in answers] == expected
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.stats.cached_tokens == (len(prompt) - 1) // 16 * 16
        assert answer.stats.recalled_chunks == (len(prompt) - 1) // 16


def test_second_turn(tiny_model: Path, prompts: list[list[int]], reference: Reference) -> None:
    with open_llm(tiny_model) as llm:
        first = run(llm, [prompts[1]])[0]
        turn = prompts[1] + first + prompts[0]
        answer = llm.generate([turn], max_tokens=TOKENS, ignore_eos=True)[0]
    assert answer.token_ids == reference(turn, TOKENS)
    # the answer's chunks were decoded with everything resident, so they are as good as prefilled ones
    assert answer.stats.cached_tokens == (len(prompts[1]) + TOKENS - 1) // 16 * 16


@pytest.mark.parametrize("hot_chunks", [5, 12])
def test_full_attention_streams_through_a_small_pool(
    tiny_model: Path, prompts: list[list[int]], expected: list[list[int]], hot_chunks: int
) -> None:
    with open_llm(tiny_model, hot_chunks=hot_chunks, keep_ratio=0.2) as llm:
        assert run(llm, prompts, policy="full") == expected


def test_prefill_in_small_steps_beside_running_streams(
    tiny_model: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with open_llm(tiny_model, max_step_tokens=24) as llm:
        assert run(llm, prompts) == expected


def test_a_damaged_chunk_is_prefilled_again(
    tiny_model: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with open_llm(tiny_model) as llm:
        run(llm, prompts)
        settle(llm)
        llm.engine.pool.evict_all()
        llm.memory.arena.chunks[:, ::1000] ^= 1
        answers = llm.generate(prompts, max_tokens=TOKENS, ignore_eos=True)
        assert llm.memory.stats().dropped_chunks >= len(prompts)
    assert [answer.token_ids for answer in answers] == expected
    assert [answer.stats.cached_tokens for answer in answers] == [0] * len(prompts)


def test_a_chunk_damaged_while_running_restarts_its_sequence(
    tiny_model: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recall, recalls = Prefetcher.recall, []

    def damage_then_recall(self: Prefetcher, items: Sequence[RecallItem], holder: str) -> int:
        if not recalls:
            llm.memory.arena.chunks[items[3].ref.slot, 0] ^= 255
        recalls.append(items)
        return recall(self, items, holder)

    monkeypatch.setattr(Prefetcher, "recall", damage_then_recall)
    with open_llm(tiny_model) as llm:
        run(llm, [prompts[2]])
        settle(llm)
        llm.engine.pool.evict_all()
        assert run(llm, [prompts[2]])[0] == expected[2]
        assert llm.engine.stats().counters.lost_chunks == 1
        assert len(recalls) == 1  # the sound ones were hot already when the sequence started over


def test_partial_sets_differ_and_are_never_shared(tiny_model: Path, prompts: list[list[int]]) -> None:
    prompt = prompts[2]
    with open_llm(tiny_model) as llm:
        exact = run(llm, [prompt])[0]
    with open_llm(tiny_model, keep_ratio=0.2, late_policy="wait") as llm:
        answer = llm.generate([prompt], max_tokens=TOKENS, ignore_eos=True)[0]
        assert answer.token_ids != exact
        assert answer.stats.keep_ratio < 0.5
        again = llm.generate([prompt + answer.token_ids + [5]], max_tokens=1, ignore_eos=True)[0]
        assert again.stats.cached_tokens == len(prompt) // 16 * 16


@pytest.mark.parametrize("policy", ["lookahead", "recency", "random"])
def test_waiting_windows_are_reproducible(tiny_model: Path, prompts: list[list[int]], policy: Any) -> None:
    with open_llm(tiny_model, keep_ratio=0.2, late_policy="wait", hot_chunks=30) as llm:
        alone = [run(llm, [prompt], policy=policy)[0] for prompt in prompts]
        assert run(llm, prompts, policy=policy) == alone


def test_requests_choose_their_windows(tiny_model: Path, prompts: list[list[int]]) -> None:
    """One set per boundary: at 2, 4, 8 and every window, the first of them staggered."""

    def turns(llm: LLM, window_steps: int | None) -> int:
        before = llm.engine.stats().counters.windows
        llm.generate([prompts[2]], max_tokens=65, ignore_eos=True, window_steps=window_steps)
        return llm.engine.stats().counters.windows - before

    with open_llm(tiny_model, keep_ratio=0.2, late_policy="wait", hot_chunks=40) as llm:
        assert 15 <= turns(llm, 4) <= 17
        assert 5 <= turns(llm, None) <= 7 and turns(llm, 16) == turns(llm, None)
        assert turns(llm, 64) in (5, 6)


def test_cold_chunks_come_back_while_decoding(tiny_model: Path, prompts: list[list[int]]) -> None:
    with open_llm(tiny_model, keep_ratio=0.1, hot_chunks=16, late_policy="wait") as llm:
        answer = llm.generate([prompts[2]], max_tokens=60, ignore_eos=True, policy="random")[0]
    assert answer.stats.recalled_chunks > 8
    assert answer.stats.resident_chunks <= 8 + 60 // 16 + 1


def test_salts_never_meet(tiny_model: Path, prompts: list[list[int]]) -> None:
    with open_llm(tiny_model) as llm:
        for salt, cached in (("a", 0), ("b", 0), ("a", 320)):
            answer = llm.generate([prompts[2]], max_tokens=1, cache_salt=salt)[0]
            assert answer.stats.cached_tokens == cached


def test_sampling_does_not_depend_on_the_batch(tiny_model: Path, prompts: list[list[int]]) -> None:
    options = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 11}
    with open_llm(tiny_model) as llm:
        alone = [run(llm, [prompt], **options)[0] for prompt in prompts]
        assert run(llm, prompts, **options) == alone
        assert run(llm, prompts, **(options | {"seed": 12})) != alone


def test_cancelled_in_every_state(tiny_model: Path, prompts: list[list[int]]) -> None:
    with open_llm(tiny_model, keep_ratio=0.2, max_step_tokens=32) as llm:
        for steps in range(30):
            llm.engine.add_request(GenerateRequest("r", tuple(prompts[2]), SamplingParams(max_tokens=30)))
            events: list[TokenEvent] = []
            for _ in range(steps):
                events += llm.engine.step()
            llm.engine.cancel("r")
            events += llm.engine.step()
            assert events[-1].finish_reason in ("cancelled", "stop", "length")
            settle(llm)
            assert llm.engine.pool.referenced == 0


def test_more_requests_than_the_pool_holds(tiny_model: Path, prompts: list[list[int]]) -> None:
    many = [prompt[i:] for i in range(5) for prompt in prompts]
    with open_llm(tiny_model, hot_chunks=30, keep_ratio=0.3) as llm:
        answers = llm.generate(many, max_tokens=20, ignore_eos=True)
        assert [len(answer.token_ids) for answer in answers] == [20] * len(many)


@pytest.mark.parametrize(
    ("tokens", "sampling", "cache", "message"),
    [
        ((), {}, {}, "prompt is empty"),
        ((5,), {"max_tokens": 0}, {}, "at least 1"),
        ((5,) * 2000, {"max_tokens": 100}, {}, "2048 tokens.*2100.*2000 in the prompt"),
        ((256,), {}, {}, "vocabulary of 256"),
        ((-1,), {}, {}, "vocabulary"),
        ((5,), {"temperature": -1.0}, {}, "temperature"),
        ((5,), {"temperature": float("nan")}, {}, "temperature"),
        ((5,), {"top_p": 0.0}, {}, "top_p"),
        ((5,), {"top_k": -3}, {}, "top_k"),
        ((5,), {"stop": ("",)}, {}, "stop string is empty"),
        ((5,), {"stop": ("x",)}, {}, "tokenizer"),
        ((5,), {}, {"keep_ratio": 0.0}, "keep_ratio"),
        ((5,), {}, {"window_steps": 0}, "window"),
        ((5,), {}, {"keep_ratio": float("nan")}, "keep_ratio"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    tiny_model: Path, tokens: Any, sampling: Any, cache: Any, message: str
) -> None:
    with open_llm(tiny_model) as llm:
        with pytest.raises(InvalidRequestError, match=message):
            llm.engine.add_request(
                GenerateRequest("r", tuple(tokens), SamplingParams(**sampling), CacheOptions(**cache))
            )
        assert llm.engine.idle


def test_cold_memory_too_small_for_a_request(tiny_model: Path, prompts: list[list[int]]) -> None:
    with (
        open_llm(tiny_model, cold_bytes=2 * 10**6 + 2 * 10**5) as llm,
        pytest.raises(InvalidRequestError, match="--cold-bytes"),
    ):
        llm.generate([prompts[2] * 5], max_tokens=20)


def test_text_without_a_tokenizer(tiny_model: Path) -> None:
    with open_llm(tiny_model) as llm, pytest.raises(ForecacheError, match="skip_tokenizer"):
        llm.generate(["text"])


requests = st.lists(
    st.tuples(
        st.integers(1, 200),  # prompt tokens
        st.integers(1, 30),  # answer tokens
        st.sampled_from([0.1, 0.4, 1.0]),
        st.sampled_from(["lookahead", "recency", "random", "full"]),
        st.integers(0, 60),  # steps before it arrives
        st.one_of(st.none(), st.integers(0, 80)),  # steps after which it is cancelled
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=25, deadline=None)
@given(plan=requests, hot_chunks=st.integers(4, 40), late_policy=st.sampled_from(["keep", "wait"]))
def test_sound_under_any_workload(tiny_model: Path, plan: list[Any], hot_chunks: int, late_policy: str) -> None:
    """Every request ends, cancelled or whole; no slot or hold leaks; slots never serve two owners."""
    ends: dict[str, str] = {}
    tokens: dict[str, int] = {}
    arrivals = {f"r{i}": entry[4] for i, entry in enumerate(plan)}
    with open_llm(tiny_model, hot_chunks=hot_chunks, late_policy=late_policy, max_batch_size=4) as llm:
        step = 0
        while len(ends) < len(plan):
            for i, (prompt, answer, ratio, policy, arrives, cancelled) in enumerate(plan):
                if arrives == step:
                    ids = tuple(np.random.default_rng(i % 3).integers(3, 256, prompt).tolist())
                    llm.engine.add_request(
                        GenerateRequest(
                            f"r{i}",
                            ids,
                            SamplingParams(max_tokens=answer, ignore_eos=True),
                            CacheOptions(policy, ratio),
                        )
                    )
                if cancelled is not None and step == arrives + cancelled:
                    llm.engine.cancel(f"r{i}")
            for event in llm.engine.step():
                tokens[event.request_id] = tokens.get(event.request_id, 0) + len(event.token_ids)
                assert event.request_id not in ends, "news of a request that has ended"
                if event.finish_reason is not None:
                    ends[event.request_id] = event.finish_reason
            llm.engine.check_integrity()
            step += 1
            assert step < 2000, f"no progress: {ends} of {arrivals}"
    for i, (_, answer, _, _, _, cancelled) in enumerate(plan):
        if cancelled is None:
            assert ends[f"r{i}"] == "length"
        if ends[f"r{i}"] == "length":
            assert tokens[f"r{i}"] == answer


def test_a_prefix_is_shared_before_it_is_stored(
    tiny_model: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, gate = Prefetcher._write_back, threading.Event()

    def stores_late(self: Prefetcher, batch: list[Any]) -> None:
        assert gate.wait(30)
        store(self, batch)

    monkeypatch.setattr(Prefetcher, "_write_back", stores_late)
    with open_llm(tiny_model) as llm:
        sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
        for name in ("first", "second"):
            llm.engine.add_request(GenerateRequest(name, tuple(prompts[2]), sampling))
            if name == "first":
                # hot, but none of its chunks can have been stored
                while not any(event.token_ids for event in llm.engine.step()):
                    pass
        gate.set()
        tokens: dict[str, list[int]] = {"first": expected[2][:1], "second": []}
        cached: dict[str, int] = {}
        while len(cached) < 2:
            for event in llm.engine.step():
                tokens[event.request_id] += event.token_ids
                if event.stats is not None:
                    cached[event.request_id] = event.stats.cached_tokens
        settle(llm)
    assert cached == {"first": 0, "second": 320}
    assert tokens == {"first": expected[2], "second": expected[2]}

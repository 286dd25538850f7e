"""The first window of a sequence: its sets are waited for briefly, and chunks that scored highly once stay, because
most answers begin there."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from forecache.indexer.serving.protocol import Indexer, Prediction, PredictRequest
from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams
from forecache.workers.core.residency import Residency
from forecache.workers.llm import LLM

TOKENS = 40
"""Less than a window: every boundary is an early one."""


class Slow:
    """Returns the result of ``inner`` after ``delay_s``; never, if that is ``None``."""

    def __init__(self, inner: Indexer, delay_s: float | None) -> None:
        self._inner = inner
        self._delay_s = delay_s

    def predict(self, request: PredictRequest) -> Future[Prediction]:
        late: Future[Prediction] = Future()
        if self._delay_s is not None:

            def answer() -> None:
                if late.set_running_or_notify_cancel():
                    late.set_result(self._inner.predict(request).result())

            threading.Timer(self._delay_s, answer).start()
        return late

    def close(self) -> None:
        self._inner.close()


@contextmanager
def opened(
    model: Path,
    arena_dir: Path,
    wrap_indexer: Callable[[Indexer], Indexer],
    *,
    keep_ratio: float = 0.2,
    **settings: Any,
) -> Iterator[LLM]:
    with LLM(
        str(model),
        skip_tokenizer=True,
        arena_dir=arena_dir,
        dtype="float32",
        device="cpu",
        chunk_tokens=16,
        keep_ratio=keep_ratio,
        min_resident_tokens=0,
        hot_bytes=4 << 20,
        cold_bytes=4 << 20,
        wrap_indexer=wrap_indexer,
        **settings,
    ) as llm:
        yield llm


@pytest.mark.parametrize("overlap_steps", [False, True])
def test_late_sets_of_the_first_window_are_waited_for(
    tiny_model: Path, prompts: list[list[int]], arena_dir: Path, overlap_steps: bool
) -> None:
    answers = {}
    for late_policy in ("wait", "keep"):
        settings: dict[str, Any] = {"late_policy": late_policy, "overlap_steps": overlap_steps}
        with opened(tiny_model, arena_dir, lambda inner: Slow(inner, 0.03), early_wait_s=30, **settings) as llm:
            answers[late_policy] = llm.generate(prompts, max_tokens=TOKENS, ignore_eos=True)
    assert [answer.token_ids for answer in answers["keep"]] == [answer.token_ids for answer in answers["wait"]]
    assert [answer.stats.late_windows for answer in answers["keep"]] == [0] * len(prompts)


@pytest.mark.parametrize("early_wait_s", [0.0, 0.02])
def test_nobody_waits_for_ever(
    tiny_model: Path, prompts: list[list[int]], arena_dir: Path, early_wait_s: float
) -> None:
    with opened(tiny_model, arena_dir, lambda inner: Slow(inner, None), early_wait_s=early_wait_s) as llm:
        answers = llm.generate(prompts, max_tokens=TOKENS, ignore_eos=True)
    assert [len(answer.token_ids) for answer in answers] == [TOKENS] * len(prompts)


class Fickle:
    """Scores one chunk higher than the others, and another one at each prediction, from the third on."""

    def __init__(self, inner: Indexer) -> None:
        self._inner = inner
        self._predictions = 0

    def predict(self, request: PredictRequest) -> Future[Prediction]:
        found = self._inner.predict(request).result()
        scores = np.zeros_like(found.scores)
        scores[3 + self._predictions] = 9
        self._predictions += 1
        answer: Future[Prediction] = Future()
        answer.set_result(dataclasses.replace(found, scores=scores))
        return answer

    def close(self) -> None:
        self._inner.close()


@pytest.mark.parametrize("window_steps", [64, 8])
def test_what_a_prediction_wanted_stays_in_the_first_window(
    tiny_model: Path, prompts: list[list[int]], arena_dir: Path, window_steps: int
) -> None:
    """Predictions are for boundaries 2, 4, 8 and so on: with windows of 8 steps the fourth is of the second window."""
    settings: dict[str, Any] = {
        "keep_ratio": 0.4,
        "window_steps": window_steps,
        "late_policy": "wait",
    }
    with opened(tiny_model, arena_dir, Fickle, **settings) as llm:
        request = GenerateRequest(
            "r", tuple(prompts[2]), SamplingParams(max_tokens=TOKENS, ignore_eos=True), CacheOptions()
        )
        llm.engine.add_request(request)
        (seq,) = llm.engine._sequences.values()
        resident: dict[int, set[int]] = {}
        while seq.residency.decode_steps < TOKENS - 2:
            llm.engine.step()
            resident[seq.residency.decode_steps] = {3, 4, 5} & set(seq.residency.slots)
    assert resident[9] == {3, 4, 5}
    assert (resident[TOKENS - 3] == {3, 4, 5}) == (window_steps == 64)


@given(
    scores=st.lists(arrays(np.float32, st.integers(0, 4), elements=st.floats(-9, 9, width=32)), min_size=1, max_size=7),
    window_steps=st.sampled_from([4, 16, 64]),
)
def test_scores_of_the_first_window_are_the_largest_so_far(scores: list[np.ndarray], window_steps: int) -> None:
    residency = Residency()
    expected = np.empty(0, dtype=np.float32)
    for number, more in enumerate(scores):
        boundary = 2 << number
        # chunks become more from one boundary to the next
        predicted = np.concatenate([np.resize(more, len(expected)) if len(more) else expected - 1, more])
        given_scores = predicted.copy()
        got = residency.keep_early_scores(predicted, boundary, window_steps)
        if boundary > window_steps:
            assert np.array_equal(got, given_scores)
        else:
            grown = np.concatenate([expected, np.full(len(predicted) - len(expected), -np.inf, dtype=np.float32)])
            expected = np.maximum(grown, given_scores)
            assert np.array_equal(got, expected)
        assert np.array_equal(predicted, given_scores), "what an indexer answered is its own"
        expected = expected if boundary <= window_steps else np.empty(0, dtype=np.float32)
    for _ in range(2):
        residency.drop_pending()
        assert residency.early_scores is None

"""The sets of a sequence's first window are waited for, a little: most answers begin there."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forecache.indexer.protocol import Indexer, Prediction, PredictRequest
from forecache.workers.llm import LLM

TOKENS = 40
"""Less than a window: every boundary is an early one."""


class Slow:
    """Answers as ``inner`` does, but only after ``delay_s``; never for ``None``."""

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
def opened(model: Path, arena_dir: Path, delay_s: float | None, **settings: Any) -> Iterator[LLM]:
    with LLM(
        str(model),
        skip_tokenizer=True,
        arena_dir=arena_dir,
        dtype="float32",
        device="cpu",
        chunk_tokens=16,
        keep_ratio=0.2,
        hot_bytes=4 << 20,
        cold_bytes=4 << 20,
        wrap_indexer=lambda inner: Slow(inner, delay_s),
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
        with opened(tiny_model, arena_dir, 0.03, early_wait_s=30, **settings) as llm:
            answers[late_policy] = llm.generate(prompts, max_tokens=TOKENS, ignore_eos=True)
    assert [answer.token_ids for answer in answers["keep"]] == [answer.token_ids for answer in answers["wait"]]
    assert [answer.stats.late_windows for answer in answers["keep"]] == [0] * len(prompts)


@pytest.mark.parametrize("early_wait_s", [0.0, 0.02])
def test_nobody_waits_for_ever(
    tiny_model: Path, prompts: list[list[int]], arena_dir: Path, early_wait_s: float
) -> None:
    with opened(tiny_model, arena_dir, None, early_wait_s=early_wait_s) as llm:
        answers = llm.generate(prompts, max_tokens=TOKENS, ignore_eos=True)
    assert [len(answer.token_ids) for answer in answers] == [TOKENS] * len(prompts)

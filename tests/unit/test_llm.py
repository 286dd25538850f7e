"""The in-process `LLM`: an answer that is interrupted leaves nothing behind."""

import time
from pathlib import Path

import pytest

from forecache.workers.core.requests import TokenEvent
from forecache.workers.llm import LLM


@pytest.mark.parametrize("steps", [0, 1, 3, 40])
def test_an_interrupted_call_gives_back_its_slots_and_holds_at_once(
    tiny_model: Path, prompts: list[list[int]], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two steps, before and in prefill and in decode."""
    with LLM(str(tiny_model), skip_tokenizer=True, chunk_tokens=16, hot_bytes=1 << 20, cold_bytes=1 << 24) as llm:
        expected = llm.generate(prompts[:1], max_tokens=4, ignore_eos=True)[0].token_ids
        step, left = llm.engine.step, steps

        def interrupted() -> list[TokenEvent]:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return step()

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(llm.engine, "step", interrupted)
            llm.generate(prompts, max_tokens=1000, ignore_eos=True)
        start = time.monotonic()
        while llm.memory.stats().held_slots or llm.engine.stats().hot_slots_referenced:
            assert time.monotonic() - start < 1
            time.sleep(0.01)
        assert llm.engine.stats().running == llm.engine.stats().waiting == 0
        llm.engine.check_integrity()
        assert llm.generate(prompts[:1], max_tokens=4, ignore_eos=True)[0].token_ids == expected

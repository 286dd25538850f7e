"""The asyncio engine: many callers, cancellations, and an engine that ends while requests run."""

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forecache.workers.core.requests import GenerateRequest, SamplingParams, TokenEvent
from forecache.workers.engine.async_engine import AsyncEngine
from forecache.workers.errors import EngineDeadError, InvalidRequestError
from forecache.workers.llm import LLM

pytestmark = pytest.mark.anyio
Reference = Callable[[list[int], int], list[int]]
CHUNK_BYTES = 3 * 2 * 2 * 16 * 16 * 4
TOKENS = 24
ENDLESS = 1500
DEADLINE_S = 30.0


@pytest.fixture
def llm(tiny_model: Path, arena_dir: Path) -> Any:
    """The owner of the engine's memory. It is not closed: tests close the engine, which works only once."""
    llm = LLM(
        str(tiny_model),
        skip_tokenizer=True,
        keep_ratio=1.0,
        chunk_tokens=16,
        hot_bytes=400 * CHUNK_BYTES,
        cold_bytes=8 << 20,
        arena_dir=arena_dir,
    )
    yield llm
    llm._indexer.close()
    llm.memory.arena.unlink()


@asynccontextmanager
async def serving(llm: LLM) -> AsyncIterator[AsyncEngine]:
    """An engine that runs for at most ``DEADLINE_S``; after it is closed, nothing may be held."""
    engine = AsyncEngine(llm.engine)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield engine
    finally:
        await asyncio.to_thread(engine.close)
    assert llm.engine.pool.referenced == 0
    assert llm.memory.stats().held_slots == 0
    llm.engine.check_integrity()


def request(name: str, prompt: list[int], max_tokens: int = TOKENS) -> GenerateRequest:
    return GenerateRequest(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, ignore_eos=True))


async def answer(engine: AsyncEngine, wanted: GenerateRequest) -> list[int]:
    tokens: list[int] = []
    events = [event async for event in engine.generate(wanted)]
    assert {event.request_id for event in events} == {wanted.request_id}
    assert [event.finish_reason for event in events][:-1] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == "length"
    assert events[-1].stats is not None
    for event in events:
        tokens += event.token_ids
    return tokens


async def every(events: AsyncIterator[TokenEvent]) -> list[TokenEvent]:
    return [event async for event in events]


async def until_tokens(events: AsyncIterator[TokenEvent]) -> None:
    """Read events until the first token."""
    async for event in events:
        if event.token_ids:
            return


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def test_many_callers_get_their_own_answers(llm: LLM, prompts: list[list[int]], reference: Reference) -> None:
    expected = [reference(prompt, TOKENS) for prompt in prompts]
    async with serving(llm) as engine:
        wanted = [request(str(n), prompts[n % 4]) for n in range(12)]
        answers = await asyncio.gather(*(answer(engine, each) for each in wanted))
        assert answers == [expected[n % 4] for n in range(12)]
        # again, after the engine has gone to sleep
        await until(lambda: llm.engine.idle)
        assert await answer(engine, request("later", prompts[0])) == expected[0]
        assert engine.stats().counters.finished_requests == 13
        assert engine.alive
        engine.check_health()


async def test_the_prompts_progress_is_told(llm: LLM, prompts: list[list[int]]) -> None:
    async with serving(llm) as engine:
        events = [event async for event in engine.generate(request("a", prompts[2] * 4))]
    done = [event.prefill_tokens_done for event in events if not event.token_ids]
    assert done == sorted(done)
    assert 0 < done[0] < len(prompts[2]) * 4


async def test_the_time_before_the_engine_listens_counts(
    llm: LLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, gate = llm.engine.step, threading.Event()

    def late_step() -> list[TokenEvent]:
        assert gate.wait(DEADLINE_S)
        return step()

    monkeypatch.setattr(llm.engine, "step", late_step)
    async with serving(llm) as engine:
        events = asyncio.create_task(every(engine.generate(request("a", prompts[0], 1))))
        await until(lambda: len(engine._inbox) == 1)
        asked_s = time.perf_counter()
        await asyncio.sleep(0.05)
        waited_s = time.perf_counter() - asked_s
        gate.set()
        stats = (await events)[-1].stats
    assert stats is not None
    assert stats.time_to_first_token_s >= stats.queue_s >= waited_s


async def test_closing_the_generator_cancels(llm: LLM, prompts: list[list[int]], reference: Reference) -> None:
    async with serving(llm) as engine:
        other = asyncio.create_task(answer(engine, request("other", prompts[1])))
        async with aclosing(engine.generate(request("left", prompts[0], ENDLESS))) as events:
            await until_tokens(events)
        await until(lambda: engine.stats().counters.cancelled_requests == 1)
        assert await other == reference(prompts[1], TOKENS)
        await until(lambda: llm.engine.idle)
        assert engine.stats().running == 0
        assert engine.stats().hot_slots_referenced == 0


async def test_a_cancelled_task_cancels_its_request(llm: LLM, prompts: list[list[int]]) -> None:
    async with serving(llm) as engine:
        task = asyncio.create_task(answer(engine, request("left", prompts[0], ENDLESS)))
        await until(lambda: engine.stats().running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: engine.stats().counters.cancelled_requests == 1)


async def test_a_task_cancelled_before_the_engine_saw_it_leaves_nothing(llm: LLM, prompts: list[list[int]]) -> None:
    async with serving(llm) as engine:
        for number in range(20):
            task = asyncio.create_task(answer(engine, request(str(number), prompts[0], ENDLESS)))
            await asyncio.sleep(0)  # it posts its request and waits
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await until(lambda: llm.engine.idle)
        assert len(await answer(engine, request("19", prompts[0]))) == TOKENS


async def test_a_generator_that_is_dropped_cancels(llm: LLM, prompts: list[list[int]]) -> None:
    async with serving(llm) as engine:

        async def listen_a_little() -> None:
            async for _ in engine.generate(request("left", prompts[0], ENDLESS)):
                return

        await listen_a_little()
        gc.collect()
        await until(lambda: engine.stats().counters.cancelled_requests == 1)


async def test_cancel_from_elsewhere_ends_the_stream(llm: LLM, prompts: list[list[int]]) -> None:
    async with serving(llm) as engine:
        events = engine.generate(request("a", prompts[0], ENDLESS))
        await until_tokens(events)
        engine.cancel("a")
        engine.cancel("never heard of")
        rest = [event async for event in events]
        assert rest[-1].finish_reason == "cancelled"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt_token_ids": ()}, "prompt"),
        ({"prompt_token_ids": (1, 256)}, "prompt"),
        ({"prompt_token_ids": (1,) * 2048}, "messages"),
        ({"sampling": SamplingParams(max_tokens=0)}, "max_tokens"),
    ],
)
async def test_a_bad_request_is_refused_and_harms_nobody(
    llm: LLM, prompts: list[list[int]], reference: Reference, change: dict[str, Any], param: str
) -> None:
    async with serving(llm) as engine:
        good = asyncio.create_task(answer(engine, request("good", prompts[0])))
        events = engine.generate(replace(request("bad", [1, 2, 3]), **change))
        with pytest.raises(InvalidRequestError) as refusal:
            await anext(events)
        assert refusal.value.param == param
        # the id is free again
        assert await answer(engine, request("bad", prompts[3])) == reference(prompts[3], TOKENS)
        assert await good == reference(prompts[0], TOKENS)


async def test_a_second_request_of_the_same_id_is_refused_and_the_first_goes_on(
    llm: LLM, prompts: list[list[int]], reference: Reference
) -> None:
    async with serving(llm) as engine:
        events = engine.generate(request("twin", prompts[0]))
        first = await anext(events)
        with pytest.raises(InvalidRequestError, match="'twin' is running already"):
            await anext(engine.generate(request("twin", prompts[1])))
        tokens = list(first.token_ids)
        async for event in events:
            tokens += event.token_ids
        assert tokens == reference(prompts[0], TOKENS)


async def test_closing_while_running_tells_every_caller(llm: LLM, prompts: list[list[int]]) -> None:
    async with serving(llm) as engine:
        tasks = [asyncio.create_task(answer(engine, request(str(n), prompts[n % 4], ENDLESS))) for n in range(20)]
        await until(lambda: engine.stats().running > 0)
        late = asyncio.create_task(answer(engine, request("late", prompts[0], ENDLESS)))
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        for task in [*tasks, late]:
            with pytest.raises(EngineDeadError, match="the engine has stopped: closed"):
                await task
        await closing
        assert not engine.alive
        with pytest.raises(EngineDeadError):
            engine.check_health()
        with pytest.raises(EngineDeadError):
            await anext(engine.generate(request("after", prompts[0])))
        engine.close()  # once more is fine


async def test_an_idle_engine_closes_at_once(llm: LLM) -> None:
    async with serving(llm) as engine:
        await asyncio.sleep(0.02)
        await asyncio.to_thread(engine.close)
        assert not engine.alive


async def test_requests_that_race_with_the_close_get_an_answer_or_an_error(llm: LLM, prompts: list[list[int]]) -> None:
    async with serving(llm) as engine:
        tasks = []
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        for number in range(200):
            tasks.append(asyncio.create_task(answer(engine, request(str(number), prompts[0], 1))))
            await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await closing
        assert all(isinstance(result, EngineDeadError | list) for result in results)
        assert any(isinstance(result, EngineDeadError) for result in results)


async def test_a_failing_engine_tells_every_caller(llm: LLM, prompts: list[list[int]]) -> None:
    """The failure is real: a weight whose shape no longer fits its layer."""
    engine = AsyncEngine(llm.engine)
    async with asyncio.timeout(DEADLINE_S):
        tasks = [asyncio.create_task(answer(engine, request(str(n), prompts[n % 4], ENDLESS))) for n in range(6)]
        await until(lambda: engine.stats().running > 0)
        layer: Any = llm.engine._backbone.model.model.layers[1].mlp.up_proj
        layer.weight.data = layer.weight.data[:, :-1]
        for task in tasks:
            with pytest.raises(EngineDeadError, match=r"the engine has stopped: .*mat1 and mat2") as failure:
                await task
            assert isinstance(failure.value.__cause__, RuntimeError)
        assert not engine.alive
        with pytest.raises(EngineDeadError, match="mat1 and mat2"):
            engine.check_health()
        with pytest.raises(EngineDeadError, match="mat1 and mat2"):
            await anext(engine.generate(request("after", prompts[0])))
    engine.close()
    llm.engine.close()

"""Steps that hold decode rows and parts of several prompts give the tokens of transformers.

They may have any shape, or fixed shapes as a GPU captures them in CUDA graphs; here the latter run eagerly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_llm import open_llm
from transformers import LlamaForCausalLM

from forecache.workers.core.requests import GenerateRequest, SamplingParams
from forecache.workers.core.sequence import State
from forecache.workers.core.step_plan import Plan
from forecache.workers.llm import LLM

LENGTHS = (150, 61, 97, 3, 200, 17, 33)
ANSWER_TOKENS = 20
VOCABULARY = 256
SETTINGS: dict[str, Any] = {
    "max_step_tokens": 64,
    "max_batch_size": 8,
    "inter_token_target_s": 1000.0,
    "long_prefill_token_threshold": 1000,
}
"""The target is out of reach, so only the number of tokens limits a step; and no prompt is long enough to let others
pass, so each step is filled in order of arrival."""
SHAPES = pytest.mark.parametrize("fixed", [False, True], ids=["any shape", "fixed shape"])


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    return torch.randint(1, VOCABULARY, (tokens,), generator=generator).tolist()


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def expected(model: Any, prompt: list[int], tokens: int = ANSWER_TOKENS) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


class Steps:
    """The plans of an engine: how many had decode rows and at least two prompts, and how many a fixed shape."""

    def __init__(self, llm: LLM, *, fixed: bool) -> None:
        self.mixed = self.with_prompts = self.fixed = 0
        runner: Any = llm.engine._runner
        launch = runner.launch
        if fixed:
            runner.warm_up(max_batch_size=8, max_step_tokens=72, max_chunks=24, cuda_graphs=True, torch_compile=False)
            replay = runner._mixed.replay

            def counted(*arguments: Any) -> Any:
                self.fixed += 1
                return replay(*arguments)

            runner._mixed.replay = counted

        def watched(plan: Plan, *arguments: Any) -> Any:
            prompts = [part for part in plan.streams if part.sequence.state is State.PREFILL]
            self.with_prompts += bool(prompts)
            self.mixed += bool(plan.decode) and len(prompts) > 1
            return launch(plan, *arguments)

        runner.launch = watched


@contextmanager
def opened(path: Path, *, fixed: bool, **settings: Any) -> Iterator[tuple[LLM, Steps]]:
    with open_llm(path, hot_chunks=160, **(SETTINGS | settings)) as llm:
        yield llm, Steps(llm, fixed=fixed)


def ask(llm: LLM, name: str, prompt: list[int], **sampling: Any) -> None:
    params = SamplingParams(**({"max_tokens": ANSWER_TOKENS, "ignore_eos": True} | sampling))
    llm.engine.add_request(GenerateRequest(name, tuple(prompt), params))


def run(llm: LLM, answers: dict[str, list[int]], *, until_tokens: int | None = None) -> None:
    """Step until all requests have ended, or until some answer has ``until_tokens`` tokens."""
    while not llm.engine.idle:
        for event in llm.engine.step():
            answers.setdefault(event.request_id, []).extend(event.token_ids)
        if until_tokens is not None and any(len(tokens) >= until_tokens for tokens in answers.values()):
            return


@SHAPES
def test_ragged_prompts_that_arrive_while_answers_run(tiny_model: Path, model: Any, fixed: bool) -> None:
    answers: dict[str, list[int]] = {}
    with opened(tiny_model, fixed=fixed) as (llm, steps):
        for name in ("first", "second"):
            ask(llm, name, prompt_of(40, len(name)), max_tokens=60)
        run(llm, answers, until_tokens=3)
        for tokens in LENGTHS[:6]:
            ask(llm, f"{tokens}", prompt_of(tokens))
        run(llm, answers)
        assert steps.mixed >= 1
        assert steps.fixed == (steps.with_prompts if fixed else 0)
    for name in ("first", "second"):
        assert answers[name] == expected(model, prompt_of(40, len(name)), 60)
    for tokens in LENGTHS[:6]:
        assert answers[f"{tokens}"] == expected(model, prompt_of(tokens))


@SHAPES
@pytest.mark.parametrize("evicted", [False, True], ids=["hot", "cold"])
def test_prefixes_that_end_within_a_chunk(tiny_model: Path, model: Any, fixed: bool, evicted: bool) -> None:
    """Several prompts continue one stored prompt at different places, while an answer runs.

    ``evicted``: their beginning is read where it lies in cold memory.
    """
    shared, answers = prompt_of(150), dict[str, list[int]]()
    prompts = {f"{cut}": shared[:cut] + prompt_of(30, cut) for cut in (149, 100, 55, 33)}
    with opened(tiny_model, fixed=fixed) as (llm, steps):
        ask(llm, "shared", shared)
        run(llm, answers)
        llm.engine.flush()
        if evicted:
            assert llm.engine.pool.evict_all() > 0
        ask(llm, "running", prompt_of(20), max_tokens=60)
        run(llm, answers, until_tokens=ANSWER_TOKENS + 1)
        for name, prompt in prompts.items():
            ask(llm, name, prompt)
        before = steps.fixed
        run(llm, answers)
        assert steps.mixed >= 1
        if fixed:
            assert (steps.fixed - before > 0) or evicted
            assert (steps.fixed < steps.with_prompts) == evicted
    assert answers["running"] == expected(model, prompt_of(20), 60)
    for name, prompt in prompts.items():
        assert answers[name] == expected(model, prompt)


@SHAPES
def test_one_of_them_is_cancelled(tiny_model: Path, model: Any, fixed: bool) -> None:
    answers: dict[str, list[int]] = {}
    with opened(tiny_model, fixed=fixed) as (llm, _):
        ask(llm, "first", prompt_of(40), max_tokens=60)
        run(llm, answers, until_tokens=3)
        for tokens in (150, 97, 200):
            ask(llm, f"{tokens}", prompt_of(tokens))
        run(llm, answers, until_tokens=5)
        llm.engine.cancel("97")
        run(llm, answers)
    assert answers["first"] == expected(model, prompt_of(40), 60)
    assert answers["150"] == expected(model, prompt_of(150)) and answers["200"] == expected(model, prompt_of(200))
    assert len(answers.get("97", [])) < ANSWER_TOKENS


@SHAPES
def test_one_of_them_asks_for_its_prompt_s_log_probabilities(tiny_model: Path, model: Any, fixed: bool) -> None:
    scored, found, answers = prompt_of(150), dict[int, float](), dict[str, list[int]]()
    with opened(tiny_model, fixed=fixed) as (llm, steps):
        ask(llm, "first", prompt_of(40), max_tokens=60)
        run(llm, answers, until_tokens=3)
        ask(llm, "scored", scored, prompt_logprobs=True, logprobs=1)
        ask(llm, "other", prompt_of(97))
        position = 1
        while not llm.engine.idle:
            for event in llm.engine.step():
                answers.setdefault(event.request_id, []).extend(event.token_ids)
                for logprobs in event.prompt_logprobs or ():
                    found[position] = logprobs.logprob
                    position += 1
        assert steps.mixed >= 1
    with torch.inference_mode():
        logprobs = model(torch.tensor([scored])).logits[0].log_softmax(-1)
    assert found.keys() == set(range(1, len(scored)))
    for at, value in found.items():
        assert value == pytest.approx(float(logprobs[at - 1, scored[at]]), abs=1e-4)
    for name, prompt in (("scored", scored), ("other", prompt_of(97))):
        assert answers[name] == expected(model, prompt)


def test_fixed_shapes_over_an_fp8_pool(tiny_model: Path) -> None:
    """Each step runs twice, so that both start from the same rounded keys and values: storing them again changes
    nothing."""
    errors: list[float] = []
    with opened(tiny_model, fixed=True, kv_dtype="fp8") as (llm, steps):
        runner: Any = llm.engine._runner
        replay_mixed = runner._replay_mixed

        def twice(plan: Plan, packed: Any, pasts: Any) -> Any:
            eager = runner._forward(runner._lay_out(plan, packed, pasts, {}, lambda: False)).clone()
            forward = replay_mixed(plan, packed, pasts)
            errors.extend(((forward.logits - eager).abs().amax(1) / eager.abs().amax(1)).tolist())
            return forward

        runner._replay_mixed = twice
        for tokens in LENGTHS:
            ask(llm, f"{tokens}", prompt_of(tokens))
        run(llm, {})
        assert steps.mixed >= 1 and steps.fixed == steps.with_prompts
    assert len(errors) >= len(LENGTHS) and max(errors) < 1e-4

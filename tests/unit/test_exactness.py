"""The default model at keep ratio 1.0: the tokens of transformers' `generate`, wherever the chunks were stored.

The tests share one engine and run in the order of the file: later ones find the chunks that earlier ones stored.
"""

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from forecache.workers.evaluation import corpus
from forecache.workers.llm import LLM
from forecache.workers.models.loader import resolve_model
from forecache.workers.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.long
PROMPT_TOKENS = (2000, 3500, 6000)
TOKENS = 64
CHUNK_BYTES = 64 * 30 * 2 * 3 * 64 * 4


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
    texts = corpus.documents("topics", 3, max(PROMPT_TOKENS) + 200, tokenizer)
    return [tokenizer(next(texts))["input_ids"][:count] for count in PROMPT_TOKENS]


@pytest.fixture(scope="module")
def backbone() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(resolve_model("smollm2-135m"), dtype=torch.float32)


def reference(backbone: PreTrainedModel, prompt: list[int]) -> list[int]:
    output = backbone.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def expected(backbone: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    return [reference(backbone, prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(
        "smollm2-135m", keep_ratio=1.0, dtype="float32", threads=torch.get_num_threads(), hot_bytes=260 * CHUNK_BYTES
    ) as llm:
        yield llm


def generate(llm: LLM, prompts: list[list[int]], policy: str | None = None) -> list[list[int]]:
    answers = llm.generate(prompts, max_tokens=TOKENS, ignore_eos=True, policy=policy)  # type: ignore[arg-type]
    return [answer.token_ids for answer in answers]


def test_three_prompts(llm: LLM, prompts: list[list[int]], expected: list[list[int]]) -> None:
    assert [generate(llm, [prompt])[0] for prompt in prompts] == expected


def test_after_eviction(llm: LLM, prompts: list[list[int]], expected: list[list[int]]) -> None:
    llm.engine.flush()
    llm.engine.pool.evict_all()
    assert llm.engine.pool.used == 0
    answers = [llm.generate([prompt], max_tokens=TOKENS, ignore_eos=True)[0] for prompt in prompts]
    assert [answer.token_ids for answer in answers] == expected
    assert [answer.stats.recalled_chunks for answer in answers] == [(count - 1) // 64 for count in PROMPT_TOKENS]


def test_four_in_one_batch(llm: LLM, prompts: list[list[int]], expected: list[list[int]]) -> None:
    assert generate(llm, [*prompts, prompts[0]]) == [*expected, expected[0]]


def test_second_turn(llm: LLM, backbone: PreTrainedModel, prompts: list[list[int]], expected: list[list[int]]) -> None:
    turn = prompts[0] + expected[0] + prompts[1][:40]
    answer = llm.generate([turn], max_tokens=TOKENS, ignore_eos=True)[0]
    assert answer.token_ids == reference(backbone, turn)
    assert answer.stats.cached_tokens >= len(prompts[0])
    llm.engine.check_integrity()
    llm.memory.check_integrity()


def test_full_attention_with_a_pool_smaller_than_the_prompt(
    prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with LLM(
        "smollm2-135m",
        keep_ratio=0.135,
        min_resident_tokens=0,
        dtype="float32",
        threads=torch.get_num_threads(),
        hot_bytes=14 * CHUNK_BYTES,
    ) as llm:
        assert generate(llm, prompts[:1], policy="full") == expected[:1]

"""The default model over real prose, with a hot pool smaller than the context: it finds hidden sentences."""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from forecache.workers.core.requests import Policy
from forecache.workers.evaluation.tasks import RetrievalTask, make_task
from forecache.workers.llm import LLM
from forecache.workers.models.loader import resolve_model
from forecache.workers.models.tokenizer import load_tokenizer

KEEP_RATIO = 0.135
DEPTHS = (0.1, 0.35, 0.6, 0.85)
HOT_CHUNKS = {3000: 22, 6500: 48}


@pytest.fixture(scope="module")
def model_path() -> Path:
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="module", params=[3000, pytest.param(6500, marks=pytest.mark.long)])
def found(request: pytest.FixtureRequest, model_path: Path) -> Iterator[dict[str, list[bool]]]:
    """Policy → for each depth, whether the answer has the number. All policies share a prompt's prefill."""
    tokenizer = load_tokenizer(model_path)
    tasks = [
        make_task("needle", tokenizer, tokens=request.param, depth=depth, seed=seed)
        for seed, depth in enumerate(DEPTHS)
    ]
    chunks = request.param // 64
    assert HOT_CHUNKS[request.param] < chunks / 2
    with LLM(
        "smollm2-135m",
        keep_ratio=KEEP_RATIO,
        min_resident_tokens=0,
        late_policy="wait",
        hot_bytes=HOT_CHUNKS[request.param] * 64 * 30 * 2 * 3 * 64 * 4,
        cold_bytes=3 << 30,
        threads=torch.get_num_threads(),
    ) as llm:
        yield {policy: [answers(llm, task, policy) for task in tasks] for policy in get_args(Policy)}


def answers(llm: LLM, task: RetrievalTask, policy: Policy) -> bool:
    answer = llm.generate([list(task.prompt_token_ids)], max_tokens=24, policy=policy)[0]
    print(policy, repr(task.answer), repr(answer.text), answer.stats)
    if policy != "full":
        assert answer.stats.resident_chunks < answer.stats.context_chunks / 3
        assert answer.stats.keep_ratio < 0.25
    return task.answer in answer.text


def test_lookahead_finds_what_full_attention_finds(found: dict[str, list[bool]]) -> None:
    full, lookahead = found["full"], found["lookahead"]
    assert sum(full) >= 3
    assert sum(was and not now for was, now in zip(full, lookahead, strict=True)) <= 1


@pytest.mark.parametrize("policy", ["recency", "random"])
def test_blind_choices_of_the_same_size_lose_it(found: dict[str, list[bool]], policy: str) -> None:
    assert sum(found[policy]) <= 2

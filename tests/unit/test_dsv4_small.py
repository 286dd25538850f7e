"""The small trained DeepSeek-V4 of this repository with a fifth of its chunks: retrievers find the answers."""

from pathlib import Path
from typing import Any

from forecache.indexer.serving.config import IndexerConfig, SelectionConfig
from forecache.workers.evaluation.ruler import Generator, Task, score
from forecache.workers.llm import LLM
from forecache.workers.models.tokenizer import load_tokenizer

MODELS = Path(__file__).parent.parent / "models"
MODEL, RETRIEVERS = MODELS / "dsv4-small", MODELS / "dsv4-small-retrievers.safetensors"
TOKENS = 4096
SAMPLES = 2
NAMED: tuple[Task, ...] = ("needle", "multikey", "multiquery")
"""Kinds whose question names all that is to be found; of a chain the next link is known only once the last was read."""


def test_lookahead_answers_and_recency_does_not(arena_dir: Path) -> None:
    """Questions over 4K tokens: 7 of 32 chunks are resident at most, one of them the open one."""
    generator = Generator(load_tokenizer(MODEL))
    samples = [generator.sample(kind, TOKENS, number) for kind in NAMED for number in range(SAMPLES)]
    settings: dict[str, Any] = {"dtype": "float32", "chunk_tokens": 128, "threads": 1, "late_policy": "wait"}
    settings["min_resident_tokens"] = 0
    found = {}
    with LLM(
        str(MODEL),
        arena_dir=arena_dir,
        cold_bytes=64 << 20,
        hot_bytes=32 << 20,
        selection=SelectionConfig(min_chunks=2, recency_fraction=0.25),
        indexer=IndexerConfig(checkpoint=str(RETRIEVERS)),
        **settings,
    ) as llm:
        assert llm.scorer.name == "trained"
        for policy in ("lookahead", "recency"):
            scores = []
            for sample in samples:
                [answer] = llm.generate([sample.prompt_token_ids], max_tokens=sample.max_tokens, policy=policy)
                assert answer.stats.context_chunks >= 30 and answer.stats.resident_chunks <= 7
                scores.append(score(sample, answer.text))
            found[policy] = sum(scores) / len(scores)
        llm.engine.flush()
        llm.engine.check_integrity()
    assert found["lookahead"] >= 0.9, found
    assert found["recency"] <= 0.5, found

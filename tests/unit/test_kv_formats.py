"""K/V in fp8, in the hot pool or only in cold memory: half the bytes, and nearly the same answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from forecache.workers.core.requests import GenerateRequest
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Plan, StreamPart
from forecache.workers.llm import LLM
from forecache.workers.memory.format.keys import root_key
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.backbone import load_backbone
from forecache.workers.models.dense.runner import ModelRunner
from forecache.workers.models.dense.scorer import choose_index_spec

CHUNK = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits_of(model: Path, tokens: list[int], kv_dtype: Any) -> torch.Tensor:
    """Logits, float32 [4, vocab], after a stream of two thirds of the tokens, one more stream, and decode steps."""
    backbone = load_backbone(model, dtype="float32", device=DEVICE, chunk_tokens=CHUNK, kv_dtype=kv_dtype)
    pool = HotPool(backbone.layout, -(-len(tokens) // CHUNK), backbone.device)
    runner = ModelRunner(backbone, pool, None, choose_index_spec("none", "tiny", backbone))
    request = GenerateRequest("x", tuple(tokens))
    seq = TokenSequence(request, holder="x", root=root_key("x"), chunk_tokens=CHUNK, keep_ratio=1.0, policy="full")
    for number in range(pool.num_slots):
        slot = pool.allocate()
        assert slot is not None
        seq.open_slots[number] = slot
    rows = []
    two_thirds = len(tokens) * 2 // 3
    for stop in (two_thirds, len(tokens) - 2, len(tokens) - 1, len(tokens)):
        seq.token_ids = tokens[:stop]
        count = stop - seq.num_computed
        plan = Plan((seq,), ()) if count == 1 else Plan((), (StreamPart(seq, count),))
        rows.append(runner.launch(plan).logits[0].cpu())
        seq.num_computed = stop
        while seq.tail_tokens >= CHUNK:
            number = len(seq.chunks)
            chunk = seq.complete_chunk()
            seq.residency.slots[number] = seq.open_slots.pop(number)
            seq.residency.version += 1
            pool.complete(seq.residency.slots[number], chunk.key, dirty=False)
    return torch.stack(rows)


@pytest.fixture(scope="module")
def gentle_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with weights so small that attention is never close to a choice between two keys."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.06,
    )
    path = tmp_path_factory.mktemp("gentle-llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_fp8_in_the_pool_costs_little_and_not_nothing(gentle_model: Path) -> None:
    tokens = torch.randint(0, 250, (200,), generator=torch.Generator().manual_seed(2)).tolist()
    exact, rounded = (logits_of(gentle_model, tokens, kv_dtype) for kv_dtype in ("auto", "fp8"))
    error = (rounded - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert error[0] == 0  # a first stream attends to its own K/V as they were computed
    # a number of e4m3 has 3 bits behind the first: 6 % at most, 2 % on average, of each key and value
    assert (error[1:] > 0).all()
    assert (error[1:] < 0.03).all(), error


@pytest.mark.parametrize("formats", [{"kv_dtype": "fp8"}, {"cold_dtype": "fp8"}], ids=str)
def test_answers_through_an_evicted_pool(
    tiny_model: Path, prompts: list[list[int]], arena_dir: Path, formats: dict[str, Any]
) -> None:
    """Recalled chunks equal the stored ones, and the arena holds twice as many."""
    slots = {}
    for settings in ({}, formats):
        with LLM(
            str(tiny_model),
            skip_tokenizer=True,
            arena_dir=arena_dir,
            dtype="float32",
            device="cpu",
            chunk_tokens=CHUNK,
            keep_ratio=1.0,
            hot_bytes=4 << 20,
            cold_bytes=4 << 20,
            **settings,
        ) as llm:
            slots[bool(settings)] = llm.memory.stats().slots
            if not settings:
                continue
            runs = []
            for _ in range(3):
                answers = llm.generate(prompts, max_tokens=20, ignore_eos=True)
                runs.append([answer.token_ids for answer in answers])
                llm.engine.flush()
                llm.engine.flush()
                assert llm.engine.pool.evict_all() > 0
            stored = [(len(prompt) - 1) // CHUNK * CHUNK for prompt in prompts]
            assert [answer.stats.cached_tokens for answer in answers] == stored
            # the first run attended to its own prompt as it was computed, the others to what was stored of it
            assert runs[1] == runs[2]
            llm.engine.flush()
            llm.engine.check_integrity()
            llm.memory.check_integrity()
    assert slots[True] > 1.9 * slots[False]

"""Tiny random models on disk: quick enough to compare every token of the engine with transformers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, LlamaConfig, LlamaForCausalLM

MakeDeepseekV4 = Callable[..., DeepseekV4ForCausalLM]
Reference = Callable[[list[int], int], list[int]]


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def arena_dir() -> Iterator[Path]:
    """A folder in shared memory: CUDA registers no file that lies on a disk."""
    with TemporaryDirectory(prefix="arena-test-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 3-layer Llama with 2 KV heads; weights large enough that greedy tokens vary."""
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
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Reference:
    """Greedy continuation by transformers' own ``generate``."""
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def generate(prompt: list[int], tokens: int) -> list[int]:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return output[0, len(prompt) :].tolist()

    return generate


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Four prompts of different lengths, none a multiple of the chunk size."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 256, (n,), generator=generator).tolist() for n in (50, 130, 333, 201)]


@pytest.fixture(scope="session")
def make_deepseek_v4() -> MakeDeepseekV4:
    """Saves a random DeepSeek-V4 at a path: six layers of all kinds, more entries than are selected from 100 tokens on.

    Keyword arguments change its configuration. What transformers begins with zeros is random too: sinks, position
    biases, the experts of tokens.
    """
    sliding, csa, hca = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
    settings: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 6,
        "layer_types": [sliding, csa, hca, csa, hca, csa],
        "num_attention_heads": 4,
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "num_hash_layers": 1,
        "hc_mult": 2,
        "sliding_window": 64,
        "index_n_heads": 16,  # with fewer, no head finds anything in many entries: their scores are equal, all 0
        "index_head_dim": 16,
        "index_topk": 24,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }

    def make(path: Path, **changes: Any) -> DeepseekV4ForCausalLM:
        torch.manual_seed(1)
        model = DeepseekV4ForCausalLM(DeepseekV4Config(**(settings | changes))).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "position_bias" in name or "sinks" in name:
                parameter.normal_(0, 0.5)
        for name, buffer in model.named_buffers():
            if "tid2eid" in name:
                buffer.copy_(torch.randint(0, model.config.n_routed_experts, buffer.shape))
        model.save_pretrained(path)
        return model

    return make

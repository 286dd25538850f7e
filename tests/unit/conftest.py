"""Tiny random models on disk: quick enough to compare every token of the engine with transformers."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))  # modules that tests share

Reference = Callable[[list[int], int], list[int]]


@pytest.fixture(scope="module", autouse=True)
def _alone(one_thread: None) -> None:
    """Run torch on one thread: tensors here are small, so more threads would only wait for each other."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def arena_dir() -> Iterator[Path]:
    """A directory in shared memory, since CUDA can't register files on a disk."""
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
    """Returns the greedy continuation by transformers' ``generate``."""
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

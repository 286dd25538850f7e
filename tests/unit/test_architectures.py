"""An architecture's predictions before loading (layout, state size) equal the loaded model's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from forecache.workers.models.registry import architecture_of

DEEPSEEK_V4 = Path(__file__).parents[1] / "models/dsv4-small"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_layers_add_up_to_the_chunk_and_the_state_of_dense_models(tiny_model: Path, dtype: torch.dtype) -> None:
    config = AutoConfig.from_pretrained(tiny_model)
    architecture = architecture_of(config.model_type)
    layers = architecture.layers(config, chunk_tokens=64, dtype=dtype)
    fields = architecture.chunk_layout(config, chunk_tokens=64, dtype=dtype).fields
    assert len(layers) == config.num_hidden_layers
    assert sum(layer.chunk_bytes_per_token for layer in layers) * 64 == sum(field.nbytes for field in fields)
    assert architecture.state_nbytes(config, dtype) == 0
    assert all(layer.kind == "full" and layer.indexed for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_add_up_to_the_chunk_and_the_state_of_deepseek_v4(dtype: torch.dtype) -> None:
    config = AutoConfig.from_pretrained(DEEPSEEK_V4)
    architecture = architecture_of(config.model_type)
    layers = architecture.layers(config, chunk_tokens=256, dtype=dtype)
    fields = architecture.chunk_layout(config, chunk_tokens=256, dtype=dtype).fields
    assert sum(layer.chunk_bytes_per_token for layer in layers) * 256 == sum(field.nbytes for field in fields)
    kinds = {"compressed_sparse_attention": "compressed", "heavily_compressed_attention": "heavily_compressed"}
    assert [layer.kind for layer in layers] == [kinds.get(kind, "sliding_window") for kind in config.layer_types]
    assert all(layer.indexed == (layer.kind == "compressed") for layer in layers)
    assert all(layer.state_bytes >= config.sliding_window * config.head_dim * dtype.itemsize for layer in layers)


def test_a_process_loads_only_the_architecture_that_it_serves() -> None:
    code = (
        "import sys; from forecache.workers.models.registry import architecture_of; architecture_of('llama');"
        "print([name for name in sys.modules if name.startswith('forecache.workers.models.deepseek_v4.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

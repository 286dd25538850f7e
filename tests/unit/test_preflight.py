"""What preflight learns from a model's configuration and the settings before anything starts."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forecache.cluster.config import ServeConfig
from forecache.cluster.errors import StartError
from forecache.cluster.launch import preflight
from forecache.cluster.launch.preflight import check_model
from forecache.workers.core.config import EngineConfig
from forecache.workers.errors import ArenaError, UnsupportedModelError
from forecache.workers.llm import LLM
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.models.backbone import expected_layout
from forecache.workers.models.dense.probe import expected_geometry, inspect_attention


def settings(model: Path, cold_bytes: int, max_model_len: int | None = None) -> ServeConfig:
    engine = EngineConfig(model=str(model), dtype="float32", device="cpu", chunk_tokens=16, max_model_len=max_model_len)
    return ServeConfig(engine=engine, memory=MemoryConfig(cold_bytes=cold_bytes))


def test_the_context_is_the_models_where_cold_memory_holds_it(tiny_model: Path) -> None:
    facts = check_model(tiny_model, settings(tiny_model, 8 << 20))
    assert (facts.max_model_len, facts.cold_limit, facts.has_manifest) == (2048, None, False)
    assert check_model(tiny_model, settings(tiny_model, 8 << 20, 512)).max_model_len == 512


def test_the_context_is_what_cold_memory_holds_where_that_is_less(tiny_model: Path, tmp_path: Path) -> None:
    """Otherwise a request without `max_tokens` would ask for more than any worker accepts."""
    facts = check_model(tiny_model, settings(tiny_model, 3 << 20))
    with LLM(str(tiny_model), skip_tokenizer=True, chunk_tokens=16, cold_bytes=3 << 20, arena_dir=tmp_path) as llm:
        assert facts.max_model_len == facts.cold_limit == llm.memory.arena.slots * 16 < 2048


def test_workers_without_a_place_are_refused(tiny_model: Path) -> None:
    """Otherwise Ray would wait for resources until the start's deadline."""
    config = settings(tiny_model, 8 << 20)
    preflight.check_placement(config.model_copy(update={"workers": 2, "ray_num_cpus": 2}))
    with pytest.raises(StartError, match="--ray-num-cpus 2"):
        preflight.check_placement(config.model_copy(update={"workers": 3, "ray_num_cpus": 2}))
    with pytest.raises(StartError, match="--tier-resource, or join"):
        memory = config.memory.model_copy(update={"tier_resource": "memory"})
        preflight.check_placement(config.model_copy(update={"memory": memory}))
    engine = config.engine.model_copy(update={"device": "cuda"})
    with pytest.raises(StartError, match="need a GPU each"):
        workers = torch.cuda.device_count() + 1
        preflight.check_placement(config.model_copy(update={"engine": engine, "workers": workers}))


def test_what_cannot_be_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ArenaError, match="--cold-bytes"):
        check_model(tiny_model, settings(tiny_model, 1 << 20))
    with pytest.raises(UnsupportedModelError, match="2048 positions"):
        check_model(tiny_model, settings(tiny_model, 8 << 20, 4096))


@pytest.mark.parametrize(
    ("model_type", "fields", "token_bytes"),
    [
        # transformers' defaults are those of GLM-4.7-Flash: 47 layers of 20 heads, keys of 192 + 64, values of 256
        ("glm4_moe_lite", {}, 47 * 2 * 20 * 256 * 2),
        # Qwen3-4B: 32 heads of 128 over a hidden size of 2560
        (
            "qwen3",
            {
                "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                "head_dim": 128,
            },
            36 * 2 * 8 * 128 * 2,
        ),
        ("llama", {"num_key_value_heads": 8}, 32 * 2 * 8 * 128 * 2),
    ],
)  # fmt: skip
def test_bytes_per_token_are_those_of_the_attention(
    model_type: str, fields: dict[str, object], token_bytes: int
) -> None:
    config = AutoConfig.for_model(model_type, **fields)
    assert expected_layout(config, chunk_tokens=64, dtype=torch.bfloat16).nbytes == 64 * token_bytes


def test_deepseek_v4_stores_entries_and_index_keys() -> None:
    """Bytes per token: in each CSA layer a quarter of an entry and of its index key, in each HCA layer 1/128 of an
    entry."""
    config = AutoConfig.for_model("deepseek_v4")
    kinds = list(config.layer_types)
    csa = kinds.count("compressed_sparse_attention") * (config.head_dim + config.index_head_dim) / 4
    hca = kinds.count("heavily_compressed_attention") * config.head_dim / 128
    assert csa and hca
    layout = expected_layout(config, chunk_tokens=256, dtype=torch.bfloat16)
    assert layout.nbytes == 256 * 2 * (csa + hca)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("glm4_moe_lite", {
            "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 32,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4,
        }),
        ("granite", {"attention_multiplier": 0.1, "num_key_value_heads": 2}),
        ("jetmoe", {"kv_channels": 8, "num_key_value_heads": 2, "num_local_experts": 2, "num_attention_heads": ...}),
        ("gpt2", {"num_attention_heads": 4}),
    ],
)  # fmt: skip
def test_the_expected_shapes_are_those_of_the_loaded_model(model_type: str, fields: dict[str, object]) -> None:
    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    config = AutoConfig.for_model(
        model_type, **{name: value for name, value in (small | fields).items() if value is not ...}
    )
    found = inspect_attention(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())
    assert expected_geometry(config) == found

"""Which DeepSeek-V4 configurations load, and the errors for the others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from forecache.cluster.config import ServeConfig
from forecache.cluster.launch.preflight import check_model, settle
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.llm import LLM
from forecache.workers.models.backbone import load_backbone, load_config
from forecache.workers.models.deepseek_v4.shape import CHUNK_TOKENS, DeepseekV4Shape

MakeDeepseekV4 = Callable[..., DeepseekV4ForCausalLM]


@pytest.fixture
def path(tmp_path: Path, make_deepseek_v4: MakeDeepseekV4) -> Path:
    kinds = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    make_deepseek_v4(tmp_path, num_hidden_layers=3, layer_types=kinds)
    return tmp_path


def change_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_mtp_layers_are_refused(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    save_file(weights | {"mtp.0.emb.weight": torch.zeros(2)}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"MTP layers \(weight 'mtp\.0\.emb\.weight'"):
        load_backbone(path)


def test_fp4_experts_are_refused(path: Path) -> None:
    change_config(path, expert_dtype="fp4", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModelError, match="fp4 experts"):
        load_backbone(path)


def test_quantised_weights_are_refused(path: Path) -> None:
    change_config(path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModelError, match="quantised by 'fp8'"):
        load_config(path)


def test_a_model_without_anything_to_select_is_refused(tmp_path: Path, make_deepseek_v4: MakeDeepseekV4) -> None:
    make_deepseek_v4(tmp_path, num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    with pytest.raises(UnsupportedModelError, match="without a layer of Compressed Sparse Attention"):
        load_backbone(tmp_path)


def test_chunks_that_cut_entries_are_refused(path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="multiple of 128"):
        load_backbone(path, chunk_tokens=64)


def test_fp8_in_the_pool_or_in_cold_memory_is_refused(path: Path, arena_dir: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="--kv-dtype fp8"):
        load_backbone(path, chunk_tokens=CHUNK_TOKENS, kv_dtype="fp8")
    with pytest.raises(UnsupportedModelError, match="--cold-dtype fp8"):
        LLM(str(path), skip_tokenizer=True, cold_dtype="fp8", arena_dir=arena_dir)


def test_fallback_is_refused_as_there_is_no_coverage_it_could_follow(path: Path, arena_dir: Path) -> None:
    engine = {"model": str(path), "dtype": "float32"}
    config = settle(path, ServeConfig.model_validate({"engine": engine | {"fallback": True}}))
    with pytest.raises(UnsupportedModelError, match=r"coverage is not measured.* choose a larger --keep-ratio"):
        check_model(path, config)
    with pytest.raises(UnsupportedModelError, match="Leave --fallback out"):
        LLM(str(path), skip_tokenizer=True, fallback=True, arena_dir=arena_dir)
    assert not list(arena_dir.iterdir()), "refused before anything is made"


def test_what_a_start_knows_before_the_weights_are_read(path: Path) -> None:
    config = settle(path, ServeConfig.model_validate({"engine": {"model": str(path), "dtype": "float32"}}))
    assert config.engine.chunk_tokens == CHUNK_TOKENS
    facts = check_model(path, config)
    backbone = load_backbone(path, dtype="float32", chunk_tokens=config.engine.chunk_tokens)
    assert facts.chunk_bytes == backbone.layout.nbytes
    assert facts.has_manifest, "it needs no calibration"
    set_by_hand = ServeConfig.model_validate({"engine": {"model": str(path), "chunk_tokens": 128}})
    assert settle(path, set_by_hand).engine.chunk_tokens == 128


def test_dummy_weights(path: Path, arena_dir: Path) -> None:
    (path / "model.safetensors").unlink()
    settings: dict[str, Any] = {"cold_bytes": 8 << 20, "hot_bytes": 1 << 20, "arena_dir": arena_dir, "threads": 1}
    with LLM(str(path), skip_tokenizer=True, load_format="dummy", **settings) as llm:
        [answer] = llm.generate([[5, 6, 7]], max_tokens=3, ignore_eos=True)
        assert llm.scorer.name == "training-free"
    assert len(answer.token_ids) == 3


def test_the_published_shape() -> None:
    """DeepSeek-V4-Flash: 21 CSA layers, and the target layers of FlashMemory's retrievers."""
    shape = DeepseekV4Shape.of(DeepseekV4Config(compress_ratios=[0, 0] + [4, 128] * 20 + [4]))
    assert (len(shape.csa), len(shape.hca), len(shape.kinds)) == (21, 20, 43)
    assert shape.targets == (10, 12, 20)
    layout = shape.layout("", chunk_tokens=CHUNK_TOKENS, dtype=torch.bfloat16)
    assert {field.name: field.shape for field in layout.fields} == {
        "entries": (21, 64, 512),
        "index": (21, 64, 128),
        "hca": (20, 2, 512),
    }

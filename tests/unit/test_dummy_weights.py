"""`load_format="dummy"`: a model of the shape in config.json, with random weights and no weight files."""

import argparse
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from forecache.cluster.config import add_flags, config_from_args
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.llm import LLM
from forecache.workers.models.backbone import load_backbone
from forecache.workers.models.dense.scorer import choose_index_spec
from forecache.workers.models.loader import resolve_model
from forecache.workers.models.step.architecture import Backbone
from forecache.workers.models.tokenizer import load_tokenizer
from forecache.workers.models.verify import verify_backbone

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def save(path: Path, config: PreTrainedConfig) -> Path:
    """A directory with a config.json and nothing else."""
    config.save_pretrained(path)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    return path


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    return save(tmp_path / "llama", LlamaConfig(**SHAPE, initializer_range=0.2))


def dummy(path: Path, *, seed: int = 0, dtype: str = "float32") -> Backbone:
    return load_backbone(path, load_format="dummy", seed=seed, dtype=dtype, device="cpu")


def weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return dict(backbone.model.named_parameters())


def test_weight_files_are_asked_for_only_when_they_are_read(shape: Path) -> None:
    assert resolve_model(str(shape), load_format="dummy") == shape
    with pytest.raises(UnsupportedModelError, match=r"has no \*\.safetensors weights"):
        resolve_model(str(shape))
    with pytest.raises(UnsupportedModelError, match="has no tokenizer that transformers can load"):
        load_tokenizer(shape)


def test_weights_are_a_function_of_the_seed_and_leave_the_generator_alone(shape: Path) -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    one, again, other = dummy(shape), dummy(shape), dummy(shape, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, weight in weights(one).items():
        assert torch.equal(weight, weights(again)[name]), name
    matrices = [name for name, weight in weights(one).items() if weight.dim() == 2]
    assert len(matrices) == 3 * 7 + 2
    assert not any(torch.equal(weights(one)[name], weights(other)[name]) for name in matrices)
    assert not one.model.training and not any(weight.requires_grad for weight in weights(one).values())


def test_the_name_of_the_weights_says_so(shape: Path, tiny_model: Path) -> None:
    backbones = [dummy(shape), dummy(shape, seed=1), dummy(shape, dtype="bfloat16"), dummy(tiny_model)]
    names = [backbone.fingerprint for backbone in backbones]
    assert all(name.startswith("dummy-") for name in names)
    real = load_backbone(tiny_model, device="cpu")
    assert not real.fingerprint.startswith("dummy-")
    assert len({backbone.layout.fingerprint for backbone in [*backbones, real]}) == 5
    assert dummy(shape).fingerprint == names[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deep_models_stay_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    deep = LlamaConfig(**{**SHAPE, "num_hidden_layers": 48, "hidden_size": 128, "intermediate_size": 512})
    backbone = dummy(save(tmp_path / "deep", deep), dtype=str(dtype).removeprefix("torch."))
    assert {weight.dtype for weight in weights(backbone).values()} == {dtype}
    backbone.model.set_attn_implementation("eager")
    output = backbone.model(torch.arange(200).unsqueeze(0), output_hidden_states=True, use_cache=False)
    assert output.logits.isfinite().all()
    for hidden in output.hidden_states:
        assert 1e-3 < hidden.float().std() < 100


def test_wide_models_pass_the_check_of_logits_in_half_precision(tmp_path: Path) -> None:
    """With transformers' initial weights, rounding grows with the width: 2 % at 1,024, 4 % at 2,048."""
    wide = LlamaConfig(**{**SHAPE, "num_hidden_layers": 16, "hidden_size": 768, "intermediate_size": 2048})
    backbone = dummy(save(tmp_path / "wide", wide), dtype="bfloat16")
    for layer in backbone.model.model.layers:
        assert layer.mlp.down_proj.weight.float().std() == pytest.approx(0.5 * 2048**-0.5, rel=0.02)
    verify_backbone(backbone, choose_index_spec("none", "wide", backbone))


def test_biases_and_tied_embeddings_are_those_of_the_shape(tmp_path: Path) -> None:
    backbone = dummy(save(tmp_path / "qwen", Qwen2Config(**SHAPE, tie_word_embeddings=True)))
    assert backbone.model.get_output_embeddings().weight is backbone.model.get_input_embeddings().weight
    assert "model.layers.0.self_attn.q_proj.bias" in weights(backbone)


def test_the_engine_runs_on_them(shape: Path) -> None:
    """Greedy tokens are those of transformers' `generate` on the very same weights; load verified the logits too."""
    prompt = torch.randint(3, 320, (150,), generator=torch.Generator().manual_seed(5)).tolist()
    settings = {"load_format": "dummy", "skip_tokenizer": True, "device": "cpu", "keep_ratio": 1.0, "threads": 1}
    with LLM(str(shape), seed=4, hot_bytes=1 << 22, cold_bytes=1 << 22, **settings) as llm:
        answer = llm.generate([prompt], max_tokens=20, ignore_eos=True)[0]
    model = dummy(shape, seed=4).model
    model.set_attn_implementation("eager")
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert answer.token_ids == expected[0, 150:].tolist()
    assert len(set(answer.token_ids)) > 3


def test_the_command_line_takes_it() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert config_from_args(parser.parse_args(["--load-format", "dummy"])).engine.load_format == "dummy"
    assert config_from_args(parser.parse_args([])).engine.load_format == "auto"

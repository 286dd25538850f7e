"""Which models are accepted, and the errors for the others: tiny random models of many families."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PreTrainedConfig

from forecache.indexer.records.index_spec import IndexSpec
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.models.backbone import load_backbone, load_config
from forecache.workers.models.dense.probe import inspect_attention
from forecache.workers.models.dense.scorer import choose_index_spec
from forecache.workers.models.step.architecture import Backbone, Geometry
from forecache.workers.models.verify import verify_backbone

DIMENSIONS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.2,
}
FULL = ["full_attention"] * 3
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
GEMMA3N = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "layer_types": ["full_attention"] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
}


def config(family: str, **settings: Any) -> PreTrainedConfig:
    """A tiny configuration of ``family``; settings that are ``...`` are left to it."""
    merged = {name: value for name, value in (DIMENSIONS | settings).items() if value is not ...}
    made: PreTrainedConfig = getattr(transformers, f"{family}Config")(**merged)
    return made


def gpt2(**settings: Any) -> PreTrainedConfig:
    return transformers.GPT2Config(**GPT2, **settings)


def save(tmp_path: Path, made: PreTrainedConfig, kind: Any = AutoModelForCausalLM) -> Path:
    torch.manual_seed(0)
    model = kind.from_config(made) if hasattr(kind, "from_config") else kind(made)
    model.save_pretrained(tmp_path)
    return tmp_path


def bounds(backbone: Backbone) -> IndexSpec:
    return choose_index_spec("none", "tiny", backbone)


def yarn(**settings: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128} | settings


LLAMA3_ROPE = yarn(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 256,
}

SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-yarn": ("Llama", {"rope_parameters": yarn()}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window-off": ("Qwen2", {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "granite": ("Granite", {"attention_multiplier": 0.1, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "olmo2": ("Olmo2", {}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "starcoder2": ("Starcoder2", {}),
    "cohere": ("Cohere", {}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "seed-oss": ("SeedOss", {"head_dim": 16}),
    "gpt-neox": ("GPTNeoX", {"num_key_value_heads": ...}),
    "opt": ("OPT", {"ffn_dim": 96, "intermediate_size": ..., "word_embed_proj_dim": 64}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 16, "num_experts": 4, **EXPERTS}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.mark.parametrize("name", SERVED)
def test_decoders_are_served(tmp_path: Path, name: str) -> None:
    family, settings = SERVED[name]
    backbone = load_backbone(save(tmp_path, config(family, **settings)))
    made = backbone.config
    kv_heads = 4 if name in ("gpt-neox", "opt") else 2
    scale = {"opt": 1.0, "granite": 0.1}.get(name, 0.25)
    assert backbone.geometry == Geometry(made.num_hidden_layers, 4, kv_heads, 16, scale)
    assert backbone.max_model_len == 512
    verify_backbone(backbone, bounds(backbone))


def test_gpt2_is_served(tmp_path: Path) -> None:
    backbone = load_backbone(save(tmp_path, gpt2()))
    assert backbone.geometry == Geometry(3, 4, 4, 16, 0.25)
    verify_backbone(backbone, bounds(backbone))


def test_smollm3_has_layers_without_positions(tmp_path: Path) -> None:
    """The tiny configuration keeps the feature that this family is tested for."""
    made = load_config(save(tmp_path, config("SmolLM3", num_hidden_layers=4)))
    assert made.no_rope_layers == [1, 1, 1, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_served(tmp_path: Path, dtype: str) -> None:
    backbone = load_backbone(save(tmp_path, config("Llama", initializer_range=0.05)), dtype=dtype)
    assert backbone.dtype == getattr(torch, dtype)
    verify_backbone(backbone, bounds(backbone))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral-window": ("Mistral", {"sliding_window": 64}, "sliding-window attention"),
    "starcoder2-window": ("Starcoder2", {"sliding_window": 64}, "sliding-window attention"),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
        "layers of kind sliding_attention",
    ),
    "gemma2": ("Gemma2", {"head_dim": 16}, "layers of kind sliding_attention"),
    "gemma2-softcap": ("Gemma2", {"head_dim": 16, "layer_types": FULL}, "soft-capped attention logits"),
    "gpt-oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4}, "layers of kind sliding_attention"),
    "gpt-oss-sinks": (
        "GptOss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": FULL},
        "attention sinks",
    ),
    "llama4": (
        "Llama4Text",
        {"head_dim": 16, "num_hidden_layers": 4, "num_local_experts": 2, "intermediate_size_mlp": 64},
        "layers of kind chunked_attention",
    ),
    "llama-dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "'dynamic' RoPE, whose frequencies change with the length of the batch",
    ),
    "phi3-longrope": (
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256},
        "'longrope' RoPE, whose frequencies change with the length of the batch",
    ),
    "deepseek-v3": (
        "DeepseekV3",
        LATENT | EXPERTS,
        r"keys \[1, 4, 8, 24\] and values \[1, 4, 8, 16\] of layer 0 differ in shape",
    ),
    "gemma3n": ("Gemma3nText", GEMMA3N, "shares keys between layers"),
    "doge": ("Doge", {}, "a custom mask or bias to the attention logits of layer 0"),
    "diffllama": ("DiffLlama", {}, "has 3 layers but made 6 attention calls"),
    "stablelm": ("StableLm", {}, "does not hand the arguments of its forward on"),
    "falcon-alibi": ("Falcon", {"num_key_value_heads": ..., "alibi": True}, "3 layers but made 0 attention calls"),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, "layers of kind conv"),
    "jamba": (
        "Jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 4,
            "use_mamba_kernels": False,
        },
        "layers of kind (linear_attention|mamba)",
    ),
    "mamba": (
        "Mamba",
        {
            "state_size": 4,
            "intermediate_size": ...,
            "num_attention_heads": ...,
            "num_key_value_heads": ...,
            "max_position_embeddings": ...,
        },
        "layers of kind (linear_attention|mamba)|no max_position_embeddings",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_computed_wrongly_is_refused(tmp_path: Path, name: str) -> None:
    family, settings, reason = REFUSED[name]
    path = save(tmp_path, config(family, **settings))
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        load_backbone(path)
    assert str(refusal.value).startswith(str(path))
    assert str(refusal.value).endswith(".")


def test_a_scale_per_layer_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, gpt2(scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(UnsupportedModelError, match="scales attention logits layer by layer"):
        load_backbone(path)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    made = config("Bert", num_key_value_heads=...)
    with pytest.raises(UnsupportedModelError, match="no decoder: its tokens attend to later ones"):
        load_backbone(save(tmp_path, made, transformers.BertForMaskedLM))


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    made = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(UnsupportedModelError, match="type 't5', which is not a decoder language model"):
        load_backbone(save(tmp_path, made, transformers.T5ForConditionalGeneration))


def test_images_are_refused(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.Gemma3Config(text_config=DIMENSIONS, vision_config=vision).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="type 'gemma3', which is not for text alone"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ('{"rope_scaling": {"type": "dynamic", "factor": 2.0}}', "'dynamic' RoPE"),
        ('{"max_position_embeddings": null}', "max_position_embeddings"),
        ('{"hidden_size": "sixty"}', "can't read: .*hidden_size"),
        ('{"num_attention_heads": 5}', "can't read: .*multiple of the number of attention heads"),
        ('{"model_type": "unheard-of"}', "can't read: .*unheard-of"),
    ],
)
def test_configurations_as_people_write_them(tmp_path: Path, settings: str, reason: str) -> None:
    head = '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, '
    (tmp_path / "config.json").write_text(head + settings.removeprefix("{"))
    with pytest.raises(UnsupportedModelError, match=f"(?s){reason}"):
        load_config(tmp_path)


def test_a_context_longer_than_the_models_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    config("Llama").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="--max-model-len 513 is more than the 512 positions"):
        load_backbone(tmp_path, max_model_len=513)


def test_verification_notices_wrong_attention(tiny_model: Path) -> None:
    """A layer that writes its keys and values over another's: only logits over a past can tell."""
    backbone = load_backbone(tiny_model)
    verify_backbone(backbone, bounds(backbone))
    backbone.model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(UnsupportedModelError, match=r"differ from the model's own by .* of the largest"):
        verify_backbone(backbone, bounds(backbone))


@pytest.mark.parametrize(
    ("argument", "meaning"),
    [
        ("sinks", "attention sinks"),
        ("s_aux", "attention sinks"),
        ("softcap", "soft-capped attention logits"),
        ("position_bias", "a position bias on attention logits"),
        ("indices", "attention to selected tokens"),
        ("unheard_of", "a custom attention"),
    ],
)
def test_arguments_that_attention_does_not_honour_are_refused_by_name(
    tiny_model: Path, argument: str, meaning: str
) -> None:
    """Also those of one layer, and those that no version of transformers has yet."""
    model = load_backbone(tiny_model).model
    attention = model.model.layers[1].self_attn

    def passing(value: object) -> RemovableHandle:
        def hook(_: nn.Module, positional: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return positional, keywords | {argument: value}

        return attention.register_forward_pre_hook(hook, with_kwargs=True)

    hook = passing(None)
    inspect_attention(model)  # it may be named where it is not in use
    hook.remove()
    passing(torch.ones(4))
    with pytest.raises(UnsupportedModelError, match=rf"uses {meaning} \({argument} of layer 1\)"):
        inspect_attention(model)


MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 16, "num_experts": 8, **EXPERTS}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 8, "num_experts_per_tok": 2}),
}


def mixture(path: Path, name: str) -> Backbone:
    """In bfloat16, two of four experts that are nearly equally likely: rounding decides, on any machine."""
    family, settings = MIXTURES[name]
    backbone = load_backbone(save(path, config(family, **settings)), dtype="bfloat16")
    routers = [weight for weight in backbone.model.parameters() if weight.shape == (8, 64)]
    assert len(routers) == 3
    generator = torch.Generator().manual_seed(3)
    for weight in routers:
        likely = weight[:1] + 0.02 * weight.std() * torch.randn(4, 64, generator=generator).bfloat16()
        weight[:4], weight[4:] = likely, -likely
    return backbone


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_rounding_chooses_are_no_wrong_attention(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """bfloat16 sends some tokens to other experts than eager attention does, as transformers' own backends do."""
    backbone = mixture(tmp_path, name)
    with caplog.at_level(logging.INFO, logger="forecache"):
        verify_backbone(backbone, bounds(backbone))
    assert re.search(r"rounding sends [1-9]\d* of \d+ tokens to other experts", caplog.text)
    assert all(not module._forward_pre_hooks for module in backbone.model.modules())


@pytest.mark.parametrize("name", MIXTURES)
def test_wrong_attention_of_a_mixture_of_experts_is_noticed(tmp_path: Path, name: str) -> None:
    backbone = mixture(tmp_path, name)
    backbone.model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(UnsupportedModelError, match=r"differ from the model's own by .* of the largest"):
        verify_backbone(backbone, bounds(backbone))


def test_what_transformers_own_backends_differ_by_is_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """JetMoE's layers use a custom router, so the choice of experts can't be fixed for the comparison."""
    made = config("JetMoe", num_key_value_heads=4, num_attention_heads=..., num_local_experts=4, kv_channels=16)
    backbone = load_backbone(save(tmp_path, made), dtype="bfloat16")
    with caplog.at_level(logging.INFO, logger="forecache"):
        verify_backbone(backbone, bounds(backbone))
    assert "transformers' sdpa and eager attention differ by" in caplog.text
    backbone.model.model.layers[1].self_attention.layer_idx = 0
    with pytest.raises(UnsupportedModelError, match=r"differ from the model's own by .* of the largest"):
        verify_backbone(backbone, bounds(backbone))


def test_verification_notices_logits_that_are_not_numbers(tiny_model: Path) -> None:
    backbone = load_backbone(tiny_model)
    backbone.model.model.norm.weight[0] = torch.nan
    with pytest.raises(UnsupportedModelError, match="by nan of the largest"):
        verify_backbone(backbone, bounds(backbone))

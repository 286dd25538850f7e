"""Projections of the same input fused into one: equal numbers, and no weight stored twice."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaMLP

from forecache.workers.models.dense.fused_linears import FusedLinear, fuse_checked, fuse_linears

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("config", [LlamaConfig(**SHAPE), Qwen2Config(**SHAPE)], ids=["llama", "qwen2-with-bias"])
def test_the_same_logits(config: LlamaConfig | Qwen2Config) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    tokens = torch.randint(0, 99, (1, 20))
    expected = model(tokens).logits
    bytes_before = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    assert fuse_linears(model) == 4
    torch.testing.assert_close(model(tokens).logits, expected)
    assert {name: parameter.nbytes for name, parameter in model.named_parameters()} == bytes_before
    attention = model.model.layers[1].self_attn
    assert attention.q_proj.group.parts == ()  # nothing of a step is kept
    assert isinstance(attention.k_proj, FusedLinear)
    storages = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(storages) == 1
    assert fuse_linears(model) == 0


def test_what_is_not_plain_stays() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2))
    assert fuse_linears(model) == 0  # its projections are one already


def test_a_model_that_calls_them_otherwise_keeps_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).eval().requires_grad_(False)
    tokens = torch.randint(0, 99, (1, 20))

    def backwards(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(x * 2)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * up)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", backwards)
        expected = model(tokens).logits
        assert fuse_checked(model) == 0
        assert torch.equal(model(tokens).logits, expected)
        assert not any(isinstance(module, FusedLinear) for module in model.modules())
    expected = model(tokens).logits
    assert fuse_checked(model) == 4
    torch.testing.assert_close(model(tokens).logits, expected)

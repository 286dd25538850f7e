"""The training forward of DeepSeek-V4 against transformers' own model."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from forecache.workers.recording.deepseek_v4.forward import TrainingForward


def tiny(topk: int) -> DeepseekV4ForCausalLM:
    """A model with all kinds of layers; all weights are random, norms and biases too."""
    torch.manual_seed(3)
    config = DeepseekV4Config(
        vocab_size=97,
        hidden_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=5,
        compress_ratios=[0, 4, 128, 4, 0],
        num_hash_layers=1,
        num_attention_heads=4,
        head_dim=32,
        partial_rotary_factor=0.25,
        q_lora_rank=24,
        o_groups=2,
        o_lora_rank=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        hc_mult=2,
        hc_sinkhorn_iters=3,
        sliding_window=16,
        index_n_heads=16,  # with few, many scores are 0 exactly, and which of equals is taken is not defined
        index_head_dim=16,
        index_topk=topk,
        initializer_range=0.2,
    )
    model: Any = DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.copy_(torch.stack([torch.randperm(4)[:2] for _ in range(len(buffer))]))
            elif name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    made: DeepseekV4ForCausalLM = model
    return made


@pytest.mark.parametrize("topk", [8, 512], ids=["selected", "everything"])
@pytest.mark.parametrize("segment", [2048, 64])
def test_logits_are_those_of_transformers(topk: int, segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forecache.workers.recording.deepseek_v4.attention.SEGMENT", segment)
    model = tiny(topk)
    ids = torch.randint(0, 97, (2, 288))
    forward = TrainingForward(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        logits = forward.logits(forward(ids, sparse=True).hidden)
        dense = forward.logits(forward(ids, sparse=False).hidden)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (dense - logits).abs().max() < 1e-4 if topk == 512 else (dense - logits).abs().max() > 1e-2


def test_the_index_loss_trains_the_indexer_alone() -> None:
    model = tiny(8)
    ids, positions = torch.randint(0, 97, (2, 128)), torch.randint(16, 128, (2, 24))
    forward = TrainingForward(model)
    indexers = [parameter for name, parameter in model.named_parameters() if ".indexer." in name]
    optimizer = torch.optim.Adam(indexers, lr=1e-2)
    losses = []
    for _ in range(12):
        loss = forward(ids, sparse=False, index_positions=positions, train_model=False).index_loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in indexers)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".indexer." not in name)
    assert losses[-1] < 0.8 * losses[0]


def test_gradients_are_those_of_transformers() -> None:
    model = tiny(512)
    ids = torch.randint(0, 97, (1, 144))

    def gradients(logits: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    forward = TrainingForward(model)
    expected = gradients(model(ids, use_cache=False).logits)
    ours = gradients(forward.logits(forward(ids, sparse=True).hidden))
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)

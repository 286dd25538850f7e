"""The small DeepSeek-V4: its configuration, its first weights, and how it is saved."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, PreTrainedTokenizerFast

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
EMBEDDING_STD = 0.5
"""As large as what the blocks add, so that tokens are not lost among it. All tokens share one more vector as large: a
head that attends by place alone needs something that does not vary."""
KV_NORM = 3.0
"""First weight of the norms of keys. Queries are normalised too, so a logit is at most this times √head_dim: 24, as in
V4-Flash with its heads of 512. With 8 no head found a name among others."""
MODEL_TOKENS = 65_536


def small_config(vocabulary: int) -> DeepseekV4Config:
    """All of the architecture in under 5 MB of bfloat16: three CSA layers among sliding and HCA ones."""
    return DeepseekV4Config(
        vocab_size=-(-vocabulary // 64) * 64,
        hidden_size=128,
        num_hidden_layers=7,
        layer_types=[*[SLIDING] * 2, CSA, HCA, CSA, HCA, CSA],
        mlp_layer_types=["hash_moe", *["moe"] * 6],
        num_attention_heads=4,
        head_dim=64,
        partial_rotary_factor=0.25,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        sliding_window=128,
        index_n_heads=8,
        index_head_dim=32,
        index_topk=64,
        moe_intermediate_size=80,
        n_routed_experts=4,
        num_experts_per_tok=2,
        routed_scaling_factor=1.0,
        hc_mult=2,
        hc_sinkhorn_iters=4,
        num_nextn_predict_layers=0,
        max_position_embeddings=MODEL_TOKENS,
        initializer_range=0.06,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def new_model(config: DeepseekV4Config, seed: int) -> DeepseekV4ForCausalLM:
    """First weights, a function of the seed: transformers' own but for embeddings, norms of keys, table of experts."""
    torch.manual_seed(seed)
    made: Any = DeepseekV4ForCausalLM(config)
    model: DeepseekV4ForCausalLM = made
    with torch.no_grad():
        made.model.embed_tokens.weight.normal_(std=EMBEDDING_STD)
        made.model.embed_tokens.weight += EMBEDDING_STD * torch.randn(config.hidden_size)
        for layer in made.model.layers:
            for keys in (layer.self_attn, layer.self_attn.compressor):
                if keys is not None:
                    keys.kv_norm.weight.fill_(KV_NORM)
            if layer.mlp.is_hash:
                draws = torch.rand(config.vocab_size, config.n_routed_experts)
                layer.mlp.gate.tid2eid.copy_(draws.topk(config.num_experts_per_tok, 1).indices)
    return model


def save_model(model: DeepseekV4ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A directory as transformers reads it, every weight in bfloat16. Each file is replaced as a whole, so that the
    model that was there stays usable if saving is cut off."""
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
    }
    config: Any = model.config
    config.dtype = torch.bfloat16
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        for file in sorted(Path(partial).iterdir()):
            file.replace(folder / file.name)

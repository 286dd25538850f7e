"""Launches decode attention over a block table in Triton. In PyTorch: `reference.sparse_decode`."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from forecache.kernels.attention import split_decode, stream_decode
from forecache.kernels.common import tuning
from forecache.kernels.common.tuning import DecodeConfig


def sparse_decode(
    q: Tensor,
    kv: Tensor,
    layer: int | Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.sparse_decode`. ``config``: launch settings instead of the tuned ones, for sweeps and tests."""
    batch, heads, head_dim = q.shape
    _, layers, parts, kv_heads, chunk_tokens, kv_dim = kv.shape
    max_chunks = block_table.shape[1]
    assert kv_dim == head_dim and parts == 2, f"q {tuple(q.shape)} does not fit kv {tuple(kv.shape)}"
    assert heads % kv_heads == 0, f"{heads} query heads do not divide into {kv_heads} groups"
    assert q.stride(2) == 1 and kv.stride(5) == 1 and kv.stride(4) == head_dim, "heads must be contiguous"
    assert block_table.shape[0] == context_lens.shape[0] == batch and block_table.stride(1) == 1
    assert max_chunks > 0 and context_lens.is_contiguous()
    assert not isinstance(layer, int) or 0 <= layer < layers, f"layer {layer} of {layers}"
    assert (k_scale is None) == (v_scale is None), "keys and values are both scaled or neither is"
    if k_scale is not None and v_scale is not None:
        assert k_scale.shape == v_scale.shape == (kv.shape[0], layers, kv_heads)
        assert k_scale.stride() == v_scale.stride(), "scales of keys and values have different strides"
        assert k_scale.dtype == v_scale.dtype == torch.float32

    group, family = heads // kv_heads, tuning.gpu_family(q.device)
    config = config or tuning.decode_config(kv.dtype, head_dim, group, family)
    block = max(16, min(config.block_tokens, triton.next_power_of_2(chunk_tokens)))
    # e4m3 only: float16 can't represent every product with e5m2's range
    pairs = config.pairs and kv.dtype == torch.float8_e4m3fn and q.dtype.itemsize == 2 and head_dim % 2 == 0
    units = kv.view(torch.uint16) if pairs else kv
    constants: dict[str, Any] = {
        "GROUP": group,
        "GROUP_PAD": max(16, triton.next_power_of_2(group)),
        "HEAD_DIM": head_dim,
        "HEAD_PAD": triton.next_power_of_2(head_dim),
        "CHUNK_TOKENS": chunk_tokens,
        "BLOCK": block,
        "BLOCKS_PER_CHUNK": triton.cdiv(chunk_tokens, block),
        "LAYER_IS_POINTER": not isinstance(layer, int),
        "PAIRS": pairs,
        "NATIVE": family == "hopper",
        "HAS_SCALES": k_scale is not None,
    }
    arguments = (q, units, layer, block_table, context_lens, k_scale, v_scale, scale / math.log(2))
    scale_strides = k_scale.stride() if k_scale is not None else (0, 0, 0)
    strides = (*q.stride()[:2], *units.stride()[:4], *scale_strides, block_table.stride(0))
    out = torch.empty((batch, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads), dtype=torch.float32, device=q.device)
    launch = stream_decode.launch if config.stream else split_decode.launch
    launch(arguments, constants, strides, out, lse, max_chunks, config)
    return out, lse

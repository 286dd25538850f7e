"""Log-sum-exp of queries over the index records of chunks, in Triton. In PyTorch: `reference.score_chunks`.

Each record is read once. Records lie in GPU memory, or in pinned or registered host memory; the GPU reads the latter
over PCIe and can keep a copy.
"""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from forecache.kernels.common import checks, tuning
from forecache.kernels.common.columns import TILE_ELEMENTS, Columns
from forecache.kernels.common.powers import power_of_two

_WARP_ELEMENTS = 2048
_QUERY_TILE = 16
_LEAST_QUERIES = 8
_LEAST_TILE = 16
_DTYPES = {
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}

_FP16_HOLDS = (torch.int8, torch.float8_e4m3fn, torch.float16)
"""Dtypes that float16 represents exactly. The tensor cores multiply such keys with queries split into two float16."""


@triton.jit(do_not_specialize=["n"])
def _score_kernel(
    records,  # bytes: rows of keys [KV_HEADS, TOKENS, DIM], then of scales [KV_HEADS, TOKENS] float16
    slots,  # [n]
    queries,  # [query_heads, DIM]
    query_starts,  # [KV_HEADS + 1]
    copies,  # like records
    copy_slots,  # [n]
    columns,  # [n]
    span,  # [2]
    out,  # [query_heads, n, TOKENS / BLOCK]
    n,
    record_stride,
    copy_stride,
    KV_HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM_PAD: tl.constexpr,
    QUERIES: tl.constexpr,
    DTYPE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    HAS_SPAN: tl.constexpr,
    KEYS_ARE_FP16: tl.constexpr,
):
    blocks: tl.constexpr = (TOKENS + BLOCK - 1) // BLOCK
    itemsize: tl.constexpr = DTYPE.primitive_bitwidth // 8
    key_bytes: tl.constexpr = KV_HEADS * TOKENS * DIM * itemsize
    key_pointer: tl.constexpr = tl.pointer_type(DTYPE)
    scale_pointer: tl.constexpr = tl.pointer_type(tl.float16)
    i_begin, i_end = 0, n
    if HAS_SPAN:
        i_begin, i_end = tl.load(span).to(tl.int32), tl.load(span + 1).to(tl.int32)
    for i_tile in range(tl.program_id(0), (i_end - i_begin) * KV_HEADS * blocks, tl.num_programs(0)):
        i_block, i_head, i_chunk = i_tile % blocks, i_tile // blocks % KV_HEADS, i_tile // (blocks * KV_HEADS)
        i_column = i_chunk
        if HAS_SPAN:
            i_chunk += i_begin
            i_column = tl.load(columns + i_chunk).to(tl.int32)
        o_token, o_dim = i_block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIM_PAD)
        m_token = o_token < TOKENS
        m_key = m_token[:, None] & (o_dim < DIM)[None, :]
        o_head = i_head * (TOKENS * DIM * itemsize)
        o_key = o_token[:, None] * DIM + o_dim[None, :]
        o_scale = i_head * TOKENS + o_token
        p_row = records + tl.load(slots + i_chunk).to(tl.int64) * record_stride
        b_stored = tl.load((p_row + o_head).to(key_pointer) + o_key, mask=m_key, other=0.0)
        b_scale = tl.full([BLOCK], 1.0, tl.float16)
        if HAS_SCALE:
            b_scale = tl.load((p_row + key_bytes).to(scale_pointer) + o_scale, mask=m_token, other=0.0)
        if HAS_COPIES:
            copy_slot = tl.load(copy_slots + i_chunk).to(tl.int64)
            if copy_slot >= 0:
                p_copy = copies + copy_slot * copy_stride
                tl.store((p_copy + o_head).to(key_pointer) + o_key, b_stored, mask=m_key)
                if HAS_SCALE:
                    tl.store((p_copy + key_bytes).to(scale_pointer) + o_scale, b_scale, mask=m_token)

        b_factor = b_scale.to(tl.float32)
        first, last = tl.load(query_starts + i_head), tl.load(query_starts + i_head + 1)
        if QUERIES == 1:
            # float32 products and sums, for exact queries; reading the records takes longer than the arithmetic
            b_keys = b_stored.to(tl.float32)
            for i_query in range(first, last):
                b_query = tl.load(queries + i_query * DIM + o_dim, mask=o_dim < DIM, other=0.0)
                b_logits = tl.sum(b_keys * b_query[None, :], 1) * b_factor
                b_logits = tl.where(m_token, b_logits, float("-inf"))
                largest = tl.max(b_logits, 0)
                lse = largest + tl.log(tl.sum(tl.exp(b_logits - largest), 0))
                tl.store(out + (i_query * n + i_column) * blocks + i_block, lse)
        else:
            # tensor cores with split queries (two float16 or three TensorFloat32 products) are as exact as float32
            for i_first in range(first, last, QUERIES):
                o_query = i_first + tl.arange(0, QUERIES)
                m_query = o_query < last
                p_query = queries + o_query[:, None] * DIM + o_dim[None, :]
                b_queries = tl.load(p_query, mask=m_query[:, None] & (o_dim < DIM)[None, :], other=0.0)
                if KEYS_ARE_FP16:
                    # each query, divided by a power of two, becomes a high and a low float16, the low one times 2^11
                    b_unit = power_of_two(tl.max(tl.abs(b_queries), 1))
                    b_queries /= b_unit[:, None]
                    b_high = b_queries.to(tl.float16)
                    b_low = ((b_queries - b_high.to(tl.float32)) * 2048).to(tl.float16)
                    b_keys_fp16 = tl.trans(b_stored.to(tl.float16))
                    b_many = tl.dot(b_low, b_keys_fp16) / 2048 + tl.dot(b_high, b_keys_fp16)
                    b_many *= b_unit[:, None]
                else:
                    b_many = tl.dot(b_queries, tl.trans(b_stored.to(tl.float32)), input_precision="tf32x3")
                b_many *= b_factor[None, :]
                b_many = tl.where(m_token[None, :], b_many, float("-inf"))
                b_largest = tl.max(b_many, 1)
                b_lse = b_largest + tl.log(tl.sum(tl.exp(b_many - b_largest[:, None]), 1))
                tl.store(out + (o_query * n + i_column) * blocks + i_block, b_lse, mask=m_query)


def _query_tile(query_heads: int, kv_heads: int, block: int, dim_pad: int) -> int:
    """Queries in one product; 1 (a loop over them) if they are few or the tiles are too small for tensor cores."""
    if query_heads < _LEAST_QUERIES * kv_heads or min(block, dim_pad) < _LEAST_TILE:
        return 1
    return _QUERY_TILE


def score_chunks(
    records: Tensor,
    slots: Tensor,
    queries: Tensor,
    query_starts: Tensor,
    *,
    chunk_tokens: int,
    dtype: torch.dtype,
    copies: Tensor | None = None,
    copy_slots: Tensor | None = None,
    into: Columns | None = None,
) -> Tensor:
    """See `reference.score_chunks`; the result is on the device of ``slots``."""
    checks.records(records, slots, queries, query_starts, chunk_tokens, dtype, copies, copy_slots, into)
    n, kv_heads, (query_heads, head_dim) = slots.shape[0], query_starts.shape[0] - 1, queries.shape
    dim_pad = triton.next_power_of_2(head_dim)
    block = min(triton.next_power_of_2(chunk_tokens), max(1, TILE_ELEMENTS // dim_pad))
    blocks = triton.cdiv(chunk_tokens, block)
    assert into is None or blocks == 1, f"chunks of {chunk_tokens} x {head_dim} elements exceed one tile"
    lse = torch.empty((query_heads, n, blocks), dtype=torch.float32, device=slots.device) if into is None else into.lse
    if n:
        programs = n * kv_heads * blocks
        if not records.is_cuda and slots.is_cuda:
            # enough programs to saturate the link; the rest of the GPU is left to decode steps
            programs = min(programs, tuning.multiprocessors(slots.device))
        _score_kernel[(programs,)](
            records,
            slots,
            queries,
            query_starts,
            copies,
            copy_slots,
            None if into is None else into.columns,
            None if into is None else into.span,
            lse,
            n,
            records.stride(0),
            copies.stride(0) if copies is not None else 0,
            KV_HEADS=kv_heads,
            TOKENS=chunk_tokens,
            DIM=head_dim,
            BLOCK=block,
            DIM_PAD=dim_pad,
            QUERIES=_query_tile(query_heads, kv_heads, block, dim_pad),
            DTYPE=_DTYPES[dtype],
            HAS_SCALE=not dtype.is_floating_point,
            HAS_COPIES=copies is not None,
            HAS_SPAN=into is not None,
            KEYS_ARE_FP16=dtype in _FP16_HOLDS,
            num_warps=max(1, min(block * dim_pad // _WARP_ELEMENTS, 8)),
        )
    if into is not None:
        return into.lse
    return lse.squeeze(2) if blocks == 1 else lse.logsumexp(2)

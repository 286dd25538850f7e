"""Merging what the shares of `stream_decode` left of the rows they have in common, in Triton."""

# Kernel arguments are not Python values: no types; compile-time constants are upper case.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, SIM102

import math

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from forecache.kernels.attention.decode_blocks import count_blocks

LN_2: tl.constexpr = tl.constexpr(math.log(2))


@triton.jit
def share_start(i_share, total, shares):
    """The first block of a share: the first ``total % shares`` shares have one block more than the others."""
    return i_share * (total // shares) + tl.minimum(i_share, total % shares)


@triton.jit
def share_of(i_block, total, shares):
    """The share that a block is in."""
    size, larger = total // shares, total % shares
    after = i_block - larger * (size + 1)
    return tl.where(after < 0, i_block // (size + 1), larger + after // size)


@triton.jit
def merge_shares(
    part_out,  # [2 * shares, GROUP, HEAD_DIM] float32
    part_lse,  # [2 * shares, GROUP] float32, base 2
    row_start,
    row_end,
    total,
    shares,
    o_head,
    m_head,
    o_dim,
    m_dim,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A row's output and its log-sum-exp (base 2) for some heads of its group and some dims, from all its shares."""
    first = share_of(row_start, total, shares)
    count = share_of(row_end - 1, total, shares) - first + 1
    # a share's first row is its part 0, its last one part 1: only the row's first share may have begun before the row
    begun = (share_start(first, total, shares) < row_start).to(tl.int32)
    b_max = tl.full(o_head.shape, -float("inf"), tl.float32)
    b_sum = tl.zeros(o_head.shape, tl.float32)
    b_out = tl.zeros([o_head.shape[0], o_dim.shape[0]], tl.float32)
    for start in range(0, count, PARTS):
        o_share = start + tl.arange(0, PARTS)
        m_share = o_share < count
        o_part = 2 * (first + o_share) + tl.where(o_share == 0, begun, 0)
        # [PARTS, heads]
        o_lse = o_part[:, None] * GROUP + o_head[None, :]
        m_lse = m_share[:, None] & m_head[None, :]
        b_lse = tl.load(part_lse + o_lse, mask=m_lse, other=0.0, cache_modifier=".cg")
        b_lse = tl.where(m_share[:, None], b_lse, -float("inf"))
        # [PARTS, heads, dims]
        p_part = part_out + o_lse[:, :, None] * HEAD_DIM + o_dim[None, None, :]
        m_part = m_lse[:, :, None] & m_dim[None, None, :]
        b_part = tl.load(p_part, mask=m_part, other=0.0, cache_modifier=".cg")
        b_new_max = tl.maximum(b_max, tl.max(b_lse, 0))
        b_weight = tl.exp2(b_lse - b_new_max[None, :])
        b_keep = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_keep + tl.sum(b_weight, 0)
        b_out = b_out * b_keep[:, None] + tl.sum(b_part * b_weight[:, :, None], 0)
        b_max = b_new_max
    return b_out / b_sum[:, None], b_max + tl.log2(b_sum)


@triton.jit(do_not_specialize=["batch", "shares", "max_chunks"])
def merge_kernel(
    context_lens,  # [batch]
    part_out,  # [2 * shares, GROUP, HEAD_DIM] float32
    part_lse,  # [2 * shares, GROUP] float32, base 2
    block_lse,  # [batch, heads, max_chunks * BLOCKS_PER_CHUNK] float32, base 2
    out,  # [batch, heads, HEAD_DIM]
    lse,  # [batch, heads] float32
    chunk_mass,  # [batch, heads, max_chunks] float32
    batch,
    shares,
    max_chunks,
    BATCH_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    CHUNK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_PER_CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    HAS_MASS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    i_query, i_seq = tl.program_id(0), tl.program_id(1)
    i_head = i_query // GROUP
    kv_heads = tl.num_programs(0) // GROUP
    o_seq = tl.arange(0, BATCH_PAD)
    b_lens = tl.load(context_lens + o_seq, mask=o_seq < batch, other=0)
    b_blocks = count_blocks(b_lens, CHUNK_TOKENS, BLOCK, BLOCKS_PER_CHUNK).to(tl.int32)
    blocks = tl.sum(tl.where(o_seq == i_seq, b_blocks, 0), 0)
    total = tl.sum(b_blocks, 0) * kv_heads
    row_start = tl.sum(tl.where(o_seq < i_seq, b_blocks, 0), 0) * kv_heads + i_head * blocks
    shares = tl.minimum(shares, total)
    o_row = i_seq.to(tl.int64) * tl.num_programs(0) + i_query
    if DEPENDENT:
        gdc_wait()
    if blocks > 0:
        if share_of(row_start, total, shares) != share_of(row_start + blocks - 1, total, shares):
            o_dim = tl.arange(0, HEAD_PAD)
            m_dim = o_dim < HEAD_DIM
            o_head = i_query % GROUP + tl.arange(0, 1)
            b_out, b_lse = merge_shares(
                part_out, part_lse, row_start, row_start + blocks, total, shares, o_head, o_head < GROUP, o_dim,
                m_dim, GROUP, HEAD_DIM, PARTS,
            )  # fmt: skip
            tl.store(lse + o_row + tl.arange(0, 1), b_lse * LN_2)
            p_out = out + o_row * HEAD_DIM + o_dim[None, :]
            tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_dim[None, :])
            if HAS_MASS:
                tl.debug_barrier()  # the sum just stored is read below
    if HAS_MASS:
        norm = tl.where(blocks > 0, tl.load(lse + o_row) / LN_2, 0.0)
        for first in range(0, max_chunks, CHUNK_BLOCK):
            o_chunk = first + tl.arange(0, CHUNK_BLOCK)
            b_mass = tl.zeros([CHUNK_BLOCK], tl.float32)
            for piece in tl.static_range(BLOCKS_PER_CHUNK):
                i_block = o_chunk * BLOCKS_PER_CHUNK + piece
                p_block = block_lse + o_row * max_chunks * BLOCKS_PER_CHUNK + i_block
                b_block = tl.load(p_block, mask=i_block < blocks, other=-float("inf"))
                b_mass += tl.exp2(b_block - norm)
            tl.store(chunk_mass + o_row * max_chunks + o_chunk, b_mass, mask=o_chunk < max_chunks)

"""Checks of kernel arguments, for reference and Triton kernels: shapes, strides and dtypes, never values on the GPU."""

import torch
from torch import Tensor

from forecache.kernels.common.columns import Columns


def gather(
    kv: Tensor,
    layer: int | Tensor,
    slots: Tensor,
    scale: Tensor | None,
    out: Tensor | None,
    sums: Tensor | None,
    dtype: torch.dtype | None,
) -> None:
    """Arguments of `gather_layer`."""
    _, layers, parts, kv_heads, chunk_tokens, head_dim = kv.shape
    assert parts == 2 and _heads_are_contiguous(kv), "a head's chunk must be contiguous"
    _slots(slots)
    assert not isinstance(layer, int) or 0 <= layer < layers, f"layer {layer} of {layers}"
    if out is not None:
        expected = (2, kv_heads, slots.shape[0] * chunk_tokens, head_dim)
        assert out.shape == expected, f"out is {tuple(out.shape)}, the result {expected}"
        assert out.stride(3) == 1 and out.stride(2) == head_dim, "out's heads must be contiguous"
        assert dtype in (None, out.dtype), f"out is {out.dtype}, not {dtype}"
    if scale is not None:
        _scale(scale, kv)
        assert out is not None or dtype is not None, "with scales, give the dtype of the result (or out)"
    if sums is not None:
        assert sums.shape == slots.shape and sums.dtype == torch.int64 and sums.is_contiguous()
        words = [stride * kv.dtype.itemsize % 4 for stride in (*kv.stride()[:4], chunk_tokens * head_dim)]
        assert not any(words), "checksums need heads that are whole 32-bit words"
        assert kv.stride(0) * kv.dtype.itemsize < 1 << 33, "word numbers are 31 bits"
        if scale is not None:
            offset = scale.data_ptr() - kv.data_ptr()
            assert 0 < offset < kv.stride(0) * kv.dtype.itemsize == scale.stride(0) * 4, "scales must lie in kv's rows"
            assert offset % 4 == 0, "scales must lie at whole 32-bit words"


def chunks(kv: Tensor, slots: Tensor, out_kv: Tensor, out_slots: Tensor, *, fp8: Tensor, scale: Tensor) -> None:
    """Arguments of `quantize_chunks` and `dequantize_chunks`; ``fp8`` is the fp8 one of ``kv``, ``out_kv``."""
    assert kv.shape[1:] == out_kv.shape[1:] and kv.shape[2] == 2, f"{tuple(kv.shape)} to {tuple(out_kv.shape)}"
    assert _heads_are_contiguous(kv) and _heads_are_contiguous(out_kv), "a head's chunk must be contiguous"
    assert fp8.dtype == torch.float8_e4m3fn, f"{fp8.dtype} is not float8_e4m3fn"
    _scale(scale, fp8)
    _slots(slots)
    _slots(out_slots)
    assert slots.shape == out_slots.shape, f"{slots.shape[0]} chunks to {out_slots.shape[0]} slots"


def store(
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    slots: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    non_finite: Tensor | None,
) -> None:
    """Arguments of `store_kv`."""
    tokens, kv_heads, head_dim = k.shape
    assert v.shape == k.shape, f"keys {tuple(k.shape)} and values {tuple(v.shape)} differ"
    assert kv.shape[3] == kv_heads and kv.shape[5] == head_dim, f"kv {tuple(kv.shape)}, k {tuple(k.shape)}"
    assert k.stride(2) == v.stride(2) == 1 and _heads_are_contiguous(kv), "heads must be contiguous"
    assert slots.shape == offsets.shape == (tokens,)
    _slots(slots)
    _slots(offsets)
    if scale is not None:
        assert kv.dtype == torch.float8_e4m3fn, f"scales are for float8_e4m3fn, the pool is {kv.dtype}"
        _scale(scale, kv)
    if non_finite is not None:
        flags(non_finite, tokens)


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv: Tensor,
    layer: int | Tensor,
    block_table: Tensor,
    past_lens: Tensor,
    starts: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Arguments of `ragged_prefill`."""
    tokens, heads, head_dim = q.shape
    kv_heads = kv.shape[3]
    assert kv.shape[2] == 2 and kv.shape[5] == head_dim, f"q {tuple(q.shape)} does not fit kv {tuple(kv.shape)}"
    assert heads % kv_heads == 0, f"{heads} query heads do not divide into {kv_heads} groups"
    assert k.shape == v.shape == (tokens, kv_heads, head_dim), f"k {tuple(k.shape)}, v {tuple(v.shape)}"
    assert q.dtype == k.dtype == v.dtype, f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1, "heads must be contiguous"
    pool(kv, layer, block_table, k_scale, v_scale)
    sequences = block_table.shape[0]
    assert past_lens.shape == (sequences,) and starts.shape == (sequences + 1,), (
        f"{sequences} rows of the block table, {tuple(past_lens.shape)} lengths, {tuple(starts.shape)} starts"
    )
    assert past_lens.dtype == starts.dtype == torch.int32 and past_lens.is_contiguous() and starts.is_contiguous()


def mass(
    q: Tensor,
    lse: Tensor,
    kv: Tensor,
    layers: Tensor,
    kv_heads: Tensor,
    block_table: Tensor,
    positions: Tensor,
    starts: Tensor,
    k_scale: Tensor | None,
) -> None:
    """Arguments of `chunk_mass`."""
    rows, pairs, head_dim = q.shape
    assert kv.shape[5] == head_dim and q.stride(2) == 1, f"q {tuple(q.shape)} does not fit kv {tuple(kv.shape)}"
    assert pairs > 0 and layers.shape == kv_heads.shape == (pairs,), f"{pairs} pairs, layers {tuple(layers.shape)}"
    assert lse.shape == (rows, pairs) and lse.dtype == torch.float32, f"lse {tuple(lse.shape)} of {lse.dtype}"
    assert positions.shape == (rows,) and starts.shape == (block_table.shape[0] + 1,)
    assert all(x.is_contiguous() for x in (lse, layers, kv_heads, positions, starts))
    assert starts.dtype == torch.int32, f"starts are {starts.dtype}"
    pool(kv, 0, block_table, k_scale, k_scale)


def pool(kv: Tensor, layer: int | Tensor, block_table: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """A pool, what is read of it through a block table, and its scales."""
    slots, layers, parts, kv_heads = kv.shape[:4]
    assert parts == 2 and _heads_are_contiguous(kv), "heads must be contiguous"
    assert not isinstance(layer, int) or 0 <= layer < layers, f"layer {layer} of {layers}"
    assert block_table.dim() == 2 and block_table.dtype == torch.int32, f"block table {block_table.dtype}"
    assert block_table.stride(1) == 1 or block_table.shape[1] <= 1, "rows of the block table must be contiguous"
    assert (k_scale is None) == (v_scale is None), "keys and values are both scaled or neither is"
    if k_scale is not None and v_scale is not None:
        assert k_scale.shape == v_scale.shape == (slots, layers, kv_heads), f"scales {tuple(k_scale.shape)}"
        assert k_scale.stride() == v_scale.stride(), "scales of keys and values have different strides"
        assert k_scale.dtype == v_scale.dtype == torch.float32, f"scales are {k_scale.dtype}"


def flags(non_finite: Tensor, tokens: int) -> None:
    """Argument ``non_finite`` of several kernels."""
    assert non_finite.dtype == torch.uint8 and non_finite.shape == (tokens,) and non_finite.is_contiguous()


def checksums(memory: Tensor, slots: Tensor, first_word: int) -> None:
    """Arguments of `slot_checksums`."""
    assert memory.dtype == torch.uint8 and memory.dim() == 2, f"memory is {memory.dtype}, {memory.dim()} axes"
    assert memory.shape[1] % 4 == 0, f"rows of {memory.shape[1]} bytes are not whole words"
    assert first_word >= 0 and 4 * first_word + memory.shape[1] < 1 << 33, "word numbers are 31 bits"
    assert memory.stride(1) == 1 and memory.stride(0) % 16 == 0 and memory.data_ptr() % 16 == 0, (
        "rows start at 16 bytes"
    )
    _slots(slots)


def records(
    records: Tensor,
    slots: Tensor,
    queries: Tensor,
    query_starts: Tensor,
    chunk_tokens: int,
    dtype: torch.dtype,
    copies: Tensor | None,
    copy_slots: Tensor | None,
    into: Columns | None,
) -> None:
    """Arguments of `score_chunks`."""
    assert dtype.is_floating_point or dtype == torch.int8, f"keys are floating point or int8, not {dtype}"
    assert queries.dtype == torch.float32 and queries.is_contiguous(), "queries are float32, contiguous"
    assert query_starts.dtype == torch.int32 and query_starts.is_contiguous(), "query_starts is int32, contiguous"
    kv_heads, head_dim = query_starts.shape[0] - 1, queries.shape[1]
    token_bytes = head_dim * dtype.itemsize + (0 if dtype.is_floating_point else 2)
    needed = kv_heads * chunk_tokens * token_bytes
    for table in (records,) if copies is None else (records, copies):
        assert table.dtype == torch.uint8 and table.dim() == 2, f"records are {table.dtype}, {table.dim()} axes"
        assert table.shape[1] >= needed, f"rows of {table.shape[1]} bytes, a record has {needed}"
        aligned = table.stride(1) == 1 and table.stride(0) % 16 == 0 and table.data_ptr() % 16 == 0
        assert aligned or not table.numel(), "rows start at 16 bytes"
    _slots(slots)
    assert (copies is None) == (copy_slots is None), "copies need both a table and its rows"
    if copy_slots is not None:
        _slots(copy_slots)
        assert copy_slots.shape == slots.shape, f"{slots.shape[0]} records to {copy_slots.shape[0]} rows"
    if into is not None:
        _slots(into.columns)
        _slots(into.span)
        assert into.columns.shape == slots.shape and into.span.shape == (2,), "a column for each slot, and one span"
        assert into.lse.shape == (queries.shape[0], slots.shape[0]), f"the result is {tuple(into.lse.shape)}"
        assert into.lse.dtype == torch.float32 and into.lse.is_contiguous(), "the result is float32, contiguous"


def entries(q: Tensor, entries: Tensor, block_table: Tensor, lens: Tensor) -> None:
    """Arguments of the kernels that read entries through a block table (`kernels/csa`)."""
    assert q.dim() == 3 and entries.dim() == 3, f"q {tuple(q.shape)}, entries {tuple(entries.shape)}"
    dim = q.shape[2]
    assert entries.shape[2] == dim, f"q {tuple(q.shape)} does not fit entries {tuple(entries.shape)}"
    assert entries.stride(2) == 1 and entries.stride(1) == dim, "a slot's entries must be contiguous"
    assert block_table.dim() == 2 and block_table.shape[0] == lens.shape[0] == q.shape[0]
    assert lens.is_contiguous() and (block_table.stride(1) == 1 or block_table.shape[1] == 1)


def _heads_are_contiguous(kv: Tensor) -> bool:
    return kv.stride(5) == 1 and kv.stride(4) == kv.shape[5]


def _slots(slots: Tensor) -> None:
    assert slots.dim() == 1 and slots.is_contiguous() and slots.dtype == torch.int64, "slots are int64, contiguous"


def _scale(scale: Tensor, kv: Tensor) -> None:
    assert scale.dtype == torch.float32 and scale.shape[1:] == kv.shape[1:4], f"scales {tuple(scale.shape)}"
    assert scale.shape[0] == kv.shape[0], f"scales of {scale.shape[0]} slots, not {kv.shape[0]}"

import dataclasses
import pickle

import pytest
import torch

from forecache.workers.errors import UnsupportedModelError
from forecache.workers.memory.format.layout import (
    FIELD_ALIGNMENT_BYTES,
    ChunkLayout,
    Field,
    attention_layout,
    chunk_fingerprint,
    cold_layout,
)

MIXED = ChunkLayout(
    "model",
    16,
    (
        Field("kv", (2, 3, 5), torch.bfloat16),
        Field("scales", (3,), torch.float32),
        Field("codes", (7, 11), torch.uint8),
    ),
)


def test_fields_are_aligned_and_do_not_overlap() -> None:
    assert MIXED.offsets == {"kv": 0, "scales": 256, "codes": 512}
    assert MIXED.nbytes == 768
    for field in MIXED.fields:
        assert MIXED.offsets[field.name] % FIELD_ALIGNMENT_BYTES == 0
    assert [field.nbytes for field in MIXED.fields] == [60, 12, 77]


def test_views_share_memory_and_keep_to_their_field() -> None:
    pool = torch.zeros(4, MIXED.nbytes, dtype=torch.uint8)
    expected = {}
    for field in MIXED.fields:
        view = MIXED.view(pool, field.name)
        assert view.shape == (4, *field.shape)
        assert view.dtype == field.dtype
        expected[field.name] = torch.randint(100, view.shape).to(field.dtype)
        view.copy_(expected[field.name])
    for field in MIXED.fields:
        assert torch.equal(MIXED.view(pool, field.name), expected[field.name])
    padding = torch.cat([pool[:, 60:256], pool[:, 268:512], pool[:, 589:]], dim=1)
    assert not padding.any()


def test_views_of_rows_that_are_further_apart() -> None:
    wide = torch.zeros(3, 2 * MIXED.nbytes, dtype=torch.uint8)
    rows = wide[:, MIXED.nbytes :]
    MIXED.view(rows, "scales")[1] = torch.tensor([1.0, 2.0, 3.0])
    assert MIXED.view(rows.clone(), "scales")[1].tolist() == [1.0, 2.0, 3.0]
    assert not wide[:, : MIXED.nbytes].any()


def test_fingerprint_tells_every_difference() -> None:
    kv, scales, codes = MIXED.fields
    others = [
        MIXED,
        dataclasses.replace(MIXED, model="other"),
        dataclasses.replace(MIXED, chunk_tokens=32),
        dataclasses.replace(MIXED, fields=(scales, kv, codes)),
        dataclasses.replace(MIXED, fields=(kv, scales)),
        dataclasses.replace(MIXED, fields=(Field("kv", (2, 3, 5), torch.float16), scales, codes)),
        dataclasses.replace(MIXED, fields=(Field("kv", (3, 2, 5), torch.bfloat16), scales, codes)),
        dataclasses.replace(MIXED, fields=(Field("k", (2, 3, 5), torch.bfloat16), scales, codes)),
    ]
    assert len({layout.fingerprint for layout in others}) == len(others)


def test_pickled_layout_is_the_same() -> None:
    copy = pickle.loads(pickle.dumps(MIXED))
    assert copy == MIXED
    assert copy.fingerprint == MIXED.fingerprint


def test_attention_layout() -> None:
    layout = attention_layout("m", layers=3, kv_heads=2, head_dim=64, chunk_tokens=16, dtype=torch.bfloat16)
    assert layout.nbytes == 3 * 2 * 2 * 16 * 64 * 2
    pool = torch.zeros(2, layout.nbytes, dtype=torch.uint8)
    assert layout.view(pool, "kv").shape == (2, 3, 2, 2, 16, 64)


def llama_like(dtype: torch.dtype) -> ChunkLayout:
    return attention_layout("m", layers=3, kv_heads=2, head_dim=64, chunk_tokens=16, dtype=dtype)


def test_fp8_chunks_carry_a_scale_per_layer_part_and_head() -> None:
    layout = llama_like(torch.float8_e4m3fn)
    numbers = 3 * 2 * 2 * 16 * 64
    assert layout.offsets == {"kv": 0, "scale": numbers}
    assert layout.nbytes == numbers + FIELD_ALIGNMENT_BYTES
    pool = torch.zeros(2, layout.nbytes, dtype=torch.uint8)
    assert layout.view(pool, "kv").shape == (2, 3, 2, 2, 16, 64)
    scale = layout.view(pool, "scale")
    assert scale.shape == (2, 3, 2, 2) and scale.dtype == torch.float32
    assert scale.data_ptr() - pool.data_ptr() == numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cold_layout_of_a_pool(dtype: torch.dtype) -> None:
    hot, fp8 = llama_like(dtype), llama_like(torch.float8_e4m3fn)
    assert cold_layout(hot, "auto") is hot
    assert cold_layout(hot, "fp8") == fp8
    assert cold_layout(fp8, "fp8") == cold_layout(fp8, "auto") == fp8


def test_cold_fp8_is_for_plain_kv() -> None:
    with pytest.raises(UnsupportedModelError, match="--cold-dtype fp8"):
        cold_layout(MIXED, "fp8")


def test_chunk_fingerprint_tells_cold_formats_apart() -> None:
    hot = llama_like(torch.bfloat16)
    cold = cold_layout(hot, "fp8")
    assert chunk_fingerprint(hot, hot) == hot.fingerprint
    names = {chunk_fingerprint(hot, hot), chunk_fingerprint(hot, cold), chunk_fingerprint(cold, cold)}
    names.add(chunk_fingerprint(llama_like(torch.float16), cold))
    assert len(names) == 4

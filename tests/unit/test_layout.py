import dataclasses
import pickle

import torch

from forecache.workers.memory.layout import FIELD_ALIGNMENT_BYTES, ChunkLayout, Field, attention_layout

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

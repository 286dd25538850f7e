"""Chunks that are held back until the host knows that they are finite: their own sequence can read them."""

from typing import Any

import torch

from forecache.workers.core.requests import GenerateRequest, SamplingParams
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.memory.format.keys import root_key
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.deepseek_v4.layout import StepLayout
from forecache.workers.models.dense.streamed_past import StreamedPast

CHUNK = 16
LAYOUT = attention_layout("m", layers=1, kv_heads=1, head_dim=8, chunk_tokens=CHUNK, dtype=torch.float32)
DEVICE = torch.device("cpu")


def held_back() -> tuple[TokenSequence, HotPool, int]:
    """A sequence with one held-back chunk, which is neither resident nor found by its key."""
    request = GenerateRequest("r", tuple([5] * (CHUNK + 3)), SamplingParams(max_tokens=9))
    seq = TokenSequence(request, holder="r", root=root_key("x"), chunk_tokens=CHUNK, keep_ratio=0.5, policy="lookahead")
    pool = HotPool(LAYOUT, 4, DEVICE)
    slot = pool.allocate()
    assert slot is not None
    seq.complete_chunk()
    pool.hold_back(slot)
    seq.held_back[0] = slot
    return seq, pool, slot


def test_in_a_stream_of_a_llama() -> None:
    seq, pool, slot = held_back()
    hot: Any = None  # of no use to where chunks are
    past = StreamedPast.of(seq, pool, None, hot, None, DEVICE)
    assert past.hot == {0: slot} and past.segments == ()


def test_in_a_stream_of_deepseek_v4() -> None:
    seq, pool, slot = held_back()
    unused: Any = None
    past = StepLayout(unused, unused, pool, CHUNK).past(seq, CHUNK)
    assert past.hot_slots.tolist() == [slot] and past.cold_slots.tolist() == []

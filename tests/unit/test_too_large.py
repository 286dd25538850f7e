"""A request that memory can never hold gets an error that the client can act on, not a retry hint."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_workers import Workers, stream_over

from forecache.cluster.errors import from_exception
from forecache.workers.core.requests import GenerateRequest, SamplingParams, TokenEvent
from forecache.workers.errors import InvalidRequestError
from forecache.workers.llm import LLM
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.models.backbone import expected_layout, load_config

DSV4 = Path(__file__).parents[1] / "models/dsv4-small"
CHUNK_TOKENS, SLOTS = 128, 12


@pytest.fixture
def one_of_many_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As in a cluster with ``--address``: the arena has record slots, and chunks can be spread over other nodes."""
    create = Arena.create
    monkeypatch.setattr(Arena, "create", lambda *args, **kwargs: create(*args, **{**kwargs, "record_bytes": 1 << 22}))
    monkeypatch.setattr(ArenaStore, "spread", object())
    with tempfile.TemporaryDirectory(prefix="forecache-test-", dir="/dev/shm") as directory:
        yield Path(directory)


def test_a_deepseek_v4_request_larger_than_its_node_is_refused_for_good(one_of_many_nodes: Path) -> None:
    """DeepSeek-V4's sequences can't be spread, because other nodes have no room for their states."""
    nbytes = expected_layout(load_config(DSV4), chunk_tokens=CHUNK_TOKENS, dtype=torch.float32).nbytes
    sizes: dict[str, Any] = {"cold_bytes": (2 << 20) + SLOTS * nbytes, "hot_bytes": 20 * nbytes, "threads": 1}
    with LLM(
        str(DSV4), skip_tokenizer=True, arena_dir=one_of_many_nodes, dtype="float32", chunk_tokens=CHUNK_TOKENS, **sizes
    ) as llm:
        assert llm.memory.arena.slots == SLOTS and llm.memory.arena.record_slots > SLOTS
        prompt = tuple(range(2, 200)) * 15
        with pytest.raises(InvalidRequestError, match=r"may need 24 chunks .* cold memory holds 12") as refused:
            llm.engine.add_request(GenerateRequest("big", prompt, SamplingParams(max_tokens=4)))
        told = from_exception(refused.value)
        assert (told.status, told.type, told.code) == (400, "invalid_request_error", "invalid_value")
        llm.engine.check_integrity()


@pytest.mark.anyio
async def test_what_no_nodes_together_can_hold_is_a_400() -> None:
    class Source:
        assigned = True

        def __aiter__(self) -> "Source":
            return self

        async def __anext__(self) -> TokenEvent:
            return TokenEvent("r", (), "", "error", error="may need 9 chunks: all nodes hold 8", too_large=True)

        def cancel(self) -> None: ...

    stream = stream_over(Workers(lambda _: Source()))
    with pytest.raises(InvalidRequestError, match="all nodes hold 8") as refused:
        await stream.start(60)
    assert from_exception(refused.value).status == 400

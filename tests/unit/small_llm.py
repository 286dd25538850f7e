"""An in-process LLM that checks at its end that nothing is left referenced, dirty or held."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from forecache.workers.llm import LLM

CHUNK_BYTES = 3 * 2 * 2 * 16 * 16 * 4
"""Of the fixture ``tiny_model``: layers, K and V, heads, tokens, head size, bytes of a float32."""


@contextmanager
def checked_llm(model: Path, **settings: Any) -> Iterator[LLM]:
    """An LLM without a tokenizer, with its arena in shared memory.

    Checks at its end that no slot is referenced, dirty or held.
    """
    with (
        TemporaryDirectory(prefix="llm-test-", dir="/dev/shm") as directory,
        LLM(str(model), skip_tokenizer=True, arena_dir=Path(directory), **settings) as llm,
    ):
        yield llm
        for _ in range(2):
            llm.engine.flush()
        llm.engine.check_integrity()
        llm.memory.check_integrity()
        assert llm.engine.pool.referenced == llm.engine.pool.dirty == llm.memory.stats().held_slots == 0


def open_llm(model: Path, *, hot_chunks: int = 64, **settings: Any) -> AbstractContextManager[LLM]:
    """A ``checked_llm`` of ``tiny_model`` with 16-token chunks that are all kept; ``settings`` change that."""
    defaults: dict[str, Any] = {
        "keep_ratio": 1.0,
        "min_resident_tokens": 0,
        "chunk_tokens": 16,
        "cold_bytes": 4 << 20,
        "hot_bytes": hot_chunks * CHUNK_BYTES,
        "window_steps": 16,
    }
    return checked_llm(model, **(defaults | settings))

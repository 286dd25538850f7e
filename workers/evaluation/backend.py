"""Evaluation in this process: an `LLM` with memory for what the tasks need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from forecache.indexer.serving.config import IndexerConfig, SelectionConfig
from forecache.workers.core.config import EngineConfig
from forecache.workers.evaluation.evaluate import Answer, Column
from forecache.workers.evaluation.ruler import Sample
from forecache.workers.free_memory import available_bytes, room_bytes
from forecache.workers.llm import LLM
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.models.backbone import load_config, pick_device, pick_dtype
from forecache.workers.models.loader import resolve_model
from forecache.workers.models.registry import architecture_of

SPARE_CHUNKS = 64
"""Extra slots for chunks that are being filled, written back or recalled."""
FREE_SHARE = 0.5
"""Largest share of free memory for the default size of hot or cold memory."""
GROUP_BATCHES = 2
"""Batches per call on a GPU: some samples prefill while others decode."""
LATE_POLICY = "wait"
"""Otherwise answers would depend on the machine's speed."""
INTER_TOKEN_TARGET_S = 1.0
"""Long, since no client waits for tokens during prefill."""


class EngineBackend:
    """Answers from an engine in this process. All its columns use the same indexer."""

    def __init__(self, llm: LLM, columns: int) -> None:
        """``columns``: number of columns that answer each group of samples."""
        self._llm = llm
        self._columns = columns

    def group_size(self, tokens: int) -> int:
        """Number of contexts that stay in cold memory until the last column has answered."""
        config = self._llm.config
        # each column adds chunks: its reply, and the chunk where the prompt ends
        chunks = -(-tokens // config.chunk_tokens) + self._columns * 3
        most = _group_size(config, self._llm.engine.pool.memory.device)
        return max(1, min(self._llm.memory.arena.slots // chunks, most))

    def answer(self, samples: Sequence[Sample], column: Column) -> list[Answer]:
        completions = self._llm.generate(
            [sample.prompt_token_ids for sample in samples],
            max_tokens=max(sample.max_tokens for sample in samples),
            policy=column.policy,
            min_resident_tokens=column.min_resident_tokens,
        )
        return [
            Answer(
                text=completion.text,
                prompt_tokens=completion.stats.prompt_tokens,
                cached_tokens=completion.stats.cached_tokens,
                completion_tokens=completion.stats.completion_tokens,
                keep_ratio=completion.stats.keep_ratio,
                coverage=completion.stats.coverage,
            )
            for completion in completions
        ]


def open_engine(
    config: EngineConfig,
    memory: MemoryConfig,
    selection: SelectionConfig,
    indexer: IndexerConfig,
    *,
    longest: int,
    samples: int,
) -> LLM:
    """An engine for ``samples`` contexts of at most ``longest`` tokens, with defaults for what the settings leave open.

    The defaults: a hot pool that holds a batch completely, cold memory for the samples of one call, both within
    ``FREE_SHARE`` of the free memory; steps wait for late predictions; prefill steps are long.
    """
    path = resolve_model(config.model)
    config = config.for_model(architecture_of(load_config(path).model_type).chunk_tokens)
    device = pick_device(config.device)
    config = config.model_copy(update={"max_batch_size": config.for_device(device.type).batch_size})
    context_bytes = _context_bytes(path, config, longest)
    group_bytes = min(samples, _group_size(config, device)) * context_bytes
    cold_bytes = min(group_bytes, _share(room_bytes(memory.arena_dir)))
    on_gpu = device.type == "cuda"
    free_bytes = torch.cuda.mem_get_info(device)[0] if on_gpu else available_bytes() - cold_bytes
    settings: dict[str, Any] = {
        "late_policy": LATE_POLICY,
        "inter_token_target_s": INTER_TOKEN_TARGET_S,
        "hot_bytes": min(config.batch_size * context_bytes, _share(free_bytes)),
    }
    cold: dict[str, Any] = {"cold_bytes": cold_bytes}
    given = {name for name in config.model_fields_set - {"model"} if getattr(config, name) != "auto"}
    settings.update(config.model_dump(include=given))
    cold.update(memory.model_dump(include={n for n in memory.model_fields_set if getattr(memory, n) != "auto"}))
    return LLM(config.model, selection=selection, indexer=indexer, **settings, **cold)


def _group_size(config: EngineConfig, device: torch.device) -> int:
    """Largest number of samples per call."""
    return config.batch_size * (GROUP_BATCHES if device.type == "cuda" else 1)


def _share(free_bytes: int) -> int:
    return max(1, int(FREE_SHARE * free_bytes))


def _context_bytes(path: Path, config: EngineConfig, tokens: int) -> int:
    """Bytes of hot or cold memory for one context of ``tokens`` tokens with its snapshots."""
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    model = load_config(path)
    architecture = architecture_of(model.model_type)
    layout = architecture.chunk_layout(model, chunk_tokens=config.chunk_tokens, dtype=dtype)
    pieces = -(-architecture.state_nbytes(model, dtype) // layout.nbytes) * (tokens // config.snapshot_tokens + 2)
    return (-(-tokens // config.chunk_tokens) + SPARE_CHUNKS + pieces) * layout.nbytes

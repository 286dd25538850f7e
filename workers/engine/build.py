"""Loads a model and assembles an engine around it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.serving.config import IndexerConfig, SelectionConfig
from forecache.indexer.serving.cuda_scorer import CudaIndexer
from forecache.indexer.serving.protocol import Indexer
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.grammar import Grammars
from forecache.workers.core.stats import EngineCounters
from forecache.workers.engine.chunk_lifecycle import ChunkLifecycle
from forecache.workers.engine.detokenize import OutputProcessor
from forecache.workers.engine.engine import Engine
from forecache.workers.engine.pulse import Pulse
from forecache.workers.engine.scheduler import Scheduler
from forecache.workers.engine.sizes import check_after_capture, choose_sizes
from forecache.workers.engine.snapshots import Snapshots, state_layout
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.client.protocol import ColdMemory
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.format.layout import ChunkLayout, chunk_fingerprint, cold_layout
from forecache.workers.memory.hot.cuda_host import RegisteredMemory
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefetcher import Prefetcher
from forecache.workers.models.backbone import load_backbone, load_config
from forecache.workers.models.loader import model_name, resolve_model
from forecache.workers.models.registry import architecture_of
from forecache.workers.models.step.architecture import Backbone, ChosenScorer, QueryEncoder
from forecache.workers.models.step.runner import Runner
from forecache.workers.models.tokenizer import eos_token_ids, load_tokenizer
from forecache.workers.models.verify import verify_backbone
from forecache.workers.residency.budgets import Reservations
from forecache.workers.residency.window import WindowCycle


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory and what serves it.

    Attributes:
        path: its directory or .gguf file.
        config: the engine's settings, with the model's own defaults.
        tokenizer: ``None`` if it was skipped.
        cold_layout: layout of a chunk in cold memory.
        scorer: what scores its chunks.
    """

    path: Path
    config: EngineConfig
    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase | None
    cold_layout: ChunkLayout
    scorer: ChosenScorer


def load_model(
    config: EngineConfig, memory: MemoryConfig, indexer: IndexerConfig, *, skip_tokenizer: bool = False
) -> LoadedModel:
    """Find, load and verify the model that ``config`` names.

    Raises a :class:`forecache.workers.errors.ForecacheError` that says why the model can't be served.
    """
    path = resolve_model(config.model, load_format=config.load_format)
    tokenizer = None if skip_tokenizer else load_tokenizer(path)
    architecture = architecture_of(load_config(path).model_type)
    architecture.refuse_settings(config, config.model)
    config = config.for_model(architecture.chunk_tokens)
    backbone = load_backbone(
        path,
        dtype=config.dtype,
        device=config.device,
        chunk_tokens=config.chunk_tokens,
        max_model_len=config.max_model_len,
        load_format=config.load_format,
        seed=config.seed,
        kv_dtype=config.kv_dtype,
    )
    cold = cold_layout(backbone.layout, memory.cold_dtype)
    scorer = architecture.choose_scorer(indexer, model_name(config.model), backbone)
    verify_backbone(backbone, scorer.spec)
    return LoadedModel(path, config, backbone, tokenizer, cold, scorer)


def build_gpu_indexer(model: LoadedModel, indexer: IndexerConfig, arena: Arena) -> CudaIndexer:
    """An indexer that scores on the model's GPU, or on the first one if the model runs on a CPU."""
    backbone, scorer = model.backbone, model.scorer
    return CudaIndexer(
        scorer.spec,
        arena,
        backbone.device if backbone.device.type == "cuda" else torch.device("cuda"),
        indexer.device_bytes,
        RegisteredMemory,
        scorer.lookahead,
        graph_chunks=model.config.graph_chunks(backbone.max_model_len),
    )


def build_engine(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase | None,
    config: EngineConfig,
    selection: SelectionConfig,
    memory: ColdMemory,
    indexer: Indexer,
    spec: IndexSpec,
    name: str = "local",
    cold_layout: ChunkLayout | None = None,
    query_encoder: QueryEncoder | None = None,
    sharers: int = 1,
) -> Engine:
    """An engine for ``backbone`` over ``memory`` and ``indexer``, which stay the caller's to close.

    Args:
        tokenizer: ``None``: requests are token ids and answers have no text.
        spec: the index records of the chunks.
        name: prefix of the names under which the engine holds chunks in cold memory; unique among its engines.
        cold_layout: layout of a chunk in cold memory; ``None``: as in the hot pool.
        query_encoder: the model's half of a trained indexer.
        sharers: workers on a CPU that share this machine's memory.

    Raises :class:`MemorySizeError` if ``config`` leaves sizes open and memory is too small for the least.
    """
    on_gpu = backbone.device.type == "cuda"
    arena, cold = memory.arena, cold_layout or backbone.layout
    registered = RegisteredMemory(arena.chunks) if on_gpu else None

    def make_runner(pool: HotPool, rows: int) -> Runner:
        return backbone.architecture.make_runner(
            backbone,
            pool,
            arena,
            spec,
            max_rows=rows,
            cold_layout=cold,
            query_encoder=query_encoder,
            snapshot_tokens=config.snapshot_tokens,
            spread=memory.spread,
        )

    sizes = choose_sizes(config, backbone, make_runner, sharers=sharers)
    config = sizes.config
    pool = HotPool(backbone.layout, sizes.hot_bytes // backbone.layout.nbytes, backbone.device)
    runner = make_runner(pool, config.batch_size)
    pulse, counters = Pulse(), EngineCounters()
    states = state_layout(runner, cold.nbytes, config.snapshot_tokens // config.chunk_tokens)
    prefetcher = Prefetcher(pool, memory, runner.index_record, cold, states, pulse.progress)
    reservations = Reservations(pool.num_slots)
    history_steps = 1 if query_encoder is None else query_encoder.steps
    windows = WindowCycle(config, selection, pool, arena, prefetcher, indexer, reservations, history_steps)
    scheduler = Scheduler(config, pool, windows, reservations, arena.slots, backbone.linear_equal)
    snapshots = Snapshots(runner, states, prefetcher, arena)
    if on_gpu:
        runner.warm_up(
            max_batch_size=config.batch_size,
            max_step_tokens=scheduler.max_step_tokens,
            max_chunks=windows.budgets.widest_table(backbone.max_model_len),
            cuda_graphs=config.cuda_graphs,
            torch_compile=config.torch_compile,
        )
        check_after_capture(sizes, backbone.device)
    eos = eos_token_ids(backbone.config, backbone.model.generation_config, tokenizer)
    return Engine(
        name=name,
        config=config,
        backbone=backbone,
        runner=runner,
        pool=pool,
        memory=memory,
        prefetcher=prefetcher,
        windows=windows,
        scheduler=scheduler,
        snapshots=snapshots,
        chunks=ChunkLifecycle(pool, arena, prefetcher, windows, counters, snapshots),
        outputs=OutputProcessor(tokenizer, eos, backbone.layout.nbytes, windows),
        grammars=Grammars(tokenizer, eos),
        counters=counters,
        pulse=pulse,
        registered=registered,
        fingerprint=chunk_fingerprint(backbone.layout, cold),
        retrieval_heads=spec.kind == "tokens",
    )

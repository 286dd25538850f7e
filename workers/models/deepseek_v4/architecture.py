"""DeepSeek-V4: sliding windows, and attention over compressed entries (CSA and HCA)."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from forecache.indexer.flashmemory.checkpoint import FlashMemoryIndexer
from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.serving.config import IndexerConfig
from forecache.workers.core.config import EngineConfig
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.deepseek_v4.attention import serve_attention
from forecache.workers.models.deepseek_v4.runner import DeepseekV4Runner
from forecache.workers.models.deepseek_v4.scorer import choose_scorer, entries_spec, retrievers_digest
from forecache.workers.models.deepseek_v4.shape import (
    CHUNK_TOKENS,
    CSA,
    HCA,
    MODEL_TYPE,
    DeepseekV4Shape,
    refuse_mtp,
    refuse_variants,
)
from forecache.workers.models.step.architecture import (
    Architecture,
    Backbone,
    ChosenScorer,
    ExpectedScorer,
    Geometry,
    LayerKind,
    LayerSpec,
    QueryEncoder,
)

if TYPE_CHECKING:  # it imports Ray, which an engine in one process does without
    from forecache.workers.memory.client.memory import RemoteSpread

KINDS: dict[str, LayerKind] = {CSA: "compressed", HCA: "heavily_compressed"}


class DeepseekV4(Architecture):
    """Every layer has a sliding window, which is state; CSA and HCA layers also write compressed entries to chunks.

    Only CSA layers choose among entries, so only they depend on which chunks are resident. All HCA entries of a
    sequence stay on the device.
    """

    plain_kv = False
    chunk_tokens = CHUNK_TOKENS
    recording = "entries"

    def refuse(self, config: Any, name: str) -> None:
        refuse_variants(config, name)

    def refuse_tensors(self, path: Path, files: Mapping[str, str]) -> None:
        refuse_mtp(path, files)

    def refuse_settings(self, settings: EngineConfig, name: str) -> None:
        # index keys and queries say in which order entries come next, not which share of the attention goes to them
        if settings.fallback:
            raise UnsupportedModelError(
                f"--fallback raises the keep ratio of a sequence while its coverage is low, and for {name}, of type "
                f"'{MODEL_TYPE}', coverage is not measured: it would never do anything. Leave --fallback out, and "
                "choose a larger --keep-ratio where answers need more; 1.0 is exact."
            )

    def layers(
        self, config: Any, *, chunk_tokens: int, dtype: torch.dtype, geometry: Geometry | None = None
    ) -> tuple[LayerSpec, ...]:
        shape, size = DeepseekV4Shape.of(config), dtype.itemsize
        entry = shape.head_dim + shape.index_dim  # with its index key
        chunk_bytes = {CSA: entry * size / shape.csa_rate, HCA: shape.head_dim * size / shape.hca_rate}
        # of the projections, (kv, gate) twice, of the tokens from which the next entry will be made
        state_bytes = {CSA: shape.csa_rate * 4 * entry * size}
        products = {
            CSA: shape.index_heads * shape.index_dim / shape.csa_rate,  # attention itself is to at most topk entries
            HCA: 2 * shape.heads * shape.head_dim / shape.hca_rate,
        }
        return tuple(
            LayerSpec(
                kind=KINDS.get(kind, "sliding_window"),
                chunk_bytes_per_token=chunk_bytes.get(kind, 0),
                state_bytes=shape.window * shape.head_dim * size + state_bytes.get(kind, 0),
                indexed=kind == CSA,
                past_products=products.get(kind, 0),
            )
            for kind in shape.kinds
        )

    def chunk_layout(
        self,
        config: Any,
        *,
        chunk_tokens: int,
        dtype: torch.dtype,
        fingerprint: str = "",
        geometry: Geometry | None = None,
    ) -> ChunkLayout:
        return DeepseekV4Shape.of(config).layout(fingerprint, chunk_tokens=chunk_tokens, dtype=dtype)

    def replace_attention(self, model: PreTrainedModel, path: Path) -> Geometry:
        shape = serve_attention(model)
        return Geometry(len(shape.kinds), shape.heads, 1, shape.head_dim, shape.head_dim**-0.5)

    def make_runner(
        self,
        backbone: Backbone,
        pool: HotPool,
        arena: Arena | None,
        spec: IndexSpec,
        *,
        max_rows: int = 1,
        cold_layout: ChunkLayout | None = None,
        query_encoder: QueryEncoder | None = None,
        snapshot_tokens: int = 4096,
        spread: "RemoteSpread | None" = None,
    ) -> DeepseekV4Runner:
        assert query_encoder is None or isinstance(query_encoder, FlashMemoryIndexer), "another architecture's indexer"
        return DeepseekV4Runner(
            backbone,
            pool,
            arena,
            spec,
            max_rows=max_rows,
            retriever=query_encoder,
            snapshot_tokens=snapshot_tokens,
        )

    def trained_digest(self, settings: IndexerConfig, name: str, config: Any, *, chunk_tokens: int) -> str | None:
        path = Path(settings.checkpoint)
        return retrievers_digest(path) if path.is_file() else None

    def expected_scorer(self, settings: IndexerConfig, name: str, config: Any, *, chunk_tokens: int) -> ExpectedScorer:
        # whether retrievers fit is known only once the model is loaded
        return ExpectedScorer(entries_spec(config, chunk_tokens), digest=None, informed=True)

    def choose_scorer(self, settings: IndexerConfig, name: str, backbone: Backbone) -> ChosenScorer:
        return choose_scorer(settings, name, backbone)

    def exact_tokens(self, config: Any, dtype: torch.dtype) -> int | None:
        # where not all entries are selected, rounding to half precision decides which are
        shape = DeepseekV4Shape.of(config)
        return None if dtype == torch.float32 else shape.topk * shape.csa_rate

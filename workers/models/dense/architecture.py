"""Decoders whose layers all attend to the K/V of all tokens: most models that transformers knows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedModel

from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.manifest import find_manifest
from forecache.indexer.serving.config import IndexerConfig
from forecache.indexer.serving.lookahead import LookaheadScorer
from forecache.workers.errors import UnsupportedModelError, explained
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.layout import ChunkLayout, attention_layout
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.dense.attention import ATTENTION_NAME
from forecache.workers.models.dense.fused_linears import fuse_checked
from forecache.workers.models.dense.probe import expected_geometry, inspect_attention
from forecache.workers.models.dense.remote_past import RemotePast
from forecache.workers.models.dense.runner import ModelRunner
from forecache.workers.models.dense.scorer import choose_scorer, find_before_load
from forecache.workers.models.step.architecture import (
    Architecture,
    Backbone,
    ChosenScorer,
    ExpectedScorer,
    Geometry,
    LayerSpec,
    QueryEncoder,
)

if TYPE_CHECKING:  # it imports Ray, which an engine in one process does without
    from forecache.workers.memory.client.memory import RemoteSpread


class Dense(Architecture):
    """All layers are alike: chunks hold their K/V, and sequences have no other state."""

    plain_kv = True
    recording = "attention"

    def refuse(self, config: Any, name: str) -> None:
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UnsupportedModelError(
                f"{name} has layers of kind {', '.join(sorted(kinds - {'full_attention'}))}; only models whose layers "
                "all use full attention can be served."
            )

    def layers(
        self, config: Any, *, chunk_tokens: int, dtype: torch.dtype, geometry: Geometry | None = None
    ) -> tuple[LayerSpec, ...]:
        shape = geometry or expected_geometry(config)
        fields = self.chunk_layout(config, chunk_tokens=chunk_tokens, dtype=dtype, geometry=shape).fields
        layer = LayerSpec(
            kind="full",
            chunk_bytes_per_token=sum(field.nbytes for field in fields) / shape.layers / chunk_tokens,
            state_bytes=0,
            indexed=True,
            past_products=2 * shape.heads * shape.head_dim,  # its key, and its value
        )
        return (layer,) * shape.layers

    def chunk_layout(
        self,
        config: Any,
        *,
        chunk_tokens: int,
        dtype: torch.dtype,
        fingerprint: str = "",
        geometry: Geometry | None = None,
    ) -> ChunkLayout:
        shape = geometry or expected_geometry(config)
        return attention_layout(
            fingerprint,
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            chunk_tokens=chunk_tokens,
            dtype=dtype,
        )

    def replace_attention(self, model: PreTrainedModel, path: Path) -> Geometry:
        if model.device.type == "cuda":
            with explained(path, "can't be run"):
                fuse_checked(model)
        geometry = inspect_attention(model)
        model.set_attn_implementation(ATTENTION_NAME)
        return geometry

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
    ) -> ModelRunner:
        assert query_encoder is None or isinstance(query_encoder, LookaheadScorer), "an indexer of another architecture"
        remote = None if spread is None else RemotePast(spread, cold_layout or backbone.layout)
        return ModelRunner(backbone, pool, arena, spec, max_rows, cold_layout, query_encoder, remote)

    def trained_digest(self, settings: IndexerConfig, name: str, config: Any, *, chunk_tokens: int) -> str | None:
        trained = find_before_load(settings, name, config, chunk_tokens)
        return None if trained is None else trained.digest

    def expected_scorer(self, settings: IndexerConfig, name: str, config: Any, *, chunk_tokens: int) -> ExpectedScorer:
        shape = expected_geometry(config)
        manifest = find_manifest(
            settings.manifest,
            name,
            model_type=config.model_type,
            layers=shape.layers,
            attention_heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
        trained = find_before_load(settings, name, config, chunk_tokens)
        if trained is not None:
            spec = trained.index_spec
        elif manifest is not None:
            spec = IndexSpec.from_manifest(manifest, chunk_tokens=chunk_tokens)
        else:
            spec = IndexSpec.bounds(
                shape.layers, shape.heads, shape.kv_heads, shape.head_dim, chunk_tokens=chunk_tokens
            )
        return ExpectedScorer(spec, None if trained is None else trained.digest, informed=manifest is not None)

    def choose_scorer(self, settings: IndexerConfig, name: str, backbone: Backbone) -> ChosenScorer:
        return choose_scorer(settings, name, backbone)

    @contextmanager
    def reference_attention(self, model: PreTrainedModel, backend: Literal["eager", "sdpa"]) -> Iterator[None]:
        try:
            model.set_attn_implementation(backend)
            yield
        finally:
            model.set_attn_implementation(ATTENTION_NAME)

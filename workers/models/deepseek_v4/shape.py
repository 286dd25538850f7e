"""Shapes of a DeepSeek-V4 model, what of it is refused, and what its chunks and index records hold."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from forecache.indexer.records.index_spec import IndexSpec
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.memory.format.layout import ChunkLayout, Field

MODEL_TYPE = "deepseek_v4"
CHUNK_TOKENS = 256
"""Tokens of a chunk where none are set: 64 entries of four tokens, as published."""
SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
PUBLISHED_CSA_LAYERS, PUBLISHED_TARGETS = 21, (10, 12, 20)
"""CSA layers of DeepSeek-V4-Flash, and those that FlashMemory's retrievers read (arXiv 2606.09079)."""


@dataclass(frozen=True)
class DeepseekV4Shape:
    """``kinds``: kind of each layer; ``window``: tokens of the sliding window, the present one included.

    An entry of a CSA layer stands for ``csa_rate`` tokens, one of an HCA layer for ``hca_rate``; ``topk`` entries are
    what a token attends to in a CSA layer.
    """

    kinds: tuple[str, ...]
    heads: int
    head_dim: int
    window: int
    index_heads: int
    index_dim: int
    topk: int
    csa_rate: int
    hca_rate: int

    @classmethod
    def of(cls, config: Any) -> Self:
        return cls(
            kinds=tuple(config.layer_types),
            heads=int(config.num_attention_heads),
            head_dim=int(config.head_dim),
            window=int(config.sliding_window),
            index_heads=int(config.index_n_heads),
            index_dim=int(config.index_head_dim),
            topk=int(config.index_topk),
            csa_rate=int(config.compress_rates[CSA]),
            hca_rate=int(config.compress_rates[HCA]),
        )

    def _numbers(self, kind: str) -> dict[int, int]:
        return {layer: i for i, layer in enumerate(n for n, other in enumerate(self.kinds) if other == kind)}

    @property
    def csa(self) -> dict[int, int]:
        """Layer → its number among the CSA layers."""
        return self._numbers(CSA)

    @property
    def hca(self) -> dict[int, int]:
        """Layer → its number among the HCA layers."""
        return self._numbers(HCA)

    @property
    def targets(self) -> tuple[int, ...]:
        """CSA layers, counted from 0 over these alone, that the Memory Indexer reads where no checkpoint says which:
        the published ones, in proportion."""
        last = max(len(self.csa) - 1, 0)
        places = (layer * last / (PUBLISHED_CSA_LAYERS - 1) for layer in PUBLISHED_TARGETS)
        return tuple(sorted({round(place) for place in places}))

    def layout(self, model: str, *, chunk_tokens: int, dtype: torch.dtype) -> ChunkLayout:
        """``entries`` and ``index`` (their index keys): [CSA layers, chunk_tokens / csa_rate, dim], and ``hca``:
        [HCA layers, chunk_tokens / hca_rate, head_dim], of the tokens of one chunk.

        Raises :class:`UnsupportedModelError` where an entry would stand for tokens of two chunks.
        """
        for rate in (self.csa_rate, self.hca_rate):
            if chunk_tokens % rate:
                raise UnsupportedModelError(
                    f"a DeepSeek-V4 model compresses {rate} tokens into one entry, and chunks of {chunk_tokens} tokens "
                    f"would cut entries in two: make --chunk-tokens a multiple of {rate}, for example {CHUNK_TOKENS}."
                )
        per_chunk = chunk_tokens // self.csa_rate
        fields = [
            Field("entries", (len(self.csa), per_chunk, self.head_dim), dtype),
            Field("index", (len(self.csa), per_chunk, self.index_dim), dtype),
        ]
        if self.hca:
            fields.append(Field("hca", (len(self.hca), chunk_tokens // self.hca_rate, self.head_dim), dtype))
        return ChunkLayout(model, chunk_tokens, tuple(fields))

    def index_spec(
        self, chunk_tokens: int, *, threshold: float, adaptive: bool, targets: tuple[int, ...], heads: int
    ) -> IndexSpec:
        """Records of the index keys of the ``targets``, and ``heads`` queries for each of them."""
        return IndexSpec(
            kind="entries",
            query_heads=tuple((layer, head) for layer in targets for head in range(heads)),
            kv_heads=tuple((layer, 0) for layer in targets),
            query_to_kv=tuple(number for number in range(len(targets)) for _ in range(heads)),
            head_dim=self.index_dim,
            chunk_tokens=chunk_tokens // self.csa_rate,
            scale=1.0,
            dtype=torch.int8,
            threshold=threshold,
            adaptive_entries=self.topk if adaptive else 0,
        )


def refuse_variants(config: Any, name: str) -> None:
    """Raise :class:`UnsupportedModelError` for a DeepSeek-V4 configuration that is not served."""
    quantization = getattr(config, "quantization_config", None)
    experts = getattr(config, "expert_dtype", None)
    if quantization is not None:
        as_dict = quantization if isinstance(quantization, dict) else quantization.to_dict()
        experts = as_dict.get("expert_dtype", experts)
    if experts is not None and "fp4" in str(experts).lower():
        raise UnsupportedModelError(
            f"{name} has fp4 experts (expert_dtype '{experts}'), which forecache can't compute; convert them to bf16."
        )
    if quantization is not None:
        method = as_dict.get("quant_method", "an unnamed method")
        raise UnsupportedModelError(
            f"{name} has weights quantised by '{method}'; DeepSeek-V4 is served in bf16, fp16 or fp32: convert it."
        )
    if CSA not in config.layer_types:
        raise UnsupportedModelError(
            f"{name} is of type '{MODEL_TYPE}' without a layer of Compressed Sparse Attention: there is nothing that "
            "chunks could be chosen for."
        )


def refuse_mtp(path: Path, files: Mapping[str, str]) -> None:
    """Raise :class:`UnsupportedModelError` if there are MTP layers among the tensors of ``files`` (name → its file),
    which transformers would leave out without a word."""
    for name, file in sorted(files.items()):
        if re.search(r"(^|\.)mtp\.", name):
            raise UnsupportedModelError(
                f"{path} has MTP layers (weight '{name}' in {file}): predicting several tokens a step is not "
                "supported. Remove these weights to serve the model without them."
            )

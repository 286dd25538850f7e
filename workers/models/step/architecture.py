"""The interface of an architecture: everything the engine must know about a family of models.

`docs/add-an-architecture.md` walks through it. The entries are in :mod:`forecache.workers.models.registry`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from transformers import PreTrainedModel

from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.serving.config import IndexerConfig
from forecache.indexer.serving.lookahead import LookaheadScorer
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.stats import ScorerName
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.format.layout import ChunkLayout
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.step.runner import Runner

if TYPE_CHECKING:  # it imports Ray, which an engine in one process does without
    from forecache.workers.memory.client.memory import RemoteSpread

LayerKind = Literal["full", "compressed", "heavily_compressed", "sliding_window"]


@dataclass(frozen=True)
class LayerSpec:
    """What one layer stores, and where.

    ``chunk_bytes_per_token``: bytes of a chunk that this layer writes, for each of the chunk's tokens; 0 if the layer
    stores nothing in chunks. ``state_bytes``: bytes of a sequence's state outside its chunks (a window, a recurrent
    state) that a snapshot saves for this layer; they do not grow with the context. ``indexed``: during decode the layer
    reads only resident chunks, so an indexer must predict which. ``past_products``: multiply-adds of one new token for
    each token before it.
    """

    kind: LayerKind
    chunk_bytes_per_token: float
    state_bytes: int
    indexed: bool
    past_products: float


@dataclass(frozen=True)
class Geometry:
    """Shapes of a model's attention; ``scale`` multiplies its logits."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True)
class Backbone:
    """A loaded model, its attention replaced by that of ``architecture``.

    ``geometry``: shapes of its attention; ``layers``: what each layer stores; ``layout``: the bytes of a chunk in the
    hot pool; ``fingerprint`` names the weights; ``max_model_len``: most tokens of prompt and answer together.
    """

    architecture: "Architecture"
    model: PreTrainedModel
    path: Path
    fingerprint: str
    geometry: Geometry
    layers: tuple[LayerSpec, ...]
    layout: ChunkLayout
    max_model_len: int
    device: torch.device
    dtype: torch.dtype

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def linear_equal(self) -> float:
        """Tokens of past at which attention to them costs a new token as much as all weights do."""
        return self.body_parameters / sum(layer.past_products for layer in self.layers)

    @property
    def body_parameters(self) -> int:
        """Weights that every token passes through: all but the embeddings of tokens and the output layer."""
        vocabulary = int(self.config.vocab_size)
        return sum(weight.numel() for weight in self.model.parameters() if vocabulary not in weight.shape)


class QueryEncoder(Protocol):
    """The half of a trained indexer that runs next to the model: it makes queries from hidden states."""

    @property
    def steps(self) -> int:
        """Decode steps whose hidden states it reads."""
        ...


@dataclass(frozen=True)
class ChosenScorer:
    """What scores a model's chunks.

    ``spec``: the index records, and the model's heads that query them. ``query_encoder``: the trained indexer, if one
    serves, and ``digest`` the name of its weights. ``lookahead``: the same, if the indexer processes need it to score.
    """

    spec: IndexSpec
    query_encoder: QueryEncoder | None = None
    digest: str = ""
    lookahead: LookaheadScorer | None = None

    @property
    def name(self) -> ScorerName:
        if self.query_encoder is not None:
            return "trained"
        return "bounds" if self.spec.kind == "bounds" else "training-free"


@dataclass(frozen=True)
class ExpectedScorer:
    """What will score a model's chunks, as far as its name and configuration tell.

    ``digest`` names the weights of the trained indexer; None: there is none. ``informed``: the model's own attention
    says which chunks matter, through retrieval heads or an index of the model; otherwise chunks are scored by bounds.
    """

    spec: IndexSpec
    digest: str | None
    informed: bool


class Architecture(ABC):
    """A family of models. Instances have no state: everything comes from the arguments.

    Methods that take ``config``, the configuration that transformers reads from config.json, work before any weight is
    loaded: `forecache serve` sizes memory with them.
    """

    plain_kv: ClassVar[bool]
    """Whether chunks hold keys and values alone, so that they can be stored as fp8 too."""
    chunk_tokens: ClassVar[int] = EngineConfig.model_fields["chunk_tokens"].default
    """Tokens of a chunk, if the user sets none."""
    recording: ClassVar[Literal["attention", "entries"]]
    """What `forecache indexer record` records of these models: attention to chunks, or to compressed entries."""

    @abstractmethod
    def refuse(self, config: Any, name: str) -> None:
        """Raise :class:`UnsupportedModelError` for a model ``name`` that would be computed wrongly. Everything that
        holds for all decoders is checked already."""

    def refuse_tensors(self, path: Path, files: Mapping[str, str]) -> None:  # noqa: B027 - most have none
        """Raise :class:`UnsupportedModelError` for tensors of the checkpoint at ``path`` that must not be ignored.
        ``files``: name of a tensor → its file."""

    def refuse_settings(self, settings: EngineConfig, name: str) -> None:  # noqa: B027 - most take all
        """Raise :class:`UnsupportedModelError` for settings that mean nothing for model ``name``."""

    @abstractmethod
    def layers(
        self, config: Any, *, chunk_tokens: int, dtype: torch.dtype, geometry: Geometry | None = None
    ) -> tuple[LayerSpec, ...]:
        """All layers, in their order, with chunks of ``chunk_tokens`` tokens stored in ``dtype``.

        ``geometry``: as :meth:`replace_attention` found it; None: as ``config`` lets expect.
        """

    def state_nbytes(self, config: Any, dtype: torch.dtype) -> int:
        """Bytes of a snapshot of one sequence's state outside its chunks; 0: there is none."""
        return sum(layer.state_bytes for layer in self.layers(config, chunk_tokens=self.chunk_tokens, dtype=dtype))

    @abstractmethod
    def chunk_layout(
        self,
        config: Any,
        *,
        chunk_tokens: int,
        dtype: torch.dtype,
        fingerprint: str = "",
        geometry: Geometry | None = None,
    ) -> ChunkLayout:
        """The bytes of a chunk in the hot pool: of each field, :class:`LayerSpec` says a layer's share.

        ``fingerprint`` names the weights, "" before they are known; ``geometry`` as in :meth:`layers`.

        Raises :class:`UnsupportedModelError` if ``chunk_tokens`` does not fit the model.
        """

    @abstractmethod
    def replace_attention(self, model: PreTrainedModel, path: Path) -> Geometry:
        """Make ``model``, loaded from ``path`` with transformers' eager attention, read forecache's steps: its forward
        takes them as the keyword argument ``forecache``.

        Raises :class:`UnsupportedModelError` if its attention can't be replaced exactly.
        """

    @abstractmethod
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
    ) -> Runner:
        """Make the runner for ``backbone``, with chunks in ``pool`` and, if cold, in ``arena``.

        ``spec``: the index records. ``max_rows``: most sequences in a batch. ``cold_layout``: the arena's layout, if it
        differs from the pool's. ``query_encoder``: of the trained indexer. ``snapshot_tokens``: tokens between two
        snapshots of a sequence's state. ``spread``: reads chunks on other nodes.
        """

    @abstractmethod
    def trained_digest(self, settings: IndexerConfig, name: str, config: Any, *, chunk_tokens: int) -> str | None:
        """Names the weights of the trained indexer that will score the chunks of model ``name``; None: none will.

        An indexer that does not fit the model is logged as a warning.
        """

    @abstractmethod
    def expected_scorer(self, settings: IndexerConfig, name: str, config: Any, *, chunk_tokens: int) -> ExpectedScorer:
        """What will score the chunks of model ``name``.

        Raises :class:`forecache.indexer.records.manifest.ManifestError` if ``settings`` name a file that is no manifest
        of this model's retrieval heads.
        """

    @abstractmethod
    def choose_scorer(self, settings: IndexerConfig, name: str, backbone: Backbone) -> ChosenScorer:
        """What scores the chunks of model ``name``.

        The trained indexer that ``settings`` name, if it fits; otherwise a scorer that needs no training. A trained
        indexer that does not fit is logged, since predictions are hints: the answers change little.
        Raises :class:`UnsupportedModelError` for settings that contradict the model.
        """

    # verification at load, see verify.py

    def exact_tokens(self, config: Any, dtype: torch.dtype) -> int | None:
        """Most tokens whose logits can be compared with transformers' in ``dtype``; None: any number."""
        return None

    @contextmanager
    def reference_attention(self, model: PreTrainedModel, backend: Literal["eager", "sdpa"]) -> Iterator[None]:
        """While this is open, ``model`` called without a step of forecache computes transformers' attention.

        Raises :class:`ValueError` if it has no implementation ``backend``, as transformers does.
        """
        if backend != "eager":
            raise ValueError("its attention has only one implementation")
        yield

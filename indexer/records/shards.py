"""Recorded training data on disk: shards of safetensors and one JSON manifest. Reading them does not need the model.

A shard holds a few documents. A document's tensors are named ``<number>/<field>``; its other fields are JSON in the
file's metadata. Shards are written atomically, so a recording that was interrupted resumes with the missing shards.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from forecache.indexer.records.index_spec import Head, IndexSpec

MANIFEST_FILE = "manifest.json"
SEED_WEIGHTS_FILE = "queries.safetensors"


class ShardError(ValueError):
    """Recorded data is missing, damaged or of the wrong kind."""


class RecordingManifest(BaseModel):
    """The manifest, in the file ``FILE``, of a directory of recorded ``CONTENT``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    FILE: ClassVar[str]
    CONTENT: ClassVar[str]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the manifest of ``folder``. Raises :class:`ShardError` if it is missing or invalid."""
        path = folder / cls.FILE
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ShardError(
                f"{folder} holds no recorded {cls.CONTENT}: can't read {path.name}: {error.strerror}"
            ) from error
        except ValidationError as error:
            raise ShardError(f"{path} is not a manifest of recorded {cls.CONTENT}: {error}") from error

    def save(self, folder: Path) -> None:
        """Write the manifest atomically."""
        partial = folder / f"{self.FILE}.{os.getpid()}.partial"
        partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.rename(folder / self.FILE)


class ShardManifest(RecordingManifest):
    """The model that shards were recorded from, and how.

    Attributes:
        query_heads: (layer, head) pairs whose queries can be computed from hidden states. The first ``retrieval_heads``
            of them are the model's retrieval heads, best first.
        index_kv_heads: (layer, KV head) pairs whose keys the index records hold.
        target_layers: layers whose hidden states (inputs of the query projection) are recorded, the second axis of
            ``hidden``.
        rope_scaling: factor of cosine and sine (YaRN's attention factor).
        event_mass: smallest attention share that is recorded as an event.
        recipe: settings from which the documents were generated.
    """

    FILE: ClassVar[str] = MANIFEST_FILE
    CONTENT: ClassVar[str] = "data"

    format_version: Literal[1] = 1
    model_type: str
    model_name: str
    weights_fingerprint: str
    layers: int = Field(ge=1)
    attention_heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    scale: float = Field(gt=0)
    rope_scaling: float
    query_norm_eps: float | None = None
    chunk_tokens: int = Field(ge=1)
    target_layers: tuple[int, ...]
    query_heads: tuple[Head, ...]
    retrieval_heads: int = Field(ge=1)
    index_kv_heads: tuple[Head, ...]
    event_mass: float = Field(gt=0, le=1)
    recipe: dict[str, Any]
    documents: int = Field(ge=1)
    documents_per_shard: int = Field(ge=1)
    seed: int
    torch_version: str
    transformers_version: str

    @property
    def index_spec(self) -> IndexSpec:
        """The layout of the index records, and which of their KV heads each query head reads."""
        return IndexSpec.of_heads(
            self.query_heads,
            self.index_kv_heads,
            group=self.attention_heads // self.kv_heads,
            head_dim=self.head_dim,
            chunk_tokens=self.chunk_tokens,
            scale=self.scale,
        )

    @property
    def retrieval_numbers(self) -> tuple[int, ...]:
        """Numbers of the retrieval heads in events: layer · heads + head."""
        return self.query_numbers[: self.retrieval_heads]

    @property
    def query_numbers(self) -> tuple[int, ...]:
        """Numbers of all query heads in events."""
        return tuple(layer * self.attention_heads + head for layer, head in self.query_heads)

    @property
    def shards(self) -> int:
        return -(-self.documents // self.documents_per_shard)


@dataclass(frozen=True)
class RecordedDocument:
    """One document, and what the model's heads attended to at S recorded steps. A row is one recorded step.

    Attributes:
        task: the document's question ("prose": none); text: the kind of its text; split: "train" or "eval".
        answer: [first, last) chunk of the answer.
        answer_step: the row that writes the answer's first token; -1 if there is none.
        positions: int64 [S], position of the token that the step reads. The step attends to it and all tokens before.
        runs: int64 [R, 2], rows [first, last) of consecutive positions.
        hidden: float16 [S, target layers, hidden].
        records: uint8 [chunks, record bytes] of every chunk; the last chunk is padded with zero keys.
        event_offsets: int64 [S + 1]; row s has the events ``event_offsets[s]:event_offsets[s + 1]``. In an event one
            head puts at least the manifest's ``event_mass`` of its attention on one complete chunk.
        event_chunk: int32 [events]; event_head: int16 [events], layer · heads + head; event_share: float16 [events].
        peak_share: float16 [S, chunks], largest share of any head; 0 for chunks not complete at the row's step.
        bounds_score: float16 [S, chunks], scores by bounds per chunk over all heads; 0 as for ``peak_share``.
    """

    task: str
    text: str
    split: str
    answer: tuple[int, int]
    answer_step: int
    positions: torch.Tensor
    runs: torch.Tensor
    hidden: torch.Tensor
    records: torch.Tensor
    event_offsets: torch.Tensor
    event_chunk: torch.Tensor
    event_head: torch.Tensor
    event_share: torch.Tensor
    peak_share: torch.Tensor
    bounds_score: torch.Tensor

    @property
    def steps(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device) -> "RecordedDocument":
        """The same document with its tensors on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in TENSORS}
        return RecordedDocument(**{field.name: getattr(self, field.name) for field in fields(self)} | moved)


TENSORS = tuple(field.name for field in fields(RecordedDocument) if field.type is torch.Tensor)
FACTS = tuple(field.name for field in fields(RecordedDocument) if field.type is not torch.Tensor)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def write_shard(folder: Path, shard: int, documents: Sequence[RecordedDocument]) -> None:
    """Write one shard atomically."""
    tensors = {
        f"{number}/{name}": getattr(document, name).cpu().contiguous()
        for number, document in enumerate(documents)
        for name in TENSORS
    }
    facts = [{name: getattr(document, name) for name in FACTS} for document in documents]
    path = shard_path(folder, shard)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"documents": json.dumps(facts)})
    partial.rename(path)


class Recording:
    """The documents of a directory, read one at a time.

    ``complete``: whether every shard of the manifest exists. Raises :class:`ShardError` if the directory has no
    manifest or no shard, or if a shard is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = ShardManifest.load(folder)
        self._shards = [shard for shard in range(self.manifest.shards) if shard_path(folder, shard).exists()]
        if not self._shards:
            raise ShardError(f"{folder} has a manifest but no shard; run `forecache indexer record` again")
        self.facts: list[dict[str, Any]] = []
        self._places: list[tuple[Path, int]] = []
        for shard in self._shards:
            path = shard_path(folder, shard)
            try:
                with safe_open(path, framework="pt") as file:
                    facts = json.loads((file.metadata() or {})["documents"])
            except (SafetensorError, KeyError, json.JSONDecodeError) as error:
                raise ShardError(f"{path} is damaged: {error}; delete it and record again") from error
            self.facts.extend(facts)
            self._places.extend((path, number) for number in range(len(facts)))

    @property
    def complete(self) -> bool:
        return len(self._shards) == self.manifest.shards

    @property
    def digest(self) -> str:
        """blake2b-128 of the manifest and of the documents' facts, as hex. It identifies the recording."""
        text = json.dumps([self.manifest.model_dump(mode="json"), self.facts], sort_keys=True)
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def split(self, name: str) -> list[int]:
        """Numbers of the documents of one split."""
        return [number for number, facts in enumerate(self.facts) if facts["split"] == name]

    def document(self, number: int) -> RecordedDocument:
        path, place = self._places[number]
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(f"{place}/{name}") for name in TENSORS}
        facts = dict(self.facts[number])
        return RecordedDocument(**facts | {"answer": tuple(facts["answer"])}, **tensors)

    def documents(self, numbers: Sequence[int]) -> Iterator[RecordedDocument]:
        return map(self.document, numbers)

    @cached_property
    def seed_weights(self) -> dict[str, torch.Tensor]:
        """Weights that compute the model's queries from hidden states.

        ``weight``: float32 [query heads, head_dim, hidden]; ``bias``: float32 [query heads, head_dim];
        ``inverse_frequencies``: float32 [rotated dims / 2]; ``norm``: float32 [query heads, head_dim], only for models
        that normalise queries.
        """
        path = self.folder / SEED_WEIGHTS_FILE
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ShardError(f"can't read {path}: {error}; record again") from error

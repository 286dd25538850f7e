"""Recorded training data for FlashMemory's retrievers: the compressed entries that a DeepSeek-V4 model attends to.

One safetensors file per document, and a JSON manifest with the parameters of the retrievers' formula.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from forecache.indexer.records.shards import RecordingManifest, ShardError

MANIFEST_FILE = "entries.json"
OWN_FILE = "own.safetensors"
"""The model's Lightning Indexers in the retrievers' format; training starts from them."""


class EntryManifest(RecordingManifest):
    """The model that a directory was recorded from, and how.

    ``layers``: the recorded CSA layers, counted over CSA layers from 0. ``frequencies``: RoPE's angles per position of
    the rotated pairs, the last dims of queries and keys. An entry is golden for a step if at that token, or at one of
    the next ``horizon`` tokens that the model generates, a head puts at least ``event_share`` of its attention on it: a
    retrieval event (docs/architecture.md). ``steps``: number of query steps, the last ones.
    """

    FILE: ClassVar[str] = MANIFEST_FILE
    CONTENT: ClassVar[str] = "entries"

    format_version: Literal[2] = 2
    kind: Literal["entries"] = "entries"
    model_name: str
    weights_digest: str
    hidden_size: int = Field(ge=1)
    heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    rank: int = Field(ge=1)
    norm_eps: float
    layers: tuple[int, ...]
    frequencies: tuple[float, ...]
    ratio: int = Field(ge=1)
    chunk_tokens: int = Field(ge=1)
    horizon: int = Field(ge=1)
    event_share: float = Field(gt=0, le=1)
    steps: int = Field(ge=1)
    documents: int = Field(ge=1)
    eval_documents: int = Field(ge=0)
    seed: int


@dataclass(frozen=True)
class EntryDocument:
    """One document at S of its steps.

    ``positions``: int64 [S], position of the token that a step reads. ``hidden``: float16 [S, steps, layers, hidden],
    inputs of the layers' attention at the last steps up to that one. ``keys``: float16 [layers, entries, head_dim],
    index keys as transformers computes them. ``golden_offsets``: int64 [S + 1]; step s has the golden entries
    ``golden_entries[golden_offsets[s]:golden_offsets[s + 1]]``, int32, ascending.
    """

    positions: Tensor
    hidden: Tensor
    keys: Tensor
    golden_offsets: Tensor
    golden_entries: Tensor

    def golden(self, rows: Tensor) -> Tensor:
        """Which entries are golden for the steps ``rows``: bool [rows, entries]."""
        mask = torch.zeros(len(rows), self.keys.shape[1], dtype=torch.bool)
        for place, row in enumerate(rows.tolist()):
            mask[place, self.golden_entries[self.golden_offsets[row] : self.golden_offsets[row + 1]].long()] = True
        return mask

    def to(self, device: torch.device) -> "EntryDocument":
        """The document with positions, hidden states and keys on ``device``; labels stay on the host."""
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in ("positions", "hidden", "keys")}
        return EntryDocument(**moved, golden_offsets=self.golden_offsets, golden_entries=self.golden_entries)


def document_path(folder: Path, number: int) -> Path:
    return folder / f"document-{number:05d}.safetensors"


def write_document(folder: Path, number: int, document: EntryDocument) -> None:
    """Write one document atomically."""
    path = document_path(folder, number)
    partial = path.with_suffix(".partial")
    save_file({field.name: getattr(document, field.name).cpu().contiguous() for field in fields(document)}, partial)
    partial.rename(path)


def read_document(folder: Path, number: int) -> EntryDocument:
    """Read one document. Raises :class:`ShardError` if it is missing or damaged."""
    path = document_path(folder, number)
    try:
        return EntryDocument(**load_file(path))
    except (OSError, SafetensorError, TypeError) as error:
        raise ShardError(f"can't read {path}: {error}; record it again") from error


def read_retrievers(path: Path) -> dict[str, Tensor]:
    """The tensors ``retrievers.l<N>.*`` of a file, in float32. Raises :class:`ShardError` if it is unreadable."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ShardError(f"can't read {path}: {error}") from error

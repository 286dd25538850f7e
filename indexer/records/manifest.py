"""Manifests of a model's retrieval heads, which attend to the answer while it is written, and how they were found."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PACKAGED_MANIFESTS = Path(__file__).parents[1] / "manifests"


class ManifestError(ValueError):
    """A manifest is unreadable or was made for another model."""


class RetrievalHead(BaseModel):
    """A query head. ``score``: mean attention mass on the answer's chunk as the answer is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int = Field(ge=0)
    head: int = Field(ge=0)
    score: float = Field(ge=0, le=1)


class CalibrationRecord(BaseModel):
    """How a manifest was made. ``events``: mean number of heads with a retrieval event on the answer's chunk."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int
    tasks: tuple[str, ...]
    min_tokens: int
    max_tokens: int
    chunk_tokens: int
    seed: int
    events: float
    torch_version: str
    transformers_version: str
    date: str


class RetrievalManifest(BaseModel):
    """The retrieval heads of one model, best first.

    A manifest fits a model of the same shape and, if both names are known, of the same family: "smollm2-135m" also
    fits "SmolLM2-135M-Instruct". ``weights_fingerprint`` is only read, from older files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    model_type: str
    layers: int = Field(ge=1)
    attention_heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    model_name: str | None = None
    weights_fingerprint: str | None = None
    heads: tuple[RetrievalHead, ...] = Field(min_length=1)
    calibration: CalibrationRecord

    @model_validator(mode="after")
    def _heads_exist(self) -> Self:
        if self.attention_heads % self.kv_heads:
            raise ValueError(f"{self.attention_heads} attention heads are not a multiple of {self.kv_heads} KV heads")
        pairs = [(head.layer, head.head) for head in self.heads]
        if len(set(pairs)) != len(pairs):
            raise ValueError("a head is listed twice")
        for layer, head in pairs:
            if layer >= self.layers or head >= self.attention_heads:
                raise ValueError(f"head ({layer}, {head}) is not one of {self.layers} x {self.attention_heads}")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a manifest. Raises :class:`ManifestError` if the file is missing or invalid."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ManifestError(f"can't read the retrieval-head manifest {path}: {error.strerror}") from error
        except ValidationError as error:
            raise ManifestError(f"{path} is not a retrieval-head manifest: {error}") from error

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def differences(
        self,
        *,
        model_type: str,
        layers: int,
        attention_heads: int,
        kv_heads: int,
        head_dim: int,
        model_name: str | None = None,
    ) -> list[str]:
        """Facts in which this model differs from the given one. Names are compared if both are known."""
        differences = [
            f"{name} is {theirs}, the manifest's {ours}"
            for name, ours, theirs in (
                ("model_type", self.model_type, model_type),
                ("layers", self.layers, layers),
                ("attention_heads", self.attention_heads, attention_heads),
                ("kv_heads", self.kv_heads, kv_heads),
                ("head_dim", self.head_dim, head_dim),
            )
            if ours != theirs
        ]
        if self.model_name and model_name and not same_family(self.model_name, model_name):
            differences.append(f"model_name is {model_name}, the manifest's {self.model_name}")
        return differences


def find_manifest(
    setting: str,
    model_name: str | None,
    *,
    model_type: str,
    layers: int,
    attention_heads: int,
    kv_heads: int,
    head_dim: int,
) -> RetrievalManifest | None:
    """The manifest for a model: ``setting`` is "auto" (one that the package includes), "none", or a path.

    Raises :class:`ManifestError` when the manifest at a path is unreadable or was made for a model of another shape.
    """
    if setting == "none":
        return None
    packaged = setting == "auto"
    manifests = _packaged() if packaged else iter([RetrievalManifest.load(Path(setting))])
    for manifest in manifests:
        differences = manifest.differences(
            model_type=model_type,
            layers=layers,
            attention_heads=attention_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            # a manifest that the user names may be for a renamed or fine-tuned copy of the model
            model_name=model_name if packaged else None,
        )
        if not differences:
            return manifest
        if not packaged:
            raise ManifestError(
                f"{setting} was made for another model: {'; '.join(differences)}. "
                "Make one with `forecache indexer calibrate`, or set the manifest to none."
            )
    return None


def _packaged() -> Iterator[RetrievalManifest]:
    # by path, because importlib.resources can't list a namespace package that is installed in editable mode
    for file in sorted(PACKAGED_MANIFESTS.glob("*.json")):
        yield RetrievalManifest.model_validate_json(file.read_text(encoding="utf-8"))


def same_family(one: str, other: str) -> bool:
    """Whether the last part of one name, path or hub id is a prefix of the other's, ignoring case. False for ''."""
    one, other = (name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (one, other))
    return bool(one and other) and (one.startswith(other) or other.startswith(one))

"""Retrieval-head manifests: reading, refusing, matching to a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.records.manifest import (
    CalibrationRecord,
    ManifestError,
    RetrievalHead,
    RetrievalManifest,
    find_manifest,
)

CALIBRATION = CalibrationRecord(
    documents=3,
    tasks=("needle",),
    min_tokens=100,
    max_tokens=200,
    chunk_tokens=64,
    seed=0,
    events=1.5,
    torch_version="2",
    transformers_version="5",
    date="2026-01-01",
)
SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "layers": 30,
    "attention_heads": 9,
    "kv_heads": 3,
    "head_dim": 64,
}
TINY: dict[str, Any] = {"model_type": "llama", "layers": 4, "attention_heads": 6, "kv_heads": 2, "head_dim": 16}


def manifest(**changes: Any) -> RetrievalManifest:
    heads = (RetrievalHead(layer=3, head=5, score=0.5), RetrievalHead(layer=1, head=0, score=0.25))
    return RetrievalManifest(**{**TINY, "heads": heads, "calibration": CALIBRATION, "model_name": "tiny-1b", **changes})


def test_a_manifest_comes_back_from_its_file(tmp_path: Path) -> None:
    manifest().save(tmp_path / "m.json")
    assert RetrievalManifest.load(tmp_path / "m.json") == manifest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": (RetrievalHead(layer=4, head=0, score=0.5),)}, "is not one of 4 x 6"),
        ({"heads": (RetrievalHead(layer=0, head=0, score=0.5),) * 2}, "listed twice"),
        ({"kv_heads": 4}, "not a multiple"),
        ({"heads": ()}, "at least 1"),
        ({"format_version": 2}, "format_version"),
        ({"wings": 2}, "wings"),
    ],
)
def test_what_can_not_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        manifest(**changes)


def test_a_file_that_is_no_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"can't read .*absent\.json"):
        RetrievalManifest.load(tmp_path / "absent.json")
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(ManifestError, match="is not a retrieval-head manifest"):
        RetrievalManifest.load(tmp_path / "m.json")


def test_auto_finds_the_shipped_manifest_of_the_default_model() -> None:
    found = find_manifest("auto", "smollm2-135m", **SMOLLM2_135M)
    assert found is not None
    assert len(found.heads) == 8
    assert found.calibration.documents >= 24
    spec = IndexSpec.from_manifest(found, chunk_tokens=64)
    assert spec.dtype == torch.int8
    for (layer, head), kv in zip(spec.query_heads, spec.query_to_kv, strict=True):
        assert spec.kv_heads[kv] == (layer, head // 3)


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "/models/smollm2-135m/", None])
def test_auto_takes_a_model_by_its_family_name(name: str | None) -> None:
    assert find_manifest("auto", name, **SMOLLM2_135M) is not None


def test_auto_gives_nothing_to_a_model_of_another_name_or_shape() -> None:
    assert find_manifest("auto", "llama-nobody-calibrated", **SMOLLM2_135M) is None
    assert find_manifest("auto", "smollm2-135m", **TINY) is None


def test_none_means_none() -> None:
    assert find_manifest("none", "smollm2-135m", **SMOLLM2_135M) is None


def test_a_path_is_taken_for_a_model_of_its_shape_whatever_the_name(tmp_path: Path) -> None:
    manifest().save(tmp_path / "m.json")
    assert find_manifest(str(tmp_path / "m.json"), "renamed", **TINY) == manifest()


def test_a_path_for_another_shape_says_what_differs(tmp_path: Path) -> None:
    manifest().save(tmp_path / "m.json")
    with pytest.raises(ManifestError, match="layers is 5, the manifest's 4; head_dim is 32, the manifest's 16"):
        find_manifest(str(tmp_path / "m.json"), None, **{**TINY, "layers": 5, "head_dim": 32})


def test_another_name_is_a_difference_where_both_are_known() -> None:
    assert manifest().differences(**TINY, model_name="other") == ["model_name is other, the manifest's tiny-1b"]
    assert manifest().differences(**TINY, model_name="tiny-1b") == manifest().differences(**TINY) == []


def test_a_spec_follows_its_manifest() -> None:
    spec = IndexSpec.from_manifest(manifest(), chunk_tokens=32, scale=0.5)
    assert spec.query_heads == ((3, 5), (1, 0))
    assert spec.kv_heads == ((1, 0), (3, 1))
    assert spec.query_to_kv == (1, 0)
    assert (spec.kind, spec.head_dim, spec.chunk_tokens, spec.scale) == ("tokens", 16, 32, 0.5)
    assert IndexSpec.from_manifest(manifest(), chunk_tokens=32).scale == 0.25

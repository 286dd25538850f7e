"""Calibration of a small random model, against the attention weights that transformers returns."""

import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from forecache.indexer.records.manifest import RetrievalManifest, find_manifest
from forecache.workers.recording.calibrate import (
    ATTENTION,
    HEADS,
    SEED,
    AnswerMass,
    answer_mass,
    calibrate,
    calibration_tasks,
)

CHUNK_TOKENS = 32
DOCUMENTS = 4
LENGTHS: dict[str, Any] = {"min_tokens": 700, "max_tokens": 900}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers with random weights large enough that its heads disagree, and a small tokenizer."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer_class(tokenizer_object=tokenizer).save_pretrained(path)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
        max_position_embeddings=1200,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def exact_mass(model_path: Path) -> torch.Tensor:
    """Mean mass on the answers' chunks from the full attention matrices: float32 [layers, heads]."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager")
    total = torch.zeros(3, 6)
    for task in calibration_tasks(tokenizer, documents=DOCUMENTS, seed=SEED, **LENGTHS):
        tokens = [*task.prompt_token_ids, *task.reply_prefix_token_ids, *task.answer_token_ids[:-1]]
        with torch.inference_mode():
            attentions = torch.stack(model(torch.tensor([tokens]), output_attentions=True).attentions)[:, 0]
        chunks = task.answer_chunks(CHUNK_TOKENS)
        keys = slice(chunks.start * CHUNK_TOKENS, chunks.stop * CHUNK_TOKENS)
        total += attentions[:, :, -len(task.answer_token_ids) :, keys].sum(3).mean(2)
    return total / DOCUMENTS


@pytest.fixture(scope="module")
def manifest(model_path: Path) -> RetrievalManifest:
    return calibrate(model_path, documents=DOCUMENTS, chunk_tokens=CHUNK_TOKENS, **LENGTHS)


def test_the_best_heads_are_those_of_the_attention_matrices(
    manifest: RetrievalManifest, exact_mass: torch.Tensor
) -> None:
    best = exact_mass.flatten().argsort(descending=True)[:HEADS].tolist()
    assert [(head.layer, head.head) for head in manifest.heads] == [divmod(index, 6) for index in best]
    for head in manifest.heads:
        assert head.score == pytest.approx(float(exact_mass[head.layer, head.head]), abs=1e-4)


def test_recording_does_not_change_the_model(model_path: Path) -> None:
    recorder = AnswerMass()
    AttentionInterface.register(ATTENTION, recorder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_path)
    (task,) = calibration_tasks(tokenizer, documents=1, seed=1, **LENGTHS)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation=ATTENTION)
    mass = answer_mass(model, recorder, task, CHUNK_TOKENS)
    assert mass.shape == (3, 6, len(task.answer_token_ids))
    assert ((mass >= 0) & (mass <= 1)).all()
    tokens = torch.tensor([task.prompt_token_ids])
    with torch.inference_mode():
        recorded = model(tokens).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(recorded, model(tokens).logits, rtol=1e-3, atol=1e-3)


def test_a_calibrated_manifest_fits_its_model(manifest: RetrievalManifest, tmp_path: Path) -> None:
    manifest.save(tmp_path / "tiny.json")
    found = find_manifest(
        str(tmp_path / "tiny.json"),
        "tiny",
        model_type="llama",
        layers=3,
        attention_heads=6,
        kv_heads=2,
        head_dim=8,
    )
    assert found == manifest
    assert manifest.model_name == "tiny"
    assert manifest.calibration.documents == DOCUMENTS
    assert (manifest.calibration.min_tokens, manifest.calibration.max_tokens) == (700, 900)


def test_progress_counts_documents(model_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    calibrate(model_path, documents=2, progress=lambda done, documents: seen.append((done, documents)), **LENGTHS)
    assert seen == [(1, 2), (2, 2)]

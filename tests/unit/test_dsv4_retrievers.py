"""FlashMemory's retrievers: recorded, trained and evaluated on a small DeepSeek-V4; formula and labels as written."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_small_deepseek_v4.model import new_model, save_model, small_config
from train_small_deepseek_v4.tokenizer import build_tokenizer

from forecache.cluster.cli import main as cli
from forecache.indexer.flashmemory.entry_shards import OWN_FILE, EntryManifest, read_document, read_retrievers
from forecache.indexer.flashmemory.retrievers import Retrievers, candidates, chunk_recall
from forecache.indexer.flashmemory.train import VALIDATION_BUDGET, recall_at
from forecache.indexer.records.shards import ShardError
from forecache.workers.recording.deepseek_v4.attention import CsaCapture, index_scores
from forecache.workers.recording.deepseek_v4.documents import REPLY, DocumentMaker
from forecache.workers.recording.deepseek_v4.forward import TrainingForward
from forecache.workers.recording.deepseek_v4.record import CHUNK_TOKENS, EntryRecipe

SHORTEST, LONGEST = 1536, 1792
DOCUMENTS = ["--documents", "2", "--eval-documents", "1", "--min-tokens", f"{SHORTEST}", "--max-tokens", f"{LONGEST}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, and a recording of it made by the command."""
    base = tmp_path_factory.mktemp("retrievers")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model: Any = new_model(small_config(len(tokenizer)), seed=1)
    with torch.no_grad():  # attention on entries, and index scores, that differ
        for layer in model.model.layers:
            layer.self_attn.kv_norm.weight.mul_(1.5)
            if hasattr(layer.self_attn.compressor, "indexer"):
                layer.self_attn.compressor.kv_norm.weight.mul_(3)
    save_model(model, tokenizer, base / "model")
    record = ["indexer", "record", "--model", str(base / "model"), "--out", str(base / "data"), *DOCUMENTS]
    assert cli.main([*record, "--device", "cpu"]) == 0
    return base


def test_a_retriever_begins_as_the_models_own_indexer(folder: Path) -> None:
    """Its logits are the index scores of the model, whatever the position."""
    manifest = EntryManifest.load(folder / "data")
    model: Any = TrainingForward(_model(folder))
    retrievers = Retrievers(manifest, read_retrievers(folder / "data" / OWN_FILE))
    tokenizer = build_tokenizer()
    rng = random.Random("0 record 0")
    tokens = rng.randint(SHORTEST, LONGEST) // CHUNK_TOKENS * CHUNK_TOKENS
    document = DocumentMaker(tokenizer, "docstrings").document(rng, tokens)
    captures: list[CsaCapture] = []
    with torch.no_grad():
        model(torch.from_numpy(document.ids)[None], sparse=True, observe=captures.append)
        recorded = read_document(folder / "data", 0)
        rows = torch.arange(len(recorded.positions))
        logits = retrievers.by_layer(recorded, rows)
    assert len(captures) == len(manifest.layers) == 3
    steps = logits.shape[2]
    assert steps == manifest.steps > 1
    for layer, capture in enumerate(captures):
        for behind in (0, 1, steps - 1):
            at = recorded.positions - behind
            own = index_scores(capture.index_queries[:, at], capture.index_weights[:, at], capture.index_keys)[0]
            asked = logits[layer, :, steps - 1 - behind]
            torch.testing.assert_close(asked, own, rtol=1e-2, atol=1e-2 * float(own.abs().max()))
    torch.testing.assert_close(retrievers.logits(recorded, rows), logits.amax((0, 2)))


def test_golden_entries_are_those_that_the_reply_will_retrieve(folder: Path) -> None:
    """Against transformers' own attention weights, over all recorded steps of a document."""
    manifest = EntryManifest.load(folder / "data")
    recorded = read_document(folder / "data", 1)
    rng = random.Random("0 record 1")
    tokens = rng.randint(SHORTEST, LONGEST) // CHUNK_TOKENS * CHUNK_TOKENS
    document = DocumentMaker(build_tokenizer(), "docstrings").document(rng, tokens)
    model: Any = _model(folder)
    with torch.no_grad():
        weights = model(torch.from_numpy(document.ids)[None], use_cache=False, output_attentions=True).attentions
    shares = torch.stack([weights[layer][0, :, :, tokens:] for layer in (2, 4, 6)]).amax((0, 1))
    starts = 0
    for row, at in enumerate(recorded.positions.tolist()):
        assert document.roles[at + 1] >= REPLY, "a token that the model writes comes next"
        starts += document.roles[at] < REPLY
        last = at
        while last < tokens - 2 and document.roles[last + 1] >= REPLY and last - at < manifest.horizon:
            last += 1
        expected = (shares[at : last + 1] >= manifest.event_share).any(0)
        golden = recorded.golden(torch.tensor([row]))[0]
        near = ((shares[at : last + 1] - manifest.event_share).abs() < 1e-3).any(0)
        assert torch.equal(golden | near, expected | near)
    assert starts >= 2 and len(recorded.golden_entries) > len(recorded.positions) // 2


def test_training_keeps_what_finds_most(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = folder / "data", folder / "retrievers.safetensors"
    train = ["indexer", "train", "--data", str(data), "--out", str(out), "--device", "cpu", "--epochs", "4"]
    assert cli.main(train) == 0
    tensors = load_file(out)
    assert set(tensors) == set(load_file(data / OWN_FILE)), "the published names"
    manifest = EntryManifest.load(data)
    trained, own = (Retrievers(manifest, read_retrievers(path)) for path in (out, data / OWN_FILE))
    recalls = recall_at(data, {"trained": trained, "own": own}, budgets=(VALIDATION_BUDGET,))
    assert recalls["oracle"][0] >= recalls["trained"][0] >= recalls["own"][0], "the best epoch is kept"
    assert any(not torch.equal(tensor, own.export()[name]) for name, tensor in tensors.items())
    capsys.readouterr()
    assert cli.main(["indexer", "eval", "--data", str(data), "--indexer", str(out)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("trained", "training-free", "recency", "random", "oracle"))


def test_chunks_are_ranked_by_their_entries_above_one_half() -> None:
    manifest = _manifest()
    logits = torch.tensor([[9.0, 9, 9, 9, -1, 5, -1, -1, 1, 1, -1, -1, -2, -1, -3, -3, 9, 9, 9, 9]])
    candidate = torch.ones(1, 20, dtype=torch.bool)
    candidate[:, :4] = candidate[:, 16:] = False
    golden = torch.zeros(1, 20, dtype=torch.bool)
    golden[0, [0, 5, 8, 9, 13]] = True
    # of the three chunks that can be chosen: first the third, with two, then the second, with one, then none
    for budget, expected in ((0.3, 2 / 4), (0.6, 3 / 4), (1.0, 1.0)):
        assert chunk_recall(manifest, logits, golden, candidate, budget).item() == pytest.approx(expected)
    assert math.isnan(chunk_recall(manifest, logits, golden & False, candidate, 0.5).item())


def test_what_is_resident_anyhow_need_not_be_found(folder: Path) -> None:
    manifest, document = EntryManifest.load(folder / "data"), read_document(folder / "data", 0)
    rows = torch.arange(len(document.positions))
    size = manifest.chunk_tokens // manifest.ratio
    for position, mask in zip(document.positions.tolist(), candidates(manifest, document, rows), strict=True):
        found = mask.nonzero().flatten().tolist()
        last = (position + 1) // manifest.chunk_tokens - 1
        assert found == list(range(size, max(size, last * size)))


def test_two_processes_record_what_one_does(folder: Path, tmp_path: Path) -> None:
    record = ["indexer", "record", "--model", str(folder / "model"), "--out", str(tmp_path), *DOCUMENTS]
    for part in ("2/2", "1/2"):
        assert cli.main([*record, "--device", "cpu", "--part", part]) == 0
    for number in range(3):
        ours, theirs = read_document(tmp_path, number), read_document(folder / "data", number)
        assert torch.equal(ours.positions, theirs.positions)
        assert torch.equal(ours.golden_entries, theirs.golden_entries)


def test_settings_of_other_indexers_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = ["indexer", "record", "--model", str(folder / "model"), "--out", str(folder / "x"), "--dtype", "float16"]
    train = ["indexer", "train", "--data", str(folder / "data"), "--out", "x", "--patience", "3", "--time-limit-s", "9"]
    judge = ["indexer", "eval", "--data", str(folder / "data"), "--indexer", "x", "--lead", "3", "--budget", "0.2"]
    refused = ((record, "--dtype:"), (train, "--patience, --time-limit-s:"), (judge, "--lead, --budget:"))
    for command, named in refused:
        assert cli.main(command) != 0
        assert f"the retrievers of DeepSeek-V4 have no setting {named} leave" in capsys.readouterr().err


def test_what_is_no_recording_is_said(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no recorded entries"):
        EntryManifest.load(tmp_path)
    with pytest.raises(ShardError, match="record it again"):
        read_document(tmp_path, 0)


def _model(folder: Path) -> Any:
    from transformers import DeepseekV4ForCausalLM

    loaded: Any = DeepseekV4ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return loaded.eval()


def _manifest() -> EntryManifest:
    recipe = EntryRecipe()
    return EntryManifest(
        model_name="m", weights_digest="", hidden_size=8, heads=1, head_dim=4, rank=4, norm_eps=1e-6, layers=(0,),
        frequencies=(1.0,), ratio=4, chunk_tokens=16, horizon=recipe.horizon, event_share=recipe.event_share,
        steps=recipe.steps, documents=1, eval_documents=1, seed=0,
    )  # fmt: skip

"""Recordings of a small random model: shares, events and queries against transformers' attention matrices."""

import pydoc_data.topics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from forecache.indexer.records.encoder import decode_records
from forecache.indexer.records.manifest import CalibrationRecord, RetrievalHead, RetrievalManifest
from forecache.indexer.records.shards import RecordedDocument, Recording, shard_path
from forecache.indexer.training.evaluate import evaluate
from forecache.indexer.training.train import TrainConfig, train
from forecache.workers.errors import ForecacheError, UnsupportedModelError
from forecache.workers.models.tokenizer import load_tokenizer
from forecache.workers.recording.documents import Recipe, SourceDocument, make_document, text_source
from forecache.workers.recording.events import bounds_lse, chunk_lse
from forecache.workers.recording.record import _kept_positions, query_projection, record

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 6, 2, 8
RECIPE = Recipe(
    documents=4,
    eval_documents=2,
    texts=("docstrings",),
    eval_texts=("topics",),
    tasks=("prose", "several", "quote", "values"),
    eval_tasks=("keys", "prose"),
    min_tokens=1024,
    max_tokens=1124,
    reply_tokens=48,
    prompt_windows=2,
    prompt_window_tokens=24,
    history_steps=8,
    documents_per_shard=3,
    event_mass=0.05,
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers with random weights large enough that its heads disagree, and a small tokenizer."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer_class(tokenizer_object=tokenizer).save_pretrained(path)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        initializer_range=0.4,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def heads_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A manifest that names three retrieval heads."""
    calibration = CalibrationRecord(
        documents=1,
        tasks=("needle",),
        min_tokens=1,
        max_tokens=1,
        chunk_tokens=64,
        seed=0,
        events=0,
        torch_version="",
        transformers_version="",
        date="",
    )
    heads = tuple(RetrievalHead(layer=layer, head=head, score=0.5) for layer, head in ((2, 4), (0, 1), (2, 5)))
    path = tmp_path_factory.mktemp("heads") / "heads.json"
    RetrievalManifest(
        model_type="llama",
        layers=LAYERS,
        attention_heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        heads=heads,
        calibration=calibration,
    ).save(path)
    return str(path)


@pytest.fixture(scope="module")
def folder(model_path: Path, heads_file: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded") / "data"
    record(model_path, out, RECIPE, model_name="tiny", manifest=heads_file, device="cpu")
    return out


@pytest.fixture(scope="module")
def recording(folder: Path) -> Recording:
    return Recording(folder)


def source_of(recording: Recording, number: int, model_path: Path) -> SourceDocument:
    """Make the document that was recorded as ``number`` again, with the recorded length."""
    document = recording.document(number)
    tokenizer = load_tokenizer(model_path)
    for tokens in range(RECIPE.min_tokens, RECIPE.max_tokens + 1):
        made = make_document(
            document.task,  # type: ignore[arg-type]
            document.text,
            document.split,
            tokenizer,
            tokens=tokens,
            seed=RECIPE.seed * 1_000_003 + number,
        )
        kept = list(_kept_positions(len(made.prompt_token_ids), RECIPE, number % RECIPE.documents_per_shard))
        if document.positions[: len(kept)].tolist() == kept:
            return made
    raise AssertionError(f"no length makes document {number} again")


@pytest.fixture(scope="module", params=[0, 1, 2, 4])
def replayed(request: Any, recording: Recording, model_path: Path) -> tuple[RecordedDocument, list[int], Any]:
    """A document, its greedy tokens by transformers, and the attention matrices of every layer."""
    document = recording.document(request.param)
    source = source_of(recording, request.param, model_path)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager")
    fed = [*source.prompt_token_ids, *source.reply_token_ids[: RECIPE.reply_tokens]]
    free = int(document.positions[-1]) + 1 - len(fed)
    tokens = torch.tensor([fed[: int(document.positions[-1]) + 1]])
    with torch.inference_mode():
        if free > 0:
            tokens = model.generate(tokens, max_new_tokens=free, do_sample=False, eos_token_id=None)
        output = model(tokens, output_attentions=True, output_hidden_states=True)
    return document, tokens[0].tolist(), torch.stack(output.attentions)[:, 0]


def test_shares_are_those_of_the_attention_matrices(
    replayed: tuple[RecordedDocument, list[int], torch.Tensor], recording: Recording
) -> None:
    document, tokens, attention = replayed
    size, threshold = recording.manifest.chunk_tokens, recording.manifest.event_mass
    assert len(document.records) == -(-len(tokens) // size)
    padded = torch.nn.functional.pad(attention, (0, -len(tokens) % size)).unflatten(3, (-1, size)).sum(4)
    seen = 0
    for row, position in enumerate(document.positions.tolist()):
        share = padded[:, :, position].flatten(0, 1).clone()
        complete = (position + 1) // size
        share[:, complete:] = 0
        torch.testing.assert_close(document.peak_share[row].float(), share.amax(0), atol=2e-3, rtol=2e-3)
        events = slice(int(document.event_offsets[row]), int(document.event_offsets[row + 1]))
        told = {
            (int(head), int(chunk)): float(mass)
            for head, chunk, mass in zip(
                document.event_head[events], document.event_chunk[events], document.event_share[events], strict=True
            )
        }
        share[:, 0] = 0
        sure = {(head, chunk) for head, chunk in (share > threshold + 2e-3).nonzero().tolist()}
        perhaps = {(head, chunk) for head, chunk in (share > threshold - 2e-3).nonzero().tolist()}
        assert sure <= set(told) <= perhaps
        for (head, chunk), mass in told.items():
            assert mass == pytest.approx(float(share[head, chunk]), abs=2e-3)
        seen += len(told)
    assert seen > 0


def test_runs_are_consecutive_and_end_with_the_reply(recording: Recording) -> None:
    for number in range(len(recording)):
        document = recording.document(number)
        assert document.runs[0, 0] == 0 and document.runs[-1, 1] == document.steps
        for first, last in document.runs.tolist():
            assert document.positions[first:last].diff().eq(1).all()
        assert recording.facts[number]["split"] == ("train" if number < 4 else "eval")
        if document.task != "prose":
            assert 0 <= document.answer[0] < document.answer[1] <= len(document.records)


def test_the_answer_step_writes_the_answer(recording: Recording, model_path: Path) -> None:
    document = recording.document(4)
    source = source_of(recording, 4, model_path)
    assert source.answer_span is not None and source.answer_place is not None
    row = document.answer_step
    assert int(document.positions[row]) == len(source.prompt_token_ids) - 1 + source.answer_place
    answer = source.prompt_token_ids[slice(*source.answer_span)]
    assert source.reply_token_ids[source.answer_place :] == answer
    assert document.answer[0] == source.answer_span[0] // 64


def test_queries_and_keys_come_back(recording: Recording, model_path: Path) -> None:
    """The retrieval heads' attention, rebuilt from hidden states and index records, equals the original up to int8 and
    float16 rounding."""
    document, described = recording.document(1), recording.manifest
    assert described.query_heads == ((2, 4), (0, 1), (2, 5), (0, 0), (0, 2), (2, 3))
    assert described.index_kv_heads == ((0, 0), (2, 1)) and described.target_layers == (0, 2)
    spec = described.index_spec
    queries = query_projection(described, recording.seed_weights)(document.hidden, document.positions).detach()
    keys = decode_records(spec, document.records)
    complete = (document.positions + 1) // described.chunk_tokens
    for place, (layer, head) in enumerate(described.query_heads):
        lse = chunk_lse(
            queries[:, place].unsqueeze(0),
            keys[spec.query_to_kv[place]].unsqueeze(0),
            document.positions,
            scale=described.scale,
            chunk_tokens=described.chunk_tokens,
            chunks=len(document.records),
        )[0]
        share = (lse - lse.logsumexp(1, keepdim=True)).exp()
        events = document.event_head == layer * HEADS + head
        rows = torch.arange(document.steps).repeat_interleave(document.event_offsets.diff())[events]
        chunks = document.event_chunk[events].long()
        assert (chunks < complete[rows]).all()
        torch.testing.assert_close(share[rows, chunks], document.event_share[events].float(), atol=0.05, rtol=0.1)


def test_a_stopped_recording_goes_on(model_path: Path, heads_file: str, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    kept = shard_path(folder, 0).stat().st_mtime_ns
    shard_path(folder, 1).unlink()
    assert not Recording(folder).complete
    seen: list[tuple[int, int]] = []
    record(
        model_path,
        folder,
        RECIPE,
        model_name="tiny",
        manifest=heads_file,
        device="cpu",
        progress=lambda done, documents: seen.append((done, documents)),
    )
    assert seen == [(3, 6), (6, 6)] and Recording(folder).complete
    assert shard_path(folder, 0).stat().st_mtime_ns == kept
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(UnsupportedModelError, match="another recording"):
        record(
            model_path, folder, replace(RECIPE, reply_tokens=5), model_name="tiny", manifest=heads_file, device="cpu"
        )


def test_two_processes_record_together(model_path: Path, heads_file: str, folder: Path, tmp_path: Path) -> None:
    for part in ((2, 2), (1, 2)):
        record(model_path, tmp_path, RECIPE, model_name="tiny", manifest=heads_file, device="cpu", part=part)
        assert Recording(tmp_path).complete == (part == (1, 2))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_what_cannot_be_recorded_is_said(model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="forecache indexer calibrate"):
        record(model_path, tmp_path, RECIPE, model_name="tiny", device="cpu")
    with pytest.raises(ForecacheError, match="600 to 700 tokens"):
        short = replace(RECIPE, min_tokens=600, max_tokens=700)
        record(model_path, tmp_path, short, model_name="tiny", device="cpu")
    with pytest.raises(UnsupportedModelError, match="can't record the text"):
        text_source(str(tmp_path / "nothing.txt"))


def test_texts_come_from_files_too(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("\n\n".join(f"Paragraph number {n} of the file." for n in range(300)))
    tokenizer = load_tokenizer(model_path)
    made = make_document("lookup", str(tmp_path), "train", tokenizer, tokens=2500, seed=3)
    assert 2000 < len(made.prompt_token_ids) <= 2500
    assert made == make_document("lookup", str(tmp_path), "train", tokenizer, tokens=2500, seed=3)
    assert "of the file." in str(tokenizer.decode(made.prompt_token_ids))
    for seed in range(40):  # paragraphs that are more tokens together than one by one
        assert (
            len(make_document("lookup", str(tmp_path), "train", tokenizer, tokens=2500, seed=seed).prompt_token_ids)
            <= 2500
        )


def test_bounds_are_never_below_a_logit() -> None:
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(4, 5, 8, generator=generator)
    keys = torch.randn(2, 64, 8, generator=generator)
    upper = bounds_lse(queries, keys, scale=0.3, chunk_tokens=16, chunks=4)
    logits = (queries.view(2, -1, 8) @ keys.transpose(1, 2) * 0.3).view(4, 5, 4, 16)
    assert (upper >= logits.amax(3) - 1e-5).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_records_and_trains_the_same(model_path: Path, heads_file: str, folder: Path, tmp_path: Path) -> None:
    """In float32, documents, steps and shares equal those of the CPU; training and evaluation run on the GPU too."""
    out = tmp_path / "data"
    recipe = replace(RECIPE, documents=8)
    record(model_path, out, recipe, model_name="tiny", manifest=heads_file, device="cuda", dtype="float32")
    ours, theirs = Recording(out).document(0), Recording(folder).document(0)
    assert ours.positions.tolist() == theirs.positions.tolist()
    torch.testing.assert_close(ours.peak_share.float(), theirs.peak_share.float(), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(ours.hidden.float(), theirs.hidden.float(), atol=2e-2, rtol=2e-2)
    config = TrainConfig(epochs=2, leads=(1, 2), dropout=0.0)
    curve = train(out, tmp_path / "indexer.safetensors", config=config, device="cuda")
    same = train(out, tmp_path / "by-cpu.safetensors", config=config, device="cpu")
    assert [epoch.train_loss for epoch in curve] == pytest.approx([epoch.train_loss for epoch in same], rel=0.01)
    mixed = train(out, tmp_path / "mixed.safetensors", config=replace(config, bf16=True), device="cuda")
    assert mixed[1].train_loss == pytest.approx(curve[1].train_loss, rel=0.05)
    on_gpu = evaluate(out, tmp_path / "indexer.safetensors", leads=(1,), device="cuda")
    on_cpu = evaluate(out, tmp_path / "indexer.safetensors", leads=(1,))
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert (one.scorer, one.predictions) == (other.scorer, other.predictions)
        assert one.coverage == pytest.approx(other.coverage, abs=0.05)

"""Labels, dual encoder, training and evaluation on synthetic recordings: causal, equal to serving, resumable."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from forecache.cluster.cli import main as cli
from forecache.indexer.records.checkpoint import (
    CheckpointError,
    CheckpointManifest,
    find_checkpoint,
    load_checkpoint,
    new_indexer,
)
from forecache.indexer.records.encoder import LEAST_LOG_SHARE, SIBLING_LOG_WEIGHT, EncoderShape, decode_records
from forecache.indexer.records.index_spec import encode_chunks
from forecache.indexer.records.scores import chunk_lse, scores_and_events
from forecache.indexer.records.shards import (
    SEED_WEIGHTS_FILE,
    RecordedDocument,
    Recording,
    ShardError,
    ShardManifest,
    shard_path,
    write_shard,
)
from forecache.indexer.training.evaluate import SCORERS, as_records, evaluate, gap_closed, table
from forecache.indexer.training.labels import LabelRule, complete_chunks, window_labels
from forecache.indexer.training.plots import plot_curve, plot_figures
from forecache.indexer.training.train import CosineSchedule, TrainConfig, train
from forecache.indexer.training.training_data import predict_rows, usable_rows

CHUNK_TOKENS, HEAD_DIM, HIDDEN, CHUNKS = 8, 16, 24, 40
LAYERS, HEADS, KV_HEADS = 4, 4, 2
RULE = LabelRule(window_steps=8, min_heads=2)
SHAPE = EncoderShape(history=(0, 3), context=4, units=8, reach=1)
CONFIG = TrainConfig(
    epochs=5,
    documents_per_step=2,
    learning_rate=2e-2,
    query_learning_rate=1e-3,
    retrieval=0.0,
    leads=(1, 2),
    warmup_steps=2,
    patience=9,
    rows=12,
    least_steps=4,
)


def manifest(documents: int) -> ShardManifest:
    return ShardManifest(
        model_type="llama",
        model_name="made-up",
        weights_fingerprint="00",
        layers=LAYERS,
        attention_heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        hidden_size=HIDDEN,
        scale=HEAD_DIM**-0.5,
        rope_scaling=1.1,
        chunk_tokens=CHUNK_TOKENS,
        target_layers=(1, 3),
        query_heads=((3, 0), (1, 2), (3, 1), (1, 3)),
        retrieval_heads=2,
        index_kv_heads=((1, 1), (3, 0)),
        event_mass=0.1,
        recipe={"made": "up"},
        documents=documents,
        documents_per_shard=8,
        seed=0,
        torch_version="-",
        transformers_version="-",
    )


def make_document(number: int, split: str) -> RecordedDocument:
    """A document with ten steps in its text and thirty at its end, which attend to one chunk.

    The chunk's keys hold a marker that the hidden states hold too. The queries of the retrieval heads do not ask for
    it, but those of other heads do.
    """
    generator = torch.Generator().manual_seed(number)
    spec = manifest(1).index_spec
    tokens = CHUNKS * CHUNK_TOKENS - 3
    positions = torch.cat([torch.arange(150, 160), torch.arange(tokens - 30, tokens)])
    steps = len(positions)
    golden = int(torch.randint(2, 15, (1,), generator=generator))
    marker = torch.randn(HEAD_DIM, generator=generator)
    keys = torch.randn(CHUNKS, len(spec.kv_heads), CHUNK_TOKENS, HEAD_DIM, generator=generator)
    keys[golden, :, 3] = 3 * marker
    hidden = torch.randn(steps, 2, HIDDEN, generator=generator)
    hidden[:, :, :HEAD_DIM] = marker
    noise = torch.randint(1, CHUNKS - 1, (steps, 2), generator=generator)
    rows = torch.arange(steps).repeat_interleave(4)
    chunk = torch.stack([torch.full((steps,), golden), torch.full((steps,), golden), *noise.T], 1).flatten()
    head = torch.tensor([5, 9, 2, 7]).repeat(steps)
    share = torch.tensor([0.8, 0.6, 0.4, 0.2]).repeat(steps)
    there = chunk < complete_chunks(positions, CHUNK_TOKENS)[rows]
    offsets = torch.zeros(steps + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(rows[there], minlength=steps).cumsum(0)
    peak = torch.zeros(steps, CHUNKS)
    peak[rows[there], chunk[there]] = share[there]
    return RecordedDocument(
        task="made-up",
        text="numbers",
        split=split,
        answer=(golden, golden + 1),
        answer_step=steps - 12,
        positions=positions,
        runs=torch.tensor([[0, 10], [10, steps]]),
        hidden=hidden.half(),
        records=encode_chunks(spec, keys),
        event_offsets=offsets,
        event_chunk=chunk[there].int(),
        event_head=head[there].short(),
        event_share=share[there].half(),
        peak_share=peak.half(),
        bounds_score=torch.rand(steps, CHUNKS, generator=generator).half(),
    )


def make_recording(folder: Path, documents: int = 24) -> Path:
    folder.mkdir()
    made = [make_document(number, "eval" if number >= documents - 6 else "train") for number in range(documents)]
    described = manifest(documents)
    for shard in range(described.shards):
        write_shard(folder, shard, made[shard * 8 : (shard + 1) * 8])
    generator = torch.Generator().manual_seed(99)
    weight = torch.randn(4, HEAD_DIM, HIDDEN, generator=generator) * HIDDEN**-0.5
    weight[:, :, :HEAD_DIM] = 0
    weight[2:, :, :HEAD_DIM] = torch.eye(HEAD_DIM)
    save_file(
        {
            "weight": weight,
            "bias": torch.zeros(4, HEAD_DIM),
            # RoPE hardly turns here, so that a marker is found wherever it stands
            "inverse_frequencies": torch.full((HEAD_DIM // 2,), 1e-5),
        },
        folder / SEED_WEIGHTS_FILE,
    )
    described.save(folder)
    return folder


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_recording(tmp_path_factory.mktemp("recorded") / "data")


@pytest.fixture(scope="module")
def trained(recording: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "indexer.safetensors"
    curve = train(recording, out, config=CONFIG, shape=SHAPE, rule=RULE, device="cpu")
    assert len(curve) == CONFIG.epochs and curve[-1].train_loss < 0.8 * curve[0].train_loss
    return out


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), row=st.integers(0, 39), lead=st.integers(0, 9), heads=st.integers(1, 3))
def test_labels_count_heads_in_the_window_and_never_the_future(seed: int, row: int, lead: int, heads: int) -> None:
    document = make_document(seed, "train")
    rule = LabelRule(window_steps=6, min_heads=heads, event_share=0.15, sink_chunks=1, recency_chunks=2)
    labels = window_labels(document, torch.tensor([row]), lead, rule, chunk_tokens=CHUNK_TOKENS)
    complete = (int(document.positions[row]) + 1) // CHUNK_TOKENS
    allowed = [1 <= chunk < complete - 2 for chunk in range(CHUNKS)]
    assert labels.candidates[0].tolist() == allowed, "only complete chunks are ever positive or negative"
    end = 10 if row < 10 else document.steps
    window = range(min(row + lead, end), min(row + lead + 6, end))
    assert int(labels.steps[0]) == len(window)
    looked: dict[int, set[int]] = {}
    mass = [0.0] * CHUNKS
    for step in window:
        for event in range(int(document.event_offsets[step]), int(document.event_offsets[step + 1])):
            chunk, share = int(document.event_chunk[event]), float(document.event_share[event])
            if share >= 0.15 and allowed[chunk]:
                looked.setdefault(chunk, set()).add(int(document.event_head[event]))
                mass[chunk] += share
    golden = [len(looked.get(chunk, ())) >= heads for chunk in range(CHUNKS)]
    assert labels.golden[0].tolist() == golden
    torch.testing.assert_close(labels.event_mass[0], torch.tensor(mass), atol=1e-3, rtol=1e-3)


@settings(max_examples=10, deadline=None)
@given(row=st.integers(4, 39), seed=st.integers(0, 1000))
def test_what_comes_later_changes_no_prediction(recording: Path, row: int, seed: int) -> None:
    """A prediction must not use keys of later tokens or hidden states of later steps."""
    opened = Recording(recording)
    torch.manual_seed(seed)
    indexer = new_indexer(opened, EncoderShape(history=(0, 3)))
    torch.nn.init.normal_(indexer.out.weight)
    spec, document = opened.manifest.index_spec, opened.document(seed % len(opened))
    at = torch.tensor([row])
    before = predict_rows(indexer, spec, document, at)
    position, complete = int(document.positions[row]), int(before.complete[0])
    keys = decode_records(spec, document.records)
    keys[:, position + 1 :] = torch.randn_like(keys[:, position + 1 :])
    document.hidden[row + 1 :] = torch.randn_like(document.hidden[row + 1 :])
    after = predict_rows(indexer, spec, document, at, keys)
    torch.testing.assert_close(after.logits[:, :complete], before.logits[:, :complete])


def test_untrained_it_is_the_mean_share_of_the_retrieval_heads_as_served(recording: Path) -> None:
    opened = Recording(recording)
    indexer = new_indexer(opened, EncoderShape(history=(0,)))
    document, spec = opened.document(3), opened.manifest.index_spec
    rows = usable_rows(document, 1, RULE, least_steps=1, chunk_tokens=CHUNK_TOKENS, history_steps=0)
    found = predict_rows(indexer, spec, document, rows)
    queries = indexer.queries(document.hidden[rows], document.positions[rows]).detach()
    weights = torch.tensor([0.0, 0.0, SIBLING_LOG_WEIGHT, SIBLING_LOG_WEIGHT]).softmax(0)
    for place, row in enumerate(rows.tolist()):
        complete = int(found.complete[place])
        records, tail = document.records[:complete], document.records[complete : complete + 1]
        keys = decode_records(spec, tail)[:, : int(document.positions[row]) + 1 - complete * CHUNK_TOKENS]
        heads = enumerate(spec.query_to_kv)
        local = torch.stack([(queries[place, head] * spec.scale @ keys[kv].T).logsumexp(0) for head, kv in heads])
        lse = chunk_lse(spec, records, queries[place])
        shares = (lse - torch.logaddexp(lse.logsumexp(1), local).unsqueeze(1)).exp()
        torch.testing.assert_close(scores_and_events(spec, lse, local)[0], shares.amax(0))
        # shares below the least one count as that
        expected = (shares.clamp(min=math.exp(LEAST_LOG_SHARE)) * weights.unsqueeze(1)).sum(0)
        torch.testing.assert_close(found.logits[place, :complete].exp(), expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(found.training_free[place, :complete].exp(), shares[:2].amax(0))


def test_training_learns_what_the_queries_miss(recording: Path, trained: Path, tmp_path: Path) -> None:
    figures = evaluate(recording, trained, leads=(1, 2), budgets=(0.1, 0.2), rule=RULE, least_steps=4)
    closed = gap_closed(figures, task="all", text="all", lead=2, budget=0.1, name="coverage")
    assert closed is not None and closed > 0.5
    chosen = {f.scorer: f for f in figures if (f.task, f.text, f.lead, f.budget) == ("all", "all", 2, 0.1)}
    assert set(chosen) == set(SCORERS)
    assert chosen["oracle"].recall == 1.0 and chosen["trained"].answers == 6
    for name in ("coverage", "recall"):
        values = {scorer: getattr(figure, name) for scorer, figure in chosen.items()}
        assert max(values.values()) == values["oracle"]
    assert table(figures, lead=2, budget=0.1, by="text")[0] == ["scorer", "numbers", "all"]
    start = tmp_path / "start.safetensors"
    unmoved = replace(CONFIG, epochs=1, learning_rate=0.0, query_learning_rate=0.0)
    train(recording, start, config=unmoved, shape=SHAPE, rule=RULE, device="cpu")
    again = evaluate(recording, start, leads=(2,), budgets=(0.1,), rule=RULE, least_steps=4)
    same = {f.scorer: f for f in again if (f.task, f.text) == ("all", "all")}
    assert replace(same["untrained"], scorer="") == replace(chosen["untrained"], scorer="")
    assert same["training-free"] == chosen["training-free"], "training moves no baseline"
    rows = table(figures, lead=2, budget=0.1)
    assert [row[0] for row in rows] == ["scorer", *SCORERS] and {len(row) for row in rows} == {3}
    assert len(as_records(figures)) == len(figures)


def test_the_command_shows_the_lead_and_budget_asked_for(
    recording: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--lead", "3", "--budget", "0.12"]
    assert cli.main(["indexer", "eval", "--data", str(recording), "--indexer", str(trained), *asked]) == 0
    shown = capsys.readouterr().out
    assert "3 steps ahead, 12.0% of the chunks" in shown and "of the gap between" in shown
    assert len(re.findall(r"│ oracle +│ [01]\.\d\d ", shown)) == 2, "by task and by text"


def test_a_stopped_training_ends_like_one_that_was_not(recording: Path, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "indexer.safetensors"

    class StopError(Exception):
        pass

    def stop(epoch: Any) -> None:
        if epoch.epoch == 2:
            raise StopError

    with pytest.raises(StopError):
        train(recording, out, config=CONFIG, shape=SHAPE, rule=RULE, device="cpu", progress=stop)
    seen: list[int] = []
    curve = train(
        recording,
        out,
        config=CONFIG,
        shape=SHAPE,
        rule=RULE,
        device="cpu",
        progress=lambda epoch: seen.append(epoch.epoch),
    )
    assert seen == [3, 4] and len(curve) == 5
    resumed, straight = (load_checkpoint(path)[0].state_dict() for path in (out, trained))
    for name, weight in straight.items():
        torch.testing.assert_close(resumed[name], weight)
    with pytest.raises(ShardError, match="other settings"):
        train(recording, out, config=TrainConfig(seed=7), shape=SHAPE, rule=RULE, device="cpu")
    changed = shutil.copytree(recording, tmp_path / "changed")
    manifest = ShardManifest.load(changed)
    manifest.model_copy(update={"seed": manifest.seed + 1}).save(changed)
    with pytest.raises(ShardError, match="other settings or data"):
        train(changed, out, config=CONFIG, shape=SHAPE, rule=RULE, device="cpu")
    out.unlink()
    with pytest.raises(ShardError, match="is missing"):
        train(recording, out, config=CONFIG, shape=SHAPE, rule=RULE, device="cpu")


def test_training_stops_when_held_out_documents_gain_nothing(recording: Path, tmp_path: Path) -> None:
    frozen = TrainConfig(epochs=9, patience=2, learning_rate=0.0, query_learning_rate=0.0, leads=(1,), least_steps=4)
    curve = train(recording, tmp_path / "frozen.safetensors", config=frozen, shape=SHAPE, rule=RULE, device="cpu")
    assert len(curve) == 3 and len({epoch.coverage for epoch in curve}) == 1


def test_mixed_precision_learns_too(recording: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=2, bf16=True)
    curve = train(recording, tmp_path / "mixed.safetensors", config=config, shape=SHAPE, rule=RULE, device="cpu")
    assert curve[1].train_loss < 0.9 * curve[0].train_loss
    indexer, _ = load_checkpoint(tmp_path / "mixed.safetensors")
    assert all(weight.dtype == torch.float32 and bool(weight.isfinite().all()) for weight in indexer.parameters())


def test_checkpoints_tell_their_model_and_are_not_mixed_up(recording: Path, trained: Path, tmp_path: Path) -> None:
    _, told = load_checkpoint(trained)
    described = Recording(recording).manifest
    assert told.differences(described) == []
    assert told.index_fingerprint == described.index_spec.fingerprint == told.index_spec.fingerprint
    assert told.differences(described.model_copy(update={"weights_fingerprint": "ff"})) == [], "of the same name"
    another = {"weights_fingerprint": "ff", "model_name": "other"}
    assert told.differences(described.model_copy(update=another)) == ["model_name"]
    assert told.differences({"model_name": "org/Made-Up-Instruct", "layers": 9}) == ["layers"]
    assert find_checkpoint("none", {"model_name": "made-up"}) is None
    assert find_checkpoint(str(trained), {"model_name": "org/Made-Up-Instruct", "layers": LAYERS}) == trained
    assert find_checkpoint("auto", {"model_name": "made-up", "layers": LAYERS}) is None
    with pytest.raises(CheckpointError, match="model_name"):
        find_checkpoint(str(trained), {"model_name": "other", "layers": LAYERS})
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(trained.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CheckpointError, match="can't read the indexer's manifest"):
        load_checkpoint(copy)
    copy.with_suffix(".json").write_text(trained.with_suffix(".json").read_text(encoding="utf-8"), encoding="utf-8")
    changed = bytearray(trained.read_bytes())
    changed[-1] ^= 1
    copy.write_bytes(changed)
    with pytest.raises(CheckpointError, match="does not belong to its manifest"):
        load_checkpoint(copy)
    other = described.model_copy(update=another | {"documents": 6})
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other")
    write_shard(tmp_path / "other", 0, [make_document(1, "eval")])
    with pytest.raises(CheckpointError, match="model_name"):
        evaluate(tmp_path / "other", trained)
    assert CheckpointManifest.model_validate_json(told.model_dump_json()) == told


def test_damaged_or_missing_recordings_are_named(recording: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no recorded data"):
        Recording(tmp_path)
    manifest(8).save(tmp_path)
    with pytest.raises(ShardError, match="but no shard"):
        Recording(tmp_path)
    shard_path(tmp_path, 0).write_bytes(b"\x00" * 40)
    with pytest.raises(ShardError, match="damaged"):
        Recording(tmp_path)


def test_curves_are_drawn(recording: Path, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="curves need the extra 'train'")
    curve = train(recording, trained, config=CONFIG, shape=SHAPE, rule=RULE, device="cpu")
    plot_curve(tmp_path / "curve.png", curve)
    plot_figures(tmp_path / "figures.png", evaluate(recording, trained, leads=(1,), rule=RULE), lead=1)
    for name in ("curve.png", "figures.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


ALONE = """
import json, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from forecache.cluster.cli.main import main
status = main(["indexer", "train", "--data", sys.argv[1], "--out", sys.argv[2], "--device", "cpu", "--threads", "1",
               "--epochs", "1", "--history", "0,3"])
print(json.dumps({"status": status, "modules": sorted(sys.modules), "opened": opened}))
"""


def test_training_needs_torch_and_the_shards_alone(recording: Path, tmp_path: Path) -> None:
    """Training imports neither transformers nor the engine, and opens only its own files and the recording."""
    command = [sys.executable, "-c", ALONE, str(recording), str(tmp_path / "indexer.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == 0
    loaded = {name for name in told["modules"] if name.split(".")[0] in ("transformers", "ray", "tokenizers")}
    assert loaded == set()
    assert not [name for name in told["modules"] if name.startswith("forecache.workers.models.backbone")]
    weights = [Path(path) for path in told["opened"] if Path(path).suffix in (".safetensors", ".bin", ".pt", ".gguf")]
    assert {path.parent for path in weights} <= {recording, tmp_path}


def test_two_processes_train_one_indexer(recording: Path, tmp_path: Path) -> None:
    """`torchrun` with two CPU processes: both apply all gradients, and the first one writes the checkpoint."""
    out = tmp_path / "indexer.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "forecache.cluster.cli.main", "indexer", "train", "--data", str(recording), "--out", str(out)]
    subprocess.run(
        [*command, "--device", "cpu", "--threads", "1", "--epochs", "1", "--history", "0,3"],
        check=True,
        capture_output=True,
    )
    indexer, told = load_checkpoint(out)
    assert told.training["epochs"] == 1
    assert all(bool(weight.isfinite().all()) for weight in indexer.parameters())


def test_a_run_gives_predictions_only_where_its_history_is_whole() -> None:
    document = make_document(1, "train")
    rows = usable_rows(document, 1, RULE, least_steps=2, chunk_tokens=CHUNK_TOKENS, history_steps=7)
    assert rows.tolist() == [7, *range(17, document.steps - 2)], "runs are rows 0 to 9 and 10 to 39"


def test_recordings_too_short_for_the_history_are_refused(recording: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no step to predict at"):
        train(recording, tmp_path / "a.safetensors", shape=EncoderShape(history=(0, 40)), rule=RULE, device="cpu")


def test_training_and_its_learning_rates_end_with_the_time(recording: Path, tmp_path: Path) -> None:
    ended = CosineSchedule(100, warmup_steps=1, time_limit_s=10, spent_s=10)
    assert ended.time_is_up and ended.share(1) == 0
    half = CosineSchedule(100, warmup_steps=1, time_limit_s=1e6, spent_s=5e5)
    assert not half.time_is_up and half.share(1) == pytest.approx(0.5, abs=1e-3) and half.share(75) < 0.15
    config = replace(CONFIG, time_limit_s=1e-3)
    assert len(train(recording, tmp_path / "a.safetensors", config=config, shape=SHAPE, rule=RULE, device="cpu")) == 1

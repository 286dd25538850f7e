"""The small DeepSeek-V4: its tokenizer, documents and curriculum, and which weights each stage trains."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from train_small_deepseek_v4.model import new_model, save_model, small_config
from train_small_deepseek_v4.tokenizer import build_tokenizer
from train_small_deepseek_v4.train import LOG_FILE, Curriculum, Progress, accuracy, train
from train_small_deepseek_v4.trainer import Phase, TrainConfig, Trainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    PreTrainedTokenizerFast,
)

from forecache.workers.evaluation import corpus
from forecache.workers.evaluation.ruler import CITIES, NOUNS, PEOPLE, Generator, score
from forecache.workers.recording.deepseek_v4.documents import FACT, KINDS, NUMBER, REPLY, DocumentMaker
from forecache.workers.recording.deepseek_v4.forward import TrainingForward

CPU = torch.device("cpu")
PHASES: tuple[Phase, ...] = ("dense", "indexer", "sparse")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def maker(tokenizer: PreTrainedTokenizerFast) -> DocumentMaker:
    return DocumentMaker(tokenizer, "docstrings")


def test_tokens_of_pieces_are_those_of_the_whole_text(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = [f"\n\n{text}" for text in corpus.paragraphs("topics")[:200]]
    whole = tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    by_piece = tokenizer(pieces, add_special_tokens=False)["input_ids"]
    assert whole == [token for ids in by_piece for token in ids]
    assert tokenizer.decode(whole) == "".join(pieces)


def test_names_and_pairs_of_digits_are_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for word in (*CITIES, *PEOPLE, *NOUNS):
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1
    assert len(tokenizer(" 483920", add_special_tokens=False)["input_ids"]) == 3


@pytest.mark.parametrize("tokens", [256, 2048])
def test_documents_have_their_length_and_answers_that_are_in_them(
    maker: DocumentMaker, tokenizer: PreTrainedTokenizerFast, tokens: int
) -> None:
    document = maker.document(random.Random(5), tokens)
    assert len(document.ids) == len(document.roles) == tokens
    assert document.ids[-1] == tokenizer.eos_token_id
    numbers = document.ids[document.roles == NUMBER].reshape(-1, 3)
    facts = tokenizer.decode(document.ids[document.roles == FACT])
    assert len(numbers) >= tokens // 128
    assert all(tokenizer.decode(number).strip() in facts for number in numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_questions_are_those_of_the_evaluation(
    maker: DocumentMaker, tokenizer: PreTrainedTokenizerFast, kind: Any
) -> None:
    """The end of a document without its reply is the end of a prompt of `forecache eval`, which scores the reply as
    right."""
    sample = Generator(tokenizer).sample(kind, 1024, 3)
    prompt = tokenizer.decode(sample.prompt_token_ids)
    document = maker.document(random.Random(2), 1024, kind)
    asked = document.ids[document.roles < REPLY]
    ours, theirs = (text[text.rindex("\n\nWhat") :] for text in (tokenizer.decode(asked), prompt))
    assert [word for word in ours.split() if word.islower()] == [word for word in theirs.split() if word.islower()]
    assert ours.endswith("\n\nAnswer:") and theirs.endswith("\n\nAnswer:")
    assert score(sample, f" {CITIES[0]} {', '.join(sample.answers)}.") == 1.0


def test_lengths_grow_with_accuracy_or_when_their_time_is_up() -> None:
    config = TrainConfig(lengths=(128, 256, 512), goal=0.9, passable=0.5)
    curriculum = Curriculum(config)
    for _ in range(20):
        curriculum.observe(128, 0.4, 0.1)
    assert curriculum.level == 0, "not learnt yet"
    for _ in range(100):
        curriculum.observe(128, 0.95, 0.11)
    assert curriculum.level == 1
    for _ in range(40):
        curriculum.observe(256, 0.7, 0.12)
    assert curriculum.level == 1, "its time is not up"
    curriculum.observe(128, 0.7, 0.5)
    assert curriculum.level == 1, "a batch of another length says nothing"
    curriculum.observe(256, 0.7, 0.5)
    assert curriculum.level == 2
    assert [curriculum.phase(share) for share in (0.0, 0.7, 0.9)] == ["dense", "indexer", "sparse"]
    assert {curriculum.draw(random.Random(n)) for n in range(50)} == {128, 256, 512}


def three_layers(tokenizer: PreTrainedTokenizerFast) -> DeepseekV4ForCausalLM:
    """The small model with one layer of each kind."""
    settings = small_config(len(tokenizer)).to_dict()
    settings.pop("model_type")
    types = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    settings |= {"num_hidden_layers": 3, "layer_types": types, "mlp_layer_types": ["hash_moe", "moe", "moe"]}
    return new_model(DeepseekV4Config(**settings), seed=1)


def test_each_phase_trains_its_part_and_the_model_is_transformers_own(
    maker: DocumentMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = three_layers(tokenizer)
    config = TrainConfig(warmup_steps=1, index_queries=16)
    trainer = Trainer(TrainingForward(model), config, CPU)
    document = maker.document(random.Random(0), 256)
    ids, roles = torch.from_numpy(document.ids)[None], torch.from_numpy(document.roles)[None]
    own = {name for name, _ in model.named_parameters() if ".indexer." in name}
    losses = {}
    for phase in PHASES:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for _ in range(4):
            losses[phase] = trainer.step(ids, roles, phase, 0.0)
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        assert (moved & own == own) == (phase != "dense")
        assert bool(moved - own) == (phase != "indexer")
    assert set(losses["indexer"]) == {"index"} and losses["sparse"]["reply"] < losses["dense"]["reply"]
    save_model(model, tokenizer, tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(torch.bfloat16).to(tensor.dtype)), name
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("a 1234", add_special_tokens=False)["input_ids"]
        == (tokenizer("a 1234", add_special_tokens=False)["input_ids"])
    )


def test_the_small_model_fits_five_megabytes(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_model(new_model(small_config(len(tokenizer)), seed=0), tokenizer, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 5e6


def test_no_shape_of_a_step_follows_from_data_and_nothing_is_read_back(tokenizer: PreTrainedTokenizerFast) -> None:
    """CUDA graphs need this: with tensors that have no data, data-dependent shapes and reads fail."""
    model = three_layers(tokenizer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = Trainer(TrainingForward(model), TrainConfig(), CPU)
        ids, roles = torch.zeros(2, 512, dtype=torch.int64), torch.zeros(2, 512, dtype=torch.uint8)
        found = {phase: set(trainer.compute(ids, roles, torch.rand(2, 511), phase)) for phase in PHASES}
    assert found == {
        "dense": {"reply", "accuracy", "found"},
        "indexer": {"index"},
        "sparse": {"reply", "accuracy", "found", "index"},
    }


@pytest.mark.gpu
@pytest.mark.parametrize("phase", PHASES)
def test_steps_as_graphs_train_like_eager_ones(
    maker: DocumentMaker, tokenizer: PreTrainedTokenizerFast, phase: Phase
) -> None:
    device = torch.device("cuda")
    document = maker.document(random.Random(0), 512)
    ids, roles = torch.from_numpy(document.ids)[None], torch.from_numpy(document.roles)[None]
    losses: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for graphs, found in losses.items():
        model = three_layers(tokenizer)
        torch.nn.Module.to(model, device)
        trainer = Trainer(TrainingForward(model), TrainConfig(warmup_steps=1), device, graphs=graphs)
        for step in range(10):
            share = 0.0 if step < 5 else 0.9
            found.append({name: value.item() for name, value in trainer.step(ids, roles, phase, share).items()})
        assert trainer.captured_steps == (1 if graphs else 0)
    for eager, graphed in zip(losses[False], losses[True], strict=True):
        assert graphed == pytest.approx(eager, rel=0.02, abs=0.02)
    key = "index" if phase == "indexer" else "reply"
    assert losses[True][-1][key] < losses[True][0][key]


def test_progress_says_what_became_of_each_phase(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(tmp_path, CPU)
    steps: list[tuple[Phase, dict[str, float]]] = [("dense", {"reply": 3.0, "accuracy": float("nan")})]
    steps += [("dense", {"reply": 1.0, "accuracy": 0.5}), ("indexer", {"index": 0.25})]
    for number, (phase, values) in enumerate(steps):
        progress.step(number + 1, 4.0 * number, phase, 256, values)
    progress.close(12.0)
    said = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["step"] for line in said if line.startswith("{")] == [1], "one in ten seconds"
    assert said[1:] == [
        "dense: 2 steps in 8 s, 4000.0 ms each; mean of the last 2: accuracy 0.5000, reply 2.0000",
        "indexer: 1 steps in 4 s, 4000.0 ms each; mean of the last 1: index 0.2500",
    ]
    logged = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    assert [line["phase"] for line in logged] == ["dense", "dense", "indexer"]


def test_a_run_without_time_leaves_a_model_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(TrainConfig(minutes=0.0, lengths=(512,), tokens_per_step=512), tmp_path, CPU, workers=0)
    said = capsys.readouterr().out
    assert said.count("time is up: no accuracy of ") == len(KINDS)
    assert json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))["steps"] == 0
    assert not list(tmp_path.glob(".partial*"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.model_type == "deepseek_v4"


def test_accuracy_stops_at_its_deadline(maker: DocumentMaker, tokenizer: PreTrainedTokenizerFast) -> None:
    forward = TrainingForward(three_layers(tokenizer))
    config = TrainConfig(lengths=(512,), tokens_per_step=1024)
    found = accuracy(forward, maker, config, CPU, samples=2, deadline=time.monotonic() + 3600)
    assert all(set(by_kind) == set(KINDS) and set(by_kind["needle"]) == {512} for by_kind in found.values())
    late = accuracy(forward, maker, config, CPU, samples=2, deadline=time.monotonic())
    assert late == {"sparse": {}, "dense": {}}

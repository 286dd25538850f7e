"""The small DeepSeek-V4: its tokenizer and documents, the curriculum, and that training trains what it should."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV4Config, PreTrainedTokenizerFast

from forecache.workers import corpus
from forecache.workers.dsv4_documents import FACT, KINDS, NUMBER, REPLY, DocumentMaker
from forecache.workers.dsv4_forward import TrainingForward
from forecache.workers.dsv4_model import new_model, save_model, small_config
from forecache.workers.dsv4_tokenizer import build_tokenizer
from forecache.workers.dsv4_train import Curriculum, TrainConfig, Trainer
from forecache.workers.ruler import CITIES, NOUNS, PEOPLE, Generator, score

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are small here: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    """The end of a document, reply left out, is what `forecache eval` ends a prompt with, and the reply scores."""
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


def test_each_phase_trains_its_part_and_the_model_is_transformers_own(
    maker: DocumentMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    settings = small_config(len(tokenizer)).to_dict()
    settings.pop("model_type")
    types = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    settings |= {"num_hidden_layers": 3, "layer_types": types, "mlp_layer_types": ["hash_moe", "moe", "moe"]}
    model = new_model(DeepseekV4Config(**settings), seed=1)
    config = TrainConfig(warmup_steps=1, index_queries=16)
    trainer = Trainer(TrainingForward(model), config, CPU)
    document = maker.document(random.Random(0), 256)
    ids, roles = torch.from_numpy(document.ids)[None], torch.from_numpy(document.roles)[None]
    own = {name for name, _ in model.named_parameters() if ".indexer." in name}
    losses = {}
    for phase in ("dense", "indexer", "sparse"):
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

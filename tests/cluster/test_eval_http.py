"""`forecache eval --url` against `forecache serve` gives the answers of the same evaluation in one process."""

import json
import pydoc_data.topics
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from forecache.cluster.cli import main as cli
from forecache.cluster.tenants import new_key

pytestmark = pytest.mark.cluster

VOCABULARY = 800
COLUMNS = ("full", "recency")
STOP_S = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two random layers with a tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny-eval"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(tokenizer_object=tokenizer).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file for `--api-key-file`. The server's file, `keys.yaml`, is in the same directory."""
    path = tmp_path_factory.mktemp("keys") / "key"
    key, digest = new_key()
    path.write_text(f"{key}\n")
    path.with_name("keys.yaml").write_text(f"- {{key_sha256: {digest}, tenant: {{name: eval}}}}\n")
    return path


@pytest.fixture(scope="module")
def url(model: Path, key_file: Path) -> Iterator[str]:
    """The URL of a server that needs the key."""
    sizes = ("--cold-bytes", "64MiB", "--hot-bytes", "16MiB", "--threads", "1", "--late-policy", "wait")
    serve = (sys.executable, "-m", "forecache.cluster.cli.main", "serve", "--model", str(model), "--port", "0")
    keys = ("--api-keys-file", str(key_file.with_name("keys.yaml")))
    process = subprocess.Popen([*serve, *sizes, *keys], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = next((match[1] for line in process.stdout if (match := re.search(r"(http://\S+/v1)", line))), None)
        assert found is not None, "the server ended before it was ready"
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_S)


def run(model: Path, out: Path, *more: str) -> int:
    asked = ("--tasks", "needle", "--lengths", "1K", "--samples", "4", "--batch", "2", "--columns", *COLUMNS)
    asked = (*asked, "--min-resident-tokens", "0")
    return cli.main(["eval", "--model", str(model), "--out", str(out), "--threads", "1", *asked, *more])


def answers(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    return {(line["column"], line["sample"]): line["answer"] for line in lines}


def test_a_server_gives_the_answers_of_an_engine(
    model: Path, url: str, key_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to_server = ("--url", url, "--api-key-file", str(key_file))
    assert run(model, tmp_path / "http", *to_server) == 0
    assert run(model, tmp_path / "engine") == 0
    served, local = answers(tmp_path / "http"), answers(tmp_path / "engine")
    assert len(served) == len(COLUMNS) * 4
    for (column, number), answer in served.items():
        for name in ("text", "prompt_tokens", "completion_tokens", "keep_ratio", "coverage"):
            assert answer[name] == local[column, number][name], f"{name} of sample {number}, {column}"
    assert served["full", 0]["keep_ratio"] == 1.0
    assert served["recency", 0]["keep_ratio"] < 0.7
    # what a server says no to is said in its words, and nothing is lost
    assert run(model, tmp_path / "http", *to_server, "--lengths", "4K") == 2
    assert "the context is 2048 tokens" in capsys.readouterr().err
    assert answers(tmp_path / "http") == served
    for without, said in (("--url", url), "API key"), (("--url", url, "--api-key-file", "none"), "can't be read"):
        assert run(model, tmp_path / "http", *without) == 2
        assert said in capsys.readouterr().err


def test_a_column_with_an_engine_of_its_own_is_refused(
    model: Path, url: str, key_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, tmp_path, "--url", url, "--api-key-file", str(key_file), "--columns", "full", "bounds") == 2
    assert "needs its own engine" in capsys.readouterr().err


def test_no_server_is_one_sentence(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, tmp_path, "--url", "http://127.0.0.1:1") == 2
    assert "no forecache server answers at http://127.0.0.1:1" in capsys.readouterr().err

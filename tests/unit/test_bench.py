"""`forecache bench decode` on a tiny random model: its counts, files and output. No speed is asserted."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forecache.cluster.cli import bench
from forecache.cluster.cli import main as cli
from forecache.workers.errors import InvalidRequestError
from forecache.workers.evaluation.bench_decode import TURN_STEPS, WARMUP_STEPS, Settings, measure

Reference = Callable[[list[int], int], list[int]]
CONTEXT = 1000
TOKENS = TURN_STEPS + 4


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer of one token per byte."""
    path = tmp_path_factory.mktemp("bench") / "tiny"
    shutil.copytree(tiny_model, path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(tokenizer_object=tokenizer).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def arguments(model: Path) -> list[str]:
    return ["decode", "--model", str(model), "--context", str(CONTEXT), "--tokens", str(TOKENS), "--threads", "1"]


def test_rows_table_and_json(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *arguments, "--repeat", "2", "--keep-ratio", "0.5", "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "chunks kept" in out and "of transformers" in out
    assert "goal" not in out  # those are for another context
    (path,) = (tmp_path / "new").iterdir()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    summary = json.loads(out.splitlines()[-1])
    assert summary["csv"] == str(path) and len(summary["results"]) == len(rows)
    assert [(row["turn"], row["system"], row["phase"]) for row in rows] == [
        (turn, system, phase)
        for turn in ("keep 0.5", "full")
        for system in ("transformers", "forecache")
        for phase in ("prefill", "decode")
    ]
    for row in rows:
        slow, middle, fast = (float(row[f"{p}_tokens_per_s"]) for p in ("p20", "p50", "p80"))
        assert 0 < slow <= middle <= fast
        assert int(row["samples"]) == (2 if row["phase"] == "prefill" else 2 * TOKENS)
        assert row["threads"] == "1" and row["dtype"] == "float32" and int(row["context"]) == CONTEXT
        if row["system"] == "transformers":
            assert float(row["of_transformers"]) == 1.0


def test_everything_kept_is_the_same_work_and_half_is_less(model: Path) -> None:
    settings = Settings(model=str(model), context=CONTEXT, keep_ratio=0.5, tokens=TOKENS, repeat=1, threads=1)
    partial, full = measure(settings).pairs
    assert full.same_tokens == full.new_tokens == 1 + WARMUP_STEPS + TOKENS
    assert full.kept_ratio == 1.0 and full.resident_bytes == full.context_bytes
    assert 0.4 < partial.kept_ratio < 0.6
    assert partial.resident_bytes < 0.6 * partial.context_bytes
    for pair in (partial, full):
        for timings in (pair.forecache, pair.transformers):
            assert len(timings.prefill_s) == 1 and len(timings.step_s) == TOKENS
            assert min(*timings.prefill_s, *timings.step_s) > 0
        token_bytes = 3 * 2 * 2 * 16 * 4
        assert pair.transformers_bytes == (CONTEXT + pair.new_tokens - 1) * token_bytes


def test_an_end_of_sequence_does_not_end_it(model: Path, tmp_path: Path, reference: Reference) -> None:
    """The model's first token is made its end of sequence; the benchmark must decode on."""
    path = tmp_path / "ends"
    shutil.copytree(model, path)
    prompt = list(range(3, 200))
    end = reference(prompt, 1)[0]
    for name in ("config.json", "generation_config.json"):
        config = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(config | {"eos_token_id": end}))
    full = measure(Settings(model=str(path), tokens=2, repeat=1, threads=1), tuple(prompt)).pairs[1]
    assert full.new_tokens == full.same_tokens == 1 + WARMUP_STEPS + 2
    assert len(full.transformers.step_s) == len(full.forecache.step_s) == 2


def test_progress_goes_from_nothing_to_all(model: Path) -> None:
    seen: list[tuple[str, float]] = []
    settings = Settings(model=str(model), context=400, tokens=2, repeat=2, threads=1)
    measure(settings, progress=lambda text, done: seen.append((text, done)))
    shares = [done for _, done in seen]
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == pytest.approx(1.0)
    texts = " ".join(text for text, _ in seen)
    for part in ("warm-up", "1 of 2: prefill, transformers", "2 of 2: prefill, full", "decode, token 7 of 7"):
        assert part in texts


def test_longer_than_the_model(model: Path) -> None:
    with pytest.raises(InvalidRequestError, match="2048 tokens, less than 2040 of the prompt"):
        measure(Settings(model=str(model), context=2040, tokens=8, repeat=1, threads=1))


@pytest.mark.parametrize("wrong", [["--keep-ratio", "0"], ["--tokens", "0"], ["--repeat", "-1"], ["--context", "x"]])
def test_wrong_arguments(arguments: list[str], wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main([*arguments, *wrong])
    assert stop.value.code == 2 and wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize(("q", "expected"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.2, 1.6)])
def test_quantiles(q: float, expected: float) -> None:
    assert bench.quantile([4.0, 1.0, 3.0, 2.0], q) == pytest.approx(expected)
    assert bench.quantile([7.0], q) == 7.0

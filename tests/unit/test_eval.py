"""`forecache eval` on a tiny random model: which answers it asks for, stores and repeats, and its figures."""

import csv
import json
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from forecache.cluster.cli import main as cli
from forecache.workers.errors import ForecacheError
from forecache.workers.evaluation.evaluate import COLUMNS, Answer, Clock, Column, Plan, Records, evaluate, summarize
from forecache.workers.evaluation.ruler import Generator, Sample

VOCABULARY = 800
TASKS = ("needle", "words")
COLUMN_NAMES = ("full", "lookahead", "bounds", "recency", "random")


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


def run(model: Path, out: Path, *more: str, columns: Sequence[str] = COLUMN_NAMES) -> int:
    sizes = ("--lengths", "1K", "1536", "--samples", "3", "--batch", "4", "--threads", "1")
    asked = ("--tasks", *TASKS, "--columns", *columns)
    if "--min-resident-tokens" not in more:
        more = (*more, "--min-resident-tokens", "0")
    return cli.main(["eval", "--model", str(model), "--out", str(out), *sizes, *asked, *more])


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "accuracy.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "accuracy.json").read_text())
    return found


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval")
    assert run(model, out) == 0
    return out


def test_every_column_answers_the_same_samples(finished: Path) -> None:
    samples: dict[str, list[tuple[Any, ...]]] = {name: [] for name in COLUMN_NAMES}
    for line in answers(finished):
        samples[line["column"]].append((line["task"], line["tokens"], line["sample"], line["answer"]["prompt_tokens"]))
    assert len(samples["full"]) == len(set(samples["full"])) == len(TASKS) * 2 * 3
    assert all(sorted(asked) == sorted(samples["full"]) for asked in samples.values())


def test_rows_have_accuracy_interval_and_what_was_kept(finished: Path) -> None:
    assert len(rows(finished)) == len(COLUMN_NAMES) * len(TASKS) * 2
    for row in rows(finished):
        assert row["samples"] == "3"
        assert 0 <= float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) <= 1
        assert row["coverage"] == "" or 0 <= float(row["coverage"]) <= 1
        if row["column"] == "full":
            assert float(row["keep_ratio"]) == 1.0 and row["p_value"] == ""
        else:
            # the least budget is 8 chunks, of 16 or 24
            assert 0.3 < float(row["keep_ratio"]) < 0.7 and 0 < float(row["p_value"]) <= 1


def test_later_columns_find_the_prompts_stored(finished: Path) -> None:
    shares = {(row["task"], row["tokens"], row["column"]): float(row["cached_share"]) for row in rows(finished)}
    for task in TASKS:
        for tokens in ("1024", "1536"):
            assert shares[task, tokens, "full"] < 0.5
            assert all(shares[task, tokens, column] > 0.9 for column in ("lookahead", "recency", "random"))


def test_what_a_random_model_cannot_do_is_not_averaged(finished: Path) -> None:
    found = summary(finished)
    assert found["complete"] is True
    assert set(found["model_cannot"]) == {f"{task} at {tokens}" for task in TASKS for tokens in (1024, 1536)}
    assert found["columns"] == []
    assert all(row["counted"] == "False" for row in rows(finished))


def test_a_finished_run_asks_nothing_again(finished: Path, model: Path) -> None:
    before = (finished / "answers.jsonl").read_bytes()
    assert run(model, finished) == 0
    assert (finished / "answers.jsonl").read_bytes() == before


def test_answers_of_other_settings_are_not_mixed(
    finished: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, finished, "--keep-ratio", "0.5") == 2
    assert "keep_ratio is 0.135 there and 0.5 here" in capsys.readouterr().err
    assert run(model, finished, "--seed", "1") == 2


def test_several_numbers_of_resident_tokens_are_several_columns(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = ("full", "lookahead", "recency")
    assert run(model, tmp_path, "--min-resident-tokens", "2K", "0", "--tasks", "needle", columns=columns) == 0
    texts: dict[str, list[str]] = {}
    for line in answers(tmp_path):
        texts.setdefault(line["column"], []).append(line["answer"]["text"])
    assert set(texts) == {"full", *(f"{name}@{size}" for name in columns[1:] for size in (0, 2048))}
    # all contexts are shorter than 2048 tokens, so these are exact
    assert texts["lookahead@2048"] == texts["recency@2048"] == texts["full"] != texts["recency@0"]
    for row in rows(tmp_path):
        assert (float(row["keep_ratio"]) == 1.0) == (not row["column"].endswith("@0"))
    sizes = summary(tmp_path)["settings"]["min_resident_tokens"]
    assert sizes == {f"{name}@{size}": size for name in columns[1:] for size in (0, 2048)}
    assert run(model, tmp_path, "--min-resident-tokens", "0", columns=("full", "lookahead")) == 0, "other columns"
    assert run(model, tmp_path, "--min-resident-tokens", "1K", columns=("full", "lookahead")) == 2
    assert "min_resident_tokens is 0 there and 1024 here" in capsys.readouterr().err


def test_a_run_out_of_time_goes_on_where_it_stopped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    assert run(model, tmp_path, "--time-limit-s", "1e-9") == 1
    assert f"{len(answers(finished))} answers left" in capsys.readouterr().out
    assert summary(tmp_path)["complete"] is False
    # as if it had been killed after a while, in the middle of a line
    lines = (finished / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:17]) + lines[17][:40])
    assert run(model, tmp_path) == 0
    assert answers(tmp_path)[:17] == answers(finished)[:17]

    def replies(out: Path) -> dict[tuple[str, str, int, int], str]:
        return {(a["column"], a["task"], a["tokens"], a["sample"]): a["answer"]["text"] for a in answers(out)}

    assert replies(tmp_path) == replies(finished)


def test_more_samples_are_added_to_those_there(model: Path, tmp_path: Path) -> None:
    few = ("--lengths", "1K", "--tasks", "needle")
    assert run(model, tmp_path, *few, columns=("full", "recency")) == 0
    before = answers(tmp_path)
    assert run(model, tmp_path, *few, "--samples", "4", columns=("full", "recency")) == 0
    assert answers(tmp_path)[: len(before)] == before
    assert {a["sample"] for a in answers(tmp_path)[len(before) :]} == {3}
    assert {row["samples"] for row in rows(tmp_path)} == {"4"}


def test_contexts_too_long_or_too_short_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, tmp_path, "--lengths", "4K") == 2
    assert "context of 2048 tokens" in capsys.readouterr().err
    assert run(model, tmp_path, "--lengths", "100") == 2
    assert "100 tokens is too short" in capsys.readouterr().err


class Oracle:
    """A backend that knows the answers.

    It gives none for the task `words`, and none for every second sample in the column `recency`.
    """

    def group_size(self, tokens: int) -> int:
        return 3

    def answer(self, samples: Sequence[Sample], column: Column) -> list[Answer]:
        return [
            Answer(
                text="" if self._forgets(sample, column) else ", ".join(sample.answers),
                prompt_tokens=len(sample.prompt_token_ids),
                cached_tokens=0,
                completion_tokens=8,
                keep_ratio=1.0 if column.policy == "full" else 0.1,
                coverage=None if column.policy == "full" else 0.75,
            )
            for sample in samples
        ]

    def _forgets(self, sample: Sample, column: Column) -> bool:
        return sample.task == "words" or (column.name == "recency" and sample.number % 2 == 0)


@pytest.fixture(scope="module")
def generator(model: Path) -> Generator:
    return Generator(PreTrainedTokenizerFast.from_pretrained(model))


def test_means_differences_and_tests_over_cells(generator: Generator, tmp_path: Path) -> None:
    columns = (COLUMNS["full"], COLUMNS["lookahead"], COLUMNS["recency"])
    plan = Plan(("needle", "multivalue", "words"), (1024, 1536), columns, samples=20)
    records = Records(tmp_path, {})
    told: list[int] = []
    assert evaluate(plan, columns, Oracle(), generator, records, Clock(None), lambda text, n: told.append(n))
    assert sum(told) == 3 * 2 * 3 * 20
    found = summarize(plan, Records(tmp_path, {}))
    assert {(cell.task, cell.tokens) for cell in found.not_counted} == {("words", 1024), ("words", 1536)}
    full, lookahead, recency = found.columns
    assert [column.cells for column in found.columns] == [4, 4, 4]
    assert (full.accuracy, lookahead.accuracy, recency.accuracy) == (1.0, 1.0, 0.5)
    assert full.difference is None and lookahead.difference is not None and lookahead.difference.value == 0
    assert recency.difference is not None and recency.difference.value == -0.5 and recency.difference.high < -0.35
    assert lookahead.significantly_worse == ()
    assert len(recency.significantly_worse) == 4
    assert (full.coverage, recency.coverage, recency.keep_ratio) == (None, 0.75, pytest.approx(0.1))
    cell = next(cell for cell in found.cells if cell.column == "recency" and cell.counted)
    assert (cell.better, cell.worse) == (0, 10)
    assert cell.p_value == pytest.approx(2 / 2**10)


def test_means_wait_until_a_cell_is_complete(generator: Generator, tmp_path: Path) -> None:
    columns = (COLUMNS["full"], COLUMNS["recency"])
    plan = Plan(("needle",), (1024,), columns, samples=4)
    records = Records(tmp_path, {})
    evaluate(plan, columns[:1], Oracle(), generator, records, Clock(None), lambda text, n: None)
    assert [cell.column for cell in summarize(plan, records).cells] == ["full"]
    assert summarize(plan, records).columns == ()
    assert records.missing(plan, columns) == 4


def test_hopeless_cells_may_be_skipped(generator: Generator, tmp_path: Path) -> None:
    columns = (COLUMNS["full"], COLUMNS["lookahead"], COLUMNS["recency"])
    plan = Plan(("needle", "words"), (1024,), columns, samples=20, skip_hopeless=True)
    records = Records(tmp_path, {})
    told: list[int] = []
    assert evaluate(plan, columns, Oracle(), generator, records, Clock(None), lambda text, n: told.append(n))
    # at words full attention fails; the others are asked until 18 answers show it: 15 at three a group
    assert sum(told) == 3 * 20 + (20 + 2 * 15)
    assert records.missing(plan, columns) == 0
    assert [cell.task for cell in summarize(plan, records).not_counted] == ["words"]


def test_a_cell_that_only_looked_hopeless_is_asked_in_full(generator: Generator, tmp_path: Path) -> None:
    class Late(Oracle):
        def _forgets(self, sample: Sample, column: Column) -> bool:
            return column.name == "full" and sample.number < 18

    columns = (COLUMNS["full"], COLUMNS["recency"])
    plan = Plan(("needle",), (1024,), columns, samples=24, skip_hopeless=True)
    records = Records(tmp_path, {})
    assert evaluate(plan, columns, Late(), generator, records, Clock(None), lambda text, n: None)
    full, recency = summarize(plan, records).columns
    assert (full.accuracy, recency.accuracy) == (0.25, 1.0)
    assert records.missing(plan, columns) == 0


def test_records_refuse_other_settings(tmp_path: Path) -> None:
    Records(tmp_path, {"seed": 0, "selection": {"sink_chunks": 1}})
    Records(tmp_path, {"selection": {"sink_chunks": 1}, "seed": 0})
    with pytest.raises(ForecacheError, match="seed is 0 there and None here"):
        Records(tmp_path, {"selection": {"sink_chunks": 1}})


def test_settings_of_one_column_do_not_bind_the_others(tmp_path: Path) -> None:
    Records(tmp_path, {"seed": 0})
    Records(tmp_path, {"seed": 0}, {"lookahead": {"trained_indexer": "one"}})
    Records(tmp_path, {"seed": 0}, {"lookahead": {"trained_indexer": "one"}})
    Records(tmp_path, {"seed": 0})
    with pytest.raises(ForecacheError, match="trained_indexer is 'one' there and 'other' here"):
        Records(tmp_path, {"seed": 0}, {"lookahead": {"trained_indexer": "other"}})

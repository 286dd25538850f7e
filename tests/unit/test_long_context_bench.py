"""The long-context benchmark on a model of two layers: its rows agree with the run."""

import csv
import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.selection import budget_chunks
from forecache.workers.residency.window import PROBE_TOKENS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CONTEXT, CHUNK_TOKENS, KEEP_RATIO = 1280, 16, 0.2
LAYERS, HEADS, HEAD_DIM = 2, 4, 16
MATRICES = LAYERS * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + (2 * LAYERS + 1) * 64
"""Weights besides embedding and output, norms included."""


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("bench_long_context")


@pytest.fixture(scope="module")
def bench(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    args = script.arguments(["--tiny", "--rows", "decode", "prefill", "--out", str(tmp_path_factory.mktemp("bench"))])
    with script.opened(args) as opened:
        yield opened
        opened.llm.engine.check_integrity()
        opened.llm.memory.check_integrity()


@pytest.fixture(scope="module")
def decoded(bench: Any) -> list[tuple[Any, list[Any]]]:
    """Run the benchmark: one row per turnover, with the imposed predictions."""
    return [(row, list(bench.indexer.turns)) for row in bench.decode(CONTEXT)]


def scored(chunks: int) -> int:
    """The number of chunks chosen by score: the budget without a third for recency and one sink."""
    budget = budget_chunks(chunks, KEEP_RATIO, SelectionConfig())
    return budget - 1 - budget // 3


def test_decode_rows_have_the_asked_turnover(decoded: list[tuple[Any, list[Any]]]) -> None:
    assert [row.turnover_asked for row, _ in decoded] == [0.0, 0.2, 1.0]
    assert scored(CONTEXT // CHUNK_TOKENS) == 10
    for row, turns in decoded:
        assert row.turns >= 8
        of_turns = {turn.scored for turn in turns}
        assert of_turns <= {scored(chunks) for chunks in range(79, 87)}
        mean = row.recalled_chunks / row.turns / row.turnover
        assert min(of_turns) - 0.01 <= mean <= max(of_turns) + 0.01
        later = [turn for turn in turns if turn.replaced]
        assert all(turn.replaced == round(row.turnover_asked * turn.scored) for turn in later if turn.scored == 10)
        assert 70 <= row.windows * 16 / row.concurrency <= 79
        per_window = row.recalled_chunks / mean / row.windows
        assert row.turnover_per_window == pytest.approx(per_window, rel=0.01)
        assert all(turn.asked_s <= turn.at_s for turn in turns) and row.predict_p50_ms > 0
    # a growing budget recalls one more chunk; at 100 % turnover a set recalls no more than was reserved
    still, fifth, whole = (row for row, _ in decoded)
    assert still.recalled_chunks <= still.concurrency and not any(turn.replaced for turn in decoded[0][1])
    assert fifth.turnover == pytest.approx(0.2, abs=0.05)
    assert 0.8 <= whole.turnover <= 1.05


def test_decode_rows_add_up(decoded: list[tuple[Any, list[Any]]]) -> None:
    base = decoded[0][0]
    for row, _ in decoded:
        assert row.concurrency == 2
        assert row.cached_tokens == (CONTEXT - PROBE_TOKENS) // CHUNK_TOKENS * CHUNK_TOKENS
        assert KEEP_RATIO <= row.kept_ratio <= KEEP_RATIO + 0.05
        chunk_bytes = LAYERS * 2 * 2 * CHUNK_TOKENS * HEAD_DIM * 4
        assert row.resident_bytes % chunk_bytes == 0
        assert 2 * 17 <= row.resident_bytes / chunk_bytes <= 2 * 25
        assert row.weight_bytes == 4 * (MATRICES + 256 * 64)
        floor_ms = (row.weight_bytes + row.resident_bytes) / row.copy_gb_per_s / 1e6
        assert row.floor_ms == pytest.approx(floor_ms, rel=1e-4)
        assert row.over_floor == pytest.approx(row.p50_ms / row.floor_ms, rel=1e-4)
        assert 0 < row.p20_ms <= row.p50_ms <= row.p80_ms
        # two requests in step: the rate is two tokens a step, whose mean is not far from the steps' percentiles
        assert row.steps <= 95
        assert row.tokens_per_s > 0 and row.settled_tokens_per_s > 0
    for row, _ in decoded[1:]:
        loss = 1 - row.settled_tokens_per_s / base.settled_tokens_per_s
        assert row.loss_to_recall == pytest.approx(loss, abs=1e-4)
    assert base.loss_to_recall is None


def test_prefill_finds_nothing_stored(bench: Any) -> None:
    for _ in range(2):  # the second prompt is another one
        (row,) = bench.prefill(1600)
        assert (row.cached_tokens, row.prefilled_tokens) == (0, 1600)
        assert row.prefill_tokens_per_s * row.ttft_p50_s == pytest.approx(1600, rel=1e-4)
        attention = 2 * LAYERS * HEADS * HEAD_DIM * 1600**2
        flop = row.tflop_per_s * 1e12 * row.ttft_p50_s
        assert flop == pytest.approx(2 * MATRICES * 1600 + attention, rel=1e-4)


def test_a_session_is_resumed_from_cold_memory(bench: Any) -> None:
    (row,) = bench.resume(CONTEXT)
    assert (row.cached_tokens, row.prefilled_tokens) == (CONTEXT, 64)
    assert 0 < row.ttft_p20_s <= row.ttft_p50_s <= row.ttft_p80_s
    history = LAYERS * 2 * 2 * HEAD_DIM * 4 * CONTEXT
    assert row.floor_s * row.host_copy_gb_per_s * 1e9 == pytest.approx(history, rel=1e-4)


def test_real_prefill_ends_at_the_deadline_and_says_so(bench: Any) -> None:
    (whole,) = bench.real(768)
    assert (whole.kv, whole.cached_tokens, whole.prefilled_tokens, whole.note) == ("computed", 0, 768, "")
    assert whole.turnover_asked is None
    in_time = bench.options
    bench.options = replace(in_time, deadline_s=0.0)
    (cut,) = bench.real(768)
    bench.options = in_time
    assert cut.prefilled_tokens == 256
    assert cut.note == "time limit: 256 of 768 tokens were prefilled, then decoded over"
    assert cut.cached_tokens == 256 - PROBE_TOKENS and cut.tokens_per_s > 0


def test_more_than_fits_is_refused(script: Any, bench: Any) -> None:
    with pytest.raises(script.BenchmarkError, match=r"4000 tokens need 256 cold and \d+ hot chunks, but there are"):
        list(bench.decode(4000))


def test_steady_time_is_that_of_all_requests(script: Any) -> None:
    client = importlib.import_module("client")
    early = client.Track(1, 0.0, token_s=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    late = client.Track(1, 0.0, token_s=[2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    steady = client.steady([early, late])
    assert (steady.start_s, steady.end_s, steady.tokens) == (2.5, 6.0, 4 + 4)
    assert steady.gaps_s == (0.5, 1.0, 1.0, 1.0)
    settled = client.steady([early, late], skip_tokens=2)
    assert (settled.start_s, settled.end_s, settled.tokens, settled.tokens_per_s) == (4.0, 6.0, 4, 2.0)
    with pytest.raises(script.BenchmarkError, match="raise --max-tokens"):
        client.steady([early, client.Track(1, 0.0, token_s=[6.0, 7.0])])


def test_rows_are_written_as_they_come(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--tiny", "--out", str(tmp_path), "--concurrency", "2", "--contexts", "256", "--rows"]
    assert script.main([*command, "prefill", "profile"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert script.main([*command, "resume", "--set", "lead_steps=2"]) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    with (tmp_path / "long-context.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["prefill", "resume"]
    assert [row["settings"] for row in rows] == ["", "lead_steps=2"]
    for row, said in zip(rows, [*first, *second], strict=True):
        assert row == {name: "" if value is None else str(value) for name, value in said.items()}
        assert row["torch"] == torch.__version__ and row["date"].startswith("20")
    assert "engine.py" in (tmp_path / "profile-host-256x2.txt").read_text()
    assert "aten::" in (tmp_path / "profile-device-256x2.txt").read_text()

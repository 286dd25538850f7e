"""`bench_workloads.py`: its rows, its arithmetic, and a run of a tiny model from the first request to the table."""

import importlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = ["hot_bytes=4000000", "cold_bytes=16000000", "chunk_tokens=16", "threads=1"]


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, Any]]:
    names = ("workload_rows", "workload_report", "workload_engines", "bench_workloads", "harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def rows(scripts: dict[str, Any]) -> Any:
    return scripts["workload_rows"]


def test_a_burst_is_unique_prompts_at_once(rows: Any) -> None:
    sessions = rows.sessions_of("8x32768+256", rows.SIZES["full"], 0, None)
    assert len(sessions) == 8
    assert {session.start_s for session in sessions} == {0.0}
    assert {session.turns for session in sessions} == {(rows.Turn(32768, 256),)}
    assert rows.most_tokens(sessions) == 33024


@pytest.mark.parametrize("row", ["session", "8x32768", "0x5+5", "4x5+0", "-1x5+5", "", "0@5", "3@0"])
def test_rows_that_do_not_exist(rows: Any, row: str) -> None:
    with pytest.raises(rows.RowError):
        rows.sessions_of(row, rows.SIZES["full"], 0, None)


def test_sessions_are_those_of_the_issue(rows: Any) -> None:
    sessions = rows.sessions_of("sessions", rows.SIZES["full"], 0, None)
    assert len(sessions) == 12 and {len(session.turns) for session in sessions} == {6}
    assert sessions[0].turns == (rows.Turn(65536 + 256, 256), *[rows.Turn(256, 256)] * 5)
    history_bytes = 12 * 65536 * 131072
    assert history_bytes == pytest.approx(103e9, rel=0.01)


def test_mixed_is_short_and_long_prompts_over_time(rows: Any) -> None:
    sizes = rows.SIZES["full"]
    sessions = rows.sessions_of("mixed", sizes, 3, 2.0)
    assert sessions == rows.sessions_of("mixed", sizes, 3, 2.0) != rows.sessions_of("mixed", sizes, 4, 2.0)
    assert Counter(session.kind for session in sessions) == {"chat": 96, "document": 32}
    for session in sessions:
        low, high = (2048, 4096) if session.kind == "chat" else (16384, 32768)
        assert low <= session.turns[0].new_tokens <= high
    starts_s = [session.start_s for session in sessions]
    assert starts_s == sorted(starts_s) and 128 / starts_s[-1] == pytest.approx(2.0, rel=0.25)
    at_once = rows.sessions_of("mixed", sizes, 3, None)
    assert {session.start_s for session in at_once} == {0.0}
    assert [session.turns for session in at_once] == [session.turns for session in sessions]


def test_no_prompt_begins_as_another_one(rows: Any) -> None:
    drawn = [prompts.draw(64) for run in ("a", "b") for prompts in [rows.Prompts(256, 0, run)] for _ in range(20)]
    assert len({tuple(prompt[:8]) for prompt in drawn}) == len(drawn)
    assert min(map(min, drawn)) >= 10 and max(map(max, drawn)) < 256
    assert rows.Prompts(256, 0, "a").draw(64) == drawn[0]
    assert rows.Prompts(256, 1, "a").draw(64) != drawn[0]


def test_percentiles(rows: Any) -> None:
    assert rows.percentiles([float(value) for value in range(101)]) == {"p50": 50, "p90": 90, "p99": 99, "p100": 100}
    assert rows.percentiles([]) == {}


def waits_s(arrivals_s: list[float], service_s: float) -> list[float]:
    """How long each request waits at one server that takes ``service_s`` for each, the service included."""
    waits, free_s = [], 0.0
    for arrival_s in arrivals_s:
        free_s = max(free_s, arrival_s) + service_s
        waits.append(free_s - arrival_s)
    return waits


@pytest.mark.parametrize("seed", range(5))
def test_a_growing_queue_is_seen_and_a_steady_one_is_not_taken_for_it(rows: Any, seed: int) -> None:
    generator = random.Random(seed)
    arrivals_s = list(accumulate(generator.expovariate(1.0) for _ in range(300)))
    assert rows.keeps_up(arrivals_s, waits_s(arrivals_s, 0.5), slack_s=1.0)
    for service_s in (1.2, 3.0):
        assert not rows.keeps_up(arrivals_s, waits_s(arrivals_s, service_s), slack_s=1.0)
    assert rows.keeps_up([0.0], [9.0], slack_s=0.0)


def test_bisection_finds_the_highest_rate(rows: Any) -> None:
    asked: list[float] = []

    def sustained(rate: float) -> bool:
        asked.append(rate)
        return rate <= 3.3

    assert rows.highest_rate(2.0, 4.0, sustained, 10) == pytest.approx(3.3, abs=2 / 2**10)
    assert len(asked) == 10 and all(2.0 < rate < 4.0 for rate in asked)
    assert rows.highest_rate(2.0, 4.0, lambda rate: False, 5) == 2.0
    assert rows.highest_rate(2.0, 4.0, sustained, 0) == 2.0


def test_the_driver_sends_turns_in_order_and_the_answers_are_the_engines(
    scripts: dict[str, Any], rows: Any, tiny_model: Path, arena_dir: Path
) -> None:
    settings = dict(setting.split("=") for setting in SMALL)
    engine = scripts["workload_engines"].ForecacheEngine(
        str(tiny_model), None, {**settings, "arena_dir": str(arena_dir)}
    )
    engine.keep_ratio = 1.0
    turns = (rows.Turn(150, 5), rows.Turn(20, 4), rows.Turn(10, 3))
    sessions = [rows.Session(turns, kind="session"), rows.Session((rows.Turn(40, 6),), start_s=0.3, kind="late")]
    try:
        course = scripts["workload_engines"].drive(engine, sessions, rows.Prompts(256, 0, "x"), "x")
        prompts = rows.Prompts(256, 0, "x")
        history: list[int] = []
        grown = [track for track in course.tracks if track.kind == "session"]
        assert [track.turn for track in grown] == [0, 1, 2]
        for turn, track in zip(turns, grown, strict=True):
            history += prompts.draw(turn.new_tokens)
            (completion,) = engine.llm.generate(
                [history], max_tokens=turn.answer_tokens, ignore_eos=True, keep_ratio=1.0, cache_salt="again"
            )
            assert track.prompt_tokens == len(history)
            assert track.token_ids == completion.token_ids
            history += track.token_ids
        (late,) = (track for track in course.tracks if track.kind == "late")
    finally:
        engine.close()
    assert grown[0].cached_tokens == 0 and all(track.cached_tokens >= 96 for track in grown[1:])
    assert all(track.error is None and track.due_s <= track.token_s[0] for track in course.tracks)
    assert [later.due_s for later in grown[1:]] == [earlier.token_s[-1] for earlier in grown[:-1]]
    assert late.due_s == 0.3 and late.first_token_s > 0 and len(late.gaps_s) == 5
    figures = course.figures()
    assert (figures["requests"], figures["answer_tokens"], figures["errors"]) == (4, 5 + 4 + 3 + 6, {})
    assert figures["prompt_tokens"] == sum(track.prompt_tokens for track in course.tracks)
    assert figures["total_s"] == pytest.approx(max(track.token_s[-1] for track in course.tracks), abs=0.001)
    assert set(figures["first_token_s_by_kind"]) == {"session", "late"}


def test_a_prompt_beside_streams_is_sent_when_they_decode(
    scripts: dict[str, Any], rows: Any, tiny_model: Path, arena_dir: Path
) -> None:
    settings = dict(setting.split("=") for setting in SMALL)
    engine = scripts["workload_engines"].ForecacheEngine(
        str(tiny_model), None, {**settings, "arena_dir": str(arena_dir)}
    )
    sizes = rows.SIZES["small"]
    sessions = rows.sessions_of("2@700", sizes, 0, None)
    assert [session.kind for session in sessions] == ["stream", "stream", "document"]
    try:
        course = scripts["workload_engines"].drive(engine, sessions, rows.Prompts(256, 0, "x"), "x")
    finally:
        engine.close()
    *streams, document = course.tracks
    assert document.kind == "document" and len(document.token_ids) == 1 and document.prompt_tokens == 700
    assert all(stream.token_s[31] <= document.due_s for stream in streams)
    assert all(len(stream.token_ids) == sizes.stream_answer_tokens for stream in streams)
    figures = course.figures()["beside"]
    assert figures["streams_that_lasted"] == 2
    assert figures["document_first_token_s"] == pytest.approx(document.first_token_s, abs=1e-5)
    before = [gap for stream in streams for gap in stream.gaps_s if gap > 0]
    assert 0 <= figures["gaps_before_s"]["p50"] <= max(before)
    assert figures["gaps_during_s"]["p100"] <= max(before) + 1e-5


def test_a_refused_request_is_an_error_of_the_row_and_ends_its_session(
    scripts: dict[str, Any], rows: Any, tiny_model: Path, arena_dir: Path
) -> None:
    settings = dict(setting.split("=") for setting in SMALL)
    engine = scripts["workload_engines"].ForecacheEngine(
        str(tiny_model), None, {**settings, "arena_dir": str(arena_dir)}
    )
    too_long = rows.Session((rows.Turn(4000, 5), rows.Turn(5, 5)))
    try:
        course = scripts["workload_engines"].drive(
            engine, [too_long, rows.Session((rows.Turn(20, 3),))], rows.Prompts(256, 0, "x"), "x"
        )
    finally:
        engine.close()
    figures = course.figures()
    assert figures["requests"] == 2 and figures["answer_tokens"] == 3
    (message,) = figures["errors"]
    assert "2048" in message


def result(row: str, column: str, total_s: float, **more: Any) -> dict[str, Any]:
    times = {"p50": total_s / 4, "p90": total_s / 3, "p99": total_s / 2, "p100": total_s}
    return {
        "row": row, "column": column, "total_s": total_s, "first_token_s": times, "between_tokens_s": times,
        "cached_tokens": 30, "prompt_tokens": 120, "errors": {}, "rate_per_s": None, "beside": None, **more,
    }  # fmt: skip


def test_gaps_of_streams_are_told_apart_by_the_prefill_beside_them(scripts: dict[str, Any]) -> None:
    engines = scripts["workload_engines"]

    def track(kind: str, due_s: float, token_s: list[float]) -> Any:
        return engines.Track(kind, 0, due_s, 10, len(token_s), list(range(len(token_s))), token_s, 0)

    streams = [track("stream", 0.0, [1.0, 1.1, 1.2, 2.2, 3.7, 3.8, 3.9]), track("stream", 0.0, [1.0, 1.2])]
    course = engines.Course([*streams, track("document", 1.25, [3.65])], 4.0, [0.1])
    assert course.figures()["beside"] == {
        "gaps_before_s": pytest.approx({"p50": 0.1, "p90": 0.18, "p99": 0.198, "p100": 0.2}),
        "gaps_during_s": pytest.approx({"p50": 1.25, "p90": 1.45, "p99": 1.495, "p100": 1.5}),
        "streams_that_lasted": 1,
        "document_first_token_s": 2.4,
    }
    assert engines.Course(streams, 4.0, [0.1]).figures()["beside"] is None


def test_the_rate_is_vllms_where_it_runs(scripts: dict[str, Any], tmp_path: Path) -> None:
    bench, report = scripts["bench_workloads"], scripts["workload_report"]
    args = bench.arguments(["--out", str(tmp_path / "r.json"), "--engines", "vllm", "forecache", "--rows", "mixed"])
    results = bench.open_results(args)
    assert bench.rate_of(args, results, "vllm") is None is bench.rate_of(args, results, "forecache")
    results.set_rate(report.Rate(4.0, "forecache", "at once"))
    assert bench.rate_of(args, results, "vllm") is None, "its own is still to be measured"
    assert bench.rate_of(args, results, "forecache") == 3.2
    results.add(result("mixed", "forecache, keep ratio 0.135", 5.0, rate_per_s=3.2))
    results.add(result("mixed", "forecache, keep ratio 1", 5.0, rate_per_s=3.2))
    assert not bench.missing(args, results, "forecache", ["mixed"])
    results.set_rate(report.Rate(5.0, "vllm", "at once"))
    assert bench.rate_of(args, results, "vllm") == bench.rate_of(args, results, "forecache") == 4.0
    assert bench.missing(args, results, "forecache", ["mixed"]), "measured at another rate"
    args.rate = 3.2
    assert not bench.missing(args, results, "forecache", ["mixed"])


def test_the_table_has_the_ratio_to_vllm(scripts: dict[str, Any], tmp_path: Path) -> None:
    report = scripts["workload_report"]
    results = report.Results(tmp_path / "r.json", {"seed": 0})
    columns = list(report.columns_of(["vllm", "forecache"], [0.135, 1.0]))
    assert columns == ["vllm", "forecache, keep ratio 0.135", "forecache, keep ratio 1"]
    results.add(result("sessions", columns[0], 40.0))
    results.add(result("sessions", columns[1], 10.0))
    results.add(result("mixed", columns[1], 8.0, errors={"full": 2}))
    text = report.table(results, ["sessions", "mixed", "1x2+3"], columns)
    assert "| sessions | total, s | 40 | 10 (0.25 x) |  |" in text
    assert "| sessions | between tokens p99, ms | 20000.0 | 5000.0 (0.25 x) |  |" in text
    assert "| sessions | prompt tokens cached | 25.0% | 25.0% |  |" in text
    assert "| mixed | total, s |  | 8 |  |" in text and "| mixed | **errors** |  | 2 |  |" in text
    assert "1x2+3" not in text


def test_a_file_is_resumed_only_with_its_settings(scripts: dict[str, Any], tmp_path: Path) -> None:
    report = scripts["workload_report"]
    results = report.Results(tmp_path / "r.json", {"seed": 0, "set": []})
    results.add(result("mixed", "vllm", 5.0, rate_per_s=2.0))
    results.add(result("sessions", "vllm", 5.0, errors={"full": 1}))
    results.set_rate(report.Rate(2.5, "vllm", "at once"))
    again = report.Results(tmp_path / "r.json", {"seed": 0, "set": []})
    assert again.rate == report.Rate(2.5, "vllm", "at once")
    assert again.done("mixed", "vllm", 2.0) and not again.done("mixed", "vllm", 3.0)
    assert not again.done("sessions", "vllm") and not again.done("mixed", "forecache, keep ratio 1", 2.0)
    with pytest.raises(report.ResumeError, match="seed 0, now 1"):
        report.Results(tmp_path / "r.json", {"seed": 1, "set": []})


def test_a_run_from_start_to_table_is_resumed(
    scripts: dict[str, Any], tmp_path: Path, arena_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main = scripts["bench_workloads"].main
    out = tmp_path / "w.json"
    settings = [*SMALL, f"arena_dir={arena_dir}"]
    command = ["--out", str(out), "--shape", "tiny", "--sizes", "small", "--engines", "forecache", "--set", *settings]
    assert main([*command, "--rows", "2x40+4", "mixed", "--keep-ratios", "0.5"]) == 0
    assert "| 2x40+4 | total, s |" in capfd.readouterr().out
    first = json.loads(out.read_text())["results"]
    everything = ["--rows", "2x40+4", "mixed", "sessions", "--keep-ratios", "0.5"]
    assert main([*command, *everything]) == 0
    text = capfd.readouterr().out
    stored = json.loads(out.read_text())
    found = {one["row"]: one for one in stored["results"]}
    assert stored["results"][:2] == first  # not measured again
    assert {name: (one["requests"], one["errors"]) for name, one in found.items()} == {
        "2x40+4": (2, {}),
        "mixed": (12, {}),
        "sessions": (9, {}),
    }
    assert (found["2x40+4"]["prompt_tokens"], found["2x40+4"]["answer_tokens"]) == (80, 8)
    assert found["sessions"]["cached_tokens"] > 0 and found["mixed"]["cached_tokens"] == 0
    assert stored["rate"]["of"] == "forecache"
    assert found["mixed"]["rate_per_s"] == pytest.approx(0.8 * stored["rate"]["per_s"], abs=1e-3)
    assert all(one["column"] == "forecache, keep ratio 0.5" for one in stored["results"])
    assert all(one["start_s"] > 0 and one["memory"]["cold_bytes"] <= 16_000_000 for one in stored["results"])
    for row in found:
        assert f"| {row} | between tokens p99, ms |" in text
    assert main([*command, *everything, "--table"]) == 0
    assert "forecache started" not in capfd.readouterr().out
    assert main([*command, *everything, "--seed", "5"]) == 2
    assert "other settings (seed 0, now 5)" in capfd.readouterr().err
    assert not list(arena_dir.iterdir())


def test_no_row_starts_after_the_time_limit(scripts: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "w.json"
    command = ["--out", str(out), "--shape", "tiny", "--sizes", "small", "--engines", "forecache", "--rows", "2x40+4"]
    assert scripts["bench_workloads"].main([*command, "--time-limit-s", "0"]) == 0
    assert not out.exists()


def test_memory_of_keys_and_values(scripts: dict[str, Any]) -> None:
    assert scripts["bench_workloads"].kv_bytes(scripts["harness"].SHAPES["llama-3.1-8b"]) == 131072

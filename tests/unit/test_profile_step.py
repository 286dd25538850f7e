"""`profile_step.py` on a tiny model: which steps it finds, and what it reports of each."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_each_kind_of_step_is_timed_and_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "steps.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        main = importlib.import_module("profile_step").main
        assert main(["--out", str(out), "--tiny", "--set", "cold_bytes=64000000", "hot_bytes=64000000"]) == 0
    report = json.loads(out.read_text())
    steps = {step["kind"]: step for step in report["steps"]}
    assert list(steps) == ["prefill", "mixed", "decode"]
    assert [steps[kind]["decode_rows"] for kind in steps] == [0, 4, 4]
    assert steps["decode"]["prompt_tokens"] == 0
    assert steps["prefill"]["prompt_tokens"] >= 64 and steps["mixed"]["prompt_tokens"] >= 16
    assert all(900 <= steps[kind]["past_tokens"] <= 1100 for kind in ("prefill", "mixed"))
    printed = capsys.readouterr().out
    for kind, step in steps.items():
        assert step["steps"] >= 1 and 0 < step["launch_p50_ms"] <= step["step_p50_ms"]
        assert step["device_p50_ms"] is None and step["profiled"]["kernels"] == 0
        times_us = [us for _, _, us in step["profiled"]["operators"]]
        assert len(times_us) == 15 and times_us == sorted(times_us, reverse=True) and min(times_us) > 0
        assert any(name == "aten::mm" for name, _, _ in step["profiled"]["operators"])
        assert f"{kind}: {step['decode_rows']} decode rows, {step['prompt_tokens']} prompt tokens" in printed
    assert json.loads(printed.splitlines()[-1]) == report

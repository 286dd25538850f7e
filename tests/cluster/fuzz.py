"""Sends ten thousand valid and invalid requests that schemathesis makes from the OpenAPI document. A script:

    python tests/cluster/fuzz.py [--cases 10000] [--limit-s 900] [--seed N]

It starts a server of a small model, and asks each path in turns until all cases are made or the time is over. No answer
may be a server error, none may take longer than a minute, every stream holds well-formed events alone, and the server
is well afterwards: ready, nothing running, nothing held, and it answers. Exit status 1 unless all of that is so, and
for cases that there was no time for.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from byte_model import write_byte_model
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/tokenize", "/v1/detokenize", "/v1/sessions/{session_id}",
)  # fmt: skip
CASE_LIMIT_S = 60.0
ROUND = 100
"""Cases of a path and mode before it is the next one's turn."""
START_S, STOP_S = 180.0, 60.0


def try_cases(url: str, interface: Any, path: str, mode: GenerationMode, cases: int, seed_number: int = 0) -> int:
    """Ask up to ``cases`` requests of one kind; returns how many there were.

    Raises what is wrong with an answer, with the shortest request for it.
    """
    asked = 0

    @seed(seed_number)
    @given(case=interface[path]["POST"].as_strategy(generation_mode=mode))
    @settings(
        max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None,
        phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip
    def check(case: Any) -> None:
        nonlocal asked
        asked += 1
        response = case.call(timeout=CASE_LIMIT_S)
        case.validate_response(response, checks=[not_a_server_error])
        if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
            # schemathesis reads a few events and leaves
            check_events(httpx.post(f"{url}{path}", json=case.body, timeout=CASE_LIMIT_S).text)

    check()
    return asked


def check_events(text: str) -> None:
    """Check that ``text`` is a complete stream of well-formed events."""
    events = text.split("\n\n")
    assert events.pop() == "", "the last event is not complete"
    for event in events:
        assert re.fullmatch(r": (waiting|prefill \d+/\d+)|data: \[DONE\]|data: \{.*\}", event), event
        if event.startswith("data: {"):
            assert {"choices", "error"} & set(json.loads(event.removeprefix("data: ")))
    assert events[-1] == "data: [DONE]" or "error" in json.loads(events[-1].removeprefix("data: "))


def check_well(url: str, model: str) -> None:
    """Check that the server has no request and no hold left, and answers."""
    deadline_s = time.monotonic() + 30
    while True:
        text = httpx.get(f"{url}/metrics", timeout=30).text
        left = [
            line
            for name in ("forecache_num_requests_running", "forecache_num_requests_waiting",
                         "forecache_memory_tier_held_perc")
            for line in re.findall(rf"^{name}(?:{{.*}})? .+$", text, re.MULTILINE)
            if float(line.rsplit(" ", 1)[1])
        ]  # fmt: skip
        if not left:
            break
        assert time.monotonic() < deadline_s, f"left over: {left}"
        time.sleep(0.2)
    assert httpx.get(f"{url}/ready", timeout=30).status_code == 200
    body = {"model": model, "prompt": "abc", "max_tokens": 3}
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200


def run(url: str, model: str, cases: int, limit_s: float, first_seed: int) -> int:
    """Run rounds until ``cases`` are made; returns how many there were."""
    interface = schemathesis.openapi.from_url(f"{url}/openapi.json")
    start, done, turn = time.monotonic(), 0, 0
    kinds = [(path, mode) for path in PATHS for mode in GenerationMode]
    while done < cases and time.monotonic() - start < limit_s:
        path, mode = kinds[turn % len(kinds)]
        done += try_cases(url, interface, path, mode, min(ROUND, cases - done), first_seed + turn)
        turn += 1
        if turn % len(kinds) == 0 or done >= cases:
            taken_s = time.monotonic() - start
            print(f"{done} cases in {taken_s:.0f} s: {done / taken_s:.1f} a second", flush=True)
    check_well(url, model)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--limit-s", type=float, default=900.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_byte_model(Path(folder) / "bytes")
        command = [
            *(sys.executable, "-m", "forecache.cluster.cli.main", "serve", "--model", str(model), "--port", "0"),
            *("--max-model-len", "800", "--chunk-tokens", "16", "--hot-bytes", "8MiB", "--cold-bytes", "128MiB"),
            *("--threads", "1", "--start-deadline-s", str(START_S)),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            url = next((found[1] for line in process.stdout if (found := re.search(r"(http://\S+)/v1", line))), None)
            assert url is not None, f"the server ended with status {process.wait()}"
            done = run(url, "bytes", args.cases, args.limit_s, args.seed)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
    missing = max(args.cases - done, 0)
    print("the server is well afterwards" + (f"; no time for {missing} cases" if missing else ""))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

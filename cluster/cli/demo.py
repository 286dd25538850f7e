"""`forecache demo`: starts a cluster, asks a question about a long document, and prints what the answer took."""

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from forecache.cluster.errors import StartError
from forecache.workers.errors import ForecacheError
from forecache.workers.evaluation.tasks import RetrievalTask, make_task
from forecache.workers.models.backbone import expected_layout, load_config, pick_device, pick_dtype
from forecache.workers.models.loader import resolve_model
from forecache.workers.models.tokenizer import load_tokenizer

MODEL_NAME = "demo"
CHUNK_TOKENS = 64
HOT_SHARE = 0.4
"""Hot slots / chunks of the prompt: less than half of the document fits the hot pool at once."""
ANSWER_TOKENS = 64
STOP_WAIT_S = 60.0
ANSWER_DEADLINE_S = 1800.0
MIB = 2**20


@dataclass
class Answer:
    """A streamed answer. Times are in seconds since the request."""

    text: str = ""
    first_token_s: float = 0.0
    total_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """Decode throughput: the tokens after the first / the time after the first."""
        decode_s = self.total_s - self.first_token_s
        return (self.usage["completion_tokens"] - 1) / decode_s if decode_s > 0 else 0.0


def run(model: str, tokens: int, keep_ratio: float) -> int:
    """Start the cluster, ask, stop it. Returns 0 if the answer holds the hidden number, else 1."""
    console = Console()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwinds, so that the cluster stops
    with console.status(f"preparing {model}") as status:
        path = resolve_model(model, lambda text: status.update(text))
        task = make_task("needle", load_tokenizer(path), tokens=tokens, depth=0.4, seed=1)
        prompt_tokens = len(task.prompt_token_ids)
        hot_bytes = _hot_bytes(path, prompt_tokens)
    with _server(str(path), hot_bytes, keep_ratio, console) as url:
        question = task.messages[-1]["content"].rsplit("\n\n", 1)[-1]
        console.print(f"One sentence in a document of {prompt_tokens} tokens holds a number. {question}")
        answer = _ask(url, task, console)
    console.print(_table(answer))
    found = task.answer in answer.text
    console.print(
        f"The number {'was found' if found else f'was not found: it is {task.answer}'}. The cluster is stopped."
    )
    return 0 if found else 1


def _hot_bytes(model: Path, prompt_tokens: int) -> int:
    """Bytes of a hot pool that holds ``HOT_SHARE`` of the prompt's chunks."""
    dtype = pick_dtype("auto", pick_device("auto"))
    layout = expected_layout(load_config(model), chunk_tokens=CHUNK_TOKENS, dtype=dtype)
    return int(HOT_SHARE * prompt_tokens / CHUNK_TOKENS) * layout.nbytes


@contextmanager
def _server(model: str, hot_bytes: int, keep_ratio: float, console: Console) -> Iterator[str]:
    """Run `forecache serve` in a child process on a free port; yields the URL of its API."""
    command = [sys.executable, "-m", "forecache.cluster.cli.main", "serve", "--model", model, "--port", "0"]
    command += ["--served-model-name", MODEL_NAME, "--chunk-tokens", str(CHUNK_TOKENS)]
    command += ["--hot-bytes", str(hot_bytes), "--cold-bytes", "1GiB", "--keep-ratio", str(keep_ratio)]
    command += ["--min-resident-tokens", "0"]  # the document is short: the keep ratio alone decides
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            with console.status("starting the cluster"):
                found_url = _wait_for_url(process.stdout)
            if found_url is None:
                log.seek(0)
                printed = log.read().strip().splitlines() or ["it printed no reason"]
                raise StartError(f"the server did not start: {printed[-1]}")
            yield found_url
        finally:
            with console.status("stopping the cluster"):
                _stop(process)


def _wait_for_url(output: IO[str]) -> str | None:
    """The URL that the server prints when it is ready; None if it exits before that."""
    for line in output:
        if match := re.search(r"http://\S+/v1", line):
            return match[0]
    return None


def _stop(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    try:
        process.wait(STOP_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ask(url: str, task: RetrievalTask, console: Console) -> Answer:
    """Ask over plain HTTP, whose stream also yields the SSE comments with the progress of prefill."""
    answer = Answer()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": task.messages[-1]["content"]}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    # without the environment's settings: a proxy could not reach this machine
    with httpx.Client(timeout=ANSWER_DEADLINE_S, trust_env=False) as client:
        start = time.monotonic()
        with client.stream("POST", f"{url}/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ForecacheError(f"the server refused the question: {response.read().decode(errors='replace')}")
            lines = response.iter_lines()
            with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
                bar = progress.add_task("reading the document", total=len(task.prompt_token_ids))
                first = _read_prefill(lines, lambda done: progress.update(bar, completed=done))
            answer.first_token_s = time.monotonic() - start
            for event in _events(first, lines):
                for choice in event["choices"]:
                    piece = choice["delta"].get("content") or ""
                    answer.text += piece
                    console.print(piece, end="", style="bold", highlight=False, markup=False)
                answer.usage = event.get("usage") or answer.usage
            console.print()
        answer.total_s = time.monotonic() - start
    return answer


def _read_prefill(lines: Iterator[str], done: Callable[[int], None]) -> dict[str, Any]:
    """Report each ``: prefill n/m`` comment to ``done``; returns the first event with text."""
    for line in lines:
        if match := re.match(r": prefill (\d+)/", line):
            done(int(match[1]))
        elif (event := _event(line)) and event["choices"] and event["choices"][0]["delta"].get("content"):
            return event
    raise ForecacheError("the server's stream ended before an answer; see /tmp/ray/session_latest/logs")


def _events(first: dict[str, Any], lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    yield first
    for line in lines:
        if event := _event(line):
            yield event


def _event(line: str) -> dict[str, Any] | None:
    """The JSON of a data line; None for other lines. Raises :class:`ForecacheError` for an error event."""
    if not line.startswith("data: {"):
        return None
    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise ForecacheError(f"the server failed: {event['error']['message']}")
    return event


def _table(answer: Answer) -> Table:
    context = answer.usage["forecache"]
    table = Table(show_header=False)
    rows = {
        "prompt tokens": f"{answer.usage['prompt_tokens']}",
        "chunks: all / resident / recalled": (
            f"{context['context_chunks']} / {context['resident_chunks']} / {context['recalled_chunks']}"
        ),
        "KV: full / hot": f"{context['context_bytes'] / MIB:.1f} / {context['resident_bytes'] / MIB:.1f} MiB",
        "time to first token": f"{answer.first_token_s:.1f} s",
        "tokens/s": f"{answer.tokens_per_s:.1f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table

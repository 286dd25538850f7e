"""Where the time of one step goes: prompt tokens alone, prompt tokens beside decode rows, and decode rows alone.

    python tests/benchmarks/profile_step.py --out FILE.json [--context 32768] [--rows 8] [--prompt-tokens 512]
        [--set NAME=VALUE ...]
    python tests/benchmarks/profile_step.py --out FILE.json --tiny                       # host times, on a CPU

An engine in this process serves requests over stored prompts: in cold memory one random chunk of K/V stands for every
chunk, so that a past of any length costs no prefill. The steps are the engine's own. For each kind of step there are:

- *launch*: host time until the call that launches the step returns; where steps overlap, the device works meanwhile.
- *step*: wall time of the engine's step, with planning, bookkeeping, and the results of this step or the one before.
- *device*: time from the first to the last kernel of the step on the device, waits for the host included.
- kernels, and calls that launch them (one launches all kernels of a CUDA graph), of one step under torch.profiler; and
  the operators with the most host time of their own.

Stored contexts lie in cold memory, so steps with prompt tokens read them there, and are no CUDA graphs. With
``--set keep_ratio=1`` decode rows bring their contexts into the hot pool, and a prompt over one of them is a graph.

A step beside decode rows takes all `--prompt-tokens` only if the engine's target for the time between tokens allows it:
raise that target with `--set` to see such a step. The printed number of prompt tokens is that of the step measured.
The model has random weights in the shape of `--shape`.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from client import BenchmarkError, Client, Track
from harness import SHAPES, machine_facts, now, write_model
from synthetic import make_template, store_prompts
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from forecache.indexer.serving.config import IndexerConfig
from forecache.workers.core.requests import TokenEvent
from forecache.workers.core.step_plan import Plan
from forecache.workers.llm import LLM

KINDS = ("prefill", "mixed", "decode")
TOP_OPERATORS = 15
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
"""Beginnings of the names of calls that start work on the device."""
COPIES = ("Memcpy", "Memset")
FIRST_TOKEN_ID = 10


@dataclass
class Launched:
    """One step. ``device_events``: before and after it on the device's stream."""

    decode_rows: int
    prompt_tokens: int
    past_tokens: int
    launch_s: float
    step_s: float = 0.0
    device_events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    @property
    def kind(self) -> str:
        if not self.prompt_tokens:
            return "decode"
        return "mixed" if self.decode_rows else "prefill"


@dataclass(frozen=True)
class Profiled:
    """One step under torch.profiler. ``operators``: (name, calls, host microseconds of its own), the longest first."""

    kernels: int
    copies: int
    launches: int
    device_us: float
    operators: list[tuple[str, int, float]]


@dataclass
class Observer:
    """Stands in front of an engine's runner, and times or profiles the steps that pass.

    ``profile_next``: the kind of step to profile once; such a step is not timed.
    """

    runner: Any
    on_gpu: bool
    launched: list[Launched] = field(default_factory=list)
    profiled: dict[str, Profiled] = field(default_factory=dict)
    profile_next: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def launch(self, plan: Plan, *more: Any) -> Any:
        prompts = [part for part in plan.streams if part.tokens > 1]
        past = max((part.sequence.num_computed for part in prompts), default=0)
        record = Launched(len(plan.decode), sum(part.tokens for part in prompts), past, 0.0)
        if self.profile_next == record.kind:
            self.profile_next = None
            return self._profile(record.kind, plan, more)
        if self.on_gpu:
            record.device_events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            record.device_events[0].record()
        begun = time.perf_counter()
        running = self.runner.launch(plan, *more)
        record.launch_s = time.perf_counter() - begun
        if record.device_events is not None:
            record.device_events[1].record()
        self.launched.append(record)
        return running

    def _profile(self, kind: str, plan: Plan, more: tuple[Any, ...]) -> Any:
        activities = [ProfilerActivity.CPU]
        if self.on_gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()
        with profile(activities=activities, acc_events=True) as profiled:
            running = self.runner.launch(plan, *more)
            if self.on_gpu:
                torch.cuda.synchronize()
        self.profiled[kind] = summary(profiled)
        return running


def summary(profiled: profile) -> Profiled:
    """Kernels, launches and operators of a profile."""
    kernels = copies = launches = 0
    device_us = 0.0
    operators = []
    for event in profiled.key_averages():
        if event.device_type == DeviceType.CUDA:
            device_us += event.self_device_time_total
            if event.key.startswith(COPIES):
                copies += event.count
            else:
                kernels += event.count
        else:
            launches += event.count if event.key.startswith(LAUNCHES) else 0
            operators.append((event.key, event.count, round(event.self_cpu_time_total, 1)))
    operators.sort(key=lambda operator: -operator[2])
    return Profiled(kernels, copies, launches, round(device_us, 1), operators[:TOP_OPERATORS])


class Profiler:
    """Makes an engine run steps of each kind."""

    def __init__(self, llm: LLM, args: argparse.Namespace) -> None:
        self._args = args
        self._llm = llm
        self._client = Client(llm.engine)
        self._generator = torch.Generator().manual_seed(0)
        self.observer = Observer(llm.engine._runner, llm.backbone.device.type == "cuda")
        llm.engine._runner = self.observer  # type: ignore[assignment]
        self._engine_step = llm.engine.step
        llm.engine.step = self._timed_step  # type: ignore[method-assign]
        self._contexts = [self._tokens(args.context) for _ in range(args.rows)]
        store_prompts(
            llm, [[*context, 0] for context in self._contexts], make_template(llm.cold_layout, llm.index_spec), 4
        )

    def run(self) -> None:
        """``repeat`` steps of each kind, after as many that warm up, and one of each under the profiler."""
        for profiling in (False, True):
            repeat = 1 if profiling else 2 * self._args.repeat
            for _ in range(repeat):
                self._arm("prefill", profiling)
                self._prompt()
                self._client.finish()
            decoding = self._decode()
            for _ in range(repeat):
                self._arm("mixed", profiling)
                track = self._prompt()
                self._client.run_until(lambda track=track: bool(track.token_s))  # type: ignore[misc]
            self._arm("decode", profiling)
            self._go_on(decoding, repeat + 2)
            self._client.cancel()

    def _go_on(self, decoding: Sequence[Track], tokens: int) -> None:
        """Step until each of ``decoding`` has so many ``tokens`` more."""
        wanted = [len(track.token_s) + tokens for track in decoding]
        self._client.run_until(
            lambda: all(len(track.token_s) >= count for track, count in zip(decoding, wanted, strict=True))
        )

    def _timed_step(self) -> list[TokenEvent]:
        """The engine's step; the launch in it learns how long it took."""
        before, begun = len(self.observer.launched), time.perf_counter()
        events = self._engine_step()
        if len(self.observer.launched) > before:
            self.observer.launched[-1].step_s = time.perf_counter() - begun
        return events

    def _arm(self, kind: str, profiling: bool) -> None:
        if profiling:
            self.observer.profile_next = kind

    def _decode(self) -> list[Track]:
        """Requests over the stored contexts, once all decode."""
        most = self._llm.config.max_model_len or self._llm.engine.max_model_len
        tokens = most - self._args.context - 2
        tracks = [self._client.add([*context, *self._tokens(1)], tokens) for context in self._contexts]
        self._client.run_until(lambda: all(len(track.token_s) > 1 for track in tracks))
        return tracks

    def _prompt(self) -> Track:
        """A request that finds a stored context and brings new tokens; it ends with its first token."""
        return self._client.add([*self._contexts[0], *self._tokens(self._args.prompt_tokens)], 1)

    def _tokens(self, count: int) -> list[int]:
        vocab_size = self._llm.backbone.model.config.vocab_size
        drawn: list[int] = torch.randint(FIRST_TOKEN_ID, vocab_size, (count,), generator=self._generator).tolist()
        return drawn

    def rows(self) -> list[dict[str, Any]]:
        """The figures of each kind of step: medians over its later steps that are about as large as the largest."""
        if self.observer.on_gpu:
            torch.cuda.synchronize()
        of_kind: dict[str, list[Launched]] = defaultdict(list)
        for record in self.observer.launched:
            if record.kind == "prefill" or record.decode_rows == self._args.rows:
                of_kind[record.kind].append(record)
        return [self._row(kind, of_kind[kind]) for kind in KINDS]

    def _row(self, kind: str, records: list[Launched]) -> dict[str, Any]:
        if not records:
            raise BenchmarkError(f"no step was of the kind {kind}: give fewer --rows or a shorter --context")
        later = records[len(records) // 2 :]
        # of several steps of one prompt, the largest is meant
        most = max(record.prompt_tokens for record in later)
        settled = [record for record in later if 2 * record.prompt_tokens >= most]
        events = [record.device_events for record in settled if record.device_events is not None]
        profiled = self.observer.profiled.get(kind)
        return {
            "kind": kind,
            "steps": len(settled),
            "decode_rows": settled[-1].decode_rows,
            "prompt_tokens": int(statistics.median(record.prompt_tokens for record in settled)),
            "past_tokens": int(statistics.median(record.past_tokens for record in settled)),
            "launch_p50_ms": round(statistics.median(record.launch_s for record in settled) * 1e3, 3),
            "step_p50_ms": round(statistics.median(record.step_s for record in settled) * 1e3, 3),
            "device_p50_ms": round(statistics.median(start.elapsed_time(end) for start, end in events), 3)
            if events
            else None,
            "profiled": None if profiled is None else dataclasses.asdict(profiled),
        }


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b", help="of the random weights")
    parser.add_argument("--context", type=int, default=32768, help="stored tokens of each request")
    parser.add_argument("--rows", type=int, default=8, help="requests that decode")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="new tokens of a prompt")
    parser.add_argument("--repeat", type=int, default=10, help="timed steps of each kind")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the engine")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers and short contexts, on the CPU")
    args = parser.parse_args(argv)
    if args.tiny:
        args.shape, args.context, args.rows, args.prompt_tokens, args.repeat = "tiny", 1024, 4, 64, 4
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    # the tail of the answers that decode meanwhile: every kind of step gives each a few tokens
    longest = args.context + max(args.prompt_tokens, 16 * args.repeat * 4) + 64
    settings: dict[str, Any] = {"load_format": "dummy", "max_model_len": longest}
    if args.tiny:
        settings |= {"device": "cpu", "threads": 1}
    settings |= dict(setting.split("=", 1) for setting in args.set)
    with tempfile.TemporaryDirectory() as directory:
        heads = write_model(Path(directory), SHAPES[args.shape])
        with LLM(directory, skip_tokenizer=True, indexer=IndexerConfig(manifest=str(heads)), **settings) as llm:
            profiler = Profiler(llm, args)
            profiler.run()
            rows = profiler.rows()
            facts = machine_facts(llm.backbone.device)
    report = {"shape": args.shape, "context": args.context, "set": args.set, "date": now(), **facts, "steps": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        show(row)
    print(json.dumps(report))
    return 0


def show(row: dict[str, Any]) -> None:
    device = "" if row["device_p50_ms"] is None else f", device {row['device_p50_ms']} ms"
    print(
        f"{row['kind']}: {row['decode_rows']} decode rows, {row['prompt_tokens']} prompt tokens after "
        f"{row['past_tokens']}: launch {row['launch_p50_ms']} ms, step {row['step_p50_ms']} ms{device} "
        f"(median of {row['steps']})"
    )
    profiled = row["profiled"]
    if profiled is not None:
        print(
            f"  {profiled['kernels']} kernels, {profiled['copies']} copies, {profiled['launches']} launches by the host"
        )
        for name, calls, us in profiled["operators"]:
            print(f"  {us / 1e3:9.3f} ms  {calls:6d} x  {name}")


if __name__ == "__main__":
    sys.exit(main())

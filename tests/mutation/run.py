"""Mutation testing of the modules on which the right bytes depend.

    .venv/bin/python tests/mutation/run.py arena store          # some modules
    .venv/bin/python tests/mutation/run.py --all --out FILE
    .venv/bin/python tests/mutation/run.py --all --again FILE --out FILE    # only what survived in FILE

For each module, its tests run once with a line trace. Then every mutant runs the tests that reach its line, each in a
forked process, until one fails. What survives is printed. Mutants that change nothing that a caller could see are in
``equivalent.txt`` with the reason, and count neither way.
"""

import argparse
import ast
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from modules import MODULES  # noqa: E402
from operators import Mutant, mutants  # noqa: E402

EQUIVALENT = Path(__file__).with_name("equivalent.txt")
KILLED, SURVIVED, TIMED_OUT = "killed", "survived", "timed out"
LONGER, EXTRA_S = 3, 10.0
"""A test may take ``LONGER`` times what it took without the mutant, and ``EXTRA_S``: then it is stopped, and counts as
failed."""


@dataclass
class Score:
    """Of one module, whose source has the SHA-256 ``source``. ``seconds`` is the time of its tests without any mutant,
    traced."""

    module: str
    source: str
    mutants: int
    killed: int
    equivalent: int
    survived: list[str]
    seconds: float

    @property
    def percent(self) -> float:
        """Killed mutants of those that are not equivalent."""
        return 100 * self.killed / max(self.killed + len(self.survived), 1)


class _Replaced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a code object instead of its file."""

    def __init__(self, name: str, path: Path, code: CodeType) -> None:
        self._name, self._path, self._code = name, path, code

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)


class _Trace:
    """Pytest plugin: which lines of ``path`` each test runs, in any of its threads; how long each takes."""

    def __init__(self, path: Path) -> None:
        self._file = str(path)
        self._test = ""
        self.lines: dict[str, set[int]] = defaultdict(set)
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def install(self) -> None:
        threading.settrace(self._call)
        sys.settrace(self._call)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename != self._file:
            return None
        self.lines[self._test].add(frame.f_lineno)
        return self._line

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        self.lines[self._test].add(frame.f_lineno)
        return self._line

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._test = item.nodeid
        start = time.perf_counter()
        yield
        self.seconds[item.nodeid] = time.perf_counter() - start
        self._test = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def _pytest(arguments: Sequence[str], plugins: Sequence[object] = ()) -> int:
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu and not cluster", f"--rootdir={ROOT}"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return int(pytest.main([*options, *arguments], plugins=list(plugins)))


def _compiled(source: str | ast.Module, path: Path) -> CodeType:
    return compile(source, str(path), "exec")


def _in_child(work: Callable[[], bytes], limit_s: float, *, quiet: bool = True) -> tuple[int | None, bytes]:
    """Run ``work() -> bytes`` in a forked process group. Returns its exit code (``None``: stopped at the limit)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.close(reading)
        if quiet:
            devnull = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(devnull, fd)
        code = 70
        try:
            answer = work()
            os.write(writing, answer)
            code = 0
        except BaseException:  # noqa: BLE001 - the parent sees the exit code
            traceback.print_exc()  # to where the child's output goes
        finally:
            os._exit(code)
    os.close(writing)
    chunks: list[bytes] = []
    deadline_s = time.monotonic() + limit_s
    os.set_blocking(reading, False)
    status: int | None = None
    while time.monotonic() < deadline_s:
        with suppress(BlockingIOError):
            chunks.append(os.read(reading, 1 << 20))
        done, raw = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(raw)
            break
        time.sleep(0.01)
    with suppress(ProcessLookupError):  # all of it may have ended
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
    os.set_blocking(reading, True)
    while piece := os.read(reading, 1 << 20):
        chunks.append(piece)
    os.close(reading)
    return status, b"".join(chunks)


def _baseline(name: str, path: Path, tests: Sequence[str]) -> _Trace:
    def work() -> bytes:
        trace = _Trace(path)
        sys.meta_path.insert(0, _Replaced(name, path, _compiled(path.read_text(encoding="utf-8"), path)))
        trace.install()
        code = _pytest(tests, [trace])
        lines = {test: sorted(numbers) for test, numbers in trace.lines.items()}
        return json.dumps([code, lines, trace.seconds, trace.failed, list(sys.modules)]).encode()

    _, answer = _in_child(work, 1800)
    code, lines, seconds, failed, loaded = json.loads(answer)
    if code != 0:
        raise SystemExit(f"{path}: its tests fail without any mutant: {failed}")
    trace = _Trace(path)
    trace.lines = {test: set(numbers) for test, numbers in lines.items()}
    trace.seconds = seconds
    _import_what_tests_need(name, loaded)
    return trace


def _import_what_tests_need(mutated: str, loaded: Sequence[str]) -> None:
    """Import here, once for all children, those modules of ``loaded`` that do not see ``mutated``."""
    seen_by = {mutated}
    imports = {module: _imports(path) for module, path in _ours(loaded).items()}
    while more := {module for module, names in imports.items() if names & seen_by} - seen_by:
        seen_by |= more
    libraries = [name for name in loaded if name.split(".")[0] in ("transformers", "hypothesis", "safetensors")]
    for name in [*libraries, *(name for name in imports if name not in seen_by)]:
        if not name.startswith("hypothesis.vendor"):
            importlib.import_module(name)


def _ours(loaded: Sequence[str]) -> dict[str, Path]:
    paths = {name: ROOT / (name.removeprefix("forecache.").replace(".", "/") + ".py") for name in loaded}
    return {name: path for name, path in paths.items() if name.startswith("forecache.") and path.exists()}


def _imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    # ``from forecache.kernels.attention import ops`` names a module too
    return found | {
        f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def _outcome(mutant: Mutant, name: str, path: Path, tests: Sequence[str], seconds: Sequence[float]) -> str:
    """``seconds``: how long each of ``tests`` took without the mutant."""

    def work() -> bytes:
        sys.meta_path.insert(0, _Replaced(name, path, _compiled(mutant.tree, path)))
        return str(_pytest([*tests, f"--timeout={LONGER * max(seconds) + EXTRA_S:.0f}"])).encode()

    status, answer = _in_child(work, LONGER * sum(seconds) + 2 * EXTRA_S)
    if status is None:
        return TIMED_OUT
    return SURVIVED if status == 0 and answer == b"0" else KILLED


def _equivalents() -> dict[str, set[str]]:
    """Module → names of its equivalent mutants. A line that starts with ``#`` is the reason for those below it."""
    found: dict[str, set[str]] = defaultdict(set)
    module = ""
    for line in EQUIVALENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("[") and line.endswith("]"):
            module = line[1:-1]
        elif line and not line.startswith("#"):
            found[module].add(line)
    return found


def score(module: str, *, workers: int, before: Score | None = None) -> Score:
    """Run all mutants of ``module``, a key of `MODULES`, in a process that imports what is not mutated.

    With a score from ``before`` of the same source only those that survived run, and the others stay killed: tests
    were added since.
    """

    def work() -> bytes:
        return json.dumps(asdict(_score(module, workers, before))).encode()

    status, answer = _in_child(work, 24 * 3600, quiet=False)
    if status != 0:
        raise SystemExit(f"{module} was not scored: see above")
    return Score(**json.loads(answer))


def _score(module: str, workers: int, before: Score | None) -> Score:
    path, tests = ROOT / MODULES[module].path, MODULES[module].tests
    text = path.read_text(encoding="utf-8")
    source = hashlib.sha256(text.encode()).hexdigest()
    name = "forecache." + MODULES[module].path.removesuffix(".py").replace("/", ".")
    baseline = _baseline(name, path, tests)
    imported = baseline.lines.get("", set())  # lines that run when the module is imported: any test may see them
    by_line: dict[int, list[str]] = defaultdict(list)
    for test, lines in baseline.lines.items():
        for line in lines if test else ():
            by_line[line].append(test)
    known = _equivalents()[module]
    every = list(mutants(text))
    counted = [mutant for mutant in every if mutant.name not in known]
    survivors = None if before is None or before.source != source else set(before.survived)
    todo = [mutant for mutant in counted if survivors is None or _described(mutant) in survivors]
    outcomes: list[str | None] = [None] * len(todo)

    def one(number: int) -> str:
        mutant = todo[number]
        reaching = by_line[mutant.line] or (list(baseline.seconds) if mutant.line in imported else [])
        if not reaching:
            return SURVIVED
        reaching = sorted(reaching, key=lambda test: baseline.seconds[test])
        return _outcome(mutant, name, path, reaching, [baseline.seconds[test] for test in reaching])

    _in_processes(workers, outcomes, one, lambda number: f"{path.name}:{todo[number].line}: {todo[number].name}")
    assert None not in outcomes, f"{module}: a worker died"
    survived = [_described(mutant) for mutant, outcome in zip(todo, outcomes, strict=True) if outcome == SURVIVED]
    return Score(
        module,
        source,
        len(every),
        len(counted) - len(survived),
        len(every) - len(counted),
        survived,
        round(sum(baseline.seconds.values()), 1),
    )


def _described(mutant: Mutant) -> str:
    return f"{mutant.line}: {mutant.name}"


def _in_processes(
    workers: int, outcomes: list[str | None], one: Callable[[int], str], describe: Callable[[int], str]
) -> None:
    """Fill ``outcomes`` with ``one`` of each number; each of ``workers`` processes takes every nth."""
    pipes = []
    for worker in range(workers):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as out:
                for number in range(worker, len(outcomes), workers):
                    print(number, one(number), file=out, flush=True)
            os._exit(0)
        os.close(writing)
        pipes.append((pid, os.fdopen(reading)))
    for pid, pipe in pipes:
        with pipe:
            for line in pipe:
                number, outcome = line.rstrip("\n").split(" ", 1)
                outcomes[int(number)] = outcome
                if outcome == SURVIVED:
                    print(f"  {describe(int(number))}", flush=True)
        os.waitpid(pid, 0)


def _import_once() -> None:
    """Import what every child needs and no mutant changes: libraries, pytest's plugins, the fixtures' model classes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    _pytest(["--collect-only", str(Path(__file__).parent)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", choices=[*MODULES, []], help="which modules")
    parser.add_argument("--all", action="store_true", help="all modules")
    parser.add_argument("--out", type=Path, help="write the scores to this file, JSON")
    parser.add_argument("--again", type=Path, help="only what survived in this file, which --out wrote")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="mutants at once (default: cores)")
    arguments = parser.parse_args()
    if not arguments.modules and not arguments.all:
        parser.error("name modules, or --all")
    os.chdir(ROOT)
    _import_once()
    earlier = {}
    if arguments.again:
        for row in json.loads(arguments.again.read_text(encoding="utf-8"))["modules"]:
            earlier[row["module"]] = Score(**{name: value for name, value in row.items() if name != "percent"})
    scores = []
    for module in list(MODULES) if arguments.all else arguments.modules:
        start = time.perf_counter()
        result = score(module, workers=arguments.workers, before=earlier.get(module))
        scores.append(result)
        print(
            f"{module:12} {result.mutants:4} mutants  {result.equivalent:3} equivalent  {result.killed:4} killed  "
            f"{len(result.survived):3} survived  {result.percent:5.1f} %  tests {result.seconds:.0f} s  "
            f"(run {time.perf_counter() - start:.0f} s)",
            flush=True,
        )
        if arguments.out:
            _write(arguments.out, scores)


def _write(out: Path, scores: Sequence[Score]) -> None:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "not a checkout"
    rows = [asdict(result) | {"percent": round(result.percent, 1)} for result in scores]
    out.write_text(json.dumps({"commit": commit, "modules": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

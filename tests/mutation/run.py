"""Mutation testing of the modules on which the right bytes depend.

    .venv/bin/python tests/mutation/run.py arena store          # some modules
    .venv/bin/python tests/mutation/run.py --all --out FILE
    .venv/bin/python tests/mutation/run.py --all --again FILE --out FILE    # only what survived in FILE

For each module, its tests run once with a line trace. Then each mutant runs in a fork of that process: the mutated
source is executed in the module, and the tests that reach its line run until one fails. Survivors are printed. Mutants
that change nothing that a caller could see are in ``equivalent.txt`` with the reason, and count neither way.
"""

import argparse
import ast
import hashlib
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
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from modules import MODULES  # noqa: E402
from operators import Mutant, mutants  # noqa: E402

EQUIVALENT = Path(__file__).with_name("equivalent.txt")
KILLED, SURVIVED, TIMED_OUT = "killed", "survived", "timed out"
LONGER, EXTRA_S = 4, 20.0
"""A mutant's tests may take ``LONGER`` times what they took without it, and ``EXTRA_S`` more. Then they are stopped,
and the mutant counts as killed."""


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


class _Mutation:
    """Pytest plugin that replaces the test loop: trace the tests once, then run every mutant's tests in forks of this
    process, which has imported and collected everything."""

    def __init__(self, module: str, workers: int, before: Score | None) -> None:
        self._module = module
        self._path = ROOT / MODULES[module].path
        self._text = self._path.read_text(encoding="utf-8")
        self._name = "forecache." + MODULES[module].path.removesuffix(".py").replace("/", ".")
        self._workers = workers
        self._source = hashlib.sha256(self._text.encode()).hexdigest()
        same = before is not None and before.source == self._source
        self._survivors = set(before.survived) if before is not None and same else None
        self._failed: list[str] = []
        self._test = ""
        self._lines: dict[str, set[int]] = defaultdict(set)
        self._seconds: dict[str, float] = {}
        self._items: list[pytest.Item] = []
        self.score: Score | None = None
        self.problem = "pytest collects no tests of it"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.append(report.nodeid)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self._items = list(session.items)
        self._trace_tests()
        control = Mutant(0, "", "unmutated", ast.parse(self._text))
        if self._failed:
            self.problem = f"its tests fail without any mutant: {self._failed}"
        elif (outcome := self._outcome(control, self._items)) != SURVIVED:
            self.problem = f"its tests fail when it is executed again without any mutant: {outcome}"
        else:
            self.score = self._score()
        return True

    def _trace_tests(self) -> None:
        """Run all tests, and note which lines of the module each reaches, in any thread, and how long it takes."""
        threading.settrace(self._call)
        sys.settrace(self._call)
        for item, following in self._with_following(self._items):
            self._test = item.nodeid
            start = time.perf_counter()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self._seconds[item.nodeid] = time.perf_counter() - start
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _with_following(self, items: Sequence[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item]]:
        """Each item, and the one whose fixtures are kept for later."""
        return zip(items, [*items[1:], self._items[0]], strict=True)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        # not the path of the file, which may be imported through a link
        if frame.f_globals.get("__name__") != self._name:
            return None
        self._lines[self._test].add(frame.f_lineno)
        return self._line

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        self._lines[self._test].add(frame.f_lineno)
        return self._line

    def _score(self) -> Score:
        known = _equivalents()[self._module]
        every = list(mutants(self._text))
        counted = [mutant for mutant in every if mutant.name not in known]
        todo = [m for m in counted if self._survivors is None or _described(m) in self._survivors]
        outcomes: list[str | None] = [None] * len(todo)

        def one(number: int) -> str:
            mutant = todo[number]
            # a line that no test reaches runs when the module is imported: any test may see it
            reaching = [item for item in self._items if mutant.line in self._lines[item.nodeid]] or self._items
            return self._outcome(mutant, sorted(reaching, key=lambda item: self._seconds[item.nodeid]))

        _in_processes(self._workers, outcomes, one, lambda n: f"{self._path.name}:{todo[n].line}: {todo[n].name}")
        assert None not in outcomes, f"{self._module}: a worker died"
        survived = [_described(m) for m, outcome in zip(todo, outcomes, strict=True) if outcome == SURVIVED]
        return Score(
            self._module,
            self._source,
            len(every),
            len(counted) - len(survived),
            len(every) - len(counted),
            survived,
            round(sum(self._seconds.values()), 1),
        )

    def _outcome(self, mutant: Mutant, items: Sequence[pytest.Item]) -> str:
        def work() -> bytes:
            _replace(self._name, compile(mutant.tree, str(self._path), "exec"))
            for item, following in self._with_following(items):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self._failed:
                    return KILLED.encode()
            return SURVIVED.encode()

        limit_s = LONGER * sum(self._seconds[item.nodeid] for item in items) + EXTRA_S
        status, answer = _in_child(work, limit_s)
        if status is None:
            return TIMED_OUT
        return answer.decode() if status == 0 else KILLED


def _replace(name: str, code: CodeType) -> None:
    """Execute ``code`` in the module ``name``, and give what it defines to all modules that have imported it."""
    mutated = sys.modules[name]
    exec(code, mutated.__dict__)
    for module in list(sys.modules.values()):
        file = str(getattr(module, "__file__", None) or "")
        if module is mutated or not file.endswith(".py") or not (str(ROOT) in file or "/forecache/" in file):
            continue
        for imported, known_as in _imported_names(file, name):
            if imported in mutated.__dict__:
                setattr(module, known_as, mutated.__dict__[imported])


@cache
def _imported_names(file: str, name: str) -> list[tuple[str, str]]:
    """Names that the top level of ``file`` imports from the module ``name``, and what it calls them."""
    nodes = [node for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))) if node]
    found = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == name]
    return [(alias.name, alias.asname or alias.name) for node in found for alias in node.names]


def _in_child(work: Callable[[], bytes], limit_s: float, *, quiet: bool = True) -> tuple[int | None, bytes]:
    """Run ``work`` in a forked process group. Returns its exit code, ``None`` if it ran past ``limit_s``, and what
    ``work`` returned."""
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
            os.write(writing, work())
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
        time.sleep(0.005)
    with suppress(ProcessLookupError):  # all of it may have ended
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        os.waitpid(pid, 0)
    os.set_blocking(reading, True)
    while piece := os.read(reading, 1 << 20):
        chunks.append(piece)
    os.close(reading)
    return status, b"".join(chunks)


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


class _WantedThreads(threading.local):
    """torch's number of threads as tests set and read it, per thread; a new thread takes over the last one that was
    set. torch itself keeps one thread."""

    last = 1

    def __init__(self) -> None:
        self._threads = _WantedThreads.last

    def set(self, threads: int) -> None:
        self._threads = _WantedThreads.last = threads

    def get(self) -> int:
        return self._threads


def score(module: str, *, workers: int, before: Score | None = None) -> Score:
    """Run all mutants of ``module``, a key of `MODULES`, in a new process.

    With a score from ``before`` of the same source only those that survived run, and the others stay killed: tests
    were added since.
    """

    def work() -> bytes:
        import torch

        torch.set_num_threads(1)  # a fork has none of the threads that torch would wait for
        wanted = _WantedThreads()
        torch.set_num_threads, torch.get_num_threads = wanted.set, wanted.get
        plugin = _Mutation(module, workers, before)
        options = ["-q", "-p", "no:cacheprovider", "-m", "not gpu and not cluster", f"--rootdir={ROOT}", "--capture=no"]
        with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
            pytest.main([*options, *MODULES[module].tests], plugins=[plugin])
        if plugin.score is None:
            raise SystemExit(f"{module}: {plugin.problem}")
        return json.dumps(asdict(plugin.score)).encode()

    status, answer = _in_child(work, 24 * 3600, quiet=False)
    if status != 0:
        raise SystemExit(f"{module} was not scored: see above")
    return Score(**json.loads(answer))


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
                    print(f"  {describe(int(number))}", file=sys.__stdout__, flush=True)
        os.waitpid(pid, 0)


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

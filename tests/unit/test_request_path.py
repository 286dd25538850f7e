"""The paths in `docs/architecture.md` are those of the code: every function exists, and names the next one."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_FILES = 18
FUNCTION = re.compile(r"`(\S+\.py):(\S+)`")
BOUNDARY = re.compile(r"\*(process|thread|framework|then)(: .+)?\*")


def paths() -> dict[str, list[str]]:
    """Heading → the first cells of its table's rows."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = re.search(r"^## The path of a request\n(.*?)^## ", text, flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    found = {}
    for part in re.split(r"^### ", section[1], flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        cells = re.findall(r"^\| (.+?) \| ", body, flags=re.MULTILINE)
        found[heading] = [cell for cell in cells if cell not in ("Call", "---")]
    return found


def function(cell: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """The definition of the function that a cell lists. Raises ``AssertionError`` if there is none."""
    match = FUNCTION.fullmatch(cell)
    assert match is not None, f"{cell} is neither a function nor a boundary"
    body: list[ast.stmt] = ast.parse((ROOT / match[1]).read_text(encoding="utf-8")).body
    *classes, name = match[2].split(".")
    for owner in classes:
        [body] = [node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner]
    definitions = [n for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == name]
    assert definitions, f"{cell} does not exist"
    return definitions[-1]


def names(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr


def test_all_paths_are_listed() -> None:
    assert {"From HTTP to the kernel", "A window boundary", "A write-back", "A failover"} <= paths().keys()
    assert all(FUNCTION.fullmatch(cell) or BOUNDARY.fullmatch(cell) for cells in paths().values() for cell in cells)


@pytest.mark.parametrize("heading", paths())
def test_each_function_names_the_next_one_of_its_process(heading: str) -> None:
    calls = 0
    for cell, following in pairwise([*paths()[heading], "*then*"]):
        if BOUNDARY.fullmatch(cell):
            continue
        definition = function(cell)
        if BOUNDARY.fullmatch(following):
            continue
        called = function(following).name.replace("__anext__", "anext")
        assert called in names(definition), f"{cell} does not name {called}"
        calls += 1
    assert calls >= 3


def test_a_request_passes_few_files() -> None:
    files = {match[1] for cell in paths()["From HTTP to the kernel"] if (match := FUNCTION.fullmatch(cell))}
    assert len(files) <= MAX_FILES

"""The mutation tool changes one place at a time, and skips changes that no test can notice."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[1] / "mutation"
SOURCE = '''"""A docstring."""
LIMIT = 3


def room(used: int, slots: int) -> int:
    """Another."""
    if used > slots or slots < 0:
        raise ValueError(f"{used} of {slots + 1}")
    return slots - used


def check_integrity() -> None:
    raise AssertionError
'''


@pytest.fixture(scope="module")
def operators() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutation_operators", TOOL / "operators.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_each_mutant_changes_one_place_of_its_line(operators: ModuleType) -> None:
    changes = [(mutant.line, mutant.change) for mutant in operators.mutants(SOURCE)]
    assert changes == [
        (2, "3 -> 4"),
        (7, "used > slots or slots < 0 -> used > slots and slots < 0"),
        (7, "used > slots -> used >= slots"),
        (7, "slots < 0 -> slots <= 0"),
        (7, "0 -> 1"),
        (8, "raise ValueError(f'{used} of {slots + 1}') -> pass"),
        (9, "return slots - used -> return None"),
        (9, "slots - used -> slots + used"),
    ]


def test_a_mutant_runs_with_its_change(operators: ModuleType) -> None:
    swapped = next(mutant for mutant in operators.mutants(SOURCE) if mutant.change == "slots - used -> slots + used")
    scope: dict[str, object] = {}
    exec(compile(swapped.tree, "mutant", "exec"), scope)
    room = scope["room"]
    assert callable(room) and room(2, 5) == 7

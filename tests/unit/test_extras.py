"""The packages that `make demo` and `make test` install: no more than needed."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"datasets", "langchain-openai", "lm-eval", "pandas", "playwright", "schemathesis"}
LOCAL = {name for path in (ROOT / "tests").rglob("*.py") for name in (path.stem, path.parent.name)} | {"forecache"}


def asked_for(extra: str) -> list[Requirement]:
    """The requirements in pyproject.toml: the runtime's, and those of one extra with the extras that it includes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found, left = [], [*project["dependencies"], *project["optional-dependencies"].get(extra, ())]
    while left:
        one = Requirement(left.pop())
        if one.name == "forecache":
            left += [line for name in one.extras for line in project["optional-dependencies"][name]]
        else:
            found.append(one)
    return found


def installed_by(extra: str) -> set[str]:
    """The distributions that these requirements install, with their dependencies."""
    left, seen = asked_for(extra), set[tuple[str, frozenset[str]]]()
    while left:
        one = left.pop()
        step = (canonicalize_name(one.name), frozenset(one.extras))
        if step not in seen:
            seen.add(step)
            try:
                needed = [Requirement(line) for line in requires(one.name) or ()]
            except PackageNotFoundError:
                continue  # of another platform
            left += [
                more
                for more in needed
                if more.marker is None or any(more.marker.evaluate({"extra": name}) for name in ("", *one.extras))
            ]
    return {name for name, _ in seen}


def imported(path: Path) -> Iterator[str]:
    """The top-level names of a file's imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_the_runtime_and_the_test_extra_bring_no_heavy_client() -> None:
    assert not installed_by("") & (HEAVY | {"pytest", "matplotlib", "mypy"})
    assert not installed_by("test") & HEAVY
    assert installed_by("clients") >= HEAVY


def test_the_test_extra_brings_all_that_make_test_imports() -> None:
    brought, owners = installed_by("test"), packages_distributions()
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    [main_job] = re.findall(r"^MAIN_JOB := (\S+)$", make, flags=re.MULTILINE)
    shared = ("conftest", "byte_model", "processes", "ray_nodes")
    files = [ROOT / main_job, ROOT / "tests/conftest.py", *(ROOT / f"tests/cluster/{name}.py" for name in shared)]
    files += [path for folder in ("unit", "kernels") for path in (ROOT / "tests" / folder).rglob("*.py")]
    for file in files:
        for module in set(imported(file)) - sys.stdlib_module_names - LOCAL:
            names = {canonicalize_name(owner) for owner in owners.get(module, ())}
            assert names & brought, f"{file.relative_to(ROOT)} imports {module}, which `make test` does not install"


def test_the_runtime_and_its_extras_bring_all_that_the_package_imports() -> None:
    """`make demo` installs the runtime alone: imports inside functions count too."""
    brought, owners = installed_by("train") | installed_by("otlp"), packages_distributions()
    for folder in ("cluster", "workers", "indexer", "kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            for module in set(imported(file)) - sys.stdlib_module_names - {"forecache"}:
                names = {canonicalize_name(owner) for owner in owners.get(module, ())}
                assert names & brought, f"{file.relative_to(ROOT)} imports {module}, which the package does not ask for"


@pytest.mark.parametrize("extra", ["", "test", "clients", "lint", "dev"])
def test_versions_of_what_is_asked_for_are_fixed(extra: str) -> None:
    """constraints.txt fixes every requirement except torch, which has several builds, so `make` is reproducible."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    fixed = {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", text, flags=re.MULTILINE)}
    assert {canonicalize_name(one.name) for one in asked_for(extra)} - fixed == {"torch"}

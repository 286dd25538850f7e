"""Rules of the repository that a test can check: the order of imports, the architecture's picture, plain modules."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = {
    "cluster": {"workers", "indexer", "kernels"},
    "workers": {"indexer", "kernels"},
    "indexer": {"kernels"},  # scores on a GPU
    "kernels": set(),
}
RAY_ALLOWED = {
    "indexer/serving/actor.py",
    "workers/memory/tier/actor.py",
    "workers/memory/client/memory.py",
    "workers/memory/client/peers.py",
    "workers/engine/worker.py",
}
MODULES = sorted(path for folder in FLOORS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    floor = name.split("/")[0]
    for module in imports(path):
        top, *rest = module.split(".")
        assert top not in FLOORS, f"{name} imports {module}: only forecache.{module} exists once installed"
        if top == "forecache":
            assert rest[0] == floor or rest[0] in FLOORS[floor], f"{name} imports {module}, which lies above it"
        if top == "ray":
            assert floor == "cluster" or name in RAY_ALLOWED, f"{name} imports Ray"
        if top == "transformers":
            assert floor in ("workers", "cluster"), f"{name} imports transformers"


def test_the_picture_of_the_architecture_is_the_codes() -> None:
    """Solid arrows are imports. Dotted arrows end at the process that has the method, and start where it is called."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = re.search(r"```mermaid\n(.*?)\n```", text, flags=re.DOTALL)
    assert picture is not None
    arrows = re.findall(r"^\s*(\S+\.py) --> (\S+\.py)$", picture[1], flags=re.MULTILINE)
    for source, target in arrows:
        assert f"forecache.{target.removesuffix('.py').replace('/', '.')}" in imports(ROOT / source), (
            f"{source} {target}"
        )
    calls = re.findall(r"^\s*(\S+\.py) -\. (\w+) \.-> (\S+\.py)$", picture[1], flags=re.MULTILINE)
    for source, method, target in calls:
        assert re.search(rf"\b{method}\b", (ROOT / source).read_text(encoding="utf-8")), f"{source} knows no {method}"
        assert re.search(rf"    (async )?def {method}\(self", (ROOT / target).read_text(encoding="utf-8")), target
    lines = [line for line in picture[1].splitlines() if ".py" in line]
    assert len(arrows) + len(calls) == len(lines) > 20
    placed = {file for arrow in arrows for file in arrow} | {file for call in calls for file in (call[0], call[2])}
    assert all((ROOT / file).exists() for file in placed)


def _listed_places() -> dict[str, int]:
    """Sub-package or file → its line in the order of `docs/sub-packages.md`, from the top."""
    text = (ROOT / "docs" / "sub-packages.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \| ", text, flags=re.MULTILINE)
    return {place: number for number, row in enumerate(rows) for place in re.findall(r"`(.*?)`", row)}


def _place(module: Path) -> str:
    name = str(module.relative_to(ROOT))
    return name if name in _listed_places() else str(module.parent.relative_to(ROOT))


def _imported_files(path: Path) -> set[Path]:
    """Files of this project that ``path`` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("forecache."):
            named = ROOT / node.module.removeprefix("forecache.").replace(".", "/")
            candidates = [named.with_suffix(".py"), *((named / alias.name).with_suffix(".py") for alias in node.names)]
            found |= {file for file in candidates if file.exists()}
    return found


def test_sub_packages_import_in_the_documented_order() -> None:
    places = _listed_places()
    assert {_place(module) for module in MODULES} == places.keys(), "docs/sub-packages.md lists them all"
    for module in MODULES:
        for imported in _imported_files(module):
            ours, theirs = _place(module), _place(imported)
            if ours.split("/")[0] == theirs.split("/")[0]:
                assert places[ours] <= places[theirs], f"{module} imports {imported}, which lies above it"


ARCHITECTURES = {path.name for path in (ROOT / "workers" / "models").iterdir() if path.is_dir()} - {
    "step",
    "__pycache__",
}
OWN_TO_ARCHITECTURES = ("workers/models/", "workers/recording/deepseek_v4/", "kernels/")


def test_architectures_do_not_know_each_other() -> None:
    assert {"deepseek_v4", "dense"} == ARCHITECTURES
    for name in ARCHITECTURES:
        for module in (ROOT / "workers" / "models" / name).rglob("*.py"):
            others = {_place(file) for file in _imported_files(module)}
            assert not others & {f"workers/models/{other}" for other in ARCHITECTURES - {name}}, module


def _asks_for_the_model(tree: ast.AST) -> Iterator[str]:
    """Code that depends on the model: names of an architecture, and comparisons of model types."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(getattr(side, "attr", getattr(side, "id", "")) in ("model_type", "MODEL_TYPE") for side in sides):
                yield ast.unparse(node)
        names = [getattr(node, field, None) for field in ("id", "attr", "name", "arg", "module")]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value.strip():
            names.append(node.value)
        for name in names:
            if isinstance(name, str) and re.search(r"deepseek|dsv4|(\b|_)v4", name, re.IGNORECASE):
                yield name


def test_only_architectures_ask_which_model_it_is() -> None:
    for module in MODULES:
        name = str(module.relative_to(ROOT))
        if name.startswith(OWN_TO_ARCHITECTURES):
            continue
        asked = set(_asks_for_the_model(ast.parse(module.read_text(encoding="utf-8"))))
        if name == "cluster/cli/indexer.py":  # runs it for every architecture whose `recording` is "entries"
            asked -= {"forecache.workers.recording.deepseek_v4.record"}
        assert not asked, f"{name}: ask the architecture (workers/models/registry.py) instead of {asked}"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module: _imported_files(module) for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_plain(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert path.name != "__init__.py", "a package marker here shadows installed packages of the same name"
    assert ast.get_docstring(ast.parse(text)), "a module says what it is for"
    assert "os.environ" not in text and "getenv" not in text, (
        "settings are fields of a model, not environment variables"
    )

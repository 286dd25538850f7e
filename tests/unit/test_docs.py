"""The documentation agrees with the code, and its links lead somewhere."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_README_LINES = 200
FLAGS_OF_OTHERS = {"--address", "--head", "--index-url", "--port", "--system-config"}
"""Of pip and `ray start`."""
CODE_FOLDERS = ("cluster", "workers", "indexer", "kernels", "tests")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_configuration", ROOT / "docs/generate_configuration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_generated_from_the_settings(generator: ModuleType) -> None:
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), f"stale: run `{generator.COMMAND}`"


def test_the_configuration_page_has_every_setting_once(generator: ModuleType) -> None:
    flags = re.findall(r"^\| `(--[a-z0-9-]+)` \|", generator.page(), flags=re.MULTILINE)
    assert len(flags) == len(set(flags))
    assert set(flags) == {flag for flag, _, _ in generator.settings()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in _anchors(file), f"{page.name} links to {target}#{anchor}, which is no heading there"


def _anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings of ``page``."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES


def test_the_picture_in_the_readme_names_real_classes_and_their_methods() -> None:
    picture = re.search(r"```mermaid\n(.*?)\n```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert picture is not None
    calls = re.findall(r"^\s*(\w+) -- (\w+) --> (\w+)$", picture[1], flags=re.MULTILINE)
    assert len(calls) >= 5
    classes = _classes()
    for source, method, target in calls:
        assert source in classes
        assert method in classes[target], f"{target} has no method {method}"


@cache
def _classes() -> dict[str, set[str]]:
    """Names of all product classes, with those of their methods and fields, inherited ones too."""
    nodes = {
        node.name: node
        for folder in CODE_FOLDERS[:-1]
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }

    def members(name: str) -> set[str]:
        found = {
            part.attr
            for part in ast.walk(nodes[name])
            if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
        }
        for part in nodes[name].body:
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(part.name)
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                found.add(part.target.id)
        for base in nodes[name].bases:
            if isinstance(base, ast.Name) and base.id in nodes:
                found |= members(base.id)
        return found

    return {name: members(name) for name in nodes}


def test_pages_name_only_flags_that_exist(generator: ModuleType) -> None:
    flags = FLAGS_OF_OTHERS | {flag for flag, _, _ in generator.settings()}
    for path in (path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py")):
        flags |= set(re.findall(r"\"(--[a-z][a-z0-9-]*)\"", path.read_text(encoding="utf-8")))
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", page.read_text(encoding="utf-8")))
        assert named <= flags, f"{page.name} names {sorted(named - flags)}, which no command has"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_only_files_that_exist(page: Path) -> None:
    named = re.findall(r"(?:cluster|workers|indexer|kernels|tests)/[\w/-]+\.\w+", page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_name_only_methods_that_exist(page: Path) -> None:
    classes = _classes()
    for name, method in re.findall(r"`([A-Z]\w+)\.(\w+)`", page.read_text(encoding="utf-8")):
        if name in classes:
            assert method in classes[name], f"{page.name} names {name}.{method}, which does not exist"

"""The documentation agrees with the code, and its links lead somewhere."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
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

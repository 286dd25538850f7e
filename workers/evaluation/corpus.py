"""English prose that every Python installation contains, for calibration, evaluation, benchmarks and the demo.

The text depends on the Python version, or on the installed packages, and otherwise only on the seed.
"""

import ast
import importlib.metadata
import pydoc_data.topics
import random
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

Kind = Literal["topics", "docstrings", "packages"]
"""topics: the language reference that `help()` shows; docstrings: of the standard library; packages: descriptions and
licences of the installed distributions, which no training or calibration uses."""

LEAST_PARAGRAPH_CHARACTERS = 120
LEAST_LETTER_SHARE = 0.9


def documents(kind: Kind, seed: int, tokens: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Endless documents of ``tokens`` tokens each (plus or minus one), with empty lines between paragraphs.

    Documents join articles in random order (``seed``); no article repeats before all have been used.
    """
    rng = random.Random(seed)
    articles = list(_articles(kind))
    order: list[tuple[str, ...]] = []
    paragraphs: list[str] = []
    pending = 0
    while True:
        if not order:
            order = rng.sample(articles, len(articles))
        article = order.pop()
        paragraphs.extend(article)
        pending += _count(article, tokenizer)
        if pending < tokens:
            continue
        text = "\n\n".join(paragraphs)
        ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(ends) < tokens:
            pending = len(ends)
            continue
        yield text[: ends[tokens - 1][1]]
        paragraphs, pending = [], 0


def paragraphs(kind: Kind) -> tuple[str, ...]:
    """All paragraphs of a kind, article by article in a fixed order."""
    return tuple(paragraph for article in _articles(kind) for paragraph in article)


def definitions() -> tuple[tuple[str, str], ...]:
    """(qualified name, first paragraph of its docstring) of the standard library's public classes and functions."""
    found: dict[str, str] = {}
    for module, tree in _standard_library():
        if not module.rpartition(".")[2].startswith("_"):
            found.update(_definitions(module, tree))
    return tuple(found.items())


def _definitions(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _DEFINED) or child.name.startswith("_"):
            continue
        inner = f"{name}.{child.name}"
        text = ast.get_docstring(child)
        if text:
            yield inner, " ".join(re.split(r"\n\s*\n", text)[0].split())
        if isinstance(child, ast.ClassDef):
            yield from _definitions(inner, child)


def _count(article: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> int:
    return sum(len(ids) for ids in tokenizer(list(article), add_special_tokens=False)["input_ids"])


@cache
def _articles(kind: Kind) -> tuple[tuple[str, ...], ...]:
    """All articles of a kind, each a tuple of paragraphs, in a fixed order."""
    if kind == "topics":
        texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    elif kind == "docstrings":
        texts = list(_standard_library_docstrings())
    else:
        texts = list(_package_texts())
    # several topics of the reference include the same sections
    seen: set[str] = set()
    articles = []
    for text in texts:
        fresh = [paragraph for paragraph in _paragraphs(text) if paragraph not in seen]
        seen.update(fresh)
        if fresh:
            articles.append(tuple(fresh))
    return tuple(articles)


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of ``text`` that are prose, each on one line; skips code, tables and grammar."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        if len(paragraph) >= LEAST_PARAGRAPH_CHARACTERS and is_prose(paragraph):
            yield paragraph


def is_prose(paragraph: str) -> bool:
    """Whether ``paragraph`` consists of sentences, not of code or a table."""
    letters = sum(character.isalpha() or character in " ,." for character in paragraph)
    return letters >= LEAST_LETTER_SHARE * len(paragraph) and paragraph.endswith((".", ":")) and ">>>" not in paragraph


def _standard_library() -> Iterator[tuple[str, ast.Module]]:
    """(dotted name, syntax tree) of the standard library's modules, parsed without an import."""
    root = Path(sysconfig.get_path("stdlib"))
    folders = [
        root,
        *(root / name for name in ("asyncio", "concurrent/futures", "email", "http", "logging", "unittest")),
    ]
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def _standard_library_docstrings() -> Iterator[str]:
    """Docstrings of the standard library, one text per module."""
    for _, tree in _standard_library():
        nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, *_DEFINED))]
        yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _package_texts() -> Iterator[str]:
    """Description and licences of every installed distribution, sorted by name."""
    distributions = {found.name.lower(): found for found in importlib.metadata.distributions()}
    for _, distribution in sorted(distributions.items()):
        metadata = distribution.metadata.json
        yield str(metadata.get("description", ""))
        for file in distribution.files or []:
            path = Path(str(distribution.locate_file(file)))
            if re.match(r"licen[cs]e|copying|notice", file.name, re.IGNORECASE) and path.is_file():
                yield path.read_text(encoding="utf-8", errors="replace")


_DEFINED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

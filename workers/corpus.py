"""Real English prose that every Python installation has, for calibration, benchmarks and the demo.

The text follows the Python version; within one version everything is a function of the seed.
"""

import ast
import pydoc_data.topics
import random
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

Kind = Literal["topics", "docstrings"]
"""topics: the language reference as `help()` shows it; docstrings: those of the standard library."""

LEAST_PARAGRAPH_CHARACTERS = 120
LEAST_LETTER_SHARE = 0.9


def documents(kind: Kind, seed: int, tokens: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Endless documents of ``tokens`` tokens each (give or take one), paragraphs parted by empty lines.

    Each is a run of articles in an order drawn from ``seed``; none comes again before all have been used.
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


def _count(article: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> int:
    return sum(len(ids) for ids in tokenizer(list(article), add_special_tokens=False)["input_ids"])


@cache
def _articles(kind: Kind) -> tuple[tuple[str, ...], ...]:
    """Every article of a kind, as paragraphs, in a fixed order."""
    if kind == "topics":
        texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    else:
        texts = list(_standard_library_docstrings())
    # the reference includes some sections in several topics
    seen: set[str] = set()
    articles = []
    for text in texts:
        fresh = [paragraph for paragraph in _paragraphs(text) if paragraph not in seen]
        seen.update(fresh)
        if fresh:
            articles.append(tuple(fresh))
    return tuple(articles)


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of ``text`` that are sentences, each on one line; no code, tables and grammar."""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        letters = sum(character.isalpha() or character in " ,." for character in paragraph)
        is_prose = letters >= LEAST_LETTER_SHARE * len(paragraph) and paragraph.endswith((".", ":"))
        if len(paragraph) >= LEAST_PARAGRAPH_CHARACTERS and is_prose and ">>>" not in paragraph:
            yield paragraph


def _standard_library_docstrings() -> Iterator[str]:
    """Docstrings of the standard library, one text per module, read from the sources without an import."""
    root = Path(sysconfig.get_path("stdlib"))
    folders = [
        root,
        *(root / name for name in ("asyncio", "concurrent/futures", "email", "http", "logging", "unittest")),
    ]
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
            yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

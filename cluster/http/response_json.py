"""Answers as JSON text, written a piece at a time: one of many choices or log-probabilities has megabytes."""

import json
from collections.abc import Iterator
from typing import Any

PIECE_ITEMS = 64
"""Items of a list that are written without a turn for others."""


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def json_pieces(value: Any, depth: int) -> Iterator[str]:
    """Texts that together are the JSON of ``value``. Its long lists, ``depth`` levels below it, are divided."""
    if depth and isinstance(value, dict) and value:
        for number, (name, one) in enumerate(value.items()):
            yield f"{',' if number else '{'}{dumps(name)}:"
            yield from json_pieces(one, depth - 1)
        yield "}"
    elif depth and isinstance(value, list) and value:
        for number, one in enumerate(value):
            yield "," if number else "["
            yield from json_pieces(one, depth - 1)
        yield "]"
    elif isinstance(value, list) and len(value) > PIECE_ITEMS:
        for start in range(0, len(value), PIECE_ITEMS):
            yield ("," if start else "[") + dumps(value[start : start + PIECE_ITEMS])[1:-1]
        yield "]"
    else:
        yield dumps(value)

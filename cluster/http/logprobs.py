"""Log-probabilities as OpenAI's two interfaces show them."""

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from forecache.workers.core.requests import TokenLogprobs

TokenTexts = Callable[[int], bytes]
"""The bytes of a token's text; not always whole characters."""


class TextOffsets:
    """Where in a text that is ``chars`` characters long already the next tokens begin. A character may be in several
    tokens: it counts once it is whole."""

    def __init__(self, chars: int = 0) -> None:
        self._chars = chars
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, data: bytes) -> int:
        """Of the token with these bytes."""
        offset = self._chars
        self._chars += len(self._decoder.decode(data))
        return offset


def chat_logprobs(told: Sequence[TokenLogprobs], texts: TokenTexts) -> dict[str, Any]:
    """Of `/v1/chat/completions`."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = texts(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    content = [
        {**entry(one.token_id, one.logprob), "top_logprobs": [entry(token, value) for token, value in one.top]}
        for one in told
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(told: Sequence[TokenLogprobs], texts: TokenTexts, offsets: TextOffsets) -> dict[str, Any]:
    """Of `/v1/completions`."""
    return {
        "tokens": [_name(texts(one.token_id)) for one in told],
        "token_logprobs": [one.logprob for one in told],
        "top_logprobs": [{_name(texts(token)): value for token, value in one.top} for one in told],
        "text_offset": [offsets.take(texts(one.token_id)) for one in told],
    }


def echoed_logprobs(
    first: int, told: Sequence[TokenLogprobs], texts: TokenTexts, offsets: TextOffsets
) -> dict[str, Any]:
    """As :func:`completion_logprobs`, of a prompt: nothing comes before its ``first`` token, so that has no number."""
    data = texts(first)
    start = [offsets.take(data)]
    head = {"tokens": [_name(data)], "token_logprobs": [None], "top_logprobs": [None], "text_offset": start}
    extend(head, completion_logprobs(told, texts, offsets))
    return head


def extend(first: dict[str, Any] | None, more: dict[str, Any] | None) -> None:
    """Put the lists of ``more`` behind those of ``first``."""
    if first is not None and more is not None:
        for name, values in more.items():
            if values is not None:  # a refusal is none
                first[name] += values


def _name(data: bytes) -> str:
    """Bytes that are no whole characters are written as OpenAI does, so that names stay different."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

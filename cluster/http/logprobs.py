"""Formats log-probabilities for OpenAI's chat and text completions."""

import codecs
from collections.abc import Sequence
from typing import Any

from llguidance import LLTokenizer

from forecache.workers.core.requests import TokenLogprobs


class TokenTexts:
    """The texts of a vocabulary's tokens. Thread-safe."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer

    def text_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of the token's text. They may begin or end within a character."""
        return bytes(self._tokenizer.decode_bytes([token]))


class TextOffsets:
    """Computes the offsets of consecutive tokens in a text that already has ``chars`` characters.

    A character may be split over several tokens. It counts with the token that completes it.
    """

    def __init__(self, chars: int = 0) -> None:
        self._chars = chars
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def advance(self, data: bytes) -> int:
        """Append the token with these bytes; returns its offset in characters."""
        offset = self._chars
        self._chars += len(self._decoder.decode(data))
        return offset


def chat_logprobs(tokens: Sequence[TokenLogprobs], texts: TokenTexts) -> dict[str, Any]:
    """The ``logprobs`` object of `/v1/chat/completions`."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = texts.text_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    content = [
        {**entry(one.token_id, one.logprob), "top_logprobs": [entry(token, value) for token, value in one.top]}
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenLogprobs], texts: TokenTexts, offsets: TextOffsets) -> dict[str, Any]:
    """The ``logprobs`` object of `/v1/completions`."""
    return {
        "tokens": [_name(texts.text_bytes(one.token_id)) for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [{_name(texts.text_bytes(token)): value for token, value in one.top} for one in tokens],
        "text_offset": [offsets.advance(texts.text_bytes(one.token_id)) for one in tokens],
    }


def echoed_logprobs(
    first: int, tokens: Sequence[TokenLogprobs], texts: TokenTexts, offsets: TextOffsets
) -> dict[str, Any]:
    """As :func:`completion_logprobs`, for a prompt: its ``first`` token, whose log-probability is null, and ``tokens``.

    The first token has no log-probability because no token precedes it.
    """
    data = texts.text_bytes(first)
    start = [offsets.advance(data)]
    head = {"tokens": [_name(data)], "token_logprobs": [None], "top_logprobs": [None], "text_offset": start}
    extend(head, completion_logprobs(tokens, texts, offsets))
    return head


def extend(first: dict[str, Any] | None, more: dict[str, Any] | None) -> None:
    """Append the lists of ``more`` to those of ``first``."""
    if first is not None and more is not None:
        for name, values in more.items():
            if values is not None:  # "refusal" is null
                first[name] += values


def _name(data: bytes) -> str:
    """The token's text, or ``bytes:\\xHH…`` as OpenAI writes bytes that are not whole characters.

    Without that, such tokens would all have the same name in ``top_logprobs``.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

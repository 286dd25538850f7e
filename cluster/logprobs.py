"""Log-probabilities as OpenAI's two interfaces show them."""

from collections.abc import Callable, Sequence
from typing import Any

from forecache.workers.decode.messages import TokenLogprobs

TokenTexts = Callable[[int], bytes]
"""The bytes of a token's text; not always whole characters."""


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


def completion_logprobs(told: Sequence[TokenLogprobs], texts: TokenTexts, offset: int) -> tuple[dict[str, Any], int]:
    """Of `/v1/completions`, whose text is ``offset`` characters long already; and how long it is after these tokens."""
    tokens, offsets = [], []
    for one in told:
        data = texts(one.token_id)
        tokens.append(_name(data))
        offsets.append(offset)
        offset += len(data.decode("utf-8", "ignore"))
    logprobs = {
        "tokens": tokens,
        "token_logprobs": [one.logprob for one in told],
        "top_logprobs": [{_name(texts(token)): value for token, value in one.top} for one in told],
        "text_offset": offsets,
    }
    return logprobs, offset


def echoed_logprobs(first: int, told: Sequence[TokenLogprobs], texts: TokenTexts) -> tuple[dict[str, Any], int]:
    """As :func:`completion_logprobs`, of a prompt: nothing comes before its ``first`` token, so that has no number."""
    data = texts(first)
    rest, offset = completion_logprobs(told, texts, len(data.decode("utf-8", "ignore")))
    head = {"tokens": [_name(data)], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}
    return joined(head, rest), offset


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of `/v1/completions`, one after the other."""
    return {name: first[name] + second[name] for name in first}


def _name(data: bytes) -> str:
    """Bytes that are no whole characters are written as OpenAI does, so that names stay different."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

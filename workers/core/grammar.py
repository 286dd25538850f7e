"""Constrains answers to a grammar: llguidance decides which tokens may come next."""

import threading
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from forecache.workers.core.requests import SamplingParams
from forecache.workers.errors import InvalidRequestError

LIMITS = LLParserLimits(initial_lexer_fuel=300_000, max_grammar_size=100_000, verbose_errors=False)
"""Limits of one grammar: fuel limits the work on its regular expressions, size the symbols of its rules."""


class Matcher:
    """Follows one answer through its grammar. Not thread-safe."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill_mask(self, words: npt.NDArray[np.int32]) -> None:
        """Set bit ``token % 32`` of ``words[token // 32]`` for each token that may come next.

        ``words``: int32 [vocab / 32], zeros.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        count = min(len(mask), len(words))
        words[:count] = mask[:count]

    def advance(self, token: int) -> bool:
        """Append ``token``; returns whether the answer is complete, so that only its end may follow.

        Raises:
            InvalidRequestError: the grammar does not allow the token, or exceeds its limits.
        """
        if not self._matcher.consume_token(token):
            raise InvalidRequestError(f"the grammar can't be followed: {_first_line(self._matcher.get_error())}")
        return self._matcher.is_stopped()


class Grammars:
    """Makes matchers for one model, with its ``tokenizer`` and the ``eos`` tokens that end an answer."""

    def __init__(self, tokenizer: Any, eos: frozenset[int]) -> None:
        self._hf = tokenizer
        self._eos = eos
        self._lock = threading.Lock()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        if not isinstance(self._hf, PreTrainedTokenizerFast):
            reason = "response formats and tools need a fast tokenizer (tokenizer.json), and this model has none"
            raise InvalidRequestError(reason, "response_format")
        return from_tokenizer(self._hf, eos_token=sorted(self._eos) or None)

    @property
    def tokenizer(self) -> LLTokenizer:
        """llguidance's form of the tokenizer. The first use takes about a second with a large vocabulary.

        Raises:
            InvalidRequestError: the model has no fast tokenizer.
        """
        with self._lock:
            return self._tokenizer

    def matcher(self, sampling: SamplingParams) -> Matcher | None:
        """A matcher for a new answer; ``None`` without a grammar. May take a second; any thread may call.

        Raises:
            InvalidRequestError: the grammar is invalid or too large.
        """
        if sampling.grammar is None:
            return None
        matcher = LLMatcher(self.tokenizer, sampling.grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            reason = f"the grammar can't be followed: {_first_line(matcher.get_error())}"
            raise InvalidRequestError(reason, "response_format")
        return Matcher(matcher)


def check_grammar(grammar: str, param: str) -> None:
    """Raise :class:`InvalidRequestError` if ``grammar`` is invalid or too large; ``param`` names the request's field.

    Needs no tokenizer. May take a second, but releases the GIL.
    """
    if reason := LLMatcher.validate_grammar(grammar, None, limits=LIMITS):
        raise InvalidRequestError(f"the grammar can't be followed: {_first_line(reason)}", param)


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]

"""Answers that follow a grammar: llguidance says which tokens may come next."""

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
"""What one grammar may cost. Fuel is work on its regular expressions, size the symbols of its rules."""


class Matcher:
    """Where one answer stands in its grammar. Not for two threads at once."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill_mask(self, words: npt.NDArray[np.int32]) -> None:
        """Bit ``token % 32`` of ``words[token // 32]``: whether ``token`` may come next. int32 [vocab / 32], zeroed."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        count = min(len(mask), len(words))
        words[:count] = mask[:count]

    def advance(self, token: int) -> bool:
        """``token`` came; whether the answer is complete, so that nothing but its end may follow.

        Raises:
            InvalidRequestError: the grammar can't be followed any further, such as for its size.
        """
        if not self._matcher.consume_token(token):
            raise InvalidRequestError(f"the grammar can't be followed: {_first_line(self._matcher.get_error())}")
        return self._matcher.is_stopped()


class Grammars:
    """Matchers for the answers of one model: its ``tokenizer``, and the ``eos`` tokens that end an answer."""

    def __init__(self, tokenizer: Any, eos: frozenset[int]) -> None:
        self._hf = tokenizer
        self._eos = eos
        self._lock = threading.Lock()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        if not isinstance(self._hf, PreTrainedTokenizerFast):
            reason = "response formats and tools need a fast tokenizer, and this model has none"
            raise InvalidRequestError(reason, "response_format")
        return from_tokenizer(self._hf, eos_token=sorted(self._eos) or None)

    @property
    def tokenizer(self) -> LLTokenizer:
        """llguidance's form of the tokenizer, made when it is first needed: about a second for a large vocabulary.

        Raises:
            InvalidRequestError: the tokenizer is not one of the tokenizers library's.
        """
        with self._lock:
            return self._tokenizer

    def matcher(self, sampling: SamplingParams) -> Matcher | None:
        """At the beginning of an answer that has a grammar. May take a second; any thread may call.

        Raises:
            InvalidRequestError: no grammar, or one that is too large.
        """
        if sampling.grammar is None:
            return None
        matcher = LLMatcher(self.tokenizer, sampling.grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            reason = f"the grammar can't be followed: {_first_line(matcher.get_error())}"
            raise InvalidRequestError(reason, "response_format")
        return Matcher(matcher)


def check_grammar(grammar: str, param: str) -> None:
    """Raise :class:`InvalidRequestError` for a grammar that is none, or costs more than one may.

    Needs no tokenizer. May take a second, in which other threads run.
    """
    if reason := LLMatcher.validate_grammar(grammar, None, limits=LIMITS):
        raise InvalidRequestError(f"the grammar can't be followed: {_first_line(reason)}", param)


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]

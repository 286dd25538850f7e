"""Text to tokens and back, a token at a time."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from forecache.workers.errors import InvalidModelError, explained

INCOMPLETE = "�"
NEEDED_FILES = "Put the model's tokenizer files (tokenizer.json, tokenizer_config.json) in that directory."


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the model's directory.

    Raises:
        UnsupportedModelError: there is none that transformers can load.
        InvalidModelError: its files are missing; of some families transformers then makes one that knows no text.
    """
    with explained(path, "has no tokenizer that transformers can load", NEEDED_FILES):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        known = tokenizer("text")["input_ids"]
    if not known:
        raise InvalidModelError(f"{path} has no tokenizer: its vocabulary is empty. {NEEDED_FILES}")
    return tokenizer  # type: ignore[no-any-return]


def eos_token_ids(config: Any, generation_config: Any, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Every token that ends an answer: of the model, of its generation settings, of its tokenizer."""
    ids: set[int] = set()
    for source in (config, generation_config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        if isinstance(value, int):
            ids.add(value)
        elif value:
            ids.update(value)
    return frozenset(ids)


class Detokenizer:
    """Turns a growing list of tokens into text pieces, and stops at stop strings.

    A piece is held back while it ends in the middle of a character, or in what may become a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._start = 0
        self._read = 0
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that ``token`` completes. After a stop string, nothing more comes; see ``stopped``."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._tokens.append(token)
        # tokens before `_start` can't change the text of later ones; those up to `_read` are out already
        old = self._decode(self._tokens[self._start : self._read])
        new = self._decode(self._tokens[self._start :])
        if new.endswith(INCOMPLETE) or len(new) <= len(old):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._emit(new[len(old) :])

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        if self._tokenizer is None or self.stopped:
            return ""
        old = self._decode(self._tokens[self._start : self._read])
        rest = self._decode(self._tokens[self._start :])[len(old) :]
        self._start = self._read = len(self._tokens)
        text = self._emit(rest) if rest else ""
        text, self._pending = text + ("" if self.stopped else self._pending), ""
        return text

    def _decode(self, tokens: list[int]) -> str:
        assert self._tokenizer is not None
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _emit(self, text: str) -> str:
        text = self._pending + text
        self._pending = ""
        cut = min((at for at in (text.find(stop) for stop in self._stop) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            return text[:cut]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        if held:
            text, self._pending = text[:-held], text[-held:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Longest end of ``text`` that is a beginning of ``stop``, shorter than it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

"""Loads the tokenizer of a model."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from forecache.workers.errors import InvalidModelError, explained

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

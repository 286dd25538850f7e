"""The tokenizer of the small DeepSeek-V4: byte-level, names whole, numbers in pairs of digits, text put together from
pieces is tokenized like its pieces."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from forecache.workers.evaluation import corpus
from forecache.workers.evaluation.ruler import CITIES, NOUNS, PEOPLE

PIECES = r"\n\n| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s"
"""An empty line is a separate piece, and words and numbers include the space before them."""
TEXT_TOKENS = 1024
"""Tokens learnt from text; names and numbers come on top."""
SPECIAL = ("<|begin|>", "<|end|>", "<|pad|>")
_TEMPLATES = """
What is the secret number of? What are the secret numbers of and? What are all the secret numbers of? Answer:
The secret number of is. One of the secret numbers of is. The secret number of is the same as that of.
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Learnt from the standard library's texts: a function of the Python version."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_TOKENS,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [*corpus.paragraphs("docstrings"), *corpus.paragraphs("topics")]
    tokenizer.train_from_iterator([*texts, *[_TEMPLATES] * 1000], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(pair) for pair in model["merges"]]
    digits = [f"{number:02}" for number in range(100)]
    for word in ["\n\n", "Answer", "One", *(f" {word}" for word in (*CITIES, *PEOPLE, *NOUNS, *digits)), *digits]:
        vocabulary.setdefault(_as_bytes(word), len(vocabulary))
    # a piece that is a token as a whole needs no merges
    whole = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    whole.pre_tokenizer = _pre_tokenizer()
    whole.decoder = decoders.ByteLevel()
    begin, end, pad = SPECIAL
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=whole,
        bos_token=begin,
        eos_token=end,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _as_bytes(text: str) -> str:
    """How the byte-level vocabulary spells ASCII text."""
    return text.replace(" ", "Ġ").replace("\n", "Ċ")

"""Generated prose and retrieval tasks."""

import pydoc_data.topics
from collections.abc import Sequence
from itertools import islice
from typing import Any, cast

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from forecache.workers.evaluation.corpus import Kind, documents
from forecache.workers.evaluation.tasks import KEYS, TaskKind, make_task

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """A small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    return wrap(tokenizer, chat_template=CHAT_TEMPLATE)


def wrap(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerBase:
    tokenizer_class: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerBase = tokenizer_class(tokenizer_object=tokenizer, chat_template=chat_template)
    return wrapped


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", ["topics", "docstrings"])
def test_documents_have_their_length_and_differ(kind: Kind, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = list(islice(documents(kind, 0, 2000, tokenizer), 3))
    assert all(abs(count(tokenizer, text) - 2000) <= 1 for text in texts)
    assert len(set(texts)) == 3
    assert texts == list(islice(documents(kind, 0, 2000, tokenizer), 3))
    assert texts[0] != next(documents(kind, 1, 2000, tokenizer))


def test_a_document_may_be_longer_than_the_corpus(tokenizer: PreTrainedTokenizerBase) -> None:
    text = next(documents("topics", 0, 400_000, tokenizer))
    assert abs(count(tokenizer, text) - 400_000) <= 1


@pytest.mark.parametrize("kind", ["needle", "keys", "passage"])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("tokens", [1500, 4000])
def test_a_task_says_where_its_answer_lies(
    kind: TaskKind, depth: float, tokens: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    task = make_task(kind, tokenizer, tokens=tokens, depth=depth, seed=3)
    assert tokens - 200 <= len(task.prompt_token_ids) <= tokens
    start, end = task.answer_span
    assert task.answer in decode(tokenizer, task.prompt_token_ids[start:end])
    assert task.answer in decode(tokenizer, task.answer_token_ids)
    assert task.messages[0]["content"] in decode(tokenizer, task.prompt_token_ids)
    assert abs(start / len(task.prompt_token_ids) - depth) < 0.15
    assert task.messages[0]["content"].count(task.answer) == 1


def test_the_reply_goes_on_to_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    task = make_task("needle", tokenizer, tokens=1500, depth=0.5, seed=0)
    reply = decode(tokenizer, [*task.reply_prefix_token_ids, *task.answer_token_ids])
    assert reply.startswith("The secret number of ")
    assert reply.endswith(f" is {task.answer}")


def test_keys_hide_the_answer_among_others(tokenizer: PreTrainedTokenizerBase) -> None:
    text = make_task("keys", tokenizer, tokens=2000, depth=0.5, seed=0).messages[0]["content"]
    assert text.count("The secret number of ") == KEYS


def test_a_task_is_a_function_of_its_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    first = make_task("keys", tokenizer, tokens=2000, depth=0.5, seed=7)
    assert first == make_task("keys", tokenizer, tokens=2000, depth=0.5, seed=7)
    assert first.answer != make_task("keys", tokenizer, tokens=2000, depth=0.5, seed=8).answer


def test_answer_chunks_cover_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    task = make_task("passage", tokenizer, tokens=2000, depth=0.5, seed=0)
    start, end = task.answer_span
    assert list(task.answer_chunks(1)) == list(range(start, end))
    chunks = task.answer_chunks(16)
    assert chunks[0] * 16 <= start < end <= (chunks[-1] + 1) * 16
    assert len(chunks) <= (end - start) // 16 + 2


def test_a_tokenizer_without_a_chat_template_gets_plain_text(tokenizer: PreTrainedTokenizerBase) -> None:
    backend: Tokenizer = cast(PreTrainedTokenizerFast, tokenizer).backend_tokenizer
    plain = wrap(backend, chat_template=None)
    task = make_task("needle", plain, tokens=1500, depth=0.5, seed=0)
    assert decode(plain, task.prompt_token_ids).endswith("?\n\nAnswer:")
    assert task.answer in decode(plain, task.answer_token_ids)


def test_too_short_a_prompt_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="needs at least"):
        make_task("keys", tokenizer, tokens=100, depth=0.5, seed=0)

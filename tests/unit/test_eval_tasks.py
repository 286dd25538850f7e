"""Generated tasks: reproducible by seed, within their length, with answers at the stated positions."""

import pydoc_data.topics
import re
from collections import Counter
from typing import Any, get_args

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from forecache.workers.errors import InvalidRequestError
from forecache.workers.evaluation.corpus import definitions, paragraphs
from forecache.workers.evaluation.ruler import (
    COMMON_FACTOR,
    COMMON_WORDS,
    EXTRACTED,
    HOPS,
    NEEDLES,
    ROWS,
    TABLE_CITIES,
    Generator,
    Sample,
    Task,
    score,
)

TASKS: tuple[Task, ...] = get_args(Task)
LENGTHS = (1536, 6000)
LONGEST_PIECE_TOKENS = 600
"""No piece of the texts has more; a prompt is that much shorter than it may be at most."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """A small byte-level BPE with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    wrapped: Any = PreTrainedTokenizerFast
    return wrapped(  # type: ignore[no-any-return]
        tokenizer_object=tokenizer, chat_template="{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>"
    )


@pytest.fixture(scope="module")
def generator(tokenizer: PreTrainedTokenizerBase) -> Generator:
    return Generator(tokenizer, seed=5)


@pytest.fixture(scope="module", params=[(task, tokens) for task in TASKS for tokens in LENGTHS], ids=str)
def samples(request: pytest.FixtureRequest, generator: Generator) -> list[Sample]:
    task, tokens = request.param
    return [generator.sample(task, tokens, number) for number in range(6)]


def of(generator: Generator, task: Task, tokens: int = 3000, count: int = 8) -> list[Sample]:
    return [generator.sample(task, tokens, number) for number in range(count)]


def parts(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """(question, the paragraphs between its two occurrences)."""
    prompt = str(tokenizer.decode(list(sample.prompt_token_ids)))
    message, _, reply = prompt.removeprefix("<user>").partition("<assistant>")
    question, *text, again = message.split("\n\n")
    assert score(sample, reply) == 0
    assert question == again
    return question, text


def numbers(text: str) -> list[str]:
    return re.findall(r"\d{6}", text)


def test_prompts_leave_room_for_the_reply_and_little_more(samples: list[Sample]) -> None:
    for sample in samples:
        used = len(sample.prompt_token_ids) + sample.max_tokens
        assert sample.tokens - LONGEST_PIECE_TOKENS <= used <= sample.tokens


def test_the_answer_fits_the_reply(samples: list[Sample], tokenizer: PreTrainedTokenizerBase) -> None:
    for sample in samples:
        spelled = tokenizer(", ".join(sample.answers), add_special_tokens=False)["input_ids"]
        assert len(spelled) < sample.max_tokens


def test_all_answers_are_in_the_text(samples: list[Sample], tokenizer: PreTrainedTokenizerBase) -> None:
    for sample in samples:
        question, text = parts(sample, tokenizer)
        stated = "\n".join(text)
        if sample.task == "table":
            city = question.rstrip("?").split()[-1]
            stated = "\n".join(row for row in stated.split("\n") if row.startswith(f"{city}: "))
        assert score(sample, stated) == 1
        assert score(sample, question) == 0


def test_samples_differ(samples: list[Sample]) -> None:
    assert len({sample.prompt_token_ids for sample in samples}) == len(samples)
    assert len({sample.answers for sample in samples}) > 1


def test_samples_are_functions_of_seed_task_length_and_number(
    samples: list[Sample], tokenizer: PreTrainedTokenizerBase, generator: Generator
) -> None:
    sample = samples[2]
    again = Generator(tokenizer, seed=5)
    assert again.fingerprint == generator.fingerprint
    assert again.sample(sample.task, sample.tokens, sample.number) == sample
    other = Generator(tokenizer, seed=6).sample(sample.task, sample.tokens, sample.number)
    assert other.prompt_token_ids != sample.prompt_token_ids


@pytest.mark.parametrize("task", ["needle", "multikey", "multivalue", "multiquery", "tracking"])
def test_numbers_are_stated_once_and_asked_for_by_name(
    task: Task, generator: Generator, tokenizer: PreTrainedTokenizerBase
) -> None:
    for sample in of(generator, task):
        _, text = parts(sample, tokenizer)
        stated = Counter(numbers("\n".join(text)))
        assert all(stated[answer] == 1 for answer in sample.answers)
        assert len(set(sample.answers)) == len(sample.answers)


def test_needles_hide_in_prose_that_goes_on_as_it_was_written(
    generator: Generator, tokenizer: PreTrainedTokenizerBase
) -> None:
    prose = paragraphs("topics")
    for sample in of(generator, "needle"):
        _, text = parts(sample, tokenizer)
        rest = [prose.index(paragraph) for paragraph in text if not numbers(paragraph)]
        assert len(rest) == len(text) - 1
        assert [number % len(prose) for number in range(rest[0], rest[0] + len(rest))] == rest


def test_the_place_of_the_needle_varies(generator: Generator, tokenizer: PreTrainedTokenizerBase) -> None:
    depths = []
    for sample in of(generator, "needle", count=40):
        _, text = parts(sample, tokenizer)
        depths.append(next(i for i, paragraph in enumerate(text) if numbers(paragraph)) / len(text))
    assert min(depths) < 0.2 and max(depths) > 0.8
    assert 0.35 < sum(depths) / len(depths) < 0.65


@pytest.mark.parametrize(("task", "asked"), [("needle", 1), ("multikey", 1), ("multiquery", NEEDLES)])
def test_the_numbers_asked_for_are_those_of_the_names(
    task: Task, asked: int, generator: Generator, tokenizer: PreTrainedTokenizerBase
) -> None:
    for sample in of(generator, task):
        question, text = parts(sample, tokenizer)
        facts = dict(re.findall(r"The secret number of (\w+) is (\d{6})\.", "\n".join(text)))
        assert len(facts) == (1 if task == "needle" else NEEDLES)
        assert {facts[name] for name in facts if name in question} == set(sample.answers)
        assert len(sample.answers) == asked


def test_multivalue_asks_for_all_numbers_of_one_name(generator: Generator, tokenizer: PreTrainedTokenizerBase) -> None:
    for sample in of(generator, "multivalue"):
        question, text = parts(sample, tokenizer)
        facts = re.findall(r"One of the secret numbers of (\w+) is (\d{6})\.", "\n".join(text))
        assert {name for name, _ in facts} == {question.rstrip("?").split()[-1]}
        assert sorted(number for _, number in facts) == sorted(sample.answers)
        assert len(sample.answers) == NEEDLES


def test_tracking_leads_from_name_to_name_to_the_number(
    generator: Generator, tokenizer: PreTrainedTokenizerBase
) -> None:
    for sample in of(generator, "tracking"):
        question, text = parts(sample, tokenizer)
        joined = "\n".join(text)
        held = dict(re.findall(r"The secret number of (\w+) is (\d{6})\.", joined))
        same = dict(re.findall(r"The secret number of (\w+) is the same as that of (\w+)\.", joined))
        name, hops = question.rstrip("?").split()[-1], 0
        while name not in held:
            name, hops = same[name], hops + 1
        assert hops == HOPS
        assert sample.answers == (held[name],)


def test_common_words_are_the_most_frequent_by_far(generator: Generator, tokenizer: PreTrainedTokenizerBase) -> None:
    for sample in of(generator, "words"):
        _, text = parts(sample, tokenizer)
        counts = Counter(", ".join(text).split(", ")).most_common()
        assert {word for word, _ in counts[:COMMON_WORDS]} == set(sample.answers)
        assert counts[COMMON_WORDS - 1][1] > COMMON_FACTOR / 4 * counts[COMMON_WORDS][1]


def test_extract_asks_for_all_numbers_in_the_order_of_the_text(
    generator: Generator, tokenizer: PreTrainedTokenizerBase
) -> None:
    for sample in of(generator, "extract"):
        _, text = parts(sample, tokenizer)
        stated = re.findall(r"The secret number of (\w+ is \d{4})\.", "\n\n".join(text))
        assert tuple(stated) == (sample.given, *sample.answers)
        assert len({fact.split()[0] for fact in stated}) == EXTRACTED + 1
        prompt = str(tokenizer.decode(list(sample.prompt_token_ids)))
        assert prompt.endswith(f"<assistant>The secret number of {sample.given}.\nThe secret number of")


def test_extracted_numbers_are_spread_over_the_text(generator: Generator, tokenizer: PreTrainedTokenizerBase) -> None:
    depths = []
    for sample in of(generator, "extract", count=20):
        _, text = parts(sample, tokenizer)
        depths += [place / len(text) for place, piece in enumerate(text) if piece.startswith("The secret number of")]
    for low in (0, 0.25, 0.5, 0.75):
        assert sum(low <= depth < low + 0.25 for depth in depths) > len(depths) / 8


def test_table_asks_for_all_rows_of_one_city(generator: Generator, tokenizer: PreTrainedTokenizerBase) -> None:
    for sample in of(generator, "table"):
        question, text = parts(sample, tokenizer)
        city = question.rstrip("?").split()[-1]
        rows = [row.split(": ") for row in "\n".join(text).split("\n")]
        assert [word for name, word in rows if name == city] == [sample.given, *sample.answers]
        assert len(sample.answers) == ROWS == len(set(sample.answers))
        counts = Counter(name for name, _ in rows)
        assert len(counts) == TABLE_CITIES and counts[city] == ROWS + 1 < len(rows) / TABLE_CITIES
        prompt = str(tokenizer.decode(list(sample.prompt_token_ids)))
        assert prompt.endswith(f"<assistant>{city}: {sample.given}\n{city}:")


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (" Oslo is 1234.\nThe secret number of Lima is 5678.", 1.0),
        (" Oslo is 5678.\nThe secret number of Lima is 1234.", 0.0),
        (" Oslo is 9999.\nThe secret number of Oslo is 1234.", 0.0),  # the first value of a name counts
        (" Oslo is 1234.\nThe secret number of Oslo is 9999.", 0.5),
        (" Oslo is 12345.", 0.0),
        (" oslo is 1234.", 0.0),
        ("1234, 5678", 0.0),
        ("", 0.0),
    ],
)
def test_extracted_values_count_with_their_names(reply: str, right: float) -> None:
    sample = Sample("extract", 4096, 0, (1,), ("Oslo is 1234", "Lima is 5678"), 8, "Rome is 1111")
    assert score(sample, reply) == right


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        (" lemon\nOslo: tiger\nOslo: rabbit", 1.0),
        (" tiger\nOslo: lemon", 1.0),
        (" velvet\nOslo: lemon\nOslo: tiger", 0.5),  # the third is one too many
        (" lemon\nOslo: lemon\nOslo: tiger", 1.0),
        (" apple\nOslo: lemon\nOslo: tiger", 1.0),  # it is given
        (" lemons, tigers", 0.0),
        ("", 0.0),
    ],
)
def test_a_list_that_names_more_gains_nothing(reply: str, right: float) -> None:
    sample = Sample("table", 4096, 0, (1,), ("lemon", "tiger"), 8, "apple")
    assert score(sample, reply) == right


def test_questions_are_answered_by_one_description(generator: Generator, tokenizer: PreTrainedTokenizerBase) -> None:
    real = dict(definitions())
    for sample in of(generator, "questions"):
        question, text = parts(sample, tokenizer)
        found = dict(re.findall(r'The description of (\S+) is: "(.*)"\n', "\n".join(text) + "\n"))
        assert len(found) == NEEDLES
        assert all(real[name] == description for name, description in found.items())
        name = question.rstrip("?").split()[-1]
        assert found[name].startswith(sample.answers[0])
        assert [paragraph for paragraph in text if score(sample, paragraph) == 1] == [
            f'The description of {name} is: "{found[name]}"'
        ]


def test_a_reply_may_be_begun_for_the_model(generator: Generator, tokenizer: PreTrainedTokenizerBase) -> None:
    sample = generator.sample("questions", 2000, 0)
    prompt = str(tokenizer.decode(list(sample.prompt_token_ids)))
    assert re.search(r'<assistant>The description of (\S+) is: "$', prompt)


@pytest.mark.parametrize("task", ["needle", "words"])
def test_long_contexts_have_enough_text(task: Task, generator: Generator) -> None:
    sample = generator.sample(task, 130_000, 0)
    assert len(sample.prompt_token_ids) > 130_000 - LONGEST_PIECE_TOKENS


def test_other_prose_gives_other_texts(tokenizer: PreTrainedTokenizerBase, generator: Generator) -> None:
    other = Generator(tokenizer, prose="docstrings", seed=5)
    assert other.fingerprint != generator.fingerprint
    assert other.sample("needle", 2000, 0) != generator.sample("needle", 2000, 0)


def test_packages_have_prose_of_their_own() -> None:
    texts = paragraphs("packages")
    assert len(texts) > 100
    assert not set(texts) & set(paragraphs("topics"))
    assert texts == paragraphs("packages")


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_context_is_refused(task: Task, generator: Generator) -> None:
    with pytest.raises(InvalidRequestError, match="too short"):
        generator.sample(task, 100, 0)


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("They are 123456 and 654321.", 1.0),
        ("654321\n123456", 1.0),
        ("123456, 123456", 0.5),
        ("1234567 6543210", 0.0),
        ("123,456", 0.0),
        ("", 0.0),
    ],
)
def test_scores_are_shares_of_the_answers(reply: str, right: float) -> None:
    sample = Sample("multivalue", 4096, 0, (1,), ("123456", "654321"), 8)
    assert score(sample, reply) == right


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("It will: return THE  list.", 1.0),
        ("return the lists", 0.0),
        ("the list return", 0.0),
        ("Return the list", 1.0),
    ],
)
def test_answers_of_several_words_are_found_as_they_follow_each_other(reply: str, right: float) -> None:
    sample = Sample("questions", 4096, 0, (1,), ("Return the list",), 8)
    assert score(sample, reply) == right

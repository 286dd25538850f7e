"""Generated long-context tasks like those of RULER (Hsieh et al. 2024, arXiv 2404.06654), in real prose.

Wording and sizes are ours, chosen so that a model of 135M parameters can do as many as possible. With SmolLM2-135M,
full attention and 8 samples each, at 2K tokens: needle 1.0, multikey .50, multivalue .41, multiquery .66, tracking .88,
words .25, questions .75. These variants scored less at 1K: other words for the secret numbers of tracking (.38), common
words only 10 times as frequent as 45 others (.25), "What does NAME do?" among definitions (0; .38 with the start of the
reply given), the end of a quoted sentence (.25), and a worked example before multiquery and tracking.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import count
from typing import Literal

from transformers import PreTrainedTokenizerBase

from forecache.workers.errors import InvalidRequestError
from forecache.workers.evaluation import corpus
from forecache.workers.evaluation.tasks import DIGITS, JOINT_TOKENS, render_prompt, secret_number, user_message

Task = Literal["needle", "multikey", "multivalue", "multiquery", "tracking", "words", "questions", "extract", "table"]
"""needle: a number hidden in prose; multikey: one of four such numbers; multivalue: all four numbers of one subject;
multiquery: the numbers of four subjects; tracking: a number that a chain of people passes on; words: the most frequent
words of a list; questions: one of four descriptions of library functions; extract: all seven numbers spread over
prose, the first of them given; table: all rows of one city in a table that fills the context, one given."""

VERSION = 1
"""Version of the tasks. Raise it when a task changes, so that stored answers to old tasks are not reused."""

NEEDLES = 4
HOPS = 2
CHAINS = 2
EXTRACTED = 6
ROWS = 4
"""Rows of a table that the answer lists, besides the one that the reply begins with."""
TABLE_CITIES = 16
CODE_DIGITS = 4
COMMON_WORDS = 5
LISTED_WORDS = 35
COMMON_FACTOR = 30
"""Frequency of the common words relative to other words."""
QUOTED_WORDS = 5
"""Leading words of a description that a correct answer contains."""
SHORTEST_DESCRIPTION_WORDS, LONGEST_DESCRIPTION_WORDS = 8, 40
LEAST_TOKENS = 512

ANSWER_TOKENS: dict[Task, int] = {
    "needle": 24,
    "multikey": 24,
    "multivalue": 64,
    "multiquery": 80,
    "tracking": 24,
    "words": 48,
    "questions": 40,
    "extract": 88,
    "table": 40,
}

_CITIES = """
    Accra Athens Bergen Boston Cairo Dakar Dublin Geneva Hanoi Havana Lagos Lima Lisbon Madrid Nairobi Oslo Prague Quito
    Riga Seoul Tunis Vienna Warsaw Zagreb
"""
_PEOPLE = """
    Alice Bruno Clara David Elena Frank Grace Henry Irene Jacob Karen Louis Maria Nadia Oscar Paula Roger Sarah Tomas
    Ursula Victor Wanda Xavier Yusuf
"""
_NOUNS = """
    almond anchor apple barrel basket beetle blanket bottle button cactus candle carpet copper cotton desert dragon
    engine fabric falcon feather garden goblin guitar hammer harvest helmet insect island jacket jungle kernel kettle
    kitten ladder lantern lemon locket magnet marble meadow mirror monkey napkin needle onion orchard oyster palace
    parrot pencil pepper pillow quartz rabbit raisin ribbon river rocket saddle sailor salmon shadow spider stone
    temple thunder ticket tiger turtle valley velvet violin wagon walnut whistle willow window yogurt zebra zipper
"""
CITIES, PEOPLE, NOUNS = tuple(_CITIES.split()), tuple(_PEOPLE.split()), tuple(_NOUNS.split())


@dataclass(frozen=True)
class Sample:
    """One question about a long text; a correct reply contains all ``answers``.

    ``tokens``: the context length; the prompt leaves room for a reply of ``max_tokens``. ``given``: the answer with
    which the prompt begins the reply, if it does; it is not among ``answers``.
    """

    task: Task
    tokens: int
    number: int
    prompt_token_ids: tuple[int, ...]
    answers: tuple[str, ...]
    max_tokens: int
    given: str = ""


@dataclass(frozen=True)
class Pieces:
    """Pieces of text, and the number of tokens of each with its leading separator."""

    texts: tuple[str, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, texts: Sequence[str], separator: str, tokenizer: PreTrainedTokenizerBase) -> "Pieces":
        encoded = tokenizer([separator + text for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
        return cls(tuple(texts), tuple(map(len, encoded)))

    def fill(self, numbers: Iterable[int], tokens: int) -> list[str]:
        """The pieces with these ``numbers``, in order, up to ``tokens`` tokens in total."""
        filled = []
        for number in numbers:
            tokens -= self.tokens[number]
            if tokens < 0:
                break
            filled.append(self.texts[number])
        return filled


@dataclass(frozen=True)
class Riddle:
    """A question, its answers, and the text that hides them: ``facts`` go to random places of the filler, in order.

    ``filler``: makes a text of at most so many tokens; ``reply``: start of the reply, which the prompt contains, and
    ``given``: the answer in it.
    """

    question: str
    answers: tuple[str, ...]
    facts: tuple[str, ...]
    filler: Callable[[int], list[str]]
    separator: str = "\n\n"
    reply: str = ""
    given: str = ""


def score(sample: Sample, reply: str) -> float:
    """Share of the answers that ``reply`` contains as whole words, ignoring case (RULER's metric).

    Dense tasks are scored more strictly: `extract` takes the first value of each name, and `table` as many words of the
    reply as there are answers, so that listing more gains nothing.
    """
    if sample.task == "extract":
        values = dict(reversed(_STATED.findall(reply)))  # of equal names the first wins
        stated = [f"{name} is {value}" for name, value in values.items()]
        return len(set(stated) & set(sample.answers)) / len(sample.answers)
    if sample.task == "table":
        words = (word for word in re.findall(r"\w+", reply) if word in NOUNS and word != sample.given)
        listed = list(dict.fromkeys(words))[: len(sample.answers)]
        return len(set(listed) & set(sample.answers)) / len(sample.answers)
    found = f" {_plain(reply)} "
    return sum(f" {_plain(answer)} " in found for answer in sample.answers) / len(sample.answers)


_STATED = re.compile(r"(\w+) is (\d+)")


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


class Generator:
    """Makes samples for a tokenizer. Each depends only on ``seed``, task, length, number and the texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, prose: corpus.Kind = "topics", seed: int = 0) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._prose = Pieces.of(corpus.paragraphs(prose), "\n\n", tokenizer)
        self._taken = frozenset(re.findall(rf"\d{{{DIGITS}}}", " ".join(self._prose.texts)))
        plain = _plain(" ".join(self._prose.texts))
        self._descriptions = [pair for pair in _descriptions() if _beginning(pair[1]) not in plain]
        self._nouns = Pieces.of(NOUNS, ", ", tokenizer)
        self._riddles: dict[Task, Callable[[random.Random], Riddle]] = {
            "needle": lambda rng: self._needles(rng, subjects=1, asked=1),
            "multikey": lambda rng: self._needles(rng, subjects=NEEDLES, asked=1),
            "multiquery": lambda rng: self._needles(rng, subjects=NEEDLES, asked=NEEDLES),
            "multivalue": self._values,
            "tracking": self._tracking,
            "words": self._words,
            "questions": self._questions,
            "extract": self._extract,
            "table": self._table,
        }

    @property
    def fingerprint(self) -> str:
        """Digest of the texts that samples are made of."""
        texts = [*self._prose.texts, *(f"{name} {text}" for name, text in self._descriptions)]
        return blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()

    def sample(self, task: Task, tokens: int, number: int) -> Sample:
        """Sample ``number`` of ``task`` for a context of ``tokens`` tokens, including ``max_tokens`` for the reply.

        Raises :class:`InvalidRequestError` if ``tokens`` is too small.
        """
        rng = random.Random(f"{self._seed} {task} {tokens} {number}")
        riddle = self._riddles[task](rng)
        room = tokens - ANSWER_TOKENS[task]
        places = [rng.random() for _ in riddle.facts]
        fixed = len(self._encode(riddle, places, [])) + JOINT_TOKENS * (len(riddle.facts) + 2)
        while True:
            filler = riddle.filler(room - fixed)
            if not filler or tokens < LEAST_TOKENS:
                raise InvalidRequestError(f"a context of {tokens} tokens is too short for the task '{task}'")
            prompt = self._encode(riddle, places, filler)
            if len(prompt) <= room:
                return Sample(task, tokens, number, prompt, riddle.answers, ANSWER_TOKENS[task], riddle.given)
            fixed += len(prompt) - room  # joined pieces have more tokens than their sum

    def _encode(self, riddle: Riddle, places: Sequence[float], filler: Sequence[str]) -> tuple[int, ...]:
        """The tokens of the prompt, with the facts in the filler."""
        pieces = list(filler)
        # insert from the end, so that earlier places stay valid
        for place, fact in sorted(zip(sorted(places), riddle.facts, strict=True), key=lambda pair: -pair[0]):
            pieces.insert(round(place * len(filler)), fact)
        text = riddle.separator.join(pieces)
        prompt = render_prompt(self._tokenizer, user_message(text, riddle.question), riddle.reply)
        return tuple(self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])

    def _numbers(self, rng: random.Random, wanted: int) -> list[str]:
        """Distinct numbers of ``DIGITS`` digits that the prose does not contain."""
        drawn = (str(n) for n in rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), wanted + len(self._taken)))
        return [number for number in drawn if number not in self._taken][:wanted]

    def _hidden_in_prose(self, rng: random.Random) -> Callable[[int], list[str]]:
        size = len(self._prose.texts)
        first = rng.randrange(size)  # then in order, wrapping at the end
        return lambda tokens: self._prose.fill((number % size for number in count(first)), tokens)

    def _needles(self, rng: random.Random, *, subjects: int, asked: int) -> Riddle:
        cities = rng.sample(CITIES, subjects)
        numbers = self._numbers(rng, subjects)
        facts = [secret_number(city, number) for city, number in zip(cities, numbers, strict=True)]
        rng.shuffle(facts)
        if asked == 1:
            question = f"What is the secret number of {cities[0]}?"
        else:
            question = f"What are the secret numbers of {', '.join(cities[: asked - 1])} and {cities[asked - 1]}?"
        return Riddle(question, tuple(numbers[:asked]), tuple(facts), self._hidden_in_prose(rng))

    def _values(self, rng: random.Random) -> Riddle:
        city = rng.choice(CITIES)
        numbers = self._numbers(rng, NEEDLES)
        facts = tuple(f"One of the secret numbers of {city} is {number}." for number in numbers)
        question = f"What are all the {NEEDLES} secret numbers of {city}?"
        return Riddle(question, tuple(numbers), facts, self._hidden_in_prose(rng))

    def _tracking(self, rng: random.Random) -> Riddle:
        """Parallel chains of people: the first person has a number, each other has that of the previous one."""
        people = rng.sample(PEOPLE, CHAINS * (HOPS + 1))
        chains = [people[start::CHAINS] for start in range(CHAINS)]
        numbers = self._numbers(rng, CHAINS)
        facts = [secret_number(names[0], number) for names, number in zip(chains, numbers, strict=True)]
        for hop in range(HOPS):
            facts += [f"The secret number of {names[hop + 1]} is the same as that of {names[hop]}." for names in chains]
        question = f"What is the secret number of {chains[0][-1]}?"
        return Riddle(question, (numbers[0],), tuple(facts), self._hidden_in_prose(rng))

    def _extract(self, rng: random.Random) -> Riddle:
        """Asks for all numbers that are spread over the text. The reply begins with the first one."""
        cities = rng.sample(CITIES, EXTRACTED + 1)
        codes = _codes(rng, EXTRACTED + 1)
        pairs = [f"{city} is {code}" for city, code in zip(cities, codes, strict=True)]
        facts = [secret_number(city, code) for city, code in zip(cities, codes, strict=True)]
        return Riddle(
            "What are all the secret numbers in the text, in order?",
            tuple(pairs[1:]),
            tuple(facts),
            self._hidden_in_prose(rng),
            reply=f"{facts[0]}\nThe secret number of",
            given=pairs[0],
        )

    def _table(self, rng: random.Random) -> Riddle:
        """Asks for all rows of one city in a table of several. The reply begins with one of them."""
        city, *others = rng.sample(CITIES, TABLE_CITIES)
        words = rng.sample(NOUNS, ROWS + 1)
        rows = [f"{other}: {noun}" for other in others for noun in NOUNS]
        pieces = Pieces.of(rows, "\n", self._tokenizer)
        seed = rng.random()

        def fill(tokens: int) -> list[str]:
            # each row has more than one token
            return pieces.fill(random.Random(seed).choices(range(len(rows)), k=max(tokens, 0)), tokens)

        return Riddle(
            f"Which words does the list have for {city}?",
            tuple(words[1:]),
            tuple(f"{city}: {word}" for word in words),
            fill,
            separator="\n",
            reply=f"{city}: {words[0]}\n{city}:",
            given=words[0],
        )

    def _words(self, rng: random.Random) -> Riddle:
        listed = rng.sample(range(len(NOUNS)), LISTED_WORDS)
        weights = [COMMON_FACTOR if place < COMMON_WORDS else 1 for place in range(LISTED_WORDS)]
        seed = rng.random()

        def fill(tokens: int) -> list[str]:
            # each word has at least one token
            return self._nouns.fill(random.Random(seed).choices(listed, weights, k=max(tokens, 0)), tokens)

        question = f"What are the {COMMON_WORDS} most common words in the list?"
        common = tuple(NOUNS[number] for number in listed[:COMMON_WORDS])
        return Riddle(question, common, (), fill, separator=", ")

    def _questions(self, rng: random.Random) -> Riddle:
        """Asks for the description of one of four parts of the standard library."""
        found = rng.sample(self._descriptions, NEEDLES)
        name, text = found[0]
        facts = [f'The description of {name} is: "{text}"' for name, text in found]
        rng.shuffle(facts)
        return Riddle(
            f"What is the description of {name}?",
            (" ".join(text.split()[:QUOTED_WORDS]),),
            tuple(facts),
            self._hidden_in_prose(rng),
            # otherwise a small model explains the name
            reply=f'The description of {name} is: "',
        )


def _codes(rng: random.Random, wanted: int) -> list[str]:
    """Distinct numbers of ``CODE_DIGITS`` digits."""
    return [str(code) for code in rng.sample(range(10 ** (CODE_DIGITS - 1), 10**CODE_DIGITS), wanted)]


@cache
def _descriptions() -> tuple[tuple[str, str], ...]:
    """(name, description) of the standard library's short descriptions whose first words are unique."""
    found = [
        (name, text)
        for name, text in corpus.definitions()
        if SHORTEST_DESCRIPTION_WORDS <= len(text.split()) <= LONGEST_DESCRIPTION_WORDS and corpus.is_prose(text)
    ]
    beginnings = Counter(_beginning(text) for _, text in found)
    return tuple((name, text) for name, text in found if beginnings[_beginning(text)] == 1)


def _beginning(text: str) -> str:
    return _plain(" ".join(text.split()[:QUOTED_WORDS]))

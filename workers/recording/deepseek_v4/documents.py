"""Training documents for the small DeepSeek-V4: long prose with inserted facts, and questions about these facts.

Wording and tasks are those of `ruler.py`, but replies name the subject, or the chain of subjects, before its number.
The questions within the text turn one document into many examples. The last question is the prompt of `ruler.py`.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from forecache.workers.evaluation import corpus
from forecache.workers.evaluation.ruler import CHAINS, CITIES, HOPS, NEEDLES, NOUNS, PEOPLE
from forecache.workers.evaluation.tasks import DIGITS

Kind = Literal["needle", "multikey", "multivalue", "multiquery", "tracking"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TEXT, FACT, REPLY, NUMBER = range(4)
"""Roles of tokens: prose or question; part of a fact, which is unpredictable; part of a reply; number in a reply."""
PAIR_TOKENS = 50
"""A document has at most one fact and its question per so many tokens; the rest is prose."""
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Document:
    """``ids``, ``roles``: int64 and uint8 [tokens]."""

    ids: Ids
    roles: NDArray[np.uint8]


@dataclass(frozen=True)
class _Exercise:
    """A question, its facts in order, and its reply, which names the subject before each number."""

    question: str
    facts: tuple[str, ...]
    reply: str


class DocumentMaker:
    """Makes documents with one tokenizer and one kind of prose."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prose: corpus.Kind) -> None:
        self._tokenizer = tokenizer
        encoded = tokenizer([f"\n\n{text}" for text in corpus.paragraphs(prose)], add_special_tokens=False)["input_ids"]
        self._prose: Ids = np.concatenate([np.array(ids) for ids in encoded])
        self._number_tokens = {
            token
            for number in range(100)
            for text in (f"{number:02}", f" {number:02}")
            for token in tokenizer(text, add_special_tokens=False)["input_ids"]
        }

    def document(self, rng: random.Random, tokens: int, kind: Kind | None = None) -> Document:
        """A document of exactly ``tokens`` tokens that ends with the last reply.

        ``kind``: it has only the last question, of this kind, as in evaluation. None: as many questions as fit, of all
        kinds.
        """
        drawn = _Drawer(rng)
        distractors: list[_Exercise] = []
        if kind is None:
            last = drawn.exercise(rng.choice(KINDS))
            within = [drawn.mixed() for _ in range(_questions(rng, tokens))]
        else:
            last, within = drawn.exercise(kind), []
            if kind == "multikey":
                distractors = [drawn.exercise("needle") for _ in range(NEEDLES - 1)]
            elif kind == "tracking":
                distractors = [drawn.exercise("tracking") for _ in range(CHAINS - 1)]
        head = self._encode(last.question, "text")
        tail = [*self._question_and_reply(last)]
        items: list[tuple[float, list[tuple[list[int], int]]]] = []
        room = tokens - len(head[0][0]) - _length(tail)
        for exercise in [last, *distractors, *within]:
            asked = exercise if exercise in within else None
            made = self._items(exercise, asked, rng)
            size = sum(_length(parts) for _, parts in made)
            if size > room:
                continue
            room -= size
            items += made
        items.sort(key=lambda item: item[0])
        parts = [*head]
        start, before = rng.randrange(len(self._prose)), 0
        for place, item in items:
            upto = int(place * room)
            parts += [(self._filler(start + before, upto - before), TEXT), *item]
            before = upto
        parts += [(self._filler(start + before, room - before), TEXT), *tail]
        ids = np.concatenate([np.asarray(part, dtype=np.int64) for part, _ in parts])
        roles = np.concatenate([self._roles(part, role) for part, role in parts])
        assert len(ids) == tokens, f"{len(ids)} tokens instead of {tokens}"
        return Document(ids, roles)

    def _roles(self, ids: Sequence[int], role: int) -> NDArray[np.uint8]:
        roles = np.full(len(ids), role, dtype=np.uint8)
        if role == REPLY:
            roles[[token in self._number_tokens for token in ids]] = NUMBER
        return roles

    def _filler(self, start: int, tokens: int) -> list[int]:
        filled: list[int] = np.take(self._prose, range(start, start + tokens), mode="wrap").tolist()
        return filled

    def _items(
        self, exercise: _Exercise, asked: _Exercise | None, rng: random.Random
    ) -> list[tuple[float, list[tuple[list[int], int]]]]:
        """Facts at ascending places, then the question, if it is asked within the text."""
        places = sorted(rng.random() for _ in exercise.facts)
        items = [(at, self._encode(f"\n\n{fact}", "fact")) for at, fact in zip(places, exercise.facts, strict=True)]
        if asked is not None:
            items.append((places[-1] + (1 - places[-1]) * rng.random() ** 2, self._question_and_reply(exercise)))
        return items

    def _question_and_reply(self, exercise: _Exercise) -> list[tuple[list[int], int]]:
        question = self._encode(f"\n\n{exercise.question}\n\nAnswer:", "text")
        return [*question, *self._encode(exercise.reply, "reply"), ([self._tokenizer.eos_token_id], REPLY)]

    def _encode(self, text: str, what: Literal["text", "fact", "reply"]) -> list[tuple[list[int], int]]:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [(ids, {"text": TEXT, "fact": FACT, "reply": REPLY}[what])]


def _length(parts: list[tuple[list[int], int]]) -> int:
    return sum(len(ids) for ids, _ in parts)


def _questions(rng: random.Random, tokens: int) -> int:
    most = max(1, min(tokens // PAIR_TOKENS, len(CITIES) + len(PEOPLE) + len(NOUNS)))
    return rng.randint(max(1, most // 2), most)


class _Drawer:
    """Draws the exercises of one document. No two of them share a subject or a number."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._names = {"city": [*CITIES], "person": [*PEOPLE], "any": [*NOUNS]}
        for names in self._names.values():
            rng.shuffle(names)
        self._numbers: set[str] = set()
        self._exercises: dict[Kind, Callable[[], _Exercise]] = {
            "needle": self._needle,
            "multikey": self._needle,
            "multivalue": self._values,
            "multiquery": self._query,
            "tracking": self._tracking,
        }

    def exercise(self, kind: Kind) -> _Exercise:
        return self._exercises[kind]()

    def mixed(self) -> _Exercise:
        """An exercise of a random kind, mostly about a single fact."""
        kind = self._rng.choices(KINDS, (6, 6, 1, 2, 3))[0]
        return self.exercise(kind)

    def _take(self, sort: str, wanted: int) -> list[str]:
        taken = []
        for _ in range(wanted):
            names = self._names[sort] or self._names["any"] or self._names["city"] or self._names["person"]
            # combine two nouns once all names are used
            taken.append(names.pop() if names else f"{self._rng.choice(NOUNS)} {self._rng.choice(NOUNS)}")
        return taken

    def _number(self) -> str:
        while True:
            number = str(self._rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))
            if number not in self._numbers:
                self._numbers.add(number)
                return number

    def _sort(self) -> str:
        return self._rng.choice(("city", "city", "person", "any", "any"))

    def _needle(self) -> _Exercise:
        [name], number = self._take(self._sort(), 1), self._number()
        return _Exercise(_question(name), (_fact(name, number),), f" {name} {number}.")

    def _query(self) -> _Exercise:
        names, numbers = self._take("city", NEEDLES), [self._number() for _ in range(NEEDLES)]
        facts = [_fact(name, number) for name, number in zip(names, numbers, strict=True)]
        self._rng.shuffle(facts)
        question = f"What are the secret numbers of {', '.join(names[:-1])} and {names[-1]}?"
        pairs = (f"{name} {number}" for name, number in zip(names, numbers, strict=True))
        return _Exercise(question, tuple(facts), f" {', '.join(pairs)}.")

    def _values(self) -> _Exercise:
        [name], numbers = self._take("city", 1), [self._number() for _ in range(NEEDLES)]
        facts = tuple(f"One of the secret numbers of {name} is {number}." for number in numbers)
        question = f"What are all the {NEEDLES} secret numbers of {name}?"
        return _Exercise(question, facts, f" {name} {', '.join(numbers)}.")

    def _tracking(self) -> _Exercise:
        names, number = self._take("person", HOPS + 1), self._number()
        facts = [_fact(names[0], number)]
        facts += [f"The secret number of {b} is the same as that of {a}." for a, b in itertools.pairwise(names)]
        return _Exercise(_question(names[-1]), tuple(facts), f" {' '.join(reversed(names))} {number}.")


def _fact(name: str, number: str) -> str:
    return f"The secret number of {name} is {number}."


def _question(name: str) -> str:
    return f"What is the secret number of {name}?"


def batches(
    maker: DocumentMaker, rng: random.Random, lengths: Callable[[], int], tokens_per_batch: int
) -> Iterator[tuple[Ids, NDArray[np.uint8]]]:
    """Endless training batches, ids and roles [batch, tokens]. ``lengths`` returns the tokens of the next batch."""
    while True:
        tokens = lengths()
        documents = [maker.document(rng, tokens) for _ in range(max(1, tokens_per_batch // tokens))]
        yield np.stack([document.ids for document in documents]), np.stack([document.roles for document in documents])

"""What the clients of `forecache bench serve` send: prompts, turns, pauses and arrivals, all drawn from one seed."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Workload = Literal["unique", "shared-prefix", "multi-turn", "agentic", "mixed"]

TOOLS = ("search", "read_file", "run_tests", "list_directory")
_SYLLABLES = ("ba", "co", "di", "fe", "gu", "ha", "ki", "lo", "mu", "ne", "pa", "ri", "so", "ta", "vu", "ze")


@dataclass(frozen=True)
class WorkloadSettings:
    """What clients send. Sizes are in tokens of the served model.

    Attributes:
        input_tokens: a document, the first message of a session, or the shortest prompt of ``mixed``.
        question_tokens: a question, or the mean result of a tool.
        prefixes: documents that the prompts of ``shared-prefix`` share.
        turns: turns of a conversation of ``multi-turn`` and ``agentic``.
        system_tokens: the system prompt that all sessions of ``agentic`` share.
        document_tokens: the longest prompt of ``mixed``.
        document_share: share of the prompts of ``mixed`` that are long documents.
        pause_s: mean seconds between an answer and the next turn, exponentially distributed; 0: none.
    """

    workload: Workload = "unique"
    input_tokens: int = 1024
    question_tokens: int = 64
    prefixes: int = 4
    turns: int = 4
    system_tokens: int = 1024
    document_tokens: int = 32768
    document_share: float = 0.25
    pause_s: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Conversation:
    """User messages, one per turn; each waits for the answer to the previous one.

    ``kind``: what the report groups requests by. ``pauses_s``: seconds before each turn but the first.
    """

    turns: tuple[str, ...]
    system: str = ""
    kind: str = "request"
    pauses_s: tuple[float, ...] = ()

    def kind_of_turn(self, turn: int) -> str:
        if len(self.turns) == 1:
            return self.kind
        return "first turn" if turn == 0 else "later turns"


def prose(words: int, generator: random.Random) -> str:
    """Sentences of made-up words, so that no two documents share a prefix."""
    made = []
    for number in range(words):
        word = "".join(generator.choices(_SYLLABLES, k=generator.randint(1, 3)))
        made.append(word + ("." if number % 12 == 11 else ""))
    return " ".join(made)


def conversations(count: int, settings: WorkloadSettings, words_per_token: float) -> Sequence[Conversation]:
    """``count`` conversations, a function of the settings."""
    generator = random.Random(settings.seed)

    def text(tokens: float) -> str:
        return prose(max(1, round(tokens * words_per_token)), generator)

    if settings.workload == "unique":
        return [Conversation((text(settings.input_tokens),)) for _ in range(count)]
    if settings.workload == "shared-prefix":
        documents = [text(settings.input_tokens) for _ in range(settings.prefixes)]
        return [
            Conversation((f"{documents[i % settings.prefixes]} {text(settings.question_tokens)}",))
            for i in range(count)
        ]
    if settings.workload == "mixed":
        sizes = mixed_sizes(count, settings.input_tokens, settings.document_tokens, settings.document_share, generator)
        return [Conversation((text(tokens),), kind=kind) for kind, tokens in sizes]
    system = text(settings.system_tokens) if settings.workload == "agentic" else ""

    def later_turn() -> str:
        if not system:
            return text(settings.question_tokens)
        result = text(settings.question_tokens * generator.uniform(0.5, 1.5))
        return json.dumps({"tool": generator.choice(TOOLS), "result": result})

    return [
        Conversation(
            (text(settings.input_tokens), *(later_turn() for _ in range(settings.turns - 1))),
            system=system,
            pauses_s=tuple(
                generator.expovariate(1 / settings.pause_s) if settings.pause_s else 0.0
                for _ in range(settings.turns - 1)
            ),
        )
        for _ in range(count)
    ]


def mixed_sizes(
    count: int, shortest: int, longest: int, document_share: float, generator: random.Random
) -> list[tuple[str, int]]:
    """(kind, prompt tokens) of ``count`` requests: short chats and long documents, in random order.

    A chat has ``shortest`` to twice as many tokens, a document half of ``longest`` up to ``longest``. The number of
    documents is exactly ``document_share`` of all, rounded, so that short runs have the same mix.
    """
    documents = round(count * document_share)
    kinds = ["document"] * documents + ["chat"] * (count - documents)
    generator.shuffle(kinds)
    spans = {
        "chat": (min(shortest, longest), min(2 * shortest, longest)),
        "document": (max(1, longest // 2), longest),
    }
    return [(kind, generator.randint(*spans[kind])) for kind in kinds]


def poisson_arrivals_s(rate_per_s: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests arrive, without end: a Poisson process of ``rate_per_s``.

    For one seed, another rate stretches the same arrivals.
    """
    generator = random.Random(seed)
    at_s = 0.0
    while True:
        at_s += generator.expovariate(1.0) / rate_per_s
        yield at_s

"""What the load tool asks: conversations whose prompts are new, share a beginning, or grow turn by turn."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Workload = Literal["unique", "shared-prefix", "multi-turn"]

_SYLLABLES = ("ba", "co", "di", "fe", "gu", "ha", "ki", "lo", "mu", "ne", "pa", "ri", "so", "ta", "vu", "ze")


@dataclass(frozen=True)
class WorkloadSettings:
    """Sizes in tokens of the served model; ``prefixes`` documents are shared, ``turns`` are those of a conversation."""

    workload: Workload = "unique"
    input_tokens: int = 1024
    question_tokens: int = 64
    prefixes: int = 4
    turns: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Conversation:
    """User messages, one a turn; each waits for the answer to the one before."""

    turns: tuple[str, ...]


def prose(words: int, generator: random.Random) -> str:
    """Made-up words in sentences: no two documents begin alike."""
    told = []
    for number in range(words):
        word = "".join(generator.choices(_SYLLABLES, k=generator.randint(1, 3)))
        told.append(word + ("." if number % 12 == 11 else ""))
    return " ".join(told)


def conversations(count: int, settings: WorkloadSettings, words_per_token: float) -> Sequence[Conversation]:
    """``count`` of them, the same again for the same seed."""
    generator = random.Random(settings.seed)
    document_words = max(1, round(settings.input_tokens * words_per_token))
    question_words = max(1, round(settings.question_tokens * words_per_token))

    def question() -> str:
        return prose(question_words, generator)

    if settings.workload == "unique":
        return [Conversation((prose(document_words, generator),)) for _ in range(count)]
    if settings.workload == "shared-prefix":
        documents = [prose(document_words, generator) for _ in range(settings.prefixes)]
        return [Conversation((f"{documents[i % settings.prefixes]} {question()}",)) for i in range(count)]
    return [
        Conversation((prose(document_words, generator), *(question() for _ in range(settings.turns - 1))))
        for _ in range(count)
    ]

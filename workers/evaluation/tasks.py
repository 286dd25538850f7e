"""Generated retrieval tasks: a question about a long text whose answer is at a known place."""

import random
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from forecache.workers.evaluation import corpus

TaskKind = Literal["needle", "keys", "passage"]
"""needle: a number hidden in prose; keys: one of twelve such numbers; passage: finish a quoted paragraph."""

DIGITS = 6
KEYS = 12
QUOTED_WORDS = 10
COPIED_WORDS = 20
JOINT_TOKENS = 2
"""Upper bound on extra tokens where two pieces of text join."""

CITIES = (
    "Athens",
    "Boston",
    "Cairo",
    "Dakar",
    "Dublin",
    "Hanoi",
    "Lima",
    "Lisbon",
    "Nairobi",
    "Oslo",
    "Prague",
    "Quito",
    "Seoul",
    "Tunis",
    "Vienna",
    "Warsaw",
)


@dataclass(frozen=True)
class RetrievalTask:
    """One question, and the place of its answer in the prompt.

    ``messages``: the chat; ``prompt_token_ids``: its tokens by the chat template, up to the start of the reply.
    ``answer_span``: [start, end) of the prompt tokens that spell the answer. A correct reply is
    ``reply_prefix_token_ids`` followed by ``answer_token_ids``.
    """

    kind: TaskKind
    messages: tuple[dict[str, str], ...]
    answer: str
    prompt_token_ids: tuple[int, ...]
    answer_span: tuple[int, int]
    reply_prefix_token_ids: tuple[int, ...]
    answer_token_ids: tuple[int, ...]

    def answer_chunks(self, chunk_tokens: int) -> range:
        """Numbers of the chunks that contain the answer."""
        start, end = self.answer_span
        return range(start // chunk_tokens, (end - 1) // chunk_tokens + 1)


def make_task(
    kind: TaskKind,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    depth: float,
    seed: int,
    prose: corpus.Kind = "topics",
) -> RetrievalTask:
    """A task whose prompt has at most ``tokens`` tokens, and not many fewer.

    ``depth``: place of the answer in the prose, from 0 (start) to 1 (end), to the nearest paragraph. The task depends
    only on the arguments and the Python version. Raises ValueError if ``tokens`` is too small.
    """
    rng = random.Random(f"{kind} {seed}")
    cities = rng.sample(CITIES, KEYS if kind == "keys" else 1)
    # distinct numbers, so that the answer is at one place only
    numbers = [str(number) for number in rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), len(cities))]
    facts = [] if kind == "passage" else [secret_number(*pair) for pair in zip(cities, numbers, strict=True)]

    empty = render_prompt(tokenizer, user_message("", _question(kind, cities[0], "word " * QUOTED_WORDS)))
    overhead = sum(
        len(tokenizer(piece, add_special_tokens=False)["input_ids"]) + JOINT_TOKENS
        for piece in [empty, "\n\n", *(fact + "\n\n" for fact in facts)]
    )
    if tokens < overhead + 128:
        raise ValueError(f"a {kind} task needs at least {overhead + 128} tokens, not {tokens}")
    text = next(corpus.documents(prose, seed, tokens - overhead, tokenizer))
    paragraphs = text.split("\n\n")

    if kind == "passage":
        place = _nearest_paragraph(paragraphs, depth, least_words=QUOTED_WORDS + COPIED_WORDS)
        words = paragraphs[place].split(" ")
        subject = " ".join(words[:QUOTED_WORDS])
        answer = " ".join(words[QUOTED_WORDS : QUOTED_WORDS + COPIED_WORDS])
        reply_prefix = subject + " "
        statement = paragraphs[place]
    else:
        subject, answer = cities[0], numbers[0]
        statement = facts[0]
        reply_prefix = statement[: statement.index(answer)]
        for fact in facts[1:]:
            paragraphs.insert(rng.randrange(len(paragraphs) + 1), fact)
        paragraphs.insert(_nearest_boundary(paragraphs, depth), statement)

    message = user_message("\n\n".join(paragraphs), _question(kind, subject, subject))
    prompt = render_prompt(tokenizer, message)
    first = prompt.index(answer, prompt.index(statement))
    prompt_ids, span = locate_text(tokenizer, prompt, first, first + len(answer))
    # tokenize the whole reply, so that the answer has the tokens that the model would generate
    reply_ids, (begin, end) = locate_text(
        tokenizer,
        prompt + reply_prefix + answer,
        len(prompt + reply_prefix),
        len(prompt + reply_prefix + answer),
    )
    return RetrievalTask(
        kind=kind,
        messages=({"role": "user", "content": message},),
        answer=answer,
        prompt_token_ids=prompt_ids,
        answer_span=span,
        reply_prefix_token_ids=reply_ids[len(prompt_ids) : begin],
        answer_token_ids=reply_ids[begin:end],
    )


def secret_number(name: str, number: str) -> str:
    """The sentence that a task hides in prose."""
    return f"The secret number of {name} is {number}."


def _question(kind: TaskKind, city: str, quote: str) -> str:
    if kind == "passage":
        return f'Repeat the paragraph that begins with "{quote}", word for word.'
    return f"What is the secret number of {city}?"


def user_message(text: str, question: str) -> str:
    """The question stands first too: SmolLM2-135M then found 5 of 5 needles in 6,500 tokens, instead of 3."""
    return f"{question}\n\n{text}\n\n{question}"


def render_prompt(tokenizer: PreTrainedTokenizerBase, message: str, reply: str = "") -> str:
    """The prompt up to and including ``reply``, the start of the reply; plain text without a chat template."""
    if tokenizer.chat_template is None:
        return f"{message}\n\nAnswer: {reply}".rstrip()
    chat = [{"role": "user", "content": message}]
    return f"{tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)}{reply}"


def locate_text(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """(token ids of ``text``, [first, last) of the tokens that overlap its characters [start, end))."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    first = bisect_right(offsets, start, key=lambda offset: offset[1])
    last = bisect_left(offsets, end, key=lambda offset: offset[0])
    return tuple(encoded["input_ids"]), (first, last)


def _nearest_boundary(paragraphs: list[str], depth: float) -> int:
    """The position at which about ``depth`` of the characters precede a new paragraph."""
    goal = depth * sum(map(len, paragraphs))
    before, best, distance = 0, 0, abs(goal)
    for position, paragraph in enumerate(paragraphs, start=1):
        before += len(paragraph)
        if abs(before - goal) < distance:
            best, distance = position, abs(before - goal)
    return best


def _nearest_paragraph(paragraphs: list[str], depth: float, *, least_words: int) -> int:
    """The paragraph nearest to ``depth`` with at least ``least_words`` words."""
    goal = depth * sum(map(len, paragraphs))
    before, best, distance = 0, -1, float("inf")
    for position, paragraph in enumerate(paragraphs):
        if len(paragraph.split(" ")) >= least_words and abs(before - goal) < distance:
            best, distance = position, abs(before - goal)
        before += len(paragraph)
    if best < 0:
        raise ValueError(f"no paragraph of the text has {least_words} words")
    return best

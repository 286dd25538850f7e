"""Documents to record: prose to continue, and questions about it whose correct reply the model reads.

Their wording differs from :mod:`forecache.workers.evaluation.tasks`, so an indexer that is trained on these can be
evaluated on those.
"""

import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from forecache.workers.errors import UnsupportedModelError
from forecache.workers.evaluation import corpus
from forecache.workers.evaluation.tasks import TaskKind, locate_text, make_task, render_prompt

SourceTask = Literal["prose", "lookup", "several", "values", "quote", "needle", "keys", "passage"]
"""prose: continue the text; lookup: one fact among similar ones; several: two to five facts; values: all values of one
subject; quote: finish a quoted paragraph; needle, keys, passage: see :mod:`forecache.workers.evaluation.tasks`."""

SUBJECTS = tuple(
    f"{first} {second}"
    for first in ("north", "old", "green", "stone", "upper", "silent", "river", "winter", "copper", "linen", "harbour")
    for second in ("tower", "archive", "garden", "station", "mill", "library", "bridge", "workshop", "market", "ferry")
)
STATEMENTS = (
    "The access code of the {subject} is {value}.",
    "According to the register, the {subject} has the number {value}.",
    "Anyone who calls the {subject} must dial {value}.",
    "Inspectors valued the {subject} at {value} crowns.",
    "The keeper of the {subject} goes by the name {value}.",
    "Parcels for the {subject} are marked with {value}.",
    "The {subject} was given the reference {value}.",
)
QUESTIONS = (
    "What does the text say about the {subjects}?",
    "Repeat what is said of the {subjects}.",
    "Find the sentences about the {subjects} and quote them.",
    "Which details are given for the {subjects}?",
)
SYLLABLES = ("ka", "lo", "mi", "ren", "tas", "vo", "du", "sel", "fi", "gor", "ban", "zu", "pel", "na", "wik")
JOINT_TOKENS = 3
TASK_KINDS: tuple[TaskKind, ...] = get_args(TaskKind)


@dataclass(frozen=True)
class Recipe:
    """What to record. Lengths are in tokens; ``texts``: see :func:`text_source`.

    Training documents use ``tasks`` in ``texts``, documents for evaluation ``eval_tasks`` in ``eval_texts``.
    ``reply_tokens``: longest reply, given and greedy tokens together. ``prompt_windows``: number of windows of
    ``prompt_window_tokens`` steps to record from each prompt. ``history_steps``: steps to record before each window and
    before the end of the prompt, so that predictions have as much history as in serving.
    """

    documents: int = 384
    eval_documents: int = 96
    texts: tuple[str, ...] = ("docstrings", "code")
    eval_texts: tuple[str, ...] = ("docstrings", "topics")
    tasks: tuple[SourceTask, ...] = ("prose", "lookup", "several", "values", "quote")
    eval_tasks: tuple[SourceTask, ...] = ("prose", "needle", "keys", "passage")
    min_tokens: int = 2048
    max_tokens: int = 8192
    reply_tokens: int = 96
    prompt_windows: int = 2
    prompt_window_tokens: int = 96
    history_steps: int = 48
    documents_per_shard: int = 16
    event_mass: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class SourceDocument:
    """One document: its prompt, the given reply, and the place of the answer in the prompt.

    ``answer_span``: [first, last) prompt token of the first answer; ``answer_place``: index of the reply token that
    starts it. Both are None without a question.
    """

    task: SourceTask
    text: str
    split: str
    prompt_token_ids: list[int]
    reply_token_ids: list[int]
    answer_span: tuple[int, int] | None = None
    answer_place: int | None = None


def text_source(name: str) -> Callable[[int, int, PreTrainedTokenizerBase], list[str]]:
    """A function ``source(seed, tokens, tokenizer)`` that returns paragraphs with about ``tokens`` tokens in total.

    ``name``: a kind of :mod:`forecache.workers.evaluation.corpus`, "code" (the modules of the standard library), a
    text file, or a directory of ``*.txt`` and ``*.md`` files.
    """
    kinds: Sequence[corpus.Kind] = get_args(corpus.Kind)
    for kind in kinds:
        if name == kind:
            return lambda seed, tokens, tokenizer: next(corpus.documents(kind, seed, tokens, tokenizer)).split("\n\n")
    path = Path(name).expanduser()
    files = tuple(sorted([*path.rglob("*.txt"), *path.rglob("*.md")])) if path.is_dir() else (path,)
    if name == "code":
        files = tuple(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    if not files or not all(file.is_file() for file in files):
        raise UnsupportedModelError(
            f"can't record the text '{name}': use {', '.join(kinds)}, code, a text file, or a directory "
            "with *.txt or *.md"
        )
    return lambda seed, tokens, tokenizer: _cut(_file_paragraphs(files), seed, tokens, tokenizer)


@cache
def _file_paragraphs(files: tuple[Path, ...]) -> tuple[str, ...]:
    text = "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return tuple(block.strip("\n") for block in text.split("\n\n") if block.strip())


def _cut(paragraphs: tuple[str, ...], seed: int, tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Consecutive ``paragraphs`` from a random start, wrapping at the end."""
    start = random.Random(seed).randrange(len(paragraphs))
    run: list[str] = []
    count = 0
    while count < tokens:
        run.append(paragraphs[(start + len(run)) % len(paragraphs)])
        count += len(tokenizer(run[-1] + "\n\n", add_special_tokens=False)["input_ids"])
    return run[:-1] or run


def make_document(
    task: SourceTask, text: str, split: str, tokenizer: PreTrainedTokenizerBase, *, tokens: int, seed: int
) -> SourceDocument:
    """A document whose prompt has at most ``tokens`` tokens, and not many fewer. Depends only on the arguments."""
    rng = random.Random(f"{task} {text} {seed}")
    kind_of_task = next((kind for kind in TASK_KINDS if kind == task), None)
    if kind_of_task is not None:
        kinds: Sequence[corpus.Kind] = [kind for kind in get_args(corpus.Kind) if kind == text]
        if not kinds:
            raise UnsupportedModelError(
                f"the task '{task}' needs one of the texts {', '.join(get_args(corpus.Kind))}, not {text}"
            )
        made = make_task(
            kind_of_task,
            tokenizer,
            tokens=tokens,
            depth=rng.uniform(0.05, 0.9),
            seed=rng.getrandbits(32),
            prose=kinds[0],
        )
        return SourceDocument(
            task,
            text,
            split,
            list(made.prompt_token_ids),
            [*made.reply_prefix_token_ids, *made.answer_token_ids],
            made.answer_span,
            len(made.reply_prefix_token_ids),
        )
    source = text_source(text)
    if task == "prose":
        ids = tokenizer("\n\n".join(source(rng.getrandbits(32), tokens + 64, tokenizer)))["input_ids"]
        return SourceDocument(task, text, split, ids[:tokens], [])
    return _question_document(task, text, split, tokenizer, tokens, rng)


def _question_document(
    task: SourceTask,
    text: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    rng: random.Random,
    spare: int = 0,
) -> SourceDocument:
    """``spare``: tokens by which joined paragraphs exceed the sum of their tokens."""
    state = rng.getstate()

    def count(piece: str) -> int:
        return len(tokenizer(piece, add_special_tokens=False)["input_ids"]) + JOINT_TOKENS

    statements, replies, answer, subjects = _facts(task, rng)
    question = rng.choice(QUESTIONS).format(subjects=" and the ".join(subjects))
    overhead = sum(map(count, statements)) + 2 * (count(question) + 60) + count(render_prompt(tokenizer, ""))
    if tokens < overhead + 256:
        raise ValueError(f"a document of the task '{task}' needs at least {overhead + 256} tokens, not {tokens}")
    paragraphs = text_source(text)(rng.getrandbits(32), tokens - overhead - spare, tokenizer)
    for statement in statements:
        paragraphs.insert(rng.randrange(len(paragraphs) + 1), statement)
    if task == "quote":
        long = [paragraph for paragraph in paragraphs[1:] if len(paragraph.split(" ")) >= 32] or paragraphs
        replies = [rng.choice(long)]
        words = replies[0].split(" ")
        answer = " ".join(words[min(rng.randint(6, 12), len(words) - 1) :])
        beginning = replies[0][: len(replies[0]) - len(answer)]
        question = f'Repeat the paragraph that begins with "{beginning.strip()}", word for word.'
    body = "\n\n".join(paragraphs)
    message = f"{question}\n\n{body}\n\n{question}" if rng.random() < 0.7 else f"{body}\n\n{question}"
    prompt = render_prompt(tokenizer, message)
    reply = " ".join(replies)
    place = prompt.index(answer, prompt.index(replies[0], prompt.index(body)))
    prompt_ids, span = locate_text(tokenizer, prompt, place, place + len(answer))
    if len(prompt_ids) > tokens:
        rng.setstate(state)
        return _question_document(task, text, split, tokenizer, tokens, rng, spare + len(prompt_ids) - tokens)
    start = len(prompt) + reply.index(answer)
    all_ids, (begin, _) = locate_text(tokenizer, prompt + reply, start, start + len(answer))
    return SourceDocument(
        task, text, split, list(prompt_ids), list(all_ids[len(prompt_ids) :]), span, max(begin - len(prompt_ids), 0)
    )


def _facts(task: SourceTask, rng: random.Random) -> tuple[list[str], list[str], str, list[str]]:
    """(sentences to hide, sentences of the reply, first answer in the reply, subjects of the question)."""
    if task == "quote":
        return [], [], "", []
    form = rng.choice(STATEMENTS)
    subjects = rng.sample(SUBJECTS, rng.randint(2, 16))
    chosen = rng.sample(subjects, min(rng.randint(2, 5), len(subjects)) if task == "several" else 1)
    facts: dict[str, list[str]] = {}
    values: set[str] = set()
    for subject in subjects:
        many = rng.randint(2, 4) if task == "values" and subject in chosen else 1
        facts[subject] = []
        while len(facts[subject]) < many:
            value = _value(rng)
            if value not in values:
                values.add(value)
                facts[subject].append(form.format(subject=subject, value=value))
    replies = [sentence for subject in chosen for sentence in facts[subject]]
    answer = replies[0].removeprefix(form.format(subject=chosen[0], value="\0").split("\0")[0])
    statements = [sentence for subject in subjects for sentence in facts[subject]]
    return statements, replies, answer, chosen


def _value(rng: random.Random) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        return str(rng.randrange(10 ** rng.randint(2, 6), 10**7))
    if kind == 1:
        return "".join(rng.choice("ABCDEFGHKLMNPRSTUVXZ") for _ in range(2)) + f"-{rng.randrange(100, 10_000)}"
    return "".join(rng.sample(SYLLABLES, rng.randint(2, 4))).capitalize()


def plan(recipe: Recipe) -> Iterator[tuple[SourceTask, str, str]]:
    """(task, text, split) of every document: all pairs of task and text in turn, training documents first."""
    for split, documents, tasks, texts in (
        ("train", recipe.documents, recipe.tasks, recipe.texts),
        ("eval", recipe.eval_documents, recipe.eval_tasks, recipe.eval_texts),
    ):
        for number in range(documents):
            yield tasks[number % len(tasks)], texts[number // len(tasks) % len(texts)], split

"""Prefill and decode of forecache beside transformers' own `generate`: one process, machine, dtype, prompt.

Both take turns of a few tokens, so that whatever else the machine does meanwhile hits both alike.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from forecache.workers.errors import InvalidRequestError
from forecache.workers.evaluation.bench_turns import BASELINE, Contender, Pair, Progress, Trace
from forecache.workers.evaluation.corpus import documents
from forecache.workers.llm import LLM
from forecache.workers.models.backbone import expected_layout, load_config, pick_device, pick_dtype
from forecache.workers.models.loader import resolve_model
from forecache.workers.models.tokenizer import load_tokenizer

WARMUP_PROMPT_TOKENS = 256
WARMUP_STEPS = 4
"""Decode steps left out of the account: the first resident set is recalled then, and a device wakes up."""

LEAST_CHUNKS = 32
"""Room in hot and cold memory beyond the prompt's."""


@dataclass(frozen=True)
class Settings:
    """What to measure. ``threads``: CPU threads of every model, ``None`` for all cores."""

    model: str = "smollm2-135m"
    context: int = 8192
    keep_ratio: float = 0.135
    tokens: int = 64
    repeat: int = 3
    threads: int | None = None
    chunk_tokens: int = 64

    @property
    def new_tokens(self) -> int:
        """Tokens of one answer: the one that prefill gives, those of the warm-up, those measured."""
        return 1 + WARMUP_STEPS + self.tokens


@dataclass(frozen=True)
class Timings:
    """Of all repeats: ``prefill_s`` one by one, ``step_s`` all together, without the warm-up steps."""

    prefill_s: tuple[float, ...]
    step_s: tuple[float, ...]


@dataclass(frozen=True)
class PairResult:
    """One way to run forecache, and transformers in turn with it.

    ``kept_ratio``: mean resident / all chunks over the decode steps; ``resident_bytes``: KV that the last step could
    read, of ``context_bytes``; ``same_tokens``: of ``new_tokens``, how many lead that equal transformers' in every
    repeat.
    """

    name: str
    forecache: Timings
    transformers: Timings
    kept_ratio: float
    resident_bytes: int
    context_bytes: int
    transformers_bytes: int
    same_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Measured:
    """The results, and where they were obtained. ``device``: cpu or cuda."""

    pairs: tuple[PairResult, ...]
    device: str
    dtype: str
    threads: int


def measure(
    settings: Settings, prompt: tuple[int, ...] | None = None, progress: Progress = lambda *_: None
) -> Measured:
    """Measure on ``prompt`` (default: ``settings.context`` tokens of prose), forecache's policies one after another.

    Raises :class:`InvalidRequestError` for a prompt and answer longer than the model's context.
    """
    progress("loading", 0.0)
    path = resolve_model(settings.model, lambda text: progress(text, 0.0))
    if prompt is None:
        prompt = prose(path, settings.context)
    contenders = (
        Contender(f"keep {settings.keep_ratio:g}", "lookahead", settings.keep_ratio),
        Contender("full", "full", 1.0),
    )
    traces: dict[str, list[dict[str, Trace]]] = {contender.name: [] for contender in contenders}
    with _load(settings, path, prompt) as pair:
        pair.run(
            prompt[:WARMUP_PROMPT_TOKENS],
            settings.new_tokens,
            contenders[0],
            "warm-up",
            engine_first=True,
            progress=lambda text, _: progress(f"warm-up: {text}", 0.0),
        )
        rounds = [(number, contender) for number in range(settings.repeat) for contender in contenders]
        for index, (number, contender) in enumerate(rounds):

            def tell(text: str, done: float, number: int = number, index: int = index) -> None:
                progress(f"{number + 1} of {settings.repeat}: {text}", (index + done) / len(rounds))

            traces[contender.name].append(
                pair.run(
                    prompt,
                    settings.new_tokens,
                    contender,
                    f"round {index}",
                    engine_first=number % 2 == 1,  # whoever is second finds a warm machine
                    progress=tell,
                )
            )
        token_bytes = _chunk_bytes(path, settings.chunk_tokens) // settings.chunk_tokens
        return Measured(
            pairs=tuple(_result(name, traces[name], len(prompt), token_bytes) for name in traces),
            device=pair.baseline.device.type,
            dtype=str(pair.baseline.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
        )


def prose(path: Path, tokens: int) -> tuple[int, ...]:
    """Exactly ``tokens`` tokens of English prose, for the model at ``path``."""
    tokenizer = load_tokenizer(path)
    # where a document is cut, tokens may join; a few more than wanted are made
    text = next(documents("topics", 0, tokens + 8, tokenizer))
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])


@contextmanager
def _load(settings: Settings, path: Path, prompt: tuple[int, ...]) -> Iterator[Pair]:
    chunks = -(-(len(prompt) + settings.new_tokens) // settings.chunk_tokens)
    chunk_bytes = _chunk_bytes(path, settings.chunk_tokens)
    with LLM(
        settings.model,
        skip_tokenizer=True,
        threads=settings.threads,
        chunk_tokens=settings.chunk_tokens,
        hot_bytes=(chunks + LEAST_CHUNKS) * chunk_bytes,
        cold_bytes=2 * (chunks + LEAST_CHUNKS) * chunk_bytes,
    ) as llm:
        limit = llm.engine.max_model_len
        if len(prompt) + settings.new_tokens > limit:
            raise InvalidRequestError(
                f"{settings.model} has a context of {limit} tokens, but {len(prompt)} in the prompt and "
                f"{settings.new_tokens} generated were asked for: lower --context or --tokens."
            )
        yield Pair(_baseline(path), llm)


def _baseline(path: Path) -> PreTrainedModel:
    """The model as transformers runs it, set to generate past an end of sequence."""
    device = pick_device("auto")
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=pick_dtype("auto", device), attn_implementation="sdpa", trust_remote_code=False
    )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = None
    model.to(device=device)
    assert isinstance(model, PreTrainedModel)
    return model


def _chunk_bytes(path: Path, chunk_tokens: int) -> int:
    dtype = pick_dtype("auto", pick_device("auto"))
    return expected_layout(load_config(path), chunk_tokens=chunk_tokens, dtype=dtype).nbytes


def _result(name: str, traces: list[dict[str, Trace]], prompt_tokens: int, token_bytes: int) -> PairResult:
    last = traces[-1][name]
    assert last.stats is not None
    return PairResult(
        name=name,
        forecache=_timings([trace[name] for trace in traces]),
        transformers=_timings([trace[BASELINE] for trace in traces]),
        kept_ratio=last.stats.keep_ratio,
        resident_bytes=last.stats.resident_bytes,
        context_bytes=last.stats.context_bytes,
        transformers_bytes=(prompt_tokens + len(last.step_s)) * token_bytes,
        same_tokens=min(_same(trace[name].token_ids, trace[BASELINE].token_ids) for trace in traces),
        new_tokens=len(last.token_ids),
    )


def _timings(traces: list[Trace]) -> Timings:
    return Timings(
        tuple(trace.prefill_s for trace in traces),
        tuple(duration_s for trace in traces for duration_s in trace.step_s[WARMUP_STEPS:]),
    )


def _same(a: list[int], b: list[int]) -> int:
    """Leading elements that are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))

"""Times prefill and decode of forecache and of transformers' `generate` on the same prompt, machine and dtype.

Both run in one process in turns of a few tokens, so that other load on the machine affects both alike.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from forecache.workers.core.requests import CacheOptions, GenerateRequest, Policy, SamplingParams, SequenceStats
from forecache.workers.errors import ForecacheError, InvalidRequestError
from forecache.workers.evaluation.corpus import documents
from forecache.workers.llm import LLM
from forecache.workers.models.backbone import expected_layout, load_config, pick_device, pick_dtype
from forecache.workers.models.loader import resolve_model
from forecache.workers.models.tokenizer import load_tokenizer

BASELINE = "transformers"
TURN_STEPS = 16
"""Decode steps per turn: enough that weights stay in the CPU cache, as if each ran alone."""
WARMUP_PROMPT_TOKENS = 256
WARMUP_STEPS = 4
"""Decode steps that are not timed: they recall the first resident set, and the device reaches its clock rate."""

LEAST_CHUNKS = 32
"""Extra chunks in hot and cold memory."""


@dataclass(frozen=True)
class Settings:
    """What to measure. ``threads``: CPU threads of each model; ``None``: all cores."""

    model: str = "smollm2-135m"
    context: int = 8192
    keep_ratio: float = 0.135
    tokens: int = 64
    repeat: int = 3
    threads: int | None = None
    chunk_tokens: int = 64

    @property
    def new_tokens(self) -> int:
        """Tokens of one answer: one of prefill, those of the warm-up, and the timed ones."""
        return 1 + WARMUP_STEPS + self.tokens


@dataclass(frozen=True)
class Timings:
    """Seconds of all repetitions: ``prefill_s`` has one value each, ``step_s`` every decode step after the warm-up."""

    prefill_s: tuple[float, ...]
    step_s: tuple[float, ...]


@dataclass(frozen=True)
class PairResult:
    """One setting of forecache, and transformers in turns with it.

    ``kept_ratio``: mean of resident / all chunks over the decode steps; ``resident_bytes``: resident KV at the last
    step, of ``context_bytes``; ``same_tokens``: leading tokens, of ``new_tokens``, that equal transformers' in every
    repetition.
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
    """The results and their conditions. ``device``: cpu or cuda."""

    pairs: tuple[PairResult, ...]
    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class Contender:
    """A setting of forecache."""

    name: str
    policy: Policy
    keep_ratio: float


@dataclass
class Trace:
    """Seconds of one request: ``prefill_s`` until its first token, ``step_s`` for each further token."""

    prefill_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    stats: SequenceStats | None = None


class Progress(Protocol):
    def __call__(self, text: str, done: float) -> None:
        """``text``: the current activity; ``done``: progress of the whole, 0 to 1."""
        ...


class EngineRun:
    """One request to an engine, run token by token."""

    def __init__(self, llm: LLM, prompt: tuple[int, ...], new_tokens: int, contender: Contender, salt: str) -> None:
        self.trace = Trace()
        self._engine = llm.engine
        self._request = GenerateRequest(
            f"bench, {salt}",
            prompt,
            SamplingParams(max_tokens=new_tokens, ignore_eos=True),
            # the named ratio is what is measured, however short the context is
            CacheOptions(contender.policy, contender.keep_ratio, salt, min_resident_tokens=0),
        )

    def prefill(self, progress: Callable[[int], None]) -> None:
        """Run until the first token. Calls ``progress`` with the number of prefilled tokens."""
        start = time.perf_counter()
        self._engine.add_request(self._request)
        self._advance(progress)
        self.trace.prefill_s = time.perf_counter() - start
        # finish copies now, not in the other's turn; evict all, so that chosen chunks must be recalled
        self._engine.flush()
        self._engine.pool.evict_all()

    def step(self) -> None:
        """Decode one token."""
        start = time.perf_counter()
        self._advance(lambda _: None)
        self.trace.step_s.append(time.perf_counter() - start)

    def _advance(self, progress: Callable[[int], None]) -> None:
        while True:
            for event in self._engine.step():
                progress(event.prefill_tokens_done)
                if event.error is not None:
                    raise ForecacheError(event.error)
                self.trace.stats = event.stats
                if event.token_ids:
                    self.trace.token_ids += event.token_ids
                    return


class TurnTaking(BaseStreamer):
    """Times each token of `generate`, and calls ``other`` between two tokens, outside the measured time."""

    def __init__(self, other: Callable[[int], None]) -> None:
        self.trace = Trace()
        self._other = other
        self._since = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if value.dim() > 1:
            return  # the prompt, before the first step
        duration_s = time.perf_counter() - self._since
        if self.trace.token_ids:
            self.trace.step_s.append(duration_s)
        else:
            self.trace.prefill_s = duration_s
        self.trace.token_ids += value.tolist()
        self._other(len(self.trace.token_ids))
        self._since = time.perf_counter()

    def end(self) -> None:
        """Nothing to do: ``put`` has received every token."""


@dataclass(frozen=True)
class Pair:
    """transformers' model and an engine, each with its own weights and cache."""

    baseline: PreTrainedModel
    llm: LLM

    def run(
        self,
        prompt: tuple[int, ...],
        new_tokens: int,
        contender: Contender,
        salt: str,
        *,
        engine_first: bool,
        progress: Progress,
    ) -> dict[str, Trace]:
        """Run the same request on both: each prefills, then they decode in turns."""
        run = EngineRun(self.llm, prompt, new_tokens, contender, salt)

        # in the progress bar, all decode steps count as much as one prefill
        def prefill_engine() -> None:
            done_before = 0 if engine_first else 1
            run.prefill(lambda done: progress(f"prefill, {contender.name}", (done_before + done / len(prompt)) / 3))

        def between(token: int) -> None:
            steps = token - 1
            if steps == 0:
                if not engine_first:
                    prefill_engine()
            elif steps % TURN_STEPS == 0 or token == new_tokens:
                while len(run.trace.step_s) < steps:
                    run.step()
            progress(f"decode, token {token} of {new_tokens}, {contender.name}", (2 + token / new_tokens) / 3)

        if engine_first:
            prefill_engine()
        progress(f"prefill, {BASELINE}", 1 / 3 if engine_first else 0.0)
        inputs = torch.tensor([prompt], device=self.baseline.device)
        clock = TurnTaking(between)
        generate: Any = self.baseline.generate
        generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            streamer=clock,
        )
        return {BASELINE: clock.trace, contender.name: run.trace}


def measure(
    settings: Settings, prompt: tuple[int, ...] | None = None, progress: Progress = lambda *_: None
) -> Measured:
    """Measure on ``prompt`` (default: ``settings.context`` tokens of prose), with a keep ratio and with full attention.

    Raises :class:`InvalidRequestError` if prompt and answer exceed the model's context.
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
                    engine_first=number % 2 == 1,  # alternate: the second finds a warm machine
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
    """Exactly ``tokens`` token ids of English prose, for the model at ``path``."""
    tokenizer = load_tokenizer(path)
    # tokens may merge where a document is cut, so make a few more
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
                f"{settings.model} has a context of {limit} tokens, less than {len(prompt)} of the prompt and "
                f"{settings.new_tokens} to generate: lower --context or --tokens"
            )
        yield Pair(_baseline(path), llm)


def _baseline(path: Path) -> PreTrainedModel:
    """The model in transformers, which generates past an end of sequence."""
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
    """Number of equal leading elements."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))

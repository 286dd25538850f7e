"""One request to transformers' `generate` and to an engine, in turns of a few tokens, each step timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from forecache.workers.core.requests import CacheOptions, GenerateRequest, Policy, SamplingParams, SequenceStats
from forecache.workers.errors import ForecacheError
from forecache.workers.llm import LLM

BASELINE = "transformers"
TURN_STEPS = 16
"""Decode steps of one before the other's turn: so many that weights found in cache pay as if it ran alone."""


@dataclass(frozen=True)
class Contender:
    """A way to run forecache."""

    name: str
    policy: Policy
    keep_ratio: float


@dataclass
class Trace:
    """Times of one request: ``prefill_s`` from its start to its first token, ``step_s`` for each token after that."""

    prefill_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    stats: SequenceStats | None = None


class Progress(Protocol):
    def __call__(self, text: str, done: float) -> None:
        """``text`` is being done; ``done`` of all, 0 to 1."""
        ...


class EngineRun:
    """One request to an engine, advanced token by token."""

    def __init__(self, llm: LLM, prompt: tuple[int, ...], new_tokens: int, contender: Contender, salt: str) -> None:
        self.trace = Trace()
        self._engine = llm.engine
        self._request = GenerateRequest(
            f"bench, {salt}",
            prompt,
            SamplingParams(max_tokens=new_tokens, ignore_eos=True),
            CacheOptions(contender.policy, contender.keep_ratio, salt),
        )

    def prefill(self, progress: Callable[[int], None]) -> None:
        """Until the first token is there; ``progress`` is told the prompt tokens done."""
        start = time.perf_counter()
        self._engine.add_request(self._request)
        self._advance(progress)
        self.trace.prefill_s = time.perf_counter() - start
        # the last chunks' copies would run into the other's time; and what is chosen later must be recalled
        self._engine.flush()
        self._engine.pool.evict_all()

    def step(self) -> None:
        """One token more."""
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
    """Takes the time of each token of `generate`; between two of them ``other`` may work, off this clock."""

    def __init__(self, other: Callable[[int], None]) -> None:
        self.trace = Trace()
        self._other = other
        self._since = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if value.dim() > 1:
            return  # the prompt, before anything is computed
        duration_s = time.perf_counter() - self._since
        if self.trace.token_ids:
            self.trace.step_s.append(duration_s)
        else:
            self.trace.prefill_s = duration_s
        self.trace.token_ids += value.tolist()
        self._other(len(self.trace.token_ids))
        self._since = time.perf_counter()

    def end(self) -> None:
        """All has been put already."""


@dataclass(frozen=True)
class Pair:
    """transformers' model and an engine, with weights and cache of their own."""

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
        """The same request to both: one prefill, the other, then decode steps in turns."""
        run = EngineRun(self.llm, prompt, new_tokens, contender, salt)

        # for the progress bar all decoding counts as much as one prefill
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

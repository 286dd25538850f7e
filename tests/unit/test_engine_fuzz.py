"""Random requests in random engines: greedy answers equal transformers', and nothing is left behind.

A case is one engine, drawn from its number: a pool from one slot on, windows from one step on, steps that overlap or
not, prompts of ragged lengths that share beginnings, mixed policies and budgets, answers that go on from elsewhere,
sessions, cancellations at any step, chunks that are lost. `--fuzz-seconds N` tries for longer than the suite does, and
`--fuzz-seed K` begins with case K: a failure names its case.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from forecache.workers.core.requests import CacheOptions, GenerateRequest, Policy, SamplingParams
from forecache.workers.core.sequence import State
from forecache.workers.llm import LLM

CHUNK_BYTES = 3 * 2 * 2 * 16 * 16 * 4
CHUNK_TOKENS = 16
LONGEST = 320
MOST_TOKENS = 40
MOST_STEPS = 20_000
LEAST_CASES = 3
TIE = 1e-4
"""Two logits that differ by less may change places with the order in which floats are added."""
POLICIES: tuple[Policy, ...] = ("lookahead", "recency", "random", "full")


@dataclass(frozen=True)
class Greedy:
    """transformers' answer: its ``tokens``, and each token's lead over the second-best logit."""

    tokens: list[int]
    margins: list[float]


class Reference:
    """Prompts shared by all cases, with their answers, each computed once."""

    def __init__(self, model: Path) -> None:
        self._model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model.generation_config.eos_token_id = None  # of which its generate() would make none
        draw = random.Random(5)
        trunks = [[draw.randrange(3, 256) for _ in range(LONGEST)] for _ in range(4)]
        lengths = [1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 127, 129, 200, 255, 279, LONGEST - MOST_TOKENS]
        self.prompts = [trunk[:length] for trunk in trunks for length in lengths]
        self.answer = cache(self._answer)

    def _answer(self, number: int) -> Greedy:
        prompt = self.prompts[number]
        out = self._model.generate(
            torch.tensor([prompt]), max_new_tokens=MOST_TOKENS, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        assert out.sequences.shape[1] == len(prompt) + MOST_TOKENS
        best = [logits[0].topk(2).values for logits in out.logits]
        return Greedy(out.sequences[0, len(prompt) :].tolist(), [float(two[0] - two[1]) for two in best])


@dataclass
class Asked:
    """A running request and its results."""

    request: GenerateRequest
    prompt: int
    arrives: int
    cancelled: int | None
    loses_chunks: int | None
    exact: bool
    tokens: list[int]
    end: str = ""


def settings_of(draw: random.Random) -> dict[str, Any]:
    return {
        "keep_ratio": draw.choice([0.1, 0.3, 1.0]),
        "min_resident_tokens": draw.choice([0, 0, 100, 4096]),
        "policy": draw.choice(POLICIES),
        "hot_bytes": draw.choice([1, 2, 3, 5, 8, 13, 21, 34, 80]) * CHUNK_BYTES,
        "max_model_len": LONGEST,
        "window_steps": draw.choice([1, 2, 5, 16]),
        "lead_steps": draw.choice([0, 1, 4, 8]),
        "late_policy": draw.choice(["keep", "wait"]),
        "overlap_steps": draw.random() < 0.5,
        "max_batch_size": draw.randint(1, 6),
        "max_step_tokens": draw.choice([16, 24, 50, 128, 512]),
        "early_wait_s": draw.choice([0.0, 0.01]),
        "cold_bytes": (2 << 20) + draw.choice([30, 60, 400]) * CHUNK_BYTES,
        "max_restarts": 100,
        "seed": draw.randrange(100),
    }


def requests_of(draw: random.Random, reference: Reference, keep_ratio: float, policy: Policy) -> list[Asked]:
    asked = []
    for number in range(draw.randint(2, 10)):
        prompt = draw.randrange(len(reference.prompts))
        most = draw.choice([1, 2, CHUNK_TOKENS, MOST_TOKENS, draw.randint(1, MOST_TOKENS)])
        begun = draw.randrange(most) if draw.random() < 0.3 else 0
        cache = CacheOptions(
            policy=draw.choice([None, *POLICIES]),
            keep_ratio=draw.choice([None, None, 0.1, 0.5, 1.0]),
            cache_salt=draw.choice(["", "", "", "salt"]),
            session_id=draw.choice([None, None, "s", "t"]),
            window_steps=draw.choice([None, None, 1, 3]),
            min_resident_tokens=draw.choice([None, None, 0, 60]),
        )
        greedy = draw.random() < 0.8
        sampling = SamplingParams(most, 0.0 if greedy else 0.8, seed=number, ignore_eos=True)
        whole = (cache.policy or policy) == "full" or (cache.keep_ratio or keep_ratio) == 1.0
        asked.append(
            Asked(
                GenerateRequest(
                    f"r{number}", tuple(reference.prompts[prompt]), sampling, cache,
                    tuple(reference.answer(prompt).tokens[:begun]), show_chunks=draw.random() < 0.2,
                ),
                prompt,
                arrives=draw.choice([0, 0, draw.randint(0, 60)]),
                cancelled=draw.randint(0, 60) if draw.random() < 0.25 else None,
                loses_chunks=draw.randint(0, 60) if draw.random() < 0.2 else None,
                exact=greedy and whole,
                tokens=[],
            )
        )  # fmt: skip
    return asked


@contextmanager
def open_llm(model: Path, **settings: Any) -> Iterator[LLM]:
    with (
        TemporaryDirectory(prefix="fuzz-test-", dir="/dev/shm") as directory,
        LLM(str(model), skip_tokenizer=True, chunk_tokens=CHUNK_TOKENS, arena_dir=Path(directory), **settings) as llm,
    ):
        yield llm


def run_case(model: Path, reference: Reference, case: int) -> int:
    """Run a case; returns its number of requests.

    Raises ``AssertionError`` if a request got a wrong result, or something is left.
    """
    draw = random.Random(case)
    settings = settings_of(draw)
    asked = requests_of(draw, reference, settings["keep_ratio"], settings["policy"])
    by_name = {one.request.request_id: one for one in asked}
    with open_llm(model, **settings) as llm:
        engine = llm.engine
        for step in range(MOST_STEPS):
            for name, one in by_name.items():
                seq = engine._sequences.get(name)
                if step == one.arrives:
                    engine.add_request(one.request)
                elif one.cancelled is not None and step == one.arrives + one.cancelled:
                    engine.cancel(name)
                elif one.loses_chunks is not None and step >= one.arrives + one.loses_chunks and may_restart(llm, seq):
                    one.loses_chunks = None
                    engine._restart(seq, "they are, in this case")
            for event in engine.step():
                one = by_name[event.request_id]
                assert not one.end, f"{event} came after the end"
                assert not event.token_ids or event.position == len(one.request.resume_token_ids) + len(one.tokens)
                one.tokens += event.token_ids
                if event.finish_reason is not None:
                    one.end = event.finish_reason
                    assert event.error is None or event.overloaded, event
            engine.check_integrity()
            if all(one.end for one in asked):
                break
        assert all(one.end for one in asked), f"no progress: {[one for one in asked if not one.end]}"
        for one in asked:
            check_answer(one, reference)
        check_nothing_left(llm)
    return len(asked)


def may_restart(llm: LLM, seq: Any) -> bool:
    """Whether the engine may find now that chunks of ``seq`` are lost."""
    return seq is not None and seq.state in (State.PREFILL, State.DECODE) and not seq.residency.copying


def check_answer(one: Asked, reference: Reference) -> None:
    begun, most = len(one.request.resume_token_ids), one.request.sampling.max_tokens
    if one.end == "length":
        assert len(one.tokens) == most - begun, one
    else:
        assert one.end == "error" or (one.end == "cancelled" and one.cancelled is not None), one
    assert all(0 <= token < 256 for token in one.tokens)
    if one.exact:
        greedy = reference.answer(one.prompt)
        for at, (token, right) in enumerate(zip(one.tokens, greedy.tokens[begun:], strict=False), start=begun):
            if token != right:
                assert greedy.margins[at] < TIE, f"token {at} of {one} is {token}, transformers has {right}"
                break


def check_nothing_left(llm: LLM) -> None:
    engine = llm.engine
    for _ in range(3):
        engine.flush()
        engine.step()
    assert engine.idle
    engine.check_integrity()
    llm.memory.check_integrity()
    engine._prefetcher.check_idle()
    pool, stats = engine.pool, llm.memory.stats()
    assert pool.referenced == pool.dirty == 0 and pool.used == pool.num_slots - len(pool._free)
    assert stats.held_slots == stats.committed_slots == 0 and not llm.memory.holders()
    assert not engine._chunks._holders and not engine._chunks._asked and not engine._chunks._releasing
    assert not engine._outputs._detokenizers and not engine.windows._recalling
    assert not engine._scheduler.running and not engine._scheduler.waiting


@pytest.fixture(scope="module")
def fuzz_reference(tiny_model: Path) -> Reference:
    return Reference(tiny_model)


@pytest.mark.timeout(0)
def test_engine_fuzz(
    tiny_model: Path, fuzz_reference: Reference, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds, first = pytestconfig.getoption("--fuzz-seconds"), pytestconfig.getoption("--fuzz-seed")
    end_s, case, requests = time.monotonic() + seconds, first, 0
    while case - first < LEAST_CASES or time.monotonic() < end_s:
        try:
            requests += run_case(tiny_model, fuzz_reference, case)
        except BaseException as error:
            error.add_note(f"case {case}: repeat it with --fuzz-seed {case} --fuzz-seconds 0")
            raise
        case += 1
    with capsys.disabled():
        print(f"\n{case - first} engines, {requests} requests", flush=True)

"""Steps of fixed shape, as CUDA graphs need them, give the results of other steps. Runs on a CPU."""

from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Plan
from forecache.workers.llm import LLM
from forecache.workers.models.step.graphs import batch_buckets, token_buckets
from forecache.workers.models.step.in_flight_step import RunningStep

SETTINGS: dict[str, Any] = {
    "chunk_tokens": 16,
    "hot_bytes": 8 << 20,
    "cold_bytes": 32 << 20,
    "max_batch_size": 8,
    "keep_ratio": 0.5,
    "min_resident_tokens": 0,
    "window_steps": 4,
    "lead_steps": 1,
    "late_policy": "wait",
}
PROMPTS = [[(7 * i + n) % 250 + 1 for i in range(count)] for n, count in enumerate((150, 61, 97))]


Rows = dict[tuple[str, int], torch.Tensor]
"""By request id and position."""


def answers(
    path: Path, arena_dir: Path, *, fixed: bool, **sampling: Any
) -> tuple[list[list[int]], Rows, Rows, int, int]:
    """Tokens, logits and queries of decode steps, the number of steps, and how many had a fixed shape.

    Which sequences share a step depends on when predictions arrive, so rows are compared one by one. Steps of fixed
    shape always compute queries, others only for the indexer.
    """
    logits: Rows = {}
    queries: Rows = {}
    steps = count = 0
    every = torch.empty(0)
    with LLM(str(path), skip_tokenizer=True, arena_dir=arena_dir, device="cpu", **SETTINGS) as llm:
        runner: Any = llm.engine._runner
        launch = runner.launch
        if fixed:
            runner.warm_up(max_batch_size=8, max_step_tokens=200, max_chunks=16, cuda_graphs=True, torch_compile=False)
            replay = runner._graphs.replay

            def counted(rows: Any) -> Any:
                nonlocal count, every
                count += 1
                replayed = replay(rows)
                every = torch.cat([replayed.queries[layer] for layer in sorted(replayed.queries)], 1)
                return replayed

            runner._graphs.replay = counted

        def watched(plan: Plan, *args: Any) -> RunningStep:
            nonlocal steps
            step: RunningStep = launch(plan, *args)
            if not plan.streams:
                steps += 1
                for seq, row in zip(plan.decode, step.logits, strict=True):
                    logits[seq.request_id, seq.num_computed] = row.clone()
                for request, captured in zip(plan.captures, step._captured, strict=True):
                    queries[request.sequence.request_id, request.position] = captured.queries
                for seq, row in zip(plan.decode if fixed else (), every, strict=True):
                    queries[seq.request_id, seq.num_computed] = row.float()
            return step

        runner.launch = watched
        found = llm.generate(PROMPTS, max_tokens=20, ignore_eos=True, **sampling)
        llm.engine.flush()
        llm.engine.check_integrity()
    return [one.token_ids for one in found], logits, queries, steps, count


def test_steps_of_fixed_shape_compute_what_others_do(tiny_model: Path, tmp_path: Path) -> None:
    """Batches of one to three rows in buckets of 2 and 4, with changing resident sets, across ends of chunks."""
    tokens, logits, queries, steps, count = answers(tiny_model, tmp_path, fixed=True)
    expected_tokens, expected_logits, expected_queries, _, none = answers(tiny_model, tmp_path, fixed=False)
    assert none == 0 and count == steps > 15
    assert tokens == expected_tokens
    for ours, theirs, least in ((logits, expected_logits, 30), (queries, expected_queries, 1)):
        common = ours.keys() & theirs.keys()  # others were computed in one step with a prompt
        assert len(common) >= least
        for key in common:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-4 * float(theirs[key].abs().max()))


def test_tokens_are_drawn_alike(tiny_model: Path, tmp_path: Path) -> None:
    """With temperature, penalties and biases, which change logits after the step."""
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 5, "frequency_penalty": 0.5, "logit_bias": {3: 2.0}}
    tokens, *_, count = answers(tiny_model, tmp_path, fixed=True, **sampling)
    assert count > 15
    assert tokens == answers(tiny_model, tmp_path, fixed=False, **sampling)[0]
    penalty = {"presence_penalty": 1.0}
    greedy = answers(tiny_model, tmp_path, fixed=True, **penalty)[0]
    assert greedy == answers(tiny_model, tmp_path, fixed=False, **penalty)[0]


def mixed_steps(
    path: Path, arena_dir: Path, *, fixed: bool, evict: bool = False
) -> tuple[list[list[int]], Rows, int, int]:
    """Tokens; logits of every drawn token by request and position, and at position -1 the mass that the prompt puts on
    its chunks; how many steps had prompt tokens, and how many of these a fixed shape.

    Prompts arrive while answers run, in slices, several in one step. The last ones continue the first ones, whose
    chunks are still in the pool unless ``evict``.
    """
    logits: Rows = {}
    sequences: dict[str, TokenSequence] = {}
    steps = count = 0
    settings = {**SETTINGS, "max_step_tokens": 48}
    with LLM(str(path), skip_tokenizer=True, arena_dir=arena_dir, device="cpu", **settings) as llm:
        runner: Any = llm.engine._runner
        launch = runner.launch
        if fixed:
            runner.warm_up(max_batch_size=8, max_step_tokens=200, max_chunks=16, cuda_graphs=True, torch_compile=False)
            replay = runner._mixed.replay

            def counted(*args: Any) -> Any:
                nonlocal count
                count += 1
                return replay(*args)

            runner._mixed.replay = counted

        def watched(plan: Plan, *args: Any) -> RunningStep:
            nonlocal steps
            steps += bool(plan.streams)
            step: RunningStep = launch(plan, *args)
            for (seq, _), row in zip(step._sampled, step.logits, strict=True):
                logits[seq.request_id, seq.num_computed + plan.tokens_of(seq)] = row.clone()
            sequences.update({part.sequence.request_id: part.sequence for part in plan.streams})
            return step

        runner.launch = watched
        found = llm.generate([*PROMPTS, *PROMPTS[::-1]], max_tokens=24, ignore_eos=True)
        if evict:
            llm.engine.flush()
            assert llm.engine.pool.evict_all() > 0
        found += llm.generate([prompt + [9] * 40 for prompt in PROMPTS], max_tokens=8, ignore_eos=True)
        llm.engine.flush()
        llm.engine.check_integrity()
    for request_id, seq in sequences.items():
        assert seq.prompt_mass is not None
        logits[request_id, -1] = torch.from_numpy(seq.prompt_mass)
    return [one.token_ids for one in found], logits, steps, count


def tolerance(key: tuple[str, int], expected: torch.Tensor) -> float:
    """Masses are rounded to a thousandth."""
    return 1.1e-3 if key[1] < 0 else 1e-4 * float(expected.abs().max())


def test_mixed_steps_of_fixed_shape_compute_what_others_do(tiny_model: Path, tmp_path: Path) -> None:
    tokens, logits, steps, count = mixed_steps(tiny_model, tmp_path, fixed=True)
    expected_tokens, expected, _, none = mixed_steps(tiny_model, tmp_path, fixed=False)
    assert none == 0 and count == steps > 10
    assert tokens == expected_tokens
    assert logits.keys() == expected.keys() and len(logits) > 100
    for key, row in logits.items():
        torch.testing.assert_close(row, expected[key], rtol=1e-4, atol=tolerance(key, expected[key]))


def test_steps_that_read_outside_the_pool_have_no_fixed_shape(tiny_model: Path, tmp_path: Path) -> None:
    tokens, logits, steps, count = mixed_steps(tiny_model, tmp_path, fixed=True, evict=True)
    expected_tokens, expected, *_ = mixed_steps(tiny_model, tmp_path, fixed=False, evict=True)
    assert 0 < count < steps
    assert tokens == expected_tokens
    assert logits.keys() == expected.keys()
    for key, row in logits.items():
        torch.testing.assert_close(row, expected[key], rtol=1e-4, atol=tolerance(key, expected[key]))


@given(st.integers(1, 300), st.integers(1, 20_000))
def test_some_graph_is_large_enough_and_none_is_larger_than_needed(rows: int, tokens: int) -> None:
    for buckets, largest in ((batch_buckets(rows), rows), (token_buckets(tokens), tokens)):
        assert buckets == sorted(set(buckets))
        assert buckets[-1] >= largest and all(size < largest for size in buckets[:-1])
    # padding: at most a third of a step's tokens, and eight rows or a fifth of a batch
    for size, before in zip(token_buckets(tokens)[1:], token_buckets(tokens), strict=False):
        assert size - before <= size / 3 + 1
    for size, before in zip(batch_buckets(rows)[1:], batch_buckets(rows), strict=False):
        assert size - before <= max(8, size / 5)

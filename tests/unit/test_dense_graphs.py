"""Decode steps of fixed shape, as CUDA graphs need them, give the results of other steps. Runs on a CPU."""

from pathlib import Path
from typing import Any

import torch

from forecache.workers.core.step_plan import Plan
from forecache.workers.llm import LLM
from forecache.workers.models.step.in_flight_step import RunningStep

SETTINGS: dict[str, Any] = {
    "chunk_tokens": 16,
    "hot_bytes": 8 << 20,
    "cold_bytes": 32 << 20,
    "max_batch_size": 8,
    "keep_ratio": 0.5,
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
            runner.warm_up(max_batch_size=8, max_chunks=16, cuda_graphs=True, torch_compile=False)
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

"""Biases, penalties, masks and log-probabilities: against the formulas, and through the engine."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from forecache.workers.core.requests import GenerateRequest, SamplingParams
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.errors import InvalidRequestError
from forecache.workers.llm import LLM
from forecache.workers.models.step.logits import LogitAdjuster, logprobs_of

VOCAB = 70  # no multiple of 32: the last word of a mask is part used
CPU = torch.device("cpu")


class EvenOnly:
    """A matcher that allows only even tokens, with a mask shorter than the vocabulary's."""

    def fill_mask(self, words: np.ndarray) -> None:
        words[:2] = 0x55555555


def sequence(name: str, prompt: int = 3, **sampling: object) -> TokenSequence:
    request = GenerateRequest(name, tuple(range(prompt)), SamplingParams(**sampling))  # type: ignore[arg-type]
    return TokenSequence(request, holder=name, root=b"", chunk_tokens=16, keep_ratio=1.0, policy="full")


def expected(logits: torch.Tensor, seq: TokenSequence) -> torch.Tensor:
    """OpenAI's formula, one token at a time."""
    want, sampling = logits.clone(), seq.sampling
    for token, count in Counter(seq.output_ids).items():
        want[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    for token, bias in sampling.logit_bias:
        want[token] += bias
    return want


def test_nothing_asked_is_nothing_done() -> None:
    logits = torch.randn(2, VOCAB)
    adjuster = LogitAdjuster(VOCAB, CPU)
    plain = [sequence("a"), sequence("b", temperature=1.0, logprobs=None)]
    assert adjuster.adjust(logits, plain) is logits
    adjuster.drawn(torch.tensor([1, 2]), plain, [3, 3])
    assert logprobs_of(logits, torch.tensor([1, 2]), plain) is None


def test_penalties_and_biases_follow_the_formula_while_rows_come_and_go() -> None:
    generator = torch.Generator().manual_seed(0)
    adjuster = LogitAdjuster(VOCAB, CPU)
    everyone = [
        sequence("plain"),
        sequence("f", frequency_penalty=0.7),
        sequence("p", presence_penalty=-1.3),
        sequence("b", logit_bias=((4, 2.0), (69, -100.0))),
        sequence("all", frequency_penalty=-0.2, presence_penalty=0.5, logit_bias=((0, 1.0),)),
        *(sequence(f"more {i}", frequency_penalty=0.1 * i) for i in range(1, 6)),
    ]
    for step in range(40):
        batch = [seq for i, seq in enumerate(everyone) if (step + i) % 3]
        logits = torch.randn(len(batch), VOCAB, generator=generator)
        given = logits.clone()
        got = adjuster.adjust(logits, batch)
        assert torch.equal(logits, given), "the model's own logits are not to be touched"
        torch.testing.assert_close(got, torch.stack([expected(row, s) for row, s in zip(logits, batch, strict=True)]))
        tokens = torch.randint(0, 8, (len(batch),), generator=generator)  # few, so that they repeat
        adjuster.drawn(tokens, batch, [len(seq.token_ids) for seq in batch])
        for seq, token in zip(batch, tokens.tolist(), strict=True):
            seq.token_ids.append(token)
    adjuster.forget("all")
    adjuster.forget("nobody")
    reborn = sequence("all", frequency_penalty=1.0)
    assert torch.equal(adjuster.adjust(given[:1], [reborn]), given[:1])


def test_a_sequence_that_starts_over_is_counted_from_its_tokens() -> None:
    adjuster = LogitAdjuster(VOCAB, CPU)
    seq = sequence("r", frequency_penalty=1.0)
    logits = torch.zeros(1, VOCAB)
    adjuster.adjust(logits, [seq])
    adjuster.drawn(torch.tensor([9]), [seq], [3])  # drawn, but lost with the chunk: never in its tokens
    seq.token_ids += [5, 5, 6]
    seq.start_over("again")
    torch.testing.assert_close(adjuster.adjust(logits, [seq]), expected(logits[0], seq).unsqueeze(0))


def test_an_answer_that_is_made_again_is_counted_once() -> None:
    adjuster = LogitAdjuster(VOCAB, CPU)
    seq = sequence("r", frequency_penalty=1.0)
    seq.token_ids += [5, 5, 6]
    seq.replay()
    logits = torch.zeros(1, VOCAB)
    for position in (3, 4, 5):  # what is drawn there is known already
        adjuster.adjust(logits, [seq])
        adjuster.drawn(torch.tensor([9]), [seq], [position])
    torch.testing.assert_close(adjuster.adjust(logits, [seq]), expected(logits[0], seq).unsqueeze(0))


def test_masks_forbid_and_leave_others_alone() -> None:
    masked, plain = sequence("m", frequency_penalty=1.0), sequence("n")
    masked.matcher = EvenOnly()  # type: ignore[assignment]
    logits = torch.randn(2, VOCAB)
    got = LogitAdjuster(VOCAB, CPU).adjust(logits, [plain, masked])
    assert torch.equal(got[0], logits[0])
    assert torch.equal(got[1, :64:2], logits[1, :64:2])
    assert (got[1, 1::2] == -math.inf).all() and (got[1, 64:] == -math.inf).all()


def test_logprobs_are_of_the_rows_that_ask() -> None:
    logits = torch.randn(4, VOCAB)
    batch = [sequence("a"), sequence("b", logprobs=0), sequence("c", logprobs=5), sequence("d", logprobs=1000)]
    tokens = torch.tensor([1, 2, 3, 4])
    got = logprobs_of(logits, tokens, batch)
    assert got is not None and got.rows == (1, 2, 3)
    for index, row in enumerate(got.rows):
        want = logits[row].double().log_softmax(-1)
        told = got.of(index, int(tokens[row]))
        assert told.logprob == pytest.approx(float(want[tokens[row]]), abs=1e-5)
        best = want.topk(min(batch[row].sampling.logprobs or 0, VOCAB))
        assert [token for token, _ in told.top] == best.indices.tolist()
        assert [value for _, value in told.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:  # type: ignore[misc]
    with LLM(str(tiny_model), skip_tokenizer=True, chunk_tokens=16, hot_bytes=1 << 20, cold_bytes=1 << 22) as llm:
        yield llm


@pytest.mark.parametrize("overlap", [False, True])
def test_the_engine_draws_what_the_formula_says(tiny_model: Path, prompts: list[list[int]], overlap: bool) -> None:
    """Greedy with penalties, teacher-forced: each token has the largest adjusted logit, by the engine's logprobs."""
    penalty, bias = 8.0, {17: 3.0, 40: -100.0}
    with LLM(
        str(tiny_model), skip_tokenizer=True, chunk_tokens=16, hot_bytes=1 << 20, cold_bytes=1 << 22,
        keep_ratio=1.0, overlap_steps=overlap,
    ) as llm:  # fmt: skip
        answers = llm.generate(
            prompts, max_tokens=24, ignore_eos=True, frequency_penalty=penalty, logit_bias=bias, logprobs=256
        )
        plain = llm.generate(prompts, max_tokens=24, ignore_eos=True)
    for answer in answers:
        assert len(answer.logprobs) == len(answer.token_ids) == 24
        came: Counter[int] = Counter()
        for told, token in zip(answer.logprobs, answer.token_ids, strict=True):
            assert told.token_id == token and len(told.top) == 256
            scores = {t: v - penalty * came[t] + bias.get(t, 0.0) for t, v in told.top}
            assert scores[token] >= max(scores.values()) - 1e-4
            came[token] += 1
        assert 40 not in came
    assert [a.token_ids for a in answers] != [p.token_ids for p in plain]


def test_logprobs_do_not_change_what_is_drawn(llm: LLM, prompts: list[list[int]]) -> None:
    one = llm.generate(prompts[:2], max_tokens=8, temperature=0.9, seed=3, ignore_eos=True)
    two = llm.generate(prompts[:2], max_tokens=8, temperature=0.9, seed=3, ignore_eos=True, logprobs=2)
    assert [a.token_ids for a in one] == [a.token_ids for a in two]
    assert one[0].logprobs == () and all(len(told.top) == 2 for told in two[0].logprobs)


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        ({"logit_bias": {256: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"logprobs": -1}, "logprobs"),
        ({"grammar": "start: /a/"}, "response_format"),
    ],
)
def test_what_makes_no_sense_is_refused(llm: LLM, sampling: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        llm.generate([[1, 2, 3]], max_tokens=2, **sampling)  # type: ignore[arg-type]
    assert raised.value.param == param
    llm.engine.check_integrity()

"""Log-probabilities of prompt tokens equal transformers', even with stored or hot prefixes and restarts."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from forecache.cluster.dispatch.completion_stream import Turns
from forecache.cluster.http.logprobs import TokenTexts
from forecache.cluster.http.responses import AnswerFormat, ChoiceWriter, Echo, Piece
from forecache.workers.core.prompt_logprobs import MAX_STEP_TOKENS
from forecache.workers.core.requests import GenerateRequest, SamplingParams, SequenceStats, TokenEvent, TokenLogprobs
from forecache.workers.llm import LLM


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    settings: dict[str, Any] = {"chunk_tokens": 16, "hot_bytes": 1 << 20, "cold_bytes": 1 << 22, "keep_ratio": 0.3}
    settings["min_resident_tokens"] = 0
    with LLM(str(tiny_model), skip_tokenizer=True, **settings) as llm:
        yield llm


def add(llm: LLM, name: str, prompt: list[int], **sampling: Any) -> None:
    settings = {"logprobs": 3, "prompt_logprobs": True, "max_tokens": 4, "ignore_eos": True, **sampling}
    llm.engine.add_request(GenerateRequest(name, tuple(prompt), SamplingParams(**settings)))


def events_of(llm: LLM) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while not llm.engine.idle:
        events += llm.engine.step()
    llm.engine.flush()
    llm.engine.check_integrity()
    return events


def check(model: Path, prompt: list[int], events: list[TokenEvent]) -> None:
    """Log-probabilities come once, with the first token, and equal one forward pass in float32."""
    (told,) = [event for event in events if event.prompt_logprobs]
    assert told.token_ids and told.position == 0
    backbone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        want = backbone(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [one.token_id for one in told.prompt_logprobs] == prompt[1:]
    for at, one in enumerate(told.prompt_logprobs):
        assert one.logprob == pytest.approx(float(want[at, one.token_id]), abs=1e-3)
        best = want[at].topk(3)
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_of_prompts_long_and_short_beside_each_other_and_stored(
    llm: LLM, tiny_model: Path, prompts: list[list[int]]
) -> None:
    long = (prompts[2] * 3)[: 2 * MAX_STEP_TOKENS + 37]
    for _ in range(2):  # the second time all their chunks are stored, hot and cold
        add(llm, "long", long)
        add(llm, "short", prompts[0])
        add(llm, "one", [7])
        add(llm, "plain", prompts[2], prompt_logprobs=False)
        events = events_of(llm)
        for name, prompt in (("long", long), ("short", prompts[0])):
            mine = [event for event in events if event.request_id == name]
            check(tiny_model, prompt, mine)
            assert mine[-1].stats is not None and mine[-1].stats.cached_tokens == 0
        assert not any(event.prompt_logprobs for event in events if event.request_id in ("one", "plain"))


def test_a_prompt_that_is_begun_again_is_told_once(llm: LLM, tiny_model: Path, prompts: list[list[int]]) -> None:
    long = (prompts[1] * 30)[: MAX_STEP_TOKENS + 60]
    add(llm, "r", long)
    (seq,) = llm.engine._sequences.values()
    events: list[TokenEvent] = []
    while not seq.prompt_logprobs:
        events += llm.engine.step()
    assert 0 < len(seq.prompt_logprobs) < len(long) - 1
    llm.engine._restart(seq, "as the test wants it")
    events += events_of(llm)
    check(tiny_model, long, events)
    # and not again once it was told
    add(llm, "r", long, max_tokens=30)
    events = []
    while not any(event.token_ids for event in events):
        events += llm.engine.step()
    (seq,) = llm.engine._sequences.values()
    llm.engine._restart(seq, "as the test wants it")
    events += events_of(llm)
    check(tiny_model, long, events)
    assert seq.prompt_logprobs == []


def test_an_answer_that_goes_on_elsewhere_has_told_its_prompt(llm: LLM, prompts: list[list[int]]) -> None:
    sampling = SamplingParams(max_tokens=4, ignore_eos=True, logprobs=1, prompt_logprobs=True)
    llm.engine.add_request(GenerateRequest("r", tuple(prompts[0]), sampling, resume_token_ids=(5, 6)))
    assert not any(event.prompt_logprobs for event in events_of(llm))


LETTERS = {1: "a", 2: "é", 3: "c"}


class FixedTexts(TokenTexts):
    """Texts from a table instead of a tokenizer."""

    def __init__(self, texts: dict[int, bytes]) -> None:
        self._texts = texts

    def text_bytes(self, token: int) -> bytes:
        return self._texts[token]


def written(stream: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A choice after a prompt of two tokens, with an answer of one token: as one object, or as a stream's chunks."""
    texts = FixedTexts({token: letter.encode() for token, letter in LETTERS.items()})
    answer = AnswerFormat("id", 1, "m", chat=False, prompt_tokens=(2,), texts=texts, echo=(Echo("aé", 1),))
    choice, pieces, told = ChoiceWriter(0, answer, answer.echo[0]), list[Piece](), list[dict[str, Any]]()
    assert choice.first() is None  # with its first token: the log-probabilities are not known before
    for event in (
        TokenEvent("r", (), "", prefill_tokens_done=2),
        TokenEvent(
            "r", (3,), "c", "length", SequenceStats(), logprobs=(TokenLogprobs(3, -3.0, ((3, -3.0),)),),
            prompt_logprobs=(TokenLogprobs(2, -2.0, ((1, -0.5),)),),
        ),
    ):  # fmt: skip
        pieces.append(choice.take(event))
        if stream:
            told += [chunk["choices"][0] for chunk in asyncio.run(choice.chunks(pieces[-1], Turns(1)))]
    return ({} if stream else asyncio.run(choice.whole(pieces, Turns(1)))), told


def test_the_answer_repeats_the_prompt_with_its_numbers() -> None:
    whole, _ = written(stream=False)
    assert whole["text"] == "aéc"
    assert whole["logprobs"] == {
        "tokens": ["a", "é", "c"],
        "token_logprobs": [None, -2.0, -3.0],
        "top_logprobs": [None, {"a": -0.5}, {"c": -3.0}],
        "text_offset": [0, 1, 2],
    }


def test_a_stream_says_the_same_piece_by_piece() -> None:
    whole, _ = written(stream=False)
    _, told = written(stream=True)
    assert "".join(part["text"] for part in told) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for part in told if part["logprobs"] for value in part["logprobs"][name]] == values
    assert [part["finish_reason"] for part in told] == [None, None, "length"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_character_in_several_tokens_counts_once(stream: bool) -> None:
    smile = "😀".encode()
    parts = {1: smile[:1], 2: smile[1:3], 3: smile[3:], 4: b"x", 5: b"y"}
    choice = ChoiceWriter(0, AnswerFormat("id", 1, "m", chat=False, prompt_tokens=(2,), texts=FixedTexts(parts)))
    texts = {3: "😀", 4: "x", 5: "y"}
    pieces = [
        choice.take(TokenEvent("r", (token,), texts.get(token, ""), logprobs=(TokenLogprobs(token, -1.0),)))
        for token in parts
    ]
    if stream:
        said = [
            chunk["choices"][0]["logprobs"] for piece in pieces for chunk in asyncio.run(choice.chunks(piece, Turns(1)))
        ]
        assert [offset for logprobs in said for offset in logprobs["text_offset"]] == [0, 0, 0, 1, 2]
    else:
        assert asyncio.run(choice.whole(pieces, Turns(1)))["logprobs"]["text_offset"] == [0, 0, 0, 1, 2]

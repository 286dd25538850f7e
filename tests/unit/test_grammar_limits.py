"""The cost of schemas is limited: schemas too long or too complex are refused before a worker gets them."""

import asyncio
import json
import time
from typing import Any

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forecache.cluster.config import DEFAULT_GRAMMAR_BYTES, ServeConfig
from forecache.cluster.errors import RefusedError
from forecache.cluster.http.prompts import PromptEncoder
from forecache.cluster.http.request_reader import ReadJob, ReadRequest, RequestReader, Wanted
from forecache.workers.core.grammar import Grammars
from forecache.workers.core.requests import SamplingParams
from forecache.workers.errors import InvalidRequestError

MAX_VALUES = 4_000_000
LONGEST_COMPILE_S = 30.0
"""Measured: 2.5 s on two shared cores. What it must not be is 71 s, or without a bound."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*alphabet, "<end>"])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return fast


def body(schema: object, **more: Any) -> bytes:
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    request = {"model": "m", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 4}
    return json.dumps(request | {"response_format": wanted} | more).encode()


def tools(schema: object, count: int = 1, **more: Any) -> bytes:
    functions = [
        {"type": "function", "function": {"name": f"f{at}", "parameters": schema, **more}} for at in range(count)
    ]
    request = {"model": "m", "messages": [{"role": "user", "content": "abc"}], "tools": functions}
    return json.dumps(request | {"tool_choice": "auto" if more else "required"}).encode()


def enum(count: int) -> dict[str, Any]:
    return {"enum": [f"value-{at}" for at in range(count)]}


def properties(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{at}": {"type": "string"} for at in range(count)}}


def ranges(count: int) -> dict[str, Any]:
    parts = {f"p{at}": {"type": "number", "minimum": at * 1.37e5, "maximum": 1e9 + at * 7.1e8} for at in range(count)}
    return {"type": "object", "properties": parts, "required": list(parts)}


WORDS = ("ab", "bc", "cd", "de", "ef", "fg")
REFUSED = {
    "an enum of 3 million values": (body(enum(3_000_000)), "response_format", "--max-grammar-bytes"),
    "many properties": (body(properties(5000)), "response_format", "--max-grammar-bytes"),
    "a long pattern": (
        body({"type": "string", "pattern": "(a|b)" * 20_000}),
        "response_format",
        "--max-grammar-bytes",
    ),
    "the arguments of a tool": (tools(properties(5000)), "tools", "--max-grammar-bytes"),
    "the arguments of many strict tools": (tools(properties(100), 100, strict=True), "tools", "--max-grammar-bytes"),
    "a short schema that costs too much": (
        body(
            {"allOf": [{"type": "string", "pattern": f".*{word}.*"} for word in ("ab", "bc", "cd", "de", "ef", "fg")]}
        ),
        "response_format",
        "the grammar can't be followed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_too_long_or_too_costly_is_refused_where_it_is_read(tokenizer: Any, name: str) -> None:
    asked, param, reason = REFUSED[name]
    reader = RequestReader(tokenizer, 4096, MAX_VALUES)
    started_s = time.perf_counter()
    with pytest.raises(InvalidRequestError, match=reason) as refused:
        reader.read(ReadJob(Wanted.CHAT, "m"), asked)
    assert refused.value.param == param
    assert time.perf_counter() - started_s < LONGEST_COMPILE_S


def longest(make: Any) -> dict[str, Any]:
    """The largest schema of a kind that is accepted."""
    count = 16
    while len(json.dumps(make(count + count // 8))) <= DEFAULT_GRAMMAR_BYTES:
        count += count // 8
    made: dict[str, Any] = make(count)
    return made


@pytest.mark.parametrize("make", [enum, properties, ranges])
def test_the_longest_accepted_schemas_compile_in_bounded_time(tokenizer: Any, make: Any) -> None:
    """At the ingress without the tokenizer, and in a worker with it."""
    reader, grammars = RequestReader(tokenizer, 4096, MAX_VALUES), Grammars(tokenizer, frozenset({256}))
    started_s = time.perf_counter()
    read = reader.read(ReadJob(Wanted.CHAT, "m"), body(longest(make)))
    assert isinstance(read, ReadRequest)
    matcher = grammars.matcher(read.sampling)
    assert matcher is not None
    assert time.perf_counter() - started_s < LONGEST_COMPILE_S


def test_a_grammar_that_costs_too_much_is_refused_whatever_its_length_may_be(tokenizer: Any) -> None:
    """At an ingress that takes longer ones, in process, and where only the tokenizer shows what it costs."""
    reader = RequestReader(tokenizer, 4096, MAX_VALUES, max_grammar_bytes=4 << 20)
    with pytest.raises(InvalidRequestError, match=r"the grammar can't be followed: .*too big"):
        reader.read(ReadJob(Wanted.CHAT, "m"), body(enum(100_000)))
    grammars = Grammars(tokenizer, frozenset({256}))
    for schema in (enum(100_000), {"type": "integer", "multipleOf": 10**9 + 7}):
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        with pytest.raises(InvalidRequestError, match="the grammar can't be followed"):
            grammars.matcher(SamplingParams(max_tokens=4, grammar=grammar))


def test_the_limit_is_a_setting(tokenizer: Any) -> None:
    assert ServeConfig().limits.max_grammar_bytes == DEFAULT_GRAMMAR_BYTES
    strict = RequestReader(tokenizer, 4096, MAX_VALUES, max_grammar_bytes=1024)
    with pytest.raises(InvalidRequestError, match="1024 are allowed"):
        strict.read(ReadJob(Wanted.CHAT, "m"), body(enum(200)))
    assert isinstance(strict.read(ReadJob(Wanted.CHAT, "m"), body(enum(20))), ReadRequest)
    wide = RequestReader(tokenizer, 4096, MAX_VALUES, max_grammar_bytes=1 << 20)
    assert isinstance(wide.read(ReadJob(Wanted.CHAT, "m"), body(enum(6000))), ReadRequest)


def test_a_client_gets_400_and_the_event_loop_goes_on(tokenizer: Any) -> None:
    async def refused() -> tuple[RefusedError, int]:
        encoder = PromptEncoder(tokenizer, 4096)
        turns = 0
        try:
            reading = asyncio.ensure_future(encoder.read(Wanted.CHAT, REFUSED["a short schema that costs too much"][0]))
            while not reading.done():
                turns += 1
                await asyncio.sleep(0)
            with pytest.raises(RefusedError) as failure:
                await reading
            return failure.value, turns
        finally:
            encoder.close()

    error, turns = asyncio.run(refused())
    assert (error.error.status, error.error.param, error.error.code) == (400, "response_format", "invalid_value")
    assert turns > 1


def test_tools_that_no_grammar_is_made_of_may_be_longer(tokenizer: Any) -> None:
    """Their schemas are text of the prompt alone."""
    free = tools(properties(3000)).replace(b'"required"}', b'"auto"}')
    assert len(free) > DEFAULT_GRAMMAR_BYTES
    read = RequestReader(tokenizer, 1 << 20, MAX_VALUES).read(ReadJob(Wanted.CHAT, "m"), free)
    assert isinstance(read, ReadRequest) and read.sampling.grammar is None

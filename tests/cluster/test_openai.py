"""Features of OpenAI's API beyond a plain answer, through OpenAI's client."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.cluster

MODEL = "bytes"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rome"]}, "days": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def server(plain_server: Any) -> Any:
    return plain_server


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, **fields}


def test_n_answers_are_those_of_their_seeds_at_once_and_streamed(client: openai.OpenAI) -> None:
    body = chat(n=3, temperature=1.0, seed=7, extra_body={"ignore_eos": True})
    whole = client.chat.completions.create(**body)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert whole.usage is not None and whole.usage.completion_tokens == 36
    assert whole.usage.prompt_tokens == len("<user>hello<assistant>")
    alone = client.chat.completions.create(**{**body, "n": 1})
    assert alone.choices[0].message.content == texts[0]
    streamed, ends = ["", "", ""], dict[int, str | None]()
    for chunk in client.chat.completions.create(**body, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert streamed == texts and ends == {0: "length", 1: "length", 2: "length"}


def test_several_prompts_of_a_completion(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    apart = [client.completions.create(prompt=prompt, **common).choices[0].text for prompt in ("abc", "xyzzy")]
    both = client.completions.create(prompt=["abc", "xyzzy"], n=2, echo=True, **common)
    assert [choice.text for choice in both.choices] == [
        *(f"abc{apart[0]}",) * 2,
        *(f"xyzzy{apart[1]}",) * 2,
    ]
    assert both.usage is not None and (both.usage.prompt_tokens, both.usage.completion_tokens) == (8, 20)


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    body = chat(logprobs=True, top_logprobs=3, temperature=0)
    choice = client.chat.completions.create(**body).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 12
    for told in choice.logprobs.content:
        assert told.logprob == told.top_logprobs[0].logprob <= 0 and told.bytes == told.top_logprobs[0].bytes
        assert [top.logprob for top in told.top_logprobs] == sorted(
            (t.logprob for t in told.top_logprobs), reverse=True
        )
    said = b"".join(bytes(told.bytes or ()) for told in choice.logprobs.content)
    assert said.decode("utf-8", "replace") == choice.message.content
    streamed = [
        told
        for chunk in client.chat.completions.create(**body, stream=True)
        for piece in chunk.choices
        if piece.logprobs is not None
        for told in piece.logprobs.content or ()
    ]
    assert streamed == choice.logprobs.content


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": "abc", "max_tokens": 8, "temperature": 0, "logprobs": 2}
    choice = client.completions.create(**body).choices[0]
    told = choice.logprobs
    assert told is not None and told.tokens is not None and told.top_logprobs is not None
    assert told.token_logprobs is not None and told.text_offset is not None
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 8
    for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) == 2 and top[token] == value == max(top.values())
    offsets = [
        offset
        for chunk in client.completions.create(**body, stream=True)
        for piece in chunk.choices
        if piece.logprobs is not None
        for offset in piece.logprobs.text_offset or ()
    ]
    assert offsets == told.text_offset
    echoed = client.completions.create(**body, echo=True, n=2).choices[1]
    assert echoed.text == "abc" + choice.text and echoed.logprobs is not None
    both = echoed.logprobs
    assert both.tokens[:3] == ["a", "b", "c"] and both.token_logprobs[0] is both.top_logprobs[0] is None
    assert all(value < 0 for value in both.token_logprobs[1:3]) and both.text_offset[:4] == [0, 1, 2, 3]
    assert both.tokens[3:] == told.tokens and both.token_logprobs[3:] == pytest.approx(told.token_logprobs, abs=1e-4)
    pieces = [part.choices[0] for part in client.completions.create(**body, echo=True, stream=True)]
    assert "".join(piece.text for piece in pieces) == echoed.text
    values = [v for piece in pieces if piece.logprobs is not None for v in piece.logprobs.token_logprobs or ()]
    assert values == pytest.approx(both.token_logprobs, abs=1e-4)
    bare = client.completions.create(**{**body, "logprobs": 0}).choices[0].logprobs
    assert bare is not None and bare.token_logprobs == told.token_logprobs


def token_of(client: openai.OpenAI, text: str) -> int:
    tokens = client.post("/tokenize", body={"model": MODEL, "prompt": text}, cast_to=object)
    (token,) = tokens["tokens"]  # type: ignore[index]
    return int(token)


def test_biases_and_penalties(client: openai.OpenAI) -> None:
    a, b = token_of(client, "a"), token_of(client, "b")
    body = chat(temperature=0, logit_bias={str(a): 100, str(b): 99})
    assert client.chat.completions.create(**body).choices[0].message.content == "a" * 12
    # each "a" costs 2: after the first, "b" is ahead, and they take turns
    turns = client.chat.completions.create(**body, frequency_penalty=2).choices[0].message.content
    assert turns is not None and set(turns) == {"a", "b"} and turns.count("a") == turns.count("b")
    once = client.chat.completions.create(**{**body, "logit_bias": {str(a): 100, str(b): 98.5}}, presence_penalty=2)
    assert once.choices[0].message.content == "a" + "b" + "a" * 10


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_schema(client: openai.OpenAI, temperature: float) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    body = chat(response_format=wanted, max_tokens=400, temperature=temperature, seed=3)
    choice = client.chat.completions.create(**body).choices[0]
    said = json.loads(choice.message.content or "")
    assert set(said) == {"city", "days"} and said["city"] in ("Bern", "Rome") and 0 <= said["days"] <= 99
    assert choice.finish_reason == "stop"
    streamed = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**body, stream=True)]
    assert "".join(streamed) == choice.message.content


def test_json_object_and_plain_answers_share_a_batch(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**chat(temperature=0)).choices[0].message.content
    stream = client.chat.completions.create(**chat(max_tokens=500, temperature=0, stream=True))
    next(iter(stream))
    answer = client.chat.completions.create(
        **chat(response_format={"type": "json_object"}, max_tokens=64, seed=1, logit_bias={"0": -100})
    )
    assert (answer.choices[0].message.content or "").lstrip().startswith("{")
    assert client.chat.completions.create(**chat(temperature=0)).choices[0].message.content == plain
    stream.close()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tool_calls(client: openai.OpenAI, choice: Any) -> None:
    body = chat(tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_tokens=400, seed=5)
    answer = client.chat.completions.create(**body).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert call.type == "function" and call.function.name == "weather" and call.id.startswith("call_")
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "days"}
    deltas = [
        delta
        for chunk in client.chat.completions.create(**body, stream=True)
        for delta in chunk.choices[0].delta.tool_calls or ()
    ]
    assert [delta.index for delta in deltas] == [0]
    assert deltas[0].function is not None and json.loads(deltas[0].function.arguments or "") == arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    turn = [*body["messages"], answer.message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(**{**body, "messages": turn, "tool_choice": "none"}).choices


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"type": "object", "uniqueItems": True, "not": {}}, {"$ref": "#/nowhere"}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_schemas_that_can_not_be_followed_are_refused(client: openai.OpenAI, schema: Any, stream: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "bad", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**chat(response_format=wanted, stream=stream))
    assert refused.value.param == "response_format"


def test_tokenize_and_detokenize(server: Any) -> None:
    told = server.post("/v1/tokenize", {"model": MODEL, "prompt": "héllo"}).json()
    assert told["count"] == len("héllo".encode()) == len(told["tokens"]) and told["max_model_len"] == 8192
    back = server.post("/v1/detokenize", {"model": MODEL, "tokens": told["tokens"]})
    assert back.json() == {"prompt": "héllo"}
    chatted = server.post("/v1/tokenize", {"model": MODEL, "messages": chat()["messages"]}).json()
    assert chatted["count"] == len("<user>hello<assistant>")
    assert server.post("/v1/detokenize", {"model": MODEL, "tokens": [9999]}).json()["error"]["param"] == "tokens"
    assert server.post("/v1/tokenize", {"model": "x", "prompt": "a"}).status_code == 404


def test_a_deadline_cancels_the_work(server: Any, client: openai.OpenAI) -> None:
    server.wait_for_metric("forecache_num_requests_running", 0, within_s=30)
    cancelled = server.metric("forecache_requests_cancelled_total")
    slow = chat(max_tokens=8000, extra_body={"ignore_eos": True, "forecache": {"timeout_s": 0.5}})
    with pytest.raises(openai.APIStatusError) as late:
        client.chat.completions.create(**slow)
    assert late.value.status_code == 408 and late.value.code == "deadline_exceeded"
    with pytest.raises(openai.APIError, match="timeout_s"):
        list(client.chat.completions.create(**slow, stream=True))
    server.wait_for_metric("forecache_requests_cancelled_total", cancelled + 2, within_s=5)
    assert server.metric("forecache_num_requests_running") == 0

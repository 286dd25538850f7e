"""Which requests are valid, and that invalid fields are refused by name."""

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage
from pydantic import BaseModel, ValidationError

from forecache.cluster.dispatch.choice_requests import seed_of_choice
from forecache.cluster.errors import AnswerFailedError, ApiError, from_exception
from forecache.cluster.http.openai_types import (
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_MESSAGES,
    MAX_STOP_CHARS,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    PinRequest,
    TokenizeRequest,
    usage,
)
from forecache.workers.core.requests import SequenceStats
from forecache.workers.errors import ForecacheError, InvalidRequestError, OverloadedError

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}


def refused(kind: type[ChatCompletionRequest] | type[CompletionRequest], body: Any) -> ApiError:
    with pytest.raises((ValidationError, InvalidRequestError)) as raised:
        kind.model_validate(body)
    return from_exception(raised.value)


def test_defaults() -> None:
    request = ChatCompletionRequest.model_validate(CHAT)
    sampling = request.sampling(7)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 1.0, 1.0, 0)
    assert sampling.stop == () and not sampling.ignore_eos
    assert request.answer_tokens() is None and not request.include_usage
    assert CompletionRequest.model_validate(COMPLETION).answer_tokens() == 16


def test_all_that_is_served() -> None:
    request = ChatCompletionRequest.model_validate(
        {
            **CHAT,
            "temperature": 0,
            "top_p": 0.5,
            "top_k": 3,
            "max_tokens": 5,
            "max_completion_tokens": 6,
            "seed": -1,
            "stop": ["a", "b"],
            "stream": True,
            "stream_options": {"include_usage": True},
            "n": 3,
            "presence_penalty": 0.5,
            "frequency_penalty": -1,
            "logit_bias": {"5": -100, "7": 1.5},
            "logprobs": True,
            "top_logprobs": 4,
            "forecache": {"policy": "random", "keep_ratio": 0.5, "window": 9, "cache_salt": "s", "timeout_s": 2.5},
        }
    )
    sampling, cache = request.sampling(6), request.cache()
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1)
    assert sampling.logit_bias == ((5, -100.0), (7, 1.5)) and sampling.logprobs == 4
    assert request.n == 3 and request.timeout_s == 2.5
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.stop) == (0, 0.5, 3, ("a", "b"))
    assert 0 <= sampling.seed < 2**63
    assert request.answer_tokens() == 6 and request.include_usage
    assert (cache.policy, cache.keep_ratio, cache.window_steps, cache.cache_salt) == ("random", 0.5, 9, "s")


def test_a_seed_is_drawn_when_none_is_given() -> None:
    request = ChatCompletionRequest.model_validate(CHAT)
    assert len({request.sampling(1).seed for _ in range(8)}) == 8


def test_content_parts_are_joined_and_developer_is_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatCompletionRequest.model_validate({**CHAT, "messages": [{"role": "developer", "content": parts}]})
    assert request.messages[0].for_template() == {"role": "system", "content": "ab"}


def test_messages_are_taken_back_as_official_clients_dump_them() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    said = [
        ChatCompletionMessage(role="assistant", content="hi").model_dump(),
        ChatCompletionMessage(role="assistant", tool_calls=[call], annotations=[]).model_dump(),  # type: ignore[list-item]
        {"role": "tool", "tool_call_id": "c", "name": "weather", "content": "rain"},
    ]
    request = ChatCompletionRequest.model_validate({**CHAT, "messages": said})
    told = [message.for_template() for message in request.messages]
    assert told[0] == {"role": "assistant", "content": "hi"}
    assert told[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {}}
    assert told[2] == {"role": "tool", "content": "rain", "tool_call_id": "c"}


@pytest.mark.parametrize(
    "field",
    [
        {"annotations": [{"type": "url_citation"}]},
        {"audio": {"id": "a"}},
        {"function_call": {"name": "f", "arguments": "{}"}},
        {"refusal": "no"},
    ],
)
def test_what_is_not_supported_in_a_message_is_named(field: dict[str, Any]) -> None:
    (name,) = field
    error = refused(ChatCompletionRequest, {**CHAT, "messages": [{"role": "assistant", "content": "x", **field}]})
    assert (error.param, error.code) == (f"messages.0.{name}", "invalid_value")
    assert error.message == f"messages.0.{name}: it is not supported; leave it out"


def test_one_stop_string_is_a_list_of_one() -> None:
    assert ChatCompletionRequest.model_validate({**CHAT, "stop": "x"}).stop == ("x",)


@pytest.mark.parametrize(
    "field",
    [
        {"n": 1},
        {"presence_penalty": 0.0, "frequency_penalty": 0},
        {"user": "u", "metadata": {"a": "b"}},
        {"logprobs": False, "tools": [], "response_format": {"type": "text"}},
        {"temperature": None, "stop": None, "seed": None, "stream_options": None},
    ],
)
def test_neutral_openai_fields_pass(field: dict[str, Any]) -> None:
    assert ChatCompletionRequest.model_validate({**CHAT, **field}).model == "m"


@pytest.mark.parametrize(
    ("field", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_value"),
        ({"temperature": float("inf")}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.5}, "top_p", "invalid_value"),
        ({"top_k": -1}, "top_k", "invalid_value"),
        ({"priority": 2**31}, "priority", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": ["a"] * 5}, "stop", "invalid_value"),
        ({"stop": [""]}, "stop.0", "invalid_value"),
        ({"stop": 3}, "stop", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": MAX_CHOICES + 1}, "n", "invalid_value"),
        ({"best_of": 2}, "best_of", "invalid_value"),
        ({"functions": [{"name": "f"}]}, "functions", "invalid_value"),
        ({"audio": {"voice": "x"}}, "audio", "invalid_value"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "invalid_value"),
        ({"presence_penalty": 2.1}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "invalid_value"),
        ({"logit_bias": {str(i): 0 for i in range(MAX_LOGIT_BIAS + 1)}}, "logit_bias", "invalid_value"),
        ({"stop": ["a" * (MAX_STOP_CHARS + 1)]}, "stop.0", "invalid_value"),
        ({"logprobs": 1}, "logprobs", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "missing_required_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "invalid_value"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "invalid_value",
        ),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        ({"forecache": {"timeout_s": 0}}, "forecache.timeout_s", "invalid_value"),
        ({"messages": [CHAT["messages"][0]] * (MAX_MESSAGES + 1)}, "messages", "invalid_value"),
        ({"messages": [{"role": "assistant"}]}, "messages.0", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "missing_required_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"best_friend": 1}, "best_friend", "unknown_parameter"),
        ({"forecache": {"policy": "clever"}}, "forecache.policy", "invalid_value"),
        ({"forecache": {"keep_ratio": 0}}, "forecache.keep_ratio", "invalid_value"),
        ({"forecache": {"window": 0}}, "forecache.window", "invalid_value"),
        ({"forecache": {"show_chunks": True}}, "forecache.show_chunks", "invalid_value"),
        ({"forecache": {"keep_ration": 1}}, "forecache.keep_ration", "unknown_parameter"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": [7]}]}, "messages.0.content", "invalid_value"),
    ],
)
def test_a_wrong_field_is_named(field: dict[str, Any], param: str, code: str) -> None:
    error = refused(ChatCompletionRequest, {**CHAT, **field})
    assert (error.status, error.type, error.param, error.code) == (400, "invalid_request_error", param, code)


def test_missing_and_wrong_bodies() -> None:
    assert refused(ChatCompletionRequest, {"model": "m"}).param == "messages"
    assert refused(ChatCompletionRequest, {"messages": CHAT["messages"]}).param == "model"
    assert "JSON object" in refused(ChatCompletionRequest, [1]).message


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ["text"]),
        ([1, 2, 3], [[1, 2, 3]]),
        (["text"], ["text"]),
        (["a", "b"], ["a", "b"]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompts(prompt: Any, prompts: list[Any]) -> None:
    assert CompletionRequest.model_validate({**COMPLETION, "prompt": prompt}).prompts() == prompts


@pytest.mark.parametrize("prompt", ["", [], ["a", ""], [1, "a"], [[1], "a"], [[]], [-1], 5, None])
def test_wrong_prompts(prompt: Any) -> None:
    error = refused(CompletionRequest, {**COMPLETION, "prompt": prompt})
    assert error.status == 400 and error.param is not None and error.param.startswith("prompt")


def test_usage_shape() -> None:
    told = usage(SequenceStats(prompt_tokens=10, completion_tokens=3, cached_tokens=4, context_chunks=7))
    assert (told["prompt_tokens"], told["completion_tokens"], told["total_tokens"]) == (10, 3, 13)
    assert told["prompt_tokens_details"] == {"cached_tokens": 4}
    assert told["forecache"]["context_chunks"] == 7
    assert (told["forecache"]["coverage"], told["forecache"]["fallbacks"]) == (None, 0)
    told = usage(SequenceStats(coverage=0.5, fallbacks=2))
    assert (told["forecache"]["coverage"], told["forecache"]["fallbacks"]) == (0.5, 2)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadedError("full"), 503, "overloaded"),
        (InvalidRequestError("bad", "top_p"), 400, "invalid_value"),
        (AnswerFailedError("the grammar can't be followed: too big"), 500, "internal_error"),
    ],
)
def test_typed_errors_have_their_status(error: ForecacheError, status: int, code: str) -> None:
    said = from_exception(error)
    assert (said.status, said.code, said.message) == (status, code, str(error))


@pytest.mark.parametrize("error", [KeyError("secret"), ForecacheError("secret")])
def test_an_unexpected_error_tells_no_details(error: Exception) -> None:
    said = from_exception(error)
    assert said.code == "internal_error"
    assert said.status == 500 and "secret" not in json.dumps(said.body())


def test_completions_take_logprobs_as_a_number_and_echo() -> None:
    assert CompletionRequest.model_validate({**COMPLETION, "logprobs": 0}).sampling(1).logprobs == 0
    assert CompletionRequest.model_validate({**COMPLETION, "echo": True}).sampling(1).logprobs is None
    both = CompletionRequest.model_validate({**COMPLETION, "echo": True, "logprobs": 1}).sampling(1)
    assert both.prompt_logprobs and both.logprobs == 1
    for one in ({"echo": True}, {"logprobs": 1}, {"echo": False, "logprobs": 0}):
        assert not CompletionRequest.model_validate({**COMPLETION, **one}).sampling(1).prompt_logprobs
    assert refused(CompletionRequest, {**COMPLETION, "suffix": "x"}).param == "suffix"
    assert refused(CompletionRequest, {**COMPLETION, "prompt": ["a"] * 20, "n": 100}).param == "n"


def test_seeds_of_choices_differ_and_the_first_is_the_requests_own() -> None:
    seeds = [seed_of_choice(5, number) for number in range(MAX_CHOICES)]
    assert seeds[0] == 5 and len(set(seeds)) == MAX_CHOICES and all(0 <= seed < 2**63 for seed in seeds)


def test_earlier_calls_and_their_results_reach_the_template_as_objects() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]
    request = ChatCompletionRequest.model_validate({**CHAT, "messages": messages, "tools": [WEATHER]})
    told = [message.for_template() for message in request.messages]
    assert told[1]["content"] == "" and told[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
    assert told[2] == {"role": "tool", "content": "rain", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("fields", "has_grammar"),
    [
        ({}, False),
        ({"response_format": {"type": "text"}}, False),
        ({"response_format": {"type": "json_object"}}, True),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}, True),
        ({"tools": [WEATHER]}, False),
        ({"tools": [WEATHER], "tool_choice": "none", "response_format": {"type": "json_object"}}, True),
        ({"tools": [WEATHER], "tool_choice": "required"}, True),
        ({"tools": [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]}, True),
    ],
)
def test_what_has_a_grammar(fields: dict[str, Any], has_grammar: bool) -> None:
    grammar = ChatCompletionRequest.model_validate({**CHAT, **fields}).sampling(1).grammar
    assert (grammar is not None) == has_grammar


@pytest.mark.parametrize("fields", [{}, {"prompt": "a", "messages": CHAT["messages"]}])
def test_tokenize_takes_a_prompt_or_messages(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError):
        TokenizeRequest.model_validate({"model": "m", **fields})


MANY = 5000


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {**COMPLETION, "prompt": [-1] * MANY}),
        (CompletionRequest, {**COMPLETION, "prompt": [""] * MANY}),
        (CompletionRequest, {**COMPLETION, "prompt": [[]] * MANY}),
        (CompletionRequest, {**COMPLETION, "prompt": [[1], [-1] * MANY]}),
        (CompletionRequest, {**COMPLETION, "prompt": [None] * MANY}),
        (CompletionRequest, {**COMPLETION, "stop": [""] * MANY}),
        (CompletionRequest, {**COMPLETION, "logit_bias": {f"x{i}": 1 for i in range(MANY)}}),
        (CompletionRequest, {**COMPLETION, **{f"x{i}": 1 for i in range(MANY)}}),
        (ChatCompletionRequest, {**CHAT, "messages": [{"role": "user"}] * MANY}),
        (ChatCompletionRequest, {**CHAT, "messages": [{**CHAT["messages"][0], **{f"x{i}": 1 for i in range(MANY)}}]}),
        (ChatCompletionRequest, {**CHAT, "tools": [{}] * MANY}),
        (
            ChatCompletionRequest,
            {**CHAT, "messages": [{"role": "assistant", "content": "", "tool_calls": [{}] * MANY}]},
        ),
        (DetokenizeRequest, {"model": "m", "tokens": [-1] * MANY}),
        (TokenizeRequest, {"model": "m", "messages": [{"role": "user"}] * MANY}),
        (PinRequest, {f"x{i}": 1 for i in range(MANY)}),
    ],
)
def test_what_is_wrong_many_times_is_said_a_few_times(kind: type[BaseModel], body: Any) -> None:
    """Each validation error takes far more memory than the value, so a body of some MiB could exhaust the ingress."""
    with pytest.raises(ValidationError) as raised:
        kind.model_validate(body)
    assert raised.value.error_count() <= 4
    error = from_exception(raised.value)
    assert error.status == 400 and error.param is not None

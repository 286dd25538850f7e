"""Tool calls: parsed the same however the text is split, and described to models of any chat template."""

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from forecache.cluster.http.openai_tools import ChosenFunction, JsonSchemaFormat, Tool, format_grammar, tools_grammar
from forecache.cluster.http.openai_types import ChatCompletionRequest
from forecache.cluster.http.prompts import PromptEncoder
from forecache.cluster.http.tool_calls import (
    ToolCall,
    ToolCallParser,
    parse_call,
    template_supports_tools,
    tools_as_text,
)
from forecache.workers.errors import InvalidRequestError

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "<tool_call>"}}\n</tool_call>'


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser, content, calls = ToolCallParser(), "", list[ToolCall]()
    for piece in pieces:
        text, found = parser.push(piece)
        content, calls = content + text, calls + found
    text, found = parser.finish()
    return content + text, [(call.name, call.arguments) for call in calls + found]


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("plain text", "plain text", []),
        ("plain <tool_ text ", "plain <tool_ text ", []),
        (CALL, "", ["f"]),
        (f"let me see \n{CALL}\n{CALL}\n", "let me see", ["f", "f"]),
        ('<tool_call>{"name": "g", "parameters": {}}</tool_call>', "", ["g"]),
        ("<tool_call>no JSON</tool_call> and so on", "<tool_call>no JSON</tool_call> and so on", []),
        ('<tool_call>{"name": 7}</tool_call>', '<tool_call>{"name": 7}</tool_call>', []),
        ('<tool_call>\n{"name": "f", "arguments": {}}', "", ["f"]),
        ('<tool_call>\n{"name": "f", "argu', '<tool_call>\n{"name": "f", "argu', []),
        ("", "", []),
    ],
)
@given(data=st.data())
def test_calls_are_found_however_the_text_is_cut(
    text: str, content: str, names: list[str], data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
    ends = [0, *cuts, len(text)]
    told, calls = read([text[a:b] for a, b in itertools.pairwise(ends)])
    assert (told, [name for name, _ in calls]) == (content, names)


def test_arguments_are_json_and_ids_differ() -> None:
    one, two = parse_call('{"name": "f", "arguments": {"ä": [1]}}'), parse_call('{"name": "f"}')
    assert one is not None and json.loads(one.arguments) == {"ä": [1]} and "ä" in one.arguments
    assert two is not None and two.arguments == "{}" and one.id != two.id
    assert parse_call("[" * 100_000) is None and parse_call('{"name": "f", "arguments": 1}') is None


@given(st.text())
def test_text_without_calls_is_untouched(text: str) -> None:
    assert read(list(text)) == (text, []) or "<tool_call>" in text


def test_tools_are_written_as_text_for_templates_that_know_none() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
    ]
    told = tools_as_text(messages, [{"type": "function", "function": {"name": "f"}}])
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("be brief\n\n") and '"name": "f"' in told[0]["content"]
    assert read([told[2]["content"]]) == ("", [("f", '{"x": 1}')])
    assert told[3]["content"] == "<tool_response>\n42\n</tool_response>"
    assert tools_as_text(messages[1:2], []) == messages[1:2]
    assert tools_as_text(messages[1:2], [{}])[0]["role"] == "system"
    assert template_supports_tools("{% if tools %}<tool_call>{% endif %}") and not template_supports_tools(
        "{{ messages }}"
    )


@pytest.mark.parametrize(
    ("template", "body"),
    [
        ("{{ messages[0].content }}", {"arguments": "[" * 100_000}),
        ("<tool_call>{{ tools }}{{ messages[0].tool_calls[0].function.arguments.x + 1 }}", {"arguments": '{"x": "a"}'}),
        ("{{ raise_exception('no') }}", {}),
    ],
)
def test_what_a_template_cannot_lay_out_is_the_requests_fault(template: str, body: dict[str, str]) -> None:
    wrapped: Any = PreTrainedTokenizerFast
    encoder = PromptEncoder(wrapped(tokenizer_object=Tokenizer(models.BPE()), chat_template=template), 64)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", **body}}
    messages = [{"role": "assistant", "content": "hi", "tool_calls": [call]}]

    try:
        with pytest.raises(InvalidRequestError, match=r"nested too deep|template refuses") as raised:
            asyncio.run(encoder.encode(ChatCompletionRequest.model_validate({"model": "m", "messages": messages})))
        assert raised.value.param == "messages"
    finally:
        encoder.close()


def tool(name: str, **extra: object) -> Tool:
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    schema["additionalProperties"] = False
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": schema, **extra}})


def accepts(grammar: str | None, text: str) -> bool:
    """Whether ``grammar`` accepts ``text``, with a tokenizer of single bytes."""
    assert grammar is not None
    matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def call_text(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("choice", "parallel", "text", "allowed"),
    [
        ("required", True, call_text("f", '{"x": 1}'), True),
        ("required", True, call_text("g", '{"x": 1}') + "\n" + call_text("f", '{"x": 2}'), True),
        ("required", False, call_text("g", '{"x": 1}') + "\n" + call_text("f", '{"x": 2}'), False),
        ("required", True, call_text("h", '{"x": 1}'), False),
        ("required", True, call_text("f", '{"x": "1"}'), False),
        ("required", True, "I would rather not", False),
        ("f", True, call_text("f", '{"x": 1}'), True),
        ("f", True, call_text("g", '{"x": 1}'), False),
        ("auto", True, "I would rather not", True),
        ("auto", True, "see: " + call_text("g", '{"x": 1}'), True),
        ("auto", True, call_text("h", '{"x": 1}'), False),
        ("auto", True, call_text("g", '{"x": 1}') + "\n" + call_text("f", '{"x": 2}') + " done", True),
        ("auto", False, "I would rather not", True),
        ("auto", False, "see:\n" + call_text("g", '{"x": 1}'), True),
        ("auto", False, call_text("g", '{"x": 1}') + "\n", False),
        ("auto", False, call_text("g", '{"x": 1}') + call_text("f", '{"x": 2}'), False),
        ("auto", False, call_text("h", '{"x": 1}'), False),
    ],
)
def test_the_grammar_of_a_tool_choice(choice: str, parallel: bool, text: str, allowed: bool) -> None:
    tools = [tool("f"), tool("g", strict=True)]
    named = ChosenFunction.model_validate({"type": "function", "function": {"name": choice}})
    grammar = tools_grammar(tools, choice if choice in ("auto", "required") else named, parallel=parallel)  # type: ignore[arg-type]
    assert accepts(grammar, text) == allowed


def schema_format(schema: object) -> JsonSchemaFormat:
    return JsonSchemaFormat.model_validate({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def test_schemas_that_are_no_objects() -> None:
    assert accepts(format_grammar(schema_format(True)), '[1, {"a": null}]')
    with pytest.raises(InvalidRequestError, match="schema false"):
        format_grammar(schema_format(False))


def test_a_schema_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="the schema can't be followed"):
        format_grammar(schema_format({"description": "\ud800"}))


def test_a_schema_that_is_nested_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    deep = tool("f", parameters=schema, strict=True)
    for make in (
        lambda: format_grammar(schema_format(schema)),
        lambda: tools_grammar([deep], "auto", parallel=True),
        lambda: tools_grammar([deep], "required", parallel=True),
    ):
        with pytest.raises(InvalidRequestError, match="nested too deep"):
            make()


def test_free_choice_of_lenient_tools_has_no_grammar_but_that_one_call_is_the_end() -> None:
    assert tools_grammar([tool("f")], "auto", parallel=True) is None
    one = tools_grammar([tool("f")], "auto", parallel=False)
    for text in ("I <would> rather\nnot", "see:\n" + call_text("anything", "[1]"), "<tool_call>no JSON</tool_call>"):
        assert accepts(one, text)
    assert not accepts(one, call_text("f", "{}") + "\n" + call_text("f", "{}"))
    assert format_grammar(None) is None

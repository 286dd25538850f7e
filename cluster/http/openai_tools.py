"""Tools and response formats of OpenAI's API, and the grammars that enforce them."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from llguidance import LLMatcher
from pydantic import BaseModel, ConfigDict, Field, model_validator

from forecache.cluster.config import DEFAULT_GRAMMAR_BYTES
from forecache.cluster.http.tool_calls import CLOSE, OPEN
from forecache.workers.errors import InvalidRequestError

MAX_TOOLS = 128
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]

# without a limit on whitespace a model may indent endlessly; tool calls are written on one line
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\t]{0,24}"}
_CALL_OPTIONS: Any = {"whitespace_pattern": r"[ \n]?"}


class Strict(BaseModel):
    """A model that refuses unknown fields and converts no types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, values: Any) -> Any:
        """Keep one unknown field, which pydantic refuses: it would make an error object for each of thousands."""
        if not isinstance(values, dict) or len(values) <= len(cls.model_fields):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in values if name not in known)
        return {name: value for name, value in values.items() if name in known or name == unknown}


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: Name
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Function(Strict):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        fields = {"description": self.function.description or "", "parameters": self.schema_of_arguments()}
        return {"type": "function", "function": {"name": self.function.name, **fields}}

    def schema_of_arguments(self) -> dict[str, Any]:
        return self.function.parameters or {"type": "object", "properties": {}}


class ChosenName(Strict):
    name: Name


class ChosenFunction(Strict):
    type: Literal["function"]
    function: ChosenName


ToolChoice = Literal["none", "auto", "required"] | ChosenFunction


class CalledFunction(Strict):
    name: Name
    arguments: str


class MadeCall(Strict):
    """A call that the model made in an earlier turn."""

    id: str
    type: Literal["function"]
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates expect it: the arguments as an object, or as text if they are not valid JSON.

        Raises:
            InvalidRequestError: the arguments are nested too deep.
        """
        try:
            arguments = json.loads(self.function.arguments)
        except ValueError:
            arguments = self.function.arguments
        except RecursionError:
            raise InvalidRequestError(f"the arguments of call {self.id!r} are nested too deep", "messages") from None
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


def format_grammar(
    wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | None, max_bytes: int = DEFAULT_GRAMMAR_BYTES
) -> str | None:
    """The grammar of a response format; None for text.

    Raises:
        InvalidRequestError: the schema is invalid, matches no answer, or has more than ``max_bytes`` bytes.
    """
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    schema = {"type": "object"} if isinstance(wanted, JsonObjectFormat) else wanted.json_schema.schema_
    if schema is False:
        raise InvalidRequestError("no answer can match the schema false", "response_format")
    try:
        text = _json({} if schema is True else schema, "response_format")
        _check_length(text, max_bytes, "response_format")
        return LLMatcher.grammar_from_json_schema(text, defaults=_JSON_OPTIONS)
    except ValueError as error:
        raise InvalidRequestError(f"the schema can't be followed: {error}", "response_format") from error


def _json(schema: Any, param: str) -> str:
    """``schema`` as JSON text. Raises :class:`InvalidRequestError` if it is nested too deep."""
    try:
        return json.dumps(schema)
    except RecursionError:
        raise InvalidRequestError("the schema is nested too deep", param) from None


def _check_length(text: str, max_bytes: int, param: str) -> None:
    if len(text) > max_bytes:  # `json.dumps` writes ASCII, so characters are bytes
        raise InvalidRequestError(
            f"the schemas have {len(text)} bytes, and {max_bytes} are allowed (--max-grammar-bytes)", param
        )


def _free_grammar(tools: Sequence[Tool], *, parallel: bool) -> str | None:
    """The grammar of an answer that may call ``tools`` or not; None if every text is allowed."""
    calls = ["to_close"]
    if any(tool.function.strict for tool in tools):
        calls = [_strict_call(tool) for tool in tools]
    elif parallel:
        return None
    return "\n".join(
        [
            "%llguidance {}",
            "start: call* TEXT" if parallel else "start: call | TEXT",
            f"call: to_open ({' | '.join(calls)})",
            f"to_open[lazy]: TEXT {json.dumps(OPEN)}",
            f"to_close[lazy]: TEXT {json.dumps(CLOSE)}",
            r"TEXT: /(.|\n)*/",
        ]
    )


def _strict_call(tool: Tool) -> str:
    """The grammar of a call of a strict tool, after the opening tag."""
    begin = f'\n{{"name": {json.dumps(tool.function.name)}, "arguments": '
    schema = {**tool.schema_of_arguments(), "x-guidance": _CALL_OPTIONS}
    end = "}\n" + CLOSE
    return f"{json.dumps(begin)} %json {_json(schema, 'tools')} {json.dumps(end)}"


def tools_grammar(
    tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool, max_bytes: int = DEFAULT_GRAMMAR_BYTES
) -> str | None:
    """The grammar of an answer that may or must call ``tools``; None if every text is allowed.

    With ``auto`` the model may call tools or not, and its calls follow the schemas if one of the tools is strict.
    Without ``parallel`` the answer ends after the first call.

    Raises:
        InvalidRequestError: the schemas have more than ``max_bytes`` bytes together.
    """
    if choice == "auto":
        if (grammar := _free_grammar(tools, parallel=parallel)) is not None:
            _check_length(grammar, max_bytes, "tools")
        return grammar
    name = choice.function.name if isinstance(choice, ChosenFunction) else None
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, "arguments": tool.schema_of_arguments()},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
        if name is None or tool.function.name == name
    ]
    schema = _json({"anyOf": calls, "x-guidance": _CALL_OPTIONS}, "tools")
    _check_length(schema, max_bytes, "tools")
    more = ' ("\\n" call)*' if parallel and name is None else ""
    opening, closing = json.dumps(OPEN + "\n"), json.dumps("\n" + CLOSE)
    return f"%llguidance {{}}\nstart: call{more}\ncall: {opening} %json {schema} {closing}\n"

"""Messages of OpenAI's API, and how chat templates take them."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from forecache.cluster.http.openai_tools import MAX_TOOLS, MadeCall, Strict


def _encodable(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which are no text: no tokenizer takes them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds an unpaired surrogate, so it is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def _joined(content: Any) -> Any:
    """Content may be a list of text parts; other parts (images, audio) are refused by name."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise ValueError(f"content of type {kind!r} is not supported, only 'text'")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a text part is {'type': 'text', 'text': a string} and nothing else")
    return "".join(part["text"] for part in content)


Content = Annotated[Text, BeforeValidator(_joined)]


def _nothing(value: Any) -> None:
    """Official clients send back all fields of a message, also those that hold nothing."""
    if value not in (None, [], {}, ""):
        raise ValueError("it is not supported; leave it out")


Unsaid = Annotated[None, BeforeValidator(_nothing)]


class SaidMessage(Strict):
    role: Literal["system", "developer", "user"]
    content: Content
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it; they know no ``developer``."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Annotated[Text | None, BeforeValidator(_joined)] = None
    name: str | None = None
    refusal: Unsaid = None
    annotations: Unsaid = None
    audio: Unsaid = None
    function_call: Unsaid = None
    tool_calls: Annotated[list[MadeCall] | None, Field(max_length=MAX_TOOLS, fail_fast=True)] = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message has content or tool_calls")
        return self

    def for_template(self) -> dict[str, Any]:
        calls = [call.for_template() for call in self.tool_calls or ()]
        return {"role": "assistant", "content": self.content or "", **({"tool_calls": calls} if calls else {})}


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Content
    name: str | None = None
    tool_call_id: str

    def for_template(self) -> dict[str, Any]:
        return {"role": "tool", "content": self.content, "tool_call_id": self.tool_call_id}


Message = Annotated[SaidMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]

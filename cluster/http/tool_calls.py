"""Tool calls in the text of an answer: how the model is told to write them, and how they are read.

The form is Hermes', which Qwen and others are trained on: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``. A
model whose chat template knows it gets the tools from its template; any other gets them described in a system message.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_INSTRUCTIONS = """You may call functions to help with the user's request. Here they are, one JSON object a line:
<tools>
{tools}
</tools>
To call one, write nothing but a JSON object with its name and arguments inside tags:
<tool_call>
{{"name": the function's name, "arguments": an object of its arguments}}
</tool_call>"""


@dataclass(frozen=True)
class ToolCall:
    """``arguments`` is JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def whole(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


def parse_call(text: str) -> ToolCall | None:
    """The call that ``text``, what stands between the tags, is; None when it is none."""
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return None
    arguments = said.get("arguments", said.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    return ToolCall(said["name"], json.dumps(arguments, ensure_ascii=False))


class ToolCallParser:
    """Divides an answer that comes in pieces into text and calls. What looks like a call but is none stays text."""

    def __init__(self) -> None:
        self._text = ""
        self.found = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text that is certainly no part of a call, and the calls that are complete."""
        self._text += text
        content, calls = "", list[ToolCall]()
        while (start := self._text.find(OPEN)) >= 0 and (close := self._text.find(CLOSE, start)) >= 0:
            end = close + len(CLOSE)
            call = parse_call(self._text[start + len(OPEN) : close])
            if call is None:
                content += self._text[:end]
            else:
                content += self._text[:start].rstrip()
                calls.append(call)
                self.found += 1
            self._text = self._text[end:]
        # held back: from a tag on, or what may become one, and the white space before either
        held = start if start >= 0 else len(self._text) - _overlap(self._text, OPEN)
        said = self._text[:held].rstrip()
        self._text = self._text[len(said) :]
        return content + said, calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was held back: no more text comes. A call whose end tag was cut off counts."""
        text, self._text = self._text, ""
        start = text.find(OPEN)
        call = parse_call(text[start + len(OPEN) :]) if start >= 0 else None
        if call is not None:
            self.found += 1
            return "", [call]
        return ("" if self.found and not text.strip() else text), []


def _overlap(text: str, tag: str) -> int:
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


def template_knows_calls(template: str) -> bool:
    return OPEN in template and "tools" in template


def written_out(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` for a template that knows no tools: they, calls and results as text of the three usual roles."""
    told = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            told.append({"role": "user", "content": text})
            continue
        content = message["content"] or ""
        for call in message.get("tool_calls", ()):
            said = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            content += f"\n{OPEN}\n{json.dumps(said, ensure_ascii=False)}\n{CLOSE}"
        told.append({"role": message["role"], "content": content.lstrip()})
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        instructions = _INSTRUCTIONS.format(tools=lines)
        if told and told[0]["role"] == "system":
            told[0] = {"role": "system", "content": f"{told[0]['content']}\n\n{instructions}"}
        else:
            told.insert(0, {"role": "system", "content": instructions})
    return told

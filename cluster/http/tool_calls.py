"""Tool calls as text: puts tools into the prompt, and parses calls in the answer.

The format is Hermes', which Qwen and others are trained on: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``.
If the model's chat template supports it, the template describes the tools, else a system message does.
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
    """A call that the model made. ``arguments`` is JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def whole(self) -> dict[str, Any]:
        """As an OpenAI object."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


def parse_call(text: str) -> ToolCall | None:
    """Parse the text between the tags; None if it is not a call."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    return ToolCall(call["name"], json.dumps(arguments, ensure_ascii=False))


class ToolCallParser:
    """Splits a streamed answer into text and calls. Tagged text that is not a valid call stays text."""

    def __init__(self) -> None:
        self._text = ""
        self.found = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Append ``text``; returns the text that can't be part of a call, and the calls that are complete."""
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
        possible_call = start if start >= 0 else len(self._text) - _overlap(self._text, OPEN)
        released = self._text[:possible_call].rstrip()
        self._text = self._text[len(released) :]
        return content + released, calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """End the answer; returns the text and calls that were held back. A call without its closing tag counts."""
        text, self._text = self._text, ""
        start = text.find(OPEN)
        call = parse_call(text[start + len(OPEN) :]) if start >= 0 else None
        if call is not None:
            self.found += 1
            return "", [call]
        return ("" if self.found and not text.strip() else text), []


def _overlap(text: str, tag: str) -> int:
    """Length of the longest beginning of ``tag`` that ``text`` ends with."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


def template_supports_tools(template: str) -> bool:
    """Whether a chat template describes tools and calls in this format."""
    return OPEN in template and "tools" in template


def tools_as_text(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` for a template without tools: tools, calls and results become text of system, assistant and user."""
    chat = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            chat.append({"role": "user", "content": text})
            continue
        content = message["content"] or ""
        for call in message.get("tool_calls", ()):
            function = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            content += f"\n{OPEN}\n{json.dumps(function, ensure_ascii=False)}\n{CLOSE}"
        chat.append({"role": message["role"], "content": content.lstrip()})
    if tools:
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        instructions = _INSTRUCTIONS.format(tools=lines)
        if chat and chat[0]["role"] == "system":
            chat[0] = {"role": "system", "content": f"{chat[0]['content']}\n\n{instructions}"}
        else:
            chat.insert(0, {"role": "system", "content": instructions})
    return chat

"""The body of a request → what workers are asked, or the answer: parsed, checked, laid out and tokenized.

All of it may take seconds for a large body, so it runs off the event loop: in a thread for a small body, in a process
for a large one (:mod:`.prompts`). What goes from process to process are frozen dataclasses.
"""

import json
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import jinja2
from pydantic import ValidationError

from forecache.cluster.config import DEFAULT_GRAMMAR_BYTES
from forecache.cluster.dispatch.choice_requests import EncodedPrompt
from forecache.cluster.errors import (
    ApiError,
    BodyTooLargeError,
    ContextLengthError,
    UnknownModelError,
    from_exception,
    shortened,
)
from forecache.cluster.http.openai_tools import Tool
from forecache.cluster.http.openai_types import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
)
from forecache.cluster.http.tool_calls import template_knows_calls, written_out
from forecache.workers.core.grammar import check_grammar
from forecache.workers.core.requests import CacheOptions, SamplingParams
from forecache.workers.errors import ForecacheError, InvalidRequestError

CHARS_PER_TOKEN = 16
"""More than any tokenizer makes of real text."""

PIECE_CHARS, SPLIT_TOKENS = 256 << 10, 16
"""A text that is surely too long is counted in pieces of so many characters; where it was split, that many tokens more
than in one piece are allowed for."""

# a string without an end takes the rest: else each of its escaped quotes would begin a string that is read to the end
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)


class Wanted(Enum):
    """What is to be made of a body: a request to workers, or an answer."""

    CHAT = "chat"
    COMPLETION = "completion"
    TOKENS = "tokens"
    TEXT = "text"


@dataclass(frozen=True)
class ReadRequest:
    """A chat or completion request without its text. ``scored``: log-probabilities are wanted; ``tools``: the answer
    may call some."""

    prompts: tuple[EncodedPrompt, ...]
    sampling: SamplingParams
    cache: CacheOptions
    per_prompt: int
    stream: bool
    include_usage: bool
    show_chunks: bool
    scored: bool
    tools: bool
    timeout_s: float | None


@dataclass(frozen=True)
class Refusal:
    """A request that is refused, as its client gets it."""

    said: ApiError


Outcome = ReadRequest | bytes | Refusal
"""A request to workers; or the JSON of an answer; or neither."""


class RequestReader:
    """Reads bodies for one model. Picklable with its tokenizer. Not for two threads at once: fast tokenizers are not
    safe to share.

    A body may have ``max_values`` JSON values: each takes memory and time, whatever it is.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_model_len: int,
        max_values: int,
        max_grammar_bytes: int = DEFAULT_GRAMMAR_BYTES,
    ) -> None:
        self.max_model_len = max_model_len
        self._tokenizer = tokenizer
        self._vocabulary = len(tokenizer)
        self._template_knows_calls = template_knows_calls(str(getattr(tokenizer, "chat_template", None) or ""))
        self._max_values = max_values
        self._max_grammar_bytes = max_grammar_bytes

    def outcome(self, wanted: Wanted, body: bytes | bytearray, served: str | None) -> Outcome:
        """As :meth:`read`, with what refuses it as a value: exceptions don't go well from process to process."""
        try:
            return self.read(wanted, body, served)
        except (ForecacheError, ValidationError) as error:
            return Refusal(from_exception(error))

    def read(self, wanted: Wanted, body: bytes | bytearray, served: str | None) -> ReadRequest | bytes:
        """What ``wanted`` says of ``body``. ``served``: the model that requests must name; None: any.

        Raises:
            BodyTooLargeError: more values than a body may have.
            InvalidRequestError: not UTF-8, not JSON; the chat template refuses the messages; a token id is out of the
                vocabulary; a schema is too long or costs too much.
            ValidationError: JSON, but not such a request.
            UnknownModelError: for another model.
            ContextLengthError: prompt and answer don't fit the context.
        """
        values = parse_json(body, self._max_values)
        match wanted:
            case Wanted.TOKENS:
                counted = TokenizeRequest.model_validate(values)
                _check_model(counted.model, served)
                tokens = self._tokenize(counted)
                said = {"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens.tolist()}
                return to_json(said)
            case Wanted.TEXT:
                told = DetokenizeRequest.model_validate(values)
                _check_model(told.model, served)
                self._check_vocabulary(told.tokens, "tokens")
                return to_json({"prompt": self._decode(told.tokens)})
        kind = ChatCompletionRequest if wanted is Wanted.CHAT else CompletionRequest
        request = kind.model_validate(values)
        _check_model(request.model, served)
        sampling = request.sampling(1, self._max_grammar_bytes)
        if sampling.grammar is not None:
            # before a worker has it: there it is compiled once more, with the tokenizer
            in_tools = isinstance(request, ChatCompletionRequest) and bool(request.tools_in_use)
            check_grammar(sampling.grammar, "tools" if in_tools else "response_format")
        return ReadRequest(
            prompts=tuple(self._encode(request)),
            sampling=sampling,
            cache=request.cache(),
            per_prompt=request.n or 1,
            stream=bool(request.stream),
            include_usage=request.include_usage,
            show_chunks=request.show_chunks,
            scored=request.logprobs_wanted() is not None,
            tools=isinstance(request, ChatCompletionRequest) and bool(request.tools_in_use),
            timeout_s=request.timeout_s,
        )

    def _encode(self, request: ChatCompletionRequest | CompletionRequest) -> list[EncodedPrompt]:
        wanted = request.answer_tokens()
        if isinstance(request, ChatCompletionRequest):
            text = self._templated(request.messages, request.tools_in_use)
            return [self._fitted(self._ids(text, "messages", add_special_tokens=False), wanted, "messages")]
        prompts = []
        for prompt in request.prompts():
            if isinstance(prompt, str):
                tokens, echo = self._ids(prompt, "prompt", add_special_tokens=True), prompt
            else:
                self._check_length(len(prompt), wanted, "prompt")
                self._check_vocabulary(prompt, "prompt")
                tokens, echo = array("i", prompt), self._decode(prompt) if request.echo else ""
            prompts.append(self._fitted(tokens, wanted, "prompt", echo if request.echo else None))
        return prompts

    def _fitted(self, tokens: "array[int]", wanted: int | None, param: str, echo: str | None = None) -> EncodedPrompt:
        if not tokens:
            raise InvalidRequestError(f"{param} has no tokens", param)
        room = self._check_length(len(tokens), wanted, param)
        return EncodedPrompt(tokens, room if wanted is None else wanted, echo)

    def _check_length(self, tokens: int, wanted: int | None, param: str) -> int:
        """Tokens that the context has left for an answer."""
        room = self.max_model_len - tokens
        if room < 1 or (wanted is not None and wanted > room):
            asked = f"{tokens} in the {param} and {wanted or 1} for the answer"
            raise self._too_long(f"{tokens + (wanted or 1)} were asked for: {asked}", param)
        return room

    def _tokenize(self, request: TokenizeRequest) -> "array[int]":
        if request.messages is not None:
            text = self._templated(request.messages, request.tools or [])
            return self._ids(text, "messages", add_special_tokens=False)
        return self._ids(request.prompt or "", "prompt", add_special_tokens=request.add_special_tokens)

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _check_vocabulary(self, tokens: Sequence[int], param: str) -> None:
        if (largest := max(tokens, default=0)) >= self._vocabulary:
            raise InvalidRequestError(
                f"{param} holds token id {largest}, but the vocabulary has {self._vocabulary} tokens", param
            )

    def _templated(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise InvalidRequestError(
                "this model has no chat template, so it takes no messages; use /v1/completions", "messages"
            )
        told, described = [message.for_template() for message in messages], [tool.for_template() for tool in tools]
        try:
            if not self._template_knows_calls:
                told, described = written_out(told, described), []
            text = self._tokenizer.apply_chat_template(
                told, tools=described or None, tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, LookupError, RecursionError, TypeError, ValueError) as error:
            # a template is a program over what the client sent: it may expect of it what is not so
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
        return str(text)

    def _too_long(self, asked: str, param: str) -> ContextLengthError:
        return ContextLengthError(f"the context is {self.max_model_len} tokens here, but {asked}", param)

    def _ids(self, text: str, param: str, *, add_special_tokens: bool) -> "array[int]":
        if len(text) > CHARS_PER_TOKEN * self.max_model_len:
            # tokenizing 64 MiB takes half a minute: most often a part tells enough
            tokens = 0
            for start in range(0, CHARS_PER_TOKEN * self.max_model_len, PIECE_CHARS):
                tokens += len(self._tokenized(text[start : start + PIECE_CHARS], add_special_tokens=False))
                if tokens > self.max_model_len + start // PIECE_CHARS * SPLIT_TOKENS:
                    raise self._too_long(f"the {param} alone hold more", param)
        return array("i", self._tokenized(text, add_special_tokens=add_special_tokens))

    def _tokenized(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # `verbose=False`: the tokenizer's own warning about long texts is our error
        encoded = self._tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        tokens: list[int] = encoded["input_ids"]
        return tokens


def parse_json(body: bytes | bytearray, max_values: int) -> Any:
    """The values that the JSON text ``body`` stands for.

    Raises:
        BodyTooLargeError: more than ``max_values`` of them.
        InvalidRequestError: not UTF-8, or not JSON.
    """
    if _most_values(body) > max_values and (values := _most_values(_STRING.sub(b"", body))) > max_values:
        raise BodyTooLargeError(
            f"the body holds {values} JSON values, each token id being one, and at most {max_values} are read: send "
            "fewer, or send prompts as text"
        )
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is not valid UTF-8: {error.reason} at byte {error.start}") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from error


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def _most_values(text: bytes | bytearray) -> int:
    """Each value but the first of all follows a comma or opens its array or object."""
    return 1 + text.count(b",") + text.count(b"[") + text.count(b"{")


def _check_model(name: str, served: str | None) -> None:
    if served is not None and name != served:
        raise UnknownModelError(f"the model {shortened(name)!r} does not exist here; {served!r} is served", "model")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

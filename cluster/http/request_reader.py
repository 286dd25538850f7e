"""Turns a request body into a request for workers: parses, validates, applies the chat template and tokenizes.

A large body may take seconds, so this runs off the event loop: in a thread for a small body, in a process for a large
one (:mod:`.prompts`). Messages between the processes are frozen dataclasses.
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
from forecache.cluster.http.tool_calls import template_supports_tools, tools_as_text
from forecache.workers.core.grammar import check_grammar
from forecache.workers.core.requests import CacheOptions, SamplingParams
from forecache.workers.errors import ForecacheError, InvalidRequestError

CHARS_PER_TOKEN = 16
"""More characters per token than real text has with any tokenizer."""

PIECE_CHARS, SPLIT_TOKENS = 256 << 10, 16
"""A very long text is tokenized in pieces of ``PIECE_CHARS`` until it exceeds the context. A split may add up to
``SPLIT_TOKENS`` tokens, which the limit allows for."""

# a string without a closing quote matches to the end: else the search would start again at each of its escaped quotes,
# in quadratic time
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)


class Wanted(Enum):
    """The kind of request that a body holds, by the path that it was sent to."""

    CHAT = "chat"
    COMPLETION = "completion"
    TOKENS = "tokens"
    TEXT = "text"


@dataclass(frozen=True)
class ReadJob:
    """How to read a body. ``served``: the model that the request must name; None: any."""

    wanted: Wanted
    served: str | None


@dataclass(frozen=True)
class ReadRequest:
    """A parsed and tokenized chat or completion request.

    ``scored``: the client wants log-probabilities. ``tools``: the answer may call tools.
    """

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
    priority: int


@dataclass(frozen=True)
class Refusal:
    """A request that is refused, with the error for its client."""

    error: ApiError


Outcome = ReadRequest | bytes | Refusal
"""A request for workers; or the JSON of the answer, for a request that needs no worker; or the error."""


class RequestReader:
    """Reads bodies for one model. Picklable, with its tokenizer. Not thread-safe, because fast tokenizers are not.

    A body may have ``max_values`` JSON values, because each of them, even an empty one, takes memory and time.
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
        self._template_supports_tools = template_supports_tools(str(getattr(tokenizer, "chat_template", None) or ""))
        self._max_values = max_values
        self._max_grammar_bytes = max_grammar_bytes

    def outcome(self, job: ReadJob, body: bytes | bytearray) -> Outcome:
        """:meth:`read`, with its errors as values: not all exceptions can be pickled."""
        try:
            return self.read(job, body)
        except (ForecacheError, ValidationError) as error:
            return Refusal(from_exception(error))

    def read(self, job: ReadJob, body: bytes | bytearray) -> ReadRequest | bytes:
        """Parse, validate and tokenize ``body``; returns the JSON of the answer for ``TOKENS`` and ``TEXT``.

        Raises:
            BodyTooLargeError: the body has more than ``max_values`` JSON values.
            InvalidRequestError: the body is not UTF-8 or not JSON; the chat template refuses the messages; a token id
                is out of the vocabulary; a schema is too long or too complex.
            ValidationError: the JSON is not a valid request.
            UnknownModelError: the request names another model.
            ContextLengthError: prompt and answer don't fit the context.
        """
        values, served = parse_json(body, self._max_values), job.served
        match job.wanted:
            case Wanted.TOKENS:
                text = TokenizeRequest.model_validate(values)
                _check_model(text.model, served)
                tokens = self._tokenize(text)
                return to_json({"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens.tolist()})
            case Wanted.TEXT:
                ids = DetokenizeRequest.model_validate(values)
                _check_model(ids.model, served)
                self._check_vocabulary(ids.tokens, "tokens")
                return to_json({"prompt": self._decode(ids.tokens)})
        kind = ChatCompletionRequest if job.wanted is Wanted.CHAT else CompletionRequest
        request = kind.model_validate(values)
        _check_model(request.model, served)
        sampling = request.sampling(1, self._max_grammar_bytes)
        if sampling.grammar is not None:
            # refuse a bad grammar here, before a worker compiles it with its tokenizer
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
            priority=request.priority or 0,
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
        """Returns how many tokens the context has left for the answer. Raises :class:`ContextLengthError`."""
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
        chat, described = [message.for_template() for message in messages], [tool.for_template() for tool in tools]
        try:
            if not self._template_supports_tools:
                chat, described = tools_as_text(chat, described), []
            text = self._tokenizer.apply_chat_template(
                chat, tools=described or None, tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, LookupError, RecursionError, TypeError, ValueError) as error:
            # templates are code, and may fail on unexpected client input
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
        return str(text)

    def _too_long(self, asked: str, param: str) -> ContextLengthError:
        return ContextLengthError(f"the context is {self.max_model_len} tokens here, but {asked}", param)

    def _ids(self, text: str, param: str, *, add_special_tokens: bool) -> "array[int]":
        if len(text) > CHARS_PER_TOKEN * self.max_model_len:
            # tokenizing 64 MiB takes half a minute; mostly the first pieces exceed the context already
            tokens = 0
            for start in range(0, CHARS_PER_TOKEN * self.max_model_len, PIECE_CHARS):
                tokens += len(self._tokenized(text[start : start + PIECE_CHARS], add_special_tokens=False))
                if tokens > self.max_model_len + start // PIECE_CHARS * SPLIT_TOKENS:
                    raise self._too_long(f"the {param} alone hold more", param)
        return array("i", self._tokenized(text, add_special_tokens=add_special_tokens))

    def _tokenized(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # `verbose=False`: the tokenizer would warn about long texts, which are refused with an error here
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
    """Parse the JSON text ``body``.

    Raises:
        BodyTooLargeError: it holds more than ``max_values`` values.
        InvalidRequestError: it is not UTF-8, or not JSON.
    """
    if _most_values(body) > max_values and (values := _most_values(_STRING.sub(b"", body))) > max_values:
        raise BodyTooLargeError(
            f"the body holds {values} JSON values (each token id is one), and at most {max_values} are accepted: send "
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
    """Compact JSON, UTF-8."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def _most_values(text: bytes | bytearray) -> int:
    """An upper bound of the number of JSON values in ``text``: each but the first follows a comma, ``[`` or ``{``."""
    return 1 + text.count(b",") + text.count(b"[") + text.count(b"{")


def _check_model(name: str, served: str | None) -> None:
    if served is not None and name != served:
        raise UnknownModelError(f"the model {shortened(name)!r} does not exist here; {served!r} is served", "model")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")

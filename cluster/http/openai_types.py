"""The requests and answers of OpenAI's API that are supported. Types are strict: ``"1"`` is not a number."""

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from forecache.cluster.config import DEFAULT_GRAMMAR_BYTES
from forecache.cluster.dispatch.choice_requests import SEED_LIMIT
from forecache.cluster.http.openai_tools import (
    MAX_TOOLS,
    ChosenFunction,
    MadeCall,
    ResponseFormat,
    Strict,
    Tool,
    ToolChoice,
    format_grammar,
    tools_grammar,
)
from forecache.workers.core.requests import CacheOptions, Policy, SamplingParams, SequenceStats
from forecache.workers.errors import InvalidRequestError

MAX_MESSAGES = 4096
MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_MODEL_CHARS = 256
MAX_STOP, MAX_STOP_CHARS = 4, 1024
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_WINDOW_STEPS = 65536
DEFAULT_PIN_S, MAX_PIN_S = 3600.0, 30 * 24 * 3600.0

# fields of OpenAI's API that have no effect here, with the values that are accepted and ignored; `...`: any value
_NEUTRAL: dict[str, Any] = {
    "user": ...,
    "metadata": ...,
    "store": (None, False),
    "safety_identifier": ...,
    "prompt_cache_key": ...,
    "service_tier": (None, "auto", "default"),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
}

PRIORITY_LIMIT = 2**31


def _encodable(text: str) -> str:
    """Refuse unpaired surrogates: JSON can contain them, but they are not Unicode, and tokenizers fail on them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds an unpaired surrogate, so it is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def _joined(content: Any) -> Any:
    """Join content that is a list of text parts; refuse other parts (images, audio) by name."""
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
    """Accept empty values only: official clients send back all fields of a message, also empty ones."""
    if value not in (None, [], {}, ""):
        raise ValueError("it is not supported; leave it out")


Unsaid = Annotated[None, BeforeValidator(_nothing)]


class SaidMessage(Strict):
    role: Literal["system", "developer", "user"]
    content: Content
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it. They have no ``developer`` role."""
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


class ForecacheOptions(Strict):
    """Options of forecache: how the request uses the KV cache, and its time limit.

    ``min_resident_tokens``: tokens that stay resident whatever ``keep_ratio`` is. ``window``: decode steps between two
    resident sets. ``show_chunks``: the stream also reports where chunks are.
    """

    policy: Policy | None = None
    keep_ratio: float | None = Field(None, gt=0, le=1)
    min_resident_tokens: int | None = Field(None, ge=0)
    window: int | None = Field(None, ge=1, le=MAX_WINDOW_STEPS)
    cache_salt: Text = Field("", max_length=1024)
    session_id: Annotated[Text, Field(min_length=1, max_length=256)] | None = None
    timeout_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    show_chunks: bool = False


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def _stop_tuple(stop: Any) -> Any:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop


def _bounded(biases: Any) -> Any:
    """Check the number of entries before pydantic validates each: dictionaries have no ``fail_fast``."""
    if isinstance(biases, dict) and len(biases) > MAX_LOGIT_BIAS:
        raise ValueError(f"at most {MAX_LOGIT_BIAS} tokens can have a bias, not {len(biases)}")
    return biases


Penalty = Annotated[float | None, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenText = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]

ModelName = Annotated[str, Field(max_length=MAX_MODEL_CHARS)]


class _Request(Strict):
    model: ModelName
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0)
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    logit_bias: Annotated[dict[TokenText, Bias] | None, BeforeValidator(_bounded)] = Field(
        None, max_length=MAX_LOGIT_BIAS
    )
    seed: int | None = Field(None, ge=-SEED_LIMIT, lt=SEED_LIMIT)
    stop: Annotated[tuple[Stop, ...], BeforeValidator(_stop_tuple)] = Field((), max_length=MAX_STOP, fail_fast=True)
    response_format: ResponseFormat | None = None
    ignore_eos: bool = False
    priority: int | None = Field(None, ge=-PRIORITY_LIMIT, lt=PRIORITY_LIMIT)
    forecache: ForecacheOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        """Remove fields that have no effect here; refuse values that ask for something unsupported, by name."""
        if not isinstance(values, dict):
            raise InvalidRequestError("the body must be a JSON object")
        kept = {}
        for name, value in values.items():
            neutral = _NEUTRAL.get(name)
            if neutral is None:
                kept[name] = value
            elif neutral is not ... and value not in neutral:
                message = f"{name} is not supported with the value {repr(value)[:80]}; leave it out"
                raise InvalidRequestError(message, name)
        return kept

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed with stream: true", "stream_options")
        if self.show_chunks and not self.stream:
            raise InvalidRequestError("show_chunks is only allowed with stream: true", "forecache.show_chunks")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def show_chunks(self) -> bool:
        return self.forecache is not None and self.forecache.show_chunks

    @property
    def timeout_s(self) -> float | None:
        return None if self.forecache is None else self.forecache.timeout_s

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are wanted too."""
        return False

    def answer_tokens(self) -> int | None:
        """Tokens of the answer at most; None: until the context is full."""
        return self.max_tokens

    def logprobs_wanted(self) -> int | None:
        """Number of likeliest tokens to return with each drawn token; None: return no log-probabilities."""
        raise NotImplementedError

    def grammar(self, max_bytes: int) -> str | None:
        """The grammar that the answer must follow, if any.

        Raises :class:`InvalidRequestError` if the schemas have more than ``max_bytes`` bytes.
        """
        return format_grammar(self.response_format, max_bytes)

    def sampling(self, max_tokens: int, max_grammar_bytes: int = DEFAULT_GRAMMAR_BYTES) -> SamplingParams:
        """The sampling parameters, with OpenAI's defaults. Without a seed it draws one, for failovers to reuse."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=secrets.randbits(63) if self.seed is None else self.seed % SEED_LIMIT,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
            logprobs=self.logprobs_wanted(),
            grammar=self.grammar(max_grammar_bytes),
            prompt_logprobs=self.scores_prompt,
        )

    def cache(self) -> CacheOptions:
        options = self.forecache or ForecacheOptions()
        return CacheOptions(
            options.policy,
            options.keep_ratio,
            options.cache_salt,
            options.session_id,
            options.window,
            options.min_resident_tokens,
        )


class ChatCompletionRequest(_Request):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs is only allowed with logprobs: true", "top_logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise InvalidRequestError("two tools have the same name", "tools")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequestError("tool_choice needs tools to choose from", "tool_choice")
        if isinstance(self.tool_choice, ChosenFunction) and self.tool_choice.function.name not in names:
            raise InvalidRequestError(f"there is no tool named {self.tool_choice.function.name!r}", "tool_choice")
        if self.tools_in_use and self.response_format is not None and self.response_format.type != "text":
            raise InvalidRequestError(
                "response_format can't be followed by an answer that may call tools; use tool_choice: none",
                "response_format",
            )
        return self

    @property
    def tools_in_use(self) -> list[Tool]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    def answer_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def logprobs_wanted(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    def grammar(self, max_bytes: int) -> str | None:
        if self.tools_in_use:
            parallel = self.parallel_tool_calls is not False
            return tools_grammar(self.tools_in_use, self.tool_choice or "auto", parallel=parallel, max_bytes=max_bytes)
        return super().grammar(max_bytes)


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[Text, Field(min_length=1)]
# `fail_fast`: otherwise pydantic would make a million errors for a million wrong elements
Prompts = Annotated[list[Prompt], Field(fail_fast=True)] | Annotated[list[TokenIds], Field(fail_fast=True)]


class TokenizeRequest(Strict):
    """Tokenize a prompt, or messages by the chat template."""

    model: ModelName
    prompt: Prompt | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")
        return self


class DetokenizeRequest(Strict):
    model: ModelName
    tokens: list[TokenId] = Field(max_length=1 << 20, fail_fast=True)


class PinRequest(Strict):
    """The body of ``POST /v1/sessions/{id}``: pin the session's chunks for ``ttl_s`` seconds."""

    ttl_s: float = Field(DEFAULT_PIN_S, gt=0, le=MAX_PIN_S, allow_inf_nan=False)


class CompletionRequest(_Request):
    prompt: Prompt | TokenIds | Annotated[Prompts, Field(min_length=1, max_length=MAX_PROMPTS)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.prompts()) * (self.n or 1) > MAX_PROMPTS:
            raise InvalidRequestError(f"n times the prompts are more than {MAX_PROMPTS} answers", "n")
        return self

    @property
    def scores_prompt(self) -> bool:
        return bool(self.echo) and self.logprobs is not None

    def answer_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    def logprobs_wanted(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


def usage(stats: SequenceStats) -> dict[str, Any]:
    """OpenAI's ``usage`` object; its ``forecache`` part describes the request's context (sizes in bytes)."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.cached_tokens},
        "forecache": {
            "context_chunks": stats.context_chunks,
            "resident_chunks": stats.resident_chunks,
            "recalled_chunks": stats.recalled_chunks,
            "late_windows": stats.late_windows,
            "keep_ratio": stats.keep_ratio,
            "coverage": stats.coverage,
            "fallbacks": stats.fallbacks,
            "context_bytes": stats.context_bytes,
            "resident_bytes": stats.resident_bytes,
            "queue_s": stats.queue_s,
            "locate_s": stats.locate_s,
            "time_to_first_token_s": stats.time_to_first_token_s,
        },
    }


def model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "forecache"}

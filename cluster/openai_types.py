"""Requests and answers of OpenAI's API, as far as they are served. Types are strict: ``"1"`` is no number."""

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from forecache.workers.decode.messages import CacheOptions, Policy, SamplingParams, SequenceStats
from forecache.workers.errors import InvalidRequestError

_SEED_LIMIT = 2**63

# OpenAI's fields that ask for nothing here, with the values that ask for nothing. `...` takes any value.
_NEUTRAL: dict[str, Any] = {
    "user": ...,
    "metadata": ...,
    "store": (None, False),
    "safety_identifier": ...,
    "prompt_cache_key": ...,
    "service_tier": (None, "auto", "default"),
    "n": (None, 1),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": ...,
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
}


def _encodable(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which are no text: no tokenizer takes them."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds an unpaired surrogate, so it is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


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


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined)]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates take it; they know no ``developer``."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ForecacheOptions(_Strict):
    """A request's wishes for its KV cache."""

    policy: Policy | None = None
    keep_ratio: float | None = Field(None, gt=0, le=1)
    cache_salt: Text = ""


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def _stop_tuple(stop: Any) -> Any:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop


class _Request(_Strict):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-_SEED_LIMIT, lt=_SEED_LIMIT)
    stop: Annotated[tuple[Annotated[Text, Field(min_length=1)], ...], BeforeValidator(_stop_tuple)] = Field(
        (), max_length=4
    )
    ignore_eos: bool = False
    forecache: ForecacheOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        """Takes out fields that ask for nothing; one that asks for something not offered is refused by name."""
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
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def answer_tokens(self) -> int | None:
        """Most tokens of the answer; None is as many as the context takes."""
        return self.max_tokens

    def sampling(self, max_tokens: int) -> SamplingParams:
        """OpenAI's defaults; a seed is drawn where none is given, so that a resumed stream goes on the same."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=secrets.randbits(63) if self.seed is None else self.seed % _SEED_LIMIT,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
        )

    def cache(self) -> CacheOptions:
        options = self.forecache or ForecacheOptions()
        return CacheOptions(options.policy, options.keep_ratio, options.cache_salt)


class ChatCompletionRequest(_Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def answer_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class CompletionRequest(_Request):
    prompt: Text | list[TokenId] | list[Text]

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if not self.prompt:
            raise InvalidRequestError("prompt must not be empty", "prompt")
        if isinstance(self.prompt, list) and len(self.prompt) > 1 and isinstance(self.prompt[0], str):
            raise InvalidRequestError(
                "prompt: one prompt a request; send several requests, they are batched together", "prompt"
            )
        return self

    def answer_tokens(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    def prompt_text(self) -> str | None:
        """The prompt as text, or None when it is token ids."""
        if isinstance(self.prompt, str):
            return self.prompt
        return self.prompt[0] if isinstance(self.prompt[0], str) else None


def usage(stats: SequenceStats) -> dict[str, Any]:
    """OpenAI's ``usage`` and, under ``forecache``, the request's account of its context (sizes in bytes)."""
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
            "time_to_first_token_s": stats.time_to_first_token_s,
        },
    }


def model_object(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "forecache"}

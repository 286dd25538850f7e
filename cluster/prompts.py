"""Request → token ids: chat template, tokenizer, and whether the context takes it."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import jinja2

from forecache.cluster.errors import ContextLengthError
from forecache.cluster.logprobs import TokenTexts
from forecache.cluster.openai_messages import Message
from forecache.cluster.openai_tools import Tool
from forecache.cluster.openai_types import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from forecache.cluster.tool_calls import template_knows_calls, written_out
from forecache.workers.decode.grammar import Grammars
from forecache.workers.errors import InvalidRequestError

T = TypeVar("T")

CHARS_PER_TOKEN = 16
"""More than any tokenizer makes of real text."""


@dataclass(frozen=True)
class EncodedPrompt:
    """``max_tokens``: most tokens of each answer to it; ``echo``: its text, where the answer is to repeat it."""

    token_ids: tuple[int, ...]
    max_tokens: int
    echo: str | None = None


class PromptEncoder:
    """Tokenizes off the event loop. One thread: fast tokenizers are not safe to share between threads."""

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = len(tokenizer)
        self._template_knows_calls = template_knows_calls(str(getattr(tokenizer, "chat_template", None) or ""))
        self._grammars = Grammars(tokenizer, frozenset())
        self.max_model_len = max_model_len
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def encode(self, request: ChatCompletionRequest | CompletionRequest) -> list[EncodedPrompt]:
        """The request's prompts: one, but for completions that bring several.

        Raises:
            InvalidRequestError: the chat template refuses the messages, or a token id is out of the vocabulary.
            ContextLengthError: prompt and answer don't fit the context.
        """
        return await self._in_thread(lambda: self._encode(request))

    async def tokenize(self, request: TokenizeRequest) -> list[int]:
        """The token ids of a prompt or of messages, as :meth:`encode` makes them. Raises as it does."""
        return list(await self._in_thread(lambda: self._tokenize(request)))

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """The text of token ids.

        Raises:
            InvalidRequestError: one is out of the vocabulary.
        """
        self._check_vocabulary(request.tokens, "tokens")
        return await self._in_thread(lambda: self._decode(request.tokens))

    async def token_texts(self) -> TokenTexts:
        """The bytes of each token, to be asked for later and on any thread."""
        tokenizer = await self._in_thread(lambda: self._grammars.tokenizer)
        return lambda token: bytes(tokenizer.decode_bytes([token]))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

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
                self._check_vocabulary(prompt, "prompt")
                tokens, echo = tuple(prompt), self._decode(prompt) if request.echo else ""
            prompts.append(self._fitted(tokens, wanted, "prompt", echo if request.echo else None))
        return prompts

    def _fitted(
        self, tokens: tuple[int, ...], wanted: int | None, param: str, echo: str | None = None
    ) -> EncodedPrompt:
        if not tokens:
            raise InvalidRequestError(f"{param} has no tokens", param)
        room = self.max_model_len - len(tokens)
        if room < 1 or (wanted is not None and wanted > room):
            asked = f"{len(tokens)} in the {param} and {wanted or 1} for the answer"
            raise self._too_long(f"{len(tokens) + (wanted or 1)} were asked for: {asked}", param)
        return EncodedPrompt(tokens, room if wanted is None else wanted, echo)

    def _tokenize(self, request: TokenizeRequest) -> tuple[int, ...]:
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

    def _ids(self, text: str, param: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        beginning = text[: CHARS_PER_TOKEN * self.max_model_len]
        if len(beginning) < len(text):
            # tokenizing 64 MiB takes half a minute, in which nobody else gets tokens: most often a part tells enough
            tokens = len(self._tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"])
            if tokens > self.max_model_len:
                raise self._too_long(f"the {param} alone has more than {tokens - 1}", param)
        # `verbose=False`: the tokenizer's own warning about long texts is our error
        encoded = self._tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return tuple(encoded["input_ids"])

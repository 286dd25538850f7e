"""Request → token ids: chat template, tokenizer, and whether the context takes it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2

from forecache.cluster.errors import ContextLengthError
from forecache.cluster.openai_types import ChatCompletionRequest, CompletionRequest
from forecache.workers.errors import InvalidRequestError

CHARS_PER_TOKEN = 16
"""More than any tokenizer makes of real text."""


class PromptEncoder:
    """Tokenizes off the event loop. One thread: fast tokenizers are not safe to share between threads."""

    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = len(tokenizer)
        self.max_model_len = max_model_len
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def encode(self, request: ChatCompletionRequest | CompletionRequest) -> tuple[tuple[int, ...], int]:
        """(prompt token ids, most tokens of the answer).

        Raises:
            InvalidRequestError: the chat template refuses the messages, or a token id is out of the vocabulary.
            ContextLengthError: prompt and answer don't fit the context.
        """
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(self._thread, self._tokens, request)
        param = "messages" if isinstance(request, ChatCompletionRequest) else "prompt"
        if not tokens:
            raise InvalidRequestError(f"{param} has no tokens", param)
        room = self.max_model_len - len(tokens)
        wanted = request.answer_tokens()
        if room < 1 or (wanted is not None and wanted > room):
            asked = f"{len(tokens)} in the {param} and {wanted or 1} for the answer"
            raise self._too_long(f"{len(tokens) + (wanted or 1)} were asked for: {asked}", param)
        return tokens, room if wanted is None else wanted

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _tokens(self, request: ChatCompletionRequest | CompletionRequest) -> tuple[int, ...]:
        if isinstance(request, ChatCompletionRequest):
            return self._ids(self._templated(request), "messages", add_special_tokens=False)
        text = request.prompt_text()
        if text is not None:
            return self._ids(text, "prompt", add_special_tokens=True)
        tokens = tuple(token for token in request.prompt if isinstance(token, int))
        if (largest := max(tokens)) >= self._vocabulary:
            raise InvalidRequestError(
                f"prompt holds token id {largest}, but the vocabulary has {self._vocabulary} tokens", "prompt"
            )
        return tokens

    def _templated(self, request: ChatCompletionRequest) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise InvalidRequestError(
                "this model has no chat template, so it takes no messages; use /v1/completions", "messages"
            )
        messages = [message.for_template() for message in request.messages]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
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

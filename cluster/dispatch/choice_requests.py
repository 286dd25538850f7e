"""The requests that one HTTP request sends to workers: one for each choice."""

from array import array
from dataclasses import dataclass, replace

from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams

SEED_LIMIT = 2**63
_SEED_STEP = 0x9E3779B97F4A7C15
"""Distance between the seeds of a request's choices: odd, and near 2⁶⁴ divided by the golden ratio."""


def seed_of_choice(seed: int, number: int) -> int:
    """The seed of a prompt's choice ``number``. Choice 0 gets the request's own seed, as if it were the only one."""
    return (seed + number * _SEED_STEP) % SEED_LIMIT


@dataclass(frozen=True)
class EncodedPrompt:
    """A tokenized prompt.

    ``token_ids`` are int32, since long prompts are sent between processes. ``max_tokens`` limits each answer.
    ``echo`` is the prompt's text if the answer repeats it.
    """

    token_ids: "array[int]"
    max_tokens: int
    echo: str | None = None


@dataclass(frozen=True)
class ChoiceRequests:
    """``per_prompt`` choices for each of ``prompts``. Choice ``i`` answers prompt ``i // per_prompt``.

    A choice's request is built when the choice is opened: for a thousand choices at once this would block the event
    loop. ``traceparent`` is the W3C span that the workers' spans belong to; empty without tracing.
    """

    request_id: str
    prompts: tuple[EncodedPrompt, ...]
    per_prompt: int
    sampling: SamplingParams
    cache: CacheOptions
    show_chunks: bool = False
    traceparent: str = ""
    priority: int = 0

    @property
    def count(self) -> int:
        """Number of choices."""
        return len(self.prompts) * self.per_prompt

    def choice(self, index: int) -> GenerateRequest:
        """The request for choice ``index``."""
        at, number = divmod(index, self.per_prompt)
        prompt = self.prompts[at]
        return GenerateRequest(
            self.request_id if self.count == 1 else f"{self.request_id}-{index}",
            tuple(prompt.token_ids),
            replace(self.sampling, max_tokens=prompt.max_tokens, seed=seed_of_choice(self.sampling.seed, number)),
            self.cache,
            show_chunks=self.show_chunks,
            traceparent=self.traceparent,
            priority=self.priority,
        )

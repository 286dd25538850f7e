"""What crosses the line between the HTTP side and the engine. Frozen, picklable, free of torch and Ray."""

from dataclasses import dataclass, field
from typing import Literal

from forecache.workers.errors import InvalidRequestError, OverloadedError

FinishReason = Literal["stop", "length", "cancelled", "error"]
Policy = Literal["lookahead", "recency", "random", "full"]

SIGN_OF_LIFE_S = 10.0
"""So often a request of which there is no other news hears that its worker gets on, or that no worker has taken it."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. Greedy when ``temperature`` is 0.

    ``seed`` makes sampling reproducible: the random number used for a token is a pure function of
    (seed, position), whatever else is in the batch.

    The penalties are OpenAI's, over the answer's own tokens: a token that came ``c`` times before loses
    ``frequency_penalty · c + presence_penalty · (c > 0)`` of its logit. ``logit_bias`` has (token id, what to add).
    ``logprobs`` asks for each token's log-probability and for those of that many likeliest tokens, all as the model
    gave them: before biases, penalties, masks and temperature; ``prompt_logprobs`` asks for the same of the prompt's
    tokens, and of the token that ends the answer. ``grammar`` is llguidance's; the answer follows it.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    grammar: str | None = None
    prompt_logprobs: bool = False


@dataclass(frozen=True)
class CacheOptions:
    """A request's wishes for its KV cache; ``None`` takes the server's setting.

    Requests of one ``session_id`` also share chunks that were decoded over partial resident sets.
    """

    policy: Policy | None = None
    keep_ratio: float | None = None
    cache_salt: str = ""
    session_id: str | None = None
    window_steps: int | None = None


@dataclass(frozen=True)
class GenerateRequest:
    """``resume_token_ids``: the beginning of the answer, which another worker has made; events tell what follows it.
    ``show_chunks``: they also tell where its chunks are.

    ``traceparent``: the span (W3C) that the worker's own belongs to; empty: not traced. ``client_id``: whose channel
    may bring its events; empty: they come by the call that brought the request.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    cache: CacheOptions = field(default_factory=CacheOptions)
    resume_token_ids: tuple[int, ...] = ()
    show_chunks: bool = False
    traceparent: str = ""
    client_id: str = ""


@dataclass(frozen=True)
class ChunkView:
    """Where a request's chunks are: a letter each in ``states``, see :mod:`.chunk_states`. ``keep_ratio`` is that of
    the coming step, ``coverage`` the mean so far, as in :class:`SequenceStats`."""

    states: str
    keep_ratio: float
    coverage: float | None


@dataclass(frozen=True)
class SequenceStats:
    """One request's account of its context. Sizes in bytes, times in seconds.

    ``context_chunks`` counts all chunks of the sequence, ``resident_chunks`` those its last step could read,
    ``recalled_chunks`` the cold → hot copies made for it, ``keep_ratio`` the mean over decode steps of
    resident / context chunks, ``coverage`` the mean share of retrieval-event mass on resident chunks over the
    boundaries at which there were events (``None``: none, or not measured), ``fallbacks`` how often
    low coverage doubled its budget. ``queue_s`` ends with prefill's beginning; ``locate_s`` is its last part, in which
    the stored prefix is looked for, and brought here if it lies on other nodes.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    context_chunks: int = 0
    resident_chunks: int = 0
    recalled_chunks: int = 0
    late_windows: int = 0
    keep_ratio: float = 1.0
    coverage: float | None = None
    fallbacks: int = 0
    context_bytes: int = 0
    resident_bytes: int = 0
    queue_s: float = 0.0
    locate_s: float = 0.0
    time_to_first_token_s: float = 0.0


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of a token that was drawn, and (token id, log-probability) of the likeliest, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """One step's news of one request: new tokens and the text they complete (possibly none yet).

    The last event of a request has ``finish_reason`` and ``stats``; ``error`` goes with ``finish_reason="error"``.
    ``logprobs``, where they were asked for, are of the tokens that are part of the text: not of one that ends it.
    ``prompt_logprobs``, where they were, come with the first token: of the prompt's tokens but the first.
    ``view``: where its chunks are, if that is wanted and has changed.
    ``position`` is the number of answer tokens before these. ``overloaded``: the error is a want of room;
    ``too_large``: there would be none for the request were all memory free;
    ``chunks_lost``: it is that stored chunks of the request were lost again and again; ``non_finite``: it is that the
    model computed infinity or no number. ``waiting``: nothing is new but that the worker gets on, with a long step or
    other requests, or that the request waits for a worker.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    stats: SequenceStats | None = None
    error: str | None = None
    prefill_tokens_done: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    position: int = 0
    overloaded: bool = False
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    view: ChunkView | None = None
    chunks_lost: bool = False
    non_finite: bool = False
    too_large: bool = False
    waiting: bool = False


@dataclass(frozen=True)
class Accepted:
    """A request has come to this worker."""

    worker_id: str


@dataclass(frozen=True)
class Moved:
    """A request's further events come by this channel."""

    channel_id: str


@dataclass(frozen=True)
class Refused:
    """The worker does not take the request, for a reason that is no failure of the worker."""

    error: InvalidRequestError | OverloadedError


RequestNews = Accepted | Moved | Refused | TokenEvent
"""What the call that brought a request says."""


@dataclass(frozen=True)
class ChannelRequest:
    """Asks a worker for the events of all requests that the client has there, or will have while any of them lasts."""

    client_id: str
    channel_id: str
    worker_id: str


@dataclass(frozen=True)
class EventBatch:
    """Events of several requests of one client, those of a request in order."""

    events: tuple[TokenEvent, ...]

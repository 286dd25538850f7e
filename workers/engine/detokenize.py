"""From tokens to what a client reads: text, why an answer ended, and its account."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from forecache.workers.core.requests import FinishReason, TokenEvent, TokenLogprobs
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Sampled
from forecache.workers.engine.counters import sequence_stats
from forecache.workers.errors import InvalidRequestError
from forecache.workers.models.tokenizer import Detokenizer
from forecache.workers.residency.window import WindowCycle


@dataclass(frozen=True)
class News:
    """What a step brought a request: tokens, the text that can be sent now, and, if that was all, why."""

    tokens: tuple[int, ...] = ()
    text: str = ""
    reason: FinishReason | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    overloaded: bool = False
    too_large: bool = False
    chunks_lost: bool = False
    non_finite: bool = False


NOTHING_NEW = News()


class Answers:
    """The answers under way. ``eos`` are the token ids that end one; ``chunk_bytes`` are for the account, ``view``
    tells those who watch where chunks are."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        eos: frozenset[int],
        chunk_bytes: int,
        windows: WindowCycle,
    ) -> None:
        self._tokenizer = tokenizer
        self._eos = eos
        self._chunk_bytes = chunk_bytes
        self._windows = windows
        self._detokenizers: dict[str, Detokenizer] = {}

    def begin(self, seq: TokenSequence) -> None:
        """An answer begins, behind the tokens that another worker has made.

        Raises :class:`InvalidRequestError` where its grammar does not allow those; then nothing is kept of it.
        """
        detokenizer = Detokenizer(self._tokenizer, seq.sampling.stop)
        for token in seq.request.resume_token_ids:
            detokenizer.push(token)  # its text is out already
            if seq.matcher is not None:
                seq.matcher.advance(token)
        self._detokenizers[seq.request_id] = detokenizer

    def forget(self, seq: TokenSequence) -> None:
        """``seq`` does not go on."""
        del self._detokenizers[seq.request_id]

    def push(self, seq: TokenSequence, drawn: Sampled) -> News:
        """A token was drawn for ``seq`` and stands last in its tokens."""
        token, detokenizer = drawn.token, self._detokenizers[seq.request_id]
        logprobs = () if drawn.logprobs is None else (drawn.logprobs,)
        if token in self._eos and not seq.sampling.ignore_eos:
            told = logprobs if seq.sampling.prompt_logprobs else ()
            return News((token,), detokenizer.flush(), "stop", logprobs=told)
        text = detokenizer.push(token)
        try:
            complete = seq.matcher is not None and seq.matcher.advance(token)
        except InvalidRequestError as error:
            return News((token,), text, "error", str(error))
        if detokenizer.stopped or complete:
            return News((token,), text + detokenizer.flush(), "stop", logprobs=logprobs)
        if len(seq.token_ids) >= seq.max_len:
            return News((token,), text + detokenizer.flush(), "length", logprobs=logprobs)
        return News((token,), text, logprobs=logprobs)

    def event(self, seq: TokenSequence, news: News = NOTHING_NEW) -> TokenEvent:
        """``seq`` goes on."""
        done = min(seq.num_computed, seq.prompt_len)
        return TokenEvent(
            seq.request_id,
            news.tokens,
            news.text,
            prefill_tokens_done=done,
            logprobs=news.logprobs,
            position=len(seq.output_ids) - len(news.tokens),
            prompt_logprobs=_prompt_logprobs(seq, news),
            view=self._windows.view(seq),
        )

    def end(self, seq: TokenSequence, reason: FinishReason, news: News) -> TokenEvent:
        """``seq`` is over."""
        self.forget(seq)
        return TokenEvent(
            seq.request_id,
            news.tokens,
            news.text,
            reason,
            sequence_stats(seq, self._chunk_bytes),
            news.error,
            seq.num_computed,
            news.logprobs,
            position=len(seq.output_ids) - len(news.tokens),
            overloaded=news.overloaded,
            too_large=news.too_large,
            chunks_lost=news.chunks_lost,
            non_finite=news.non_finite,
            prompt_logprobs=_prompt_logprobs(seq, news),
            view=self._windows.view(seq),
        )


def _prompt_logprobs(seq: TokenSequence, news: News) -> tuple[TokenLogprobs, ...]:
    return seq.take_prompt_logprobs() if seq.scores_prompt and news.tokens else ()

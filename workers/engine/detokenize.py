"""From tokens to what a client reads: text, why an answer ended, and what it used."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from forecache.workers.core.requests import FinishReason, TokenEvent, TokenLogprobs
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Sampled
from forecache.workers.engine.counters import sequence_stats
from forecache.workers.errors import InvalidRequestError
from forecache.workers.residency.window import WindowCycle

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer returns for bytes that are not a whole character."""


@dataclass(frozen=True)
class Output:
    """What one step adds to an answer: tokens, the text that can be sent, and, if it was the last, why.

    The flags say what kind of ``error`` ended it; see :class:`TokenEvent`.
    """

    tokens: tuple[int, ...] = ()
    text: str = ""
    reason: FinishReason | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    overloaded: bool = False
    too_large: bool = False
    chunks_lost: bool = False
    non_finite: bool = False


NO_OUTPUT = Output()


class Detokenizer:
    """Turns the tokens of one answer into pieces of text, and ends at stop strings.

    A piece is held back while it ends within a character, or in what may become a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._start = 0
        self._read = 0
        self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that ``token`` completes; after a stop string always empty, see ``stopped``."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._tokens.append(token)
        # tokens before `_start` can't change the text of later ones; the text of those before `_read` was returned
        old = self._decode(self._tokens[self._start : self._read])
        new = self._decode(self._tokens[self._start :])
        if new.endswith(INCOMPLETE) or len(new) <= len(old):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._emit(new[len(old) :])

    def flush(self) -> str:
        """The text that was held back, after the last token."""
        if self._tokenizer is None or self.stopped:
            return ""
        old = self._decode(self._tokens[self._start : self._read])
        rest = self._decode(self._tokens[self._start :])[len(old) :]
        self._start = self._read = len(self._tokens)
        text = self._emit(rest) if rest else ""
        text, self._pending = text + ("" if self.stopped else self._pending), ""
        return text

    def _decode(self, tokens: list[int]) -> str:
        assert self._tokenizer is not None
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _emit(self, text: str) -> str:
        text = self._pending + text
        self._pending = ""
        cut = min((at for at in (text.find(stop) for stop in self._stop) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            return text[:cut]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        if held:
            text, self._pending = text[:-held], text[-held:]
        return text


class OutputProcessor:
    """Makes the events of all requests of one engine.

    Args:
        eos: token ids that end an answer.
        chunk_bytes: bytes of a chunk in the hot pool, for the requests' statistics.
        windows: knows where the chunks are, for clients that watch them.
    """

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

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def begin(self, seq: TokenSequence) -> None:
        """Begin the answer of ``seq``, after the tokens that another worker has made.

        Raises :class:`InvalidRequestError` if its grammar does not allow those tokens; then nothing is kept.
        """
        detokenizer = Detokenizer(self._tokenizer, seq.sampling.stop)
        for token in seq.request.resume_token_ids:
            detokenizer.push(token)  # the client has this text
            if seq.matcher is not None:
                seq.matcher.advance(token)
        self._detokenizers[seq.request_id] = detokenizer

    def forget(self, seq: TokenSequence) -> None:
        """Drop the answer of ``seq``."""
        del self._detokenizers[seq.request_id]

    def push(self, seq: TokenSequence, drawn: Sampled) -> Output:
        """The output of a token that was drawn for ``seq`` and appended to its tokens."""
        token, detokenizer = drawn.token, self._detokenizers[seq.request_id]
        logprobs = () if drawn.logprobs is None else (drawn.logprobs,)
        if token in self._eos and not seq.sampling.ignore_eos:
            last = logprobs if seq.sampling.prompt_logprobs else ()
            return Output((token,), detokenizer.flush(), "stop", logprobs=last)
        text = detokenizer.push(token)
        try:
            complete = seq.matcher is not None and seq.matcher.advance(token)
        except InvalidRequestError as error:
            return Output((token,), text, "error", str(error))
        if detokenizer.stopped or complete:
            return Output((token,), text + detokenizer.flush(), "stop", logprobs=logprobs)
        if len(seq.token_ids) >= seq.max_len:
            return Output((token,), text + detokenizer.flush(), "length", logprobs=logprobs)
        return Output((token,), text, logprobs=logprobs)

    def event(self, seq: TokenSequence, output: Output = NO_OUTPUT) -> TokenEvent:
        """The event of a request that continues."""
        done = min(seq.num_computed, seq.prompt_len)
        return TokenEvent(
            seq.request_id,
            output.tokens,
            output.text,
            prefill_tokens_done=done,
            logprobs=output.logprobs,
            position=len(seq.output_ids) - len(output.tokens),
            prompt_logprobs=_prompt_logprobs(seq, output),
            view=self._windows.view(seq),
        )

    def end(self, seq: TokenSequence, reason: FinishReason, output: Output) -> TokenEvent:
        """The last event of a request; drops its answer."""
        self.forget(seq)
        return TokenEvent(
            seq.request_id,
            output.tokens,
            output.text,
            reason,
            sequence_stats(seq, self._chunk_bytes),
            output.error,
            seq.num_computed,
            output.logprobs,
            position=len(seq.output_ids) - len(output.tokens),
            overloaded=output.overloaded,
            too_large=output.too_large,
            chunks_lost=output.chunks_lost,
            non_finite=output.non_finite,
            prompt_logprobs=_prompt_logprobs(seq, output),
            view=self._windows.view(seq),
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _prompt_logprobs(seq: TokenSequence, output: Output) -> tuple[TokenLogprobs, ...]:
    return seq.take_prompt_logprobs() if seq.scores_prompt and output.tokens else ()

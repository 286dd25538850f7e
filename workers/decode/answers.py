"""From tokens to what a client reads: text, why an answer ended, and its account."""

from transformers import PreTrainedTokenizerBase

from forecache.workers.decode.accounting import sequence_stats
from forecache.workers.decode.messages import FinishReason, TokenEvent
from forecache.workers.decode.sequence import Sequence
from forecache.workers.decode.tokenizer import Detokenizer


class Answers:
    """The answers under way. ``eos`` are the token ids that end one; ``chunk_bytes`` are for the account."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, eos: frozenset[int], chunk_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._eos = eos
        self._chunk_bytes = chunk_bytes
        self._detokenizers: dict[str, Detokenizer] = {}

    def begin(self, seq: Sequence) -> None:
        self._detokenizers[seq.request_id] = Detokenizer(self._tokenizer, seq.sampling.stop)

    def push(self, seq: Sequence, token: int) -> tuple[str, FinishReason | None]:
        """``token`` was drawn for ``seq`` and stands last in its tokens: the text that can be sent now, and, if that
        was the last one, why."""
        detokenizer = self._detokenizers[seq.request_id]
        if token in self._eos and not seq.sampling.ignore_eos:
            return detokenizer.flush(), "stop"
        text = detokenizer.push(token)
        if detokenizer.stopped:
            return text + detokenizer.flush(), "stop"
        if len(seq.token_ids) >= seq.max_len:
            return text + detokenizer.flush(), "length"
        return text, None

    def event(self, seq: Sequence, tokens: tuple[int, ...] = (), text: str = "") -> TokenEvent:
        """``seq`` goes on."""
        return TokenEvent(seq.request_id, tokens, text, prefill_tokens_done=min(seq.num_computed, seq.prompt_len))

    def end(
        self, seq: Sequence, reason: FinishReason, tokens: tuple[int, ...], text: str, error: str | None
    ) -> TokenEvent:
        """``seq`` is over."""
        del self._detokenizers[seq.request_id]
        stats = sequence_stats(seq, self._chunk_bytes)
        return TokenEvent(seq.request_id, tokens, text, reason, stats, error, seq.num_computed)

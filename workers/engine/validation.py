"""Which requests the engine refuses because it could never serve them."""

import math

from forecache.workers.core.requests import GenerateRequest, SamplingParams
from forecache.workers.errors import InvalidRequestError
from forecache.workers.memory.client.protocol import ColdMemory
from forecache.workers.models.step.architecture import Backbone


def check_request(request: GenerateRequest, backbone: Backbone, cold_slots: int, *, text: bool) -> None:
    """Raise :class:`InvalidRequestError` for a request that can never be served.

    Args:
        cold_slots: most chunks that one request can store, see :func:`most_chunks`.
        text: the engine has a tokenizer.
    """
    vocabulary = int(backbone.config.vocab_size)
    _check_sampling(request.sampling, vocabulary, text=text)
    prompt, answer = len(request.prompt_token_ids), request.sampling.max_tokens
    limit, layout = backbone.max_model_len, backbone.layout
    if not prompt:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    if answer < 1:
        raise InvalidRequestError(f"max_tokens must be at least 1, not {answer}", param="max_tokens")
    if prompt + answer > limit:
        raise InvalidRequestError(
            f"the model's context is {limit} tokens, but the request asks for {prompt + answer}: "
            f"{prompt} in the prompt and up to {answer} in the answer.",
            param="messages",
        )
    if len(request.resume_token_ids) >= answer:
        raise InvalidRequestError(f"the answer is complete: {answer} tokens", param="resume_token_ids")
    for param, token_ids in (("prompt", request.prompt_token_ids), ("resume_token_ids", request.resume_token_ids)):
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocabulary):
            raise InvalidRequestError(f"a token id is outside the vocabulary of {vocabulary}", param=param)
    keep_ratio = request.cache.keep_ratio
    if keep_ratio is not None and not 0 < keep_ratio <= 1:
        raise InvalidRequestError(f"keep_ratio must be in (0, 1], not {keep_ratio}", param="forecache.keep_ratio")
    least_tokens = request.cache.min_resident_tokens
    if least_tokens is not None and least_tokens < 0:
        raise InvalidRequestError(
            f"min_resident_tokens must be 0 or more, not {least_tokens}", param="forecache.min_resident_tokens"
        )
    window_steps = request.cache.window_steps
    if window_steps is not None and window_steps < 1:
        raise InvalidRequestError(f"window must be at least 1 step, not {window_steps}", param="forecache.window")
    chunks = -(-(prompt + answer) // layout.chunk_tokens)
    if chunks > cold_slots:
        raise InvalidRequestError(
            f"prompt and answer may need {chunks} chunks of {layout.nbytes} bytes, but cold memory holds {cold_slots}. "
            "Shorten the prompt, lower max_tokens or raise --cold-bytes.",
            param="messages",
        )


def most_chunks(memory: ColdMemory, *, spreads: bool) -> int:
    """The most chunks that one request can store while no other request uses cold memory.

    These are the slots of this node's arena, and more where chunks of one sequence may be spread over several nodes
    (``spreads``) and there are other nodes.
    """
    return memory.arena.slots + (memory.arena.record_slots if spreads and memory.spread is not None else 0)


def _check_sampling(sampling: SamplingParams, vocabulary: int, *, text: bool) -> None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InvalidRequestError(f"temperature must be 0 or more, not {sampling.temperature}", param="temperature")
    if not 0 < sampling.top_p <= 1:
        raise InvalidRequestError(f"top_p must be in (0, 1], not {sampling.top_p}", param="top_p")
    if sampling.top_k < 0:
        raise InvalidRequestError(f"top_k must be 0 (all) or more, not {sampling.top_k}", param="top_k")
    if "" in sampling.stop:
        raise InvalidRequestError("a stop string is empty", param="stop")
    if sampling.stop and not text:
        raise InvalidRequestError("stop strings need a tokenizer, and this engine has none", param="stop")
    for name in ("presence_penalty", "frequency_penalty"):
        if not math.isfinite(value := getattr(sampling, name)):
            raise InvalidRequestError(f"{name} must be a finite number, not {value}", param=name)
    if sampling.logprobs is not None and sampling.logprobs < 0:
        raise InvalidRequestError(f"logprobs must be 0 or more, not {sampling.logprobs}", param="logprobs")
    for token, bias in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise InvalidRequestError(f"token id {token} is outside the vocabulary of {vocabulary}", "logit_bias")
        if not math.isfinite(bias):
            raise InvalidRequestError(f"a bias must be a finite number, not {bias}", "logit_bias")

"""The last check at load: our packed, chunked, paged forward must give the model's own logits."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from forecache.indexer.records.index_spec import IndexSpec
from forecache.workers.core.requests import GenerateRequest
from forecache.workers.core.sequence import TokenSequence
from forecache.workers.core.step_plan import Plan, StreamPart
from forecache.workers.errors import UnsupportedModelError, explained
from forecache.workers.memory.format.keys import root_key
from forecache.workers.memory.format.layout import with_dtype
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.models.step.architecture import Backbone

logger = logging.getLogger(__name__)

VERIFY_TOKENS = 130
DECODE_STEPS = 3
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Difference of logits, relative to the largest logit, that is accepted of every model."""
NOISE_FACTOR = 3
"""Where transformers' own backends (eager, sdpa) differ by more, as many times their difference is accepted."""
MOST_NOISE = 0.5
"""Difference that is never accepted: a model that is so sensitive to rounding can't be checked in its dtype."""


def verify_backbone(backbone: Backbone, spec: IndexSpec) -> None:
    """Compare logits of random tokens with transformers' eager attention, in the model's dtype.

    Raises :class:`UnsupportedModelError` if they differ by more than rounding makes transformers' own backends differ.

    The tokens go through every path: a first prefill step, one over a past, and decode steps through a block table.

    Rounding also decides which experts a token goes to where two are nearly equal, and that changes logits by far more
    than attention does. Where logits differ, the comparison is made again with the experts that eager attention chose.
    """
    generator = torch.Generator().manual_seed(0)
    if backbone.architecture.plain_kv and backbone.layout.field("kv").dtype != backbone.dtype:
        # check the attention itself, without the rounding of a smaller K/V format
        backbone = replace(backbone, layout=with_dtype(backbone.layout, backbone.dtype))
    limit = backbone.architecture.exact_tokens(backbone.config, backbone.dtype)
    count = VERIFY_TOKENS if limit is None else min(VERIFY_TOKENS, limit)
    tokens = torch.randint(0, backbone.config.vocab_size, (count,), generator=generator).tolist()
    allowed = TOLERANCE[backbone.dtype]
    with routes(backbone.model) as chosen:
        chosen.record()
        with explained(backbone.path, "can't be run"):
            expected = _logits(backbone, tokens, "eager")
        rows = _compared_rows(tokens)
        chosen.release()
        error = _difference(_our_logits(backbone, spec, tokens), expected[rows])
        if error <= allowed:
            return
        if chosen.found:
            error = _difference(_our_logits(backbone, spec, tokens, chosen), expected[rows])
            logger.info(
                "%s: rounding sends %d of %d tokens to other experts than with eager attention; logits with the same "
                "experts differ by %.1e",
                backbone.path,
                chosen.flips,
                chosen.tokens,
                error,
            )
        if not error <= allowed:
            allowed = max(allowed, min(MOST_NOISE, NOISE_FACTOR * _noise(backbone, tokens, expected, chosen)))
    if not error <= allowed:
        raise UnsupportedModelError(
            f"{backbone.path}: logits over chunks differ from the model's own by {error:.1e} of the largest, more than "
            f"{allowed:.0e}. Something in its attention is not what forecache computes."
        )


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit expected."""
    return float((actual - expected).abs().max() / expected.abs().max())


def _noise(backbone: Backbone, tokens: list[int], expected: torch.Tensor, chosen: "Routes") -> float:
    """How far transformers' sdpa is from its eager attention, over all tokens; 0 where the model has no sdpa."""
    if chosen.found:
        chosen.force(0, len(tokens))
    try:
        other = _logits(backbone, tokens, "sdpa")
    except ValueError as error:  # transformers says so of models without it
        logger.info("%s has no sdpa attention to compare with: %s", backbone.path, error)
        return 0.0
    finally:
        chosen.release()
    noise = _difference(other, expected)
    logger.info("%s: transformers' sdpa and eager attention differ by %.1e", backbone.path, noise)
    return noise if math.isfinite(noise) else 0.0


class Routes:
    """Which experts the mixture-of-experts layers of a model choose: recorded in one run, forced on others.

    transformers' layers call ``experts(hidden, indices, weights)``, with integers and floats of [tokens, chosen].
    """

    def __init__(self) -> None:
        self.flips = 0
        self.tokens = 0
        self._mode: Literal["record", "force", None] = None
        self._rows = slice(0, 0)
        self._chosen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def found(self) -> bool:
        return bool(self._chosen)

    def record(self) -> None:
        self._mode = "record"

    def force(self, start: int, stop: int) -> None:
        """The next run is of tokens ``start:stop`` of the recorded one."""
        self._mode, self._rows = "force", slice(start, stop)

    def release(self) -> None:
        self._mode = None

    def hook(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Called with the positional arguments of an ``experts`` module; returns others to call it with, or None."""
        if self._mode is None or len(arguments) != 3:
            return None
        hidden, indices, weights = arguments
        if self._mode == "record":
            self._chosen[module] = indices, weights
            return None
        if module not in self._chosen:
            return None
        forced, forced_weights = (tensor[self._rows] for tensor in self._chosen[module])
        if forced.shape != indices.shape:
            return None
        self.tokens += len(indices)
        self.flips += int((forced.sort(-1).values != indices.sort(-1).values).any(-1).sum())
        return hidden, forced, forced_weights


@contextmanager
def routes(model: nn.Module) -> Iterator[Routes]:
    """The routes of ``model``'s experts, while it is checked."""
    chosen = Routes()
    hooks = [
        module.register_forward_pre_hook(chosen.hook)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts"
    ]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def _compared_rows(tokens: list[int]) -> list[int]:
    """After the first third, after prefill, and after each decode step."""
    return [_first_part(tokens) - 1, *range(len(tokens) - DECODE_STEPS - 1, len(tokens))]


@torch.inference_mode()
def _logits(backbone: Backbone, tokens: list[int], backend: Literal["eager", "sdpa"]) -> torch.Tensor:
    """transformers' own: float32 [tokens, vocab]."""
    model = backbone.model
    with backbone.architecture.reference_attention(model, backend):
        output = model(input_ids=torch.tensor([tokens], device=backbone.device), use_cache=False)
    logits: torch.Tensor = output.logits[0].float()
    return logits


def _first_part(tokens: list[int]) -> int:
    return len(tokens) // 3


def _our_logits(backbone: Backbone, spec: IndexSpec, tokens: list[int], chosen: Routes | None = None) -> torch.Tensor:
    """The compared rows through the model runner, with the experts of ``chosen`` if given: float32 [rows, vocab]."""
    chunk_tokens = backbone.layout.chunk_tokens
    slots = -(-len(tokens) // chunk_tokens)
    pool = HotPool(backbone.layout, slots, backbone.device)
    runner = backbone.architecture.make_runner(backbone, pool, None, spec)
    seq = TokenSequence(
        GenerateRequest("verify", tuple(tokens)),
        holder="verify",
        root=root_key(backbone.layout.fingerprint),
        chunk_tokens=chunk_tokens,
        keep_ratio=1.0,
        policy="full",
    )
    prompt, end = len(tokens) - DECODE_STEPS, _first_part(tokens)
    rows = []
    for stop in (end, prompt, *range(prompt + 1, len(tokens) + 1)):
        seq.token_ids = tokens[:stop]
        count = stop - seq.num_computed
        for number in range(seq.num_computed // chunk_tokens, (stop - 1) // chunk_tokens + 1):
            if number not in seq.open_slots:
                slot = pool.allocate()
                assert slot is not None
                seq.open_slots[number] = slot
        decoding = stop > prompt
        plan = Plan((seq,), ()) if decoding else Plan((), (StreamPart(seq, count),))
        if chosen is not None:
            chosen.force(seq.num_computed, stop)
        rows.append(runner.launch(plan).logits[0])
        seq.num_computed = stop
        while seq.tail_tokens >= chunk_tokens:
            number = len(seq.chunks)
            chunk = seq.complete_chunk()
            seq.residency.slots[number] = seq.open_slots.pop(number)
            seq.residency.version += 1
            pool.complete(seq.residency.slots[number], chunk.key, dirty=False)
    if chosen is not None:
        chosen.release()
    return torch.stack(rows)

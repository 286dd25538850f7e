"""The last check at load: our packed, chunked, paged forward must give the model's own logits."""

from dataclasses import replace

import torch

from forecache.indexer.index_keys import IndexSpec
from forecache.workers.decode.attention import ATTENTION_NAME
from forecache.workers.decode.backbone import Backbone
from forecache.workers.decode.messages import GenerateRequest
from forecache.workers.decode.runner import make_runner
from forecache.workers.decode.sequence import Sequence
from forecache.workers.decode.step import Plan, StreamPart
from forecache.workers.errors import UnsupportedModelError
from forecache.workers.memory.hot_pool import HotPool
from forecache.workers.memory.keys import root_key
from forecache.workers.memory.layout import with_dtype

VERIFY_TOKENS = 130
DECODE_STEPS = 3
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits, relative to the largest logit. In half precision transformers' own backends differ as
much; what is looked for here is wrong attention, which is off by far more."""


def verify_backbone(backbone: Backbone, spec: IndexSpec) -> None:
    """Compare logits of random tokens with transformers' eager attention.

    Raises :class:`UnsupportedModelError` if they differ.

    The tokens go through every path: a first prefill step, one over a past, and decode steps through a block table.
    """
    generator = torch.Generator().manual_seed(0)
    if backbone.v4 is None and backbone.layout.field("kv").dtype != backbone.dtype:
        # what is checked is the attention, not what a smaller format of K/V costs
        backbone = replace(backbone, layout=with_dtype(backbone.layout, backbone.dtype))
    count = VERIFY_TOKENS
    if backbone.v4 is not None and backbone.dtype != torch.float32:
        # where not all entries are selected, roundings of half precision decide which
        count = min(count, backbone.v4.topk * backbone.v4.csa_rate)
    tokens = torch.randint(0, backbone.config.vocab_size, (count,), generator=generator).tolist()
    expected = _eager_logits(backbone, tokens)
    actual = _our_logits(backbone, spec, tokens)
    error = (actual - expected).abs().max() / expected.abs().max()
    if not error <= TOLERANCE[backbone.dtype]:
        raise UnsupportedModelError(
            f"{backbone.path}: logits over chunks differ from the model's own by {error:.1e} of the largest, more than "
            f"{TOLERANCE[backbone.dtype]:.0e}. Something in its attention is not what forecache computes."
        )


@torch.inference_mode()
def _eager_logits(backbone: Backbone, tokens: list[int]) -> torch.Tensor:
    """float32 [2 + DECODE_STEPS, vocab]: after the first third, after prefill, and after each decode step."""
    rows = [_first_part(tokens) - 1, *range(len(tokens) - DECODE_STEPS - 1, len(tokens))]
    model = backbone.model
    try:
        if backbone.v4 is None:  # else it is its own attention that serves, until it is given our steps
            model.set_attn_implementation("eager")
        output = model(
            input_ids=torch.tensor([tokens], device=backbone.device),
            use_cache=False,
            logits_to_keep=torch.tensor(rows, device=backbone.device),
        )
    finally:
        if backbone.v4 is None:
            model.set_attn_implementation(ATTENTION_NAME)
    logits: torch.Tensor = output.logits[0].float()
    return logits


def _first_part(tokens: list[int]) -> int:
    return len(tokens) // 3


def _our_logits(backbone: Backbone, spec: IndexSpec, tokens: list[int]) -> torch.Tensor:
    """The same rows through the model runner."""
    chunk_tokens = backbone.layout.chunk_tokens
    slots = -(-len(tokens) // chunk_tokens)
    pool = HotPool(backbone.layout, slots, backbone.device)
    runner = make_runner(backbone, pool, None, spec)
    seq = Sequence(
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
        rows.append(runner.launch(plan).logits[0])
        seq.num_computed = stop
        while seq.tail_tokens >= chunk_tokens:
            number = len(seq.chunks)
            chunk = seq.complete_chunk()
            seq.resident[number] = seq.open_slots.pop(number)
            seq.table_version += 1
            pool.complete(seq.resident[number], chunk.key, dirty=False)
    return torch.stack(rows)

"""TFLOP/s of attention of packed prompts over the hot pool: `ragged_prefill` in all variants, and what else exists.

    python tests/benchmarks/bench_ragged_prefill.py --out DIR
    python tests/benchmarks/bench_ragged_prefill.py --device cpu --quick --out DIR    # in Triton's interpreter

Every result is first compared with `prefill_attention` over gathered K/V (cuDNN on a GPU). Candidates:

- `gather + prefill_attention`, and `prefill_attention` over K/V that were gathered before the clock starts;
- `ragged_prefill`, with each of `tuning.PREFILL_VARIANTS` and with the settings of tuning.py;
- `varlen_attn` of torch over the pool's pages by block table, and over gathered K/V; what torch refuses is printed with
  its message;
- FlexAttention over gathered K/V, as it cannot read pages that lie apart.

The last line printed is JSON: TFLOP/s, and each as a share of `prefill_attention` without the copy.
"""

import argparse
import inspect
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

from kernel_timing import CHUNK_TOKENS, Bench
from torch.nn.attention import varlen
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from forecache.kernels.attention import chunk_mass, ops, ragged_prefill
from forecache.kernels.attention.prefill import prefill_attention
from forecache.kernels.common import tuning

FP8 = torch.float8_e4m3fn
PIECE_TOKENS = 65536
"""Tokens of the past gathered at once, as prefill does on a GPU."""
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError)
"""How torch's functions refuse arguments."""

Result = tuple[Tensor, Tensor]
Candidate = Callable[[], Result]


@dataclass(frozen=True)
class Shape:
    """``prompts`` of ``tokens`` new tokens each, behind ``past`` tokens, whole chunks."""

    prompts: int
    tokens: int
    past: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    fp8: bool = False

    @property
    def flop(self) -> float:
        pairs = self.prompts * self.tokens * (self.past + (self.tokens + 1) / 2)
        return 4 * pairs * self.heads * self.head_dim

    def __str__(self) -> str:
        shape = f"{self.prompts} x {self.tokens} new, {self.past} past, h{self.heads}/{self.kv_heads} d{self.head_dim}"
        return f"{shape} fp8" if self.fp8 else shape


def shapes(quick: bool) -> list[Shape]:
    if quick:
        small = {"heads": 4, "kv_heads": 2, "head_dim": 64}
        return [Shape(1, 40, 128, **small), Shape(3, 20, 64, **small), Shape(1, 20, 128, **small, fp8=True)]
    return [
        *(Shape(1, 8192, past) for past in (0, 32768, 131072)),
        Shape(4, 2048, 0),
        Shape(4, 2048, 32768),
        Shape(1, 512, 32768),
        Shape(1, 128, 32768),
        Shape(8, 512, 8192),
        Shape(1, 8192, 32768, fp8=True),
        Shape(1, 512, 32768, fp8=True),
        Shape(1, 8192, 32768, heads=9, kv_heads=3, head_dim=64),
        Shape(1, 8192, 32768, heads=8, kv_heads=4, head_dim=256),
    ]


@dataclass(frozen=True)
class Inputs:
    """Packed prompts and a pool of one layer that has their past and, behind it, their own keys and values."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor
    kv: Tensor
    table: Tensor
    scales: Tensor | None

    @staticmethod
    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> "Inputs":
        assert shape.past % CHUNK_TOKENS == 0
        tokens = shape.prompts * shape.tokens
        q = torch.randn(tokens, shape.heads, shape.head_dim, device=device).to(dtype)
        k, v = (torch.randn(tokens, shape.kv_heads, shape.head_dim, device=device).to(dtype) for _ in range(2))
        past, own = shape.past // CHUNK_TOKENS, -(-shape.tokens // CHUNK_TOKENS)
        table = torch.randperm(shape.prompts * (past + own), device=device).view(shape.prompts, -1)
        size = (table.numel(), 1, 2, shape.kv_heads, CHUNK_TOKENS, shape.head_dim)
        kv = torch.zeros(size, dtype=FP8 if shape.fp8 else dtype, device=device)
        for rows in torch.split(kv, 64):  # in pieces: random numbers are made in float32
            rows.copy_(torch.randn(rows.shape, device=device))
        scales = torch.rand(len(kv), 1, 2, shape.kv_heads, device=device) + 0.5 if shape.fp8 else None
        if scales is None:
            places = torch.arange(tokens, device=device)
            slots = table[places // shape.tokens, past + places % shape.tokens // CHUNK_TOKENS]
            ops.store_kv(k, v, kv, 0, slots, places % shape.tokens % CHUNK_TOKENS)
        return Inputs(shape, q, k, v, kv, table.int(), scales)

    @property
    def past_table(self) -> Tensor:
        return self.table[:, : self.shape.past // CHUNK_TOKENS]

    def full(self, value: int, count: int) -> Tensor:
        return torch.full((count,), value, dtype=torch.int32, device=self.q.device)

    def bounds(self, tokens: int) -> Tensor:
        """int32 [prompts + 1] of prompts with ``tokens`` each."""
        return torch.arange(self.shape.prompts + 1, dtype=torch.int32, device=self.q.device) * tokens

    def gather(self, prompt: int, first: int = 0, chunks: int | None = None) -> tuple[Tensor, Tensor]:
        """K/V of some of a prompt's past chunks: [kv_heads, n, head_dim]."""
        slots = self.past_table[prompt, first : None if chunks is None else first + chunks].long()
        return ops.gather_layer(self.kv, 0, slots, scale=self.scales, dtype=self.q.dtype)

    def whole(self) -> tuple[Tensor, Tensor]:
        """K/V of all prompts, past and own: [prompts, kv_heads, past + tokens, head_dim]."""
        parts = []
        for prompt in range(self.shape.prompts):
            own = slice(prompt * self.shape.tokens, (prompt + 1) * self.shape.tokens)
            past = self.gather(prompt) if self.shape.past else (self.k[:0].transpose(0, 1),) * 2
            pairs = zip(past, (self.k, self.v), strict=True)
            parts.append([torch.cat((old, new[own].transpose(0, 1)), 1) for old, new in pairs])
        k, v = (torch.stack(side) for side in zip(*parts, strict=True))
        return k, v


def dense(inputs: Inputs, past: Callable[[int], Iterator[tuple[Tensor, Tensor]]]) -> Result:
    """`prefill_attention` of one prompt after another."""
    tokens, results = inputs.shape.tokens, []
    for prompt in range(inputs.shape.prompts):
        own = slice(prompt * tokens, (prompt + 1) * tokens)
        k, v = inputs.k[own].transpose(0, 1), inputs.v[own].transpose(0, 1)
        results.append(prefill_attention(inputs.q[own], k, v, past(prompt), inputs.q.shape[2] ** -0.5))
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses)


def gathered_pieces(inputs: Inputs, prompt: int) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, inputs.past_table.shape[1], PIECE_TOKENS // CHUNK_TOKENS):
        yield inputs.gather(prompt, first, PIECE_TOKENS // CHUNK_TOKENS)


def ragged(inputs: Inputs, kernel: Callable[..., Result]) -> Candidate:
    options = {} if inputs.scales is None else {"k_scale": inputs.scales[:, :, 0], "v_scale": inputs.scales[:, :, 1]}
    lens = inputs.full(inputs.shape.past, inputs.shape.prompts)
    return partial(
        kernel,
        *(inputs.q, inputs.k, inputs.v, inputs.kv, 0, inputs.past_table, lens, inputs.bounds(inputs.shape.tokens)),
        inputs.q.shape[2] ** -0.5,
        **options,
    )


def varlen_options(inputs: Inputs) -> dict[str, Any]:
    options = {
        "return_aux": varlen.AuxRequest(lse=True),
        "scale": inputs.q.shape[2] ** -0.5,
        "window_size": (-1, 0),
        "is_causal": True,  # what older versions have instead of a window
        "enable_gqa": True,
    }
    known = inspect.signature(varlen.varlen_attn).parameters
    return {name: value for name, value in options.items() if name in known}


def varlen_result(call: Callable[[], Any]) -> Result:
    out, lse = call()
    return out, lse.T  # [heads, tokens], whatever its documentation says


def varlen_pages(inputs: Inputs) -> Candidate:
    """torch's varlen attention by block table, over keys that are all in the pool."""
    if "block_table" not in inspect.signature(varlen.varlen_attn).parameters:
        raise NotImplementedError("this torch's varlen_attn has no block_table")
    if inputs.scales is not None:
        raise NotImplementedError("varlen_attn has no scales for fp8 pages")
    k, v = (inputs.kv[:, 0, part].transpose(1, 2) for part in range(2))  # [pages, page tokens, kv_heads, head_dim]
    shape = inputs.shape
    keys = shape.past + shape.tokens
    call = partial(
        varlen.varlen_attn,
        *(inputs.q, k, v, inputs.bounds(shape.tokens), None, shape.tokens, keys),
        seqused_k=inputs.full(keys, shape.prompts),
        block_table=inputs.table,
        **varlen_options(inputs),
    )
    return partial(varlen_result, call)


def varlen_gathered(inputs: Inputs) -> Candidate:
    shape = inputs.shape
    k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in inputs.whole())
    keys = shape.past + shape.tokens
    call = partial(
        varlen.varlen_attn,
        *(inputs.q, k, v, inputs.bounds(shape.tokens), inputs.bounds(keys), shape.tokens, keys),
        **varlen_options(inputs),
    )
    return partial(varlen_result, call)


def flex_gathered(inputs: Inputs) -> Candidate:
    shape, device = inputs.shape, inputs.q.device
    k, v = inputs.whole()
    q = inputs.q.unflatten(0, (shape.prompts, shape.tokens)).transpose(1, 2)

    def causal(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query + shape.past

    mask: BlockMask = create_block_mask(causal, None, None, shape.tokens, k.shape[2], device=str(device))
    attend: Any = torch.compile(flex_attention) if device.type == "cuda" else flex_attention

    def call() -> Result:
        aux = AuxRequest(lse=True)
        out, more = attend(q, k, v, block_mask=mask, enable_gqa=True, scale=q.shape[3] ** -0.5, return_aux=aux)
        return out.transpose(1, 2).flatten(0, 1), more.lse.transpose(1, 2).flatten(0, 1)

    return call


def candidates(inputs: Inputs) -> dict[str, Callable[[], Candidate]]:
    """What to measure, by name; the first two are today's."""
    past = [[inputs.gather(prompt)] if inputs.shape.past else [] for prompt in range(inputs.shape.prompts)]
    kernel = ragged_prefill.ragged_prefill
    return {
        "prefill_attention": lambda: partial(dense, inputs, lambda prompt: iter(past[prompt])),
        "gather + prefill_attention": lambda: partial(dense, inputs, partial(gathered_pieces, inputs)),
        "ragged_prefill": lambda: ragged(inputs, kernel),
        **{
            f"ragged_prefill {name}": partial(ragged, inputs, partial(kernel, config=config))
            for name, config in tuning.PREFILL_VARIANTS.items()
            if inputs.shape.head_dim <= 128
        },
        "varlen_attn, pages": partial(varlen_pages, inputs),
        "varlen_attn, gathered": partial(varlen_gathered, inputs),
        "flex_attention, gathered": partial(flex_gathered, inputs),
    }


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def bench_shape(bench: Bench, shape: Shape) -> dict[str, float]:
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    inputs = Inputs.make(shape, dtype, bench.device)
    values: dict[str, float] = {}
    expected: Result | None = None
    for name, make in candidates(inputs).items():
        ours = "ragged" in name or "prefill" in name
        try:
            call = make()
            result = call()
            if expected is None:
                expected = result
            errors = [error(*pair) for pair in zip(result, expected, strict=True)]
            times = bench.times_s(lambda _, call=call: call(), graph=bench.on_gpu)  # type: ignore[misc]
        except REFUSALS as refusal:
            if ours:
                raise
            print(f"{name}: refused {shape}: {str(refusal).splitlines()[0]:.160}")
            continue
        if not max(errors) < LARGEST_ERROR[dtype]:
            if ours:
                raise AssertionError(f"{name}, {shape}: relative errors {errors} of out and lse")
            print(f"{name}: wrong for {shape}: relative errors {errors} of out and lse")
            continue
        values[name] = bench.add(name, shape, inputs.kv.dtype, times, flop=shape.flop).value
    return values


def bench_mass(bench: Bench, tokens: int) -> None:
    """`chunk_mass` of the last 32 tokens at eight heads of one prompt: GB/s of keys."""
    rows, kv_heads, dim = 32, 8, 128
    chunks, dtype = tokens // CHUNK_TOKENS, torch.bfloat16 if bench.on_gpu else torch.float32
    kv = torch.randn(chunks, 1, 2, kv_heads, CHUNK_TOKENS, dim, device=bench.device).to(dtype)
    pairs = torch.arange(kv_heads, device=bench.device)
    q = torch.randn(rows, kv_heads, dim, device=bench.device).to(dtype)
    lse = torch.full((rows, kv_heads), 10.0, device=bench.device)
    table = torch.randperm(chunks, device=bench.device).int().unsqueeze(0)
    positions = torch.arange(tokens - rows, tokens, device=bench.device)
    starts = torch.tensor([0, rows], dtype=torch.int32, device=bench.device)
    kernel = chunk_mass.chunk_mass if bench.on_gpu else ops.chunk_mass
    call = partial(kernel, q, lse, kv, pairs * 0, pairs, table, positions, starts, dim**-0.5)
    times = bench.times_s(lambda _: call(), graph=bench.on_gpu)
    bench.add("chunk_mass", f"{rows} rows, {kv_heads} pairs, {tokens} tokens", dtype, times, nbytes=kv.nbytes / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats; always on a CPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV file")
    args = parser.parse_args()
    device = torch.device(args.device)
    bench = Bench(device, args.quick or device.type == "cpu")
    path = args.out / f"ragged-prefill-{device.type}.csv"
    summary = {}
    for shape in shapes(bench.quick):
        values = bench_shape(bench, shape)
        base = values["prefill_attention"]
        shares = {name: round(value / base, 3) if base else None for name, value in values.items()}
        summary[str(shape)] = {"tflop_per_s": values, "of_prefill_attention": shares}
        bench.write(path)  # as far as it went, should the rest not end in time
        if bench.on_gpu:
            torch.cuda.empty_cache()
    bench_mass(bench, 1024 if bench.quick else 131072)
    bench.write(path)
    print(json.dumps({"gpu": bench.gpu, "csv": str(path), "results": summary}))


if __name__ == "__main__":
    main()

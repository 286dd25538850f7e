"""Prefill of Compressed Sparse Attention, against decode of every token alone."""

import pytest
import torch

from forecache.kernels.csa import prefill as csa_prefill
from forecache.kernels.csa import reference as reference_csa


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csa_prefill, "BLOCK_ELEMENTS", 3000)


@pytest.mark.parametrize(("past", "tokens", "entries"), [(0, 1, 0), (0, 37, 9), (6, 20, 13), (7, 33, 40)])
@pytest.mark.parametrize("kind", ["window", "selected", "all"])
def test_prefill_is_decode_token_by_token(past: int, tokens: int, entries: int, kind: str) -> None:
    torch.manual_seed(0)
    heads, dim, window_tokens, k = 3, 16, 8, 5
    q = torch.randn(tokens, heads, dim)
    window, stored, sinks = torch.randn(past + tokens, dim), torch.randn(entries, dim), torch.randn(heads)
    lens = torch.arange(tokens) * max(entries, 1) // tokens
    lens = lens.clamp(max=entries)
    selected = None
    if kind == "selected":
        scores = torch.randn(tokens, entries).masked_fill(torch.arange(entries) >= lens.unsqueeze(1), -torch.inf)
        selected = reference_csa.top_entries(scores, k)
    actual = csa_prefill.attend_prefill(
        q,
        window,
        window_tokens,
        sinks,
        0.25,
        entries=None if kind == "window" else stored,
        lens=lens if kind == "all" else None,
        selected=selected,
    )
    for token in range(tokens):
        stop = past + token + 1
        near = window[max(stop - window_tokens, 0) : stop]
        seen = stored[: lens[token]]
        if kind == "window":
            seen = stored[:0]
        elif selected is not None:
            seen = stored[selected[token][selected[token] >= 0].long()]
        keys = torch.cat([near, seen]).double()
        logits = torch.cat([q[token].double() @ keys.T * 0.25, sinks.double().unsqueeze(1)], 1)
        expected = logits.softmax(1)[:, :-1] @ keys
        torch.testing.assert_close(actual[token].double(), expected, rtol=1e-5, atol=1e-5)


def test_scores_are_those_of_decode() -> None:
    torch.manual_seed(0)
    tokens, heads, dim, entries = 11, 4, 16, 21
    q, weights, keys = torch.randn(tokens, heads, dim), torch.randn(tokens, heads), torch.randn(entries, dim)
    lens = torch.randint(0, entries + 1, (tokens,))
    expected = reference_csa.score_entries(
        q, weights, keys.unsqueeze(0), torch.zeros(tokens, 1, dtype=torch.int32), lens.int()
    )
    actual = csa_prefill.score_entries_of_one(q, weights, keys, lens)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

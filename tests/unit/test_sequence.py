"""Chunks of one sequence: their keys, who may share them, and restarts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.memory.format.keys import prefix_keys, root_key

CHUNK = 16
ROOT = root_key("layout")


def sequence(tokens: int, *, holder: str = "me", max_tokens: int = 8, root: bytes = ROOT) -> TokenSequence:
    request = GenerateRequest("id", tuple(range(tokens)), SamplingParams(max_tokens=max_tokens))
    return TokenSequence(request, holder=holder, root=root, chunk_tokens=CHUNK, keep_ratio=0.5, policy="lookahead")


def compute(seq: TokenSequence, tokens: int) -> None:
    """Count ``tokens`` as computed, as the engine does after a step."""
    seq.num_computed += tokens
    while seq.tail_tokens >= CHUNK:
        seq.complete_chunk()


def keys(seq: TokenSequence) -> list[bytes]:
    return [chunk.key for chunk in seq.chunks]


@given(prompt=st.integers(1, 200), max_tokens=st.integers(1, 100))
def test_lengths(prompt: int, max_tokens: int) -> None:
    seq = sequence(prompt, max_tokens=max_tokens)
    assert seq.max_len == prompt + max_tokens
    assert (seq.max_chunks - 1) * CHUNK < seq.max_len <= seq.max_chunks * CHUNK
    assert seq.output_ids == []
    seq.token_ids += [7, 8]
    assert seq.output_ids == [7, 8]
    assert seq.prompt_len == prompt


@given(steps=st.lists(st.integers(1, 50), max_size=8))
def test_exact_chunks_have_the_names_of_their_prefix(steps: list[int]) -> None:
    """The keys don't depend on how the work was split, or on the worker."""
    seq = sequence(sum(steps) + 1)
    for step in steps:
        compute(seq, step)
        assert 0 <= seq.tail_tokens < CHUNK
        assert len(seq.chunks) * CHUNK + seq.tail_tokens == seq.num_computed
    assert keys(seq) == list(prefix_keys(ROOT, seq.token_ids[: seq.num_computed], CHUNK))
    assert all(chunk.exact for chunk in seq.chunks)
    assert seq.chunk_of == {chunk.key: chunk for chunk in seq.chunks}


@pytest.mark.parametrize(("tokens", "reusable"), [(1, 0), (16, 0), (17, 1), (32, 1), (33, 2)])
def test_a_prefix_hit_leaves_a_token_to_compute(tokens: int, reusable: int) -> None:
    assert len(list(sequence(tokens).reusable_keys())) == reusable


def test_a_chunk_with_an_approximate_token_is_private_and_so_are_those_after_it() -> None:
    mine, other, exact = sequence(100, holder="a"), sequence(100, holder="b"), sequence(100)
    for seq in (mine, other):
        compute(seq, 20)
        seq.open_exact = False  # a token of the second chunk read a partial resident set
        compute(seq, 60)
    compute(exact, 80)
    assert [chunk.exact for chunk in mine.chunks] == [True, False, False, False, False]
    assert keys(mine)[0] == keys(other)[0] == keys(exact)[0]
    assert not set(keys(mine)[1:]) & (set(keys(other)) | set(keys(exact)))
    assert len(set(keys(mine))) == 5


def test_no_prompt_spells_the_name_of_private_chunks() -> None:
    """Even a chunk of the name's length, with byte values as token ids."""
    holder = "a holder"
    mine, other = sequence(3 * CHUNK, holder=holder), sequence(4 * CHUNK)
    other.token_ids[CHUNK:] = [*f"private {holder}".encode(), *mine.token_ids[CHUNK:]]
    compute(mine, CHUNK)
    mine.open_exact = False
    compute(mine, CHUNK)
    compute(other, 3 * CHUNK)
    assert len(other.token_ids) == 4 * CHUNK and keys(mine)[0] == keys(other)[0]
    assert keys(mine)[1] not in keys(other)


def test_the_same_holder_finds_its_private_chunks_again() -> None:
    twice = [sequence(100, holder="session") for _ in range(2)]
    for seq in twice:
        seq.open_exact = False
        compute(seq, 48)
    assert keys(twice[0]) == keys(twice[1])


def test_other_salts_never_meet() -> None:
    seqs = [sequence(64, root=root_key("layout", salt)) for salt in ("", "x", "y")]
    for seq in seqs:
        compute(seq, 48)
        seq.open_exact = False
        compute(seq, 16)
    assert len({key for seq in seqs for key in keys(seq)}) == 12


def test_partial_means_that_a_chunk_is_not_read() -> None:
    seq = sequence(100)
    assert not seq.partial
    compute(seq, 50)
    assert seq.partial
    seq.residency.slots = {0: 5, 1: 6, 2: 7}
    assert not seq.partial
    del seq.residency.slots[1]
    assert seq.partial
    seq.residency.streamed = True  # reads everything, resident or not
    assert not seq.partial


def test_starting_over_computes_everything_again_exactly() -> None:
    seq = sequence(40, holder="first")
    compute(seq, 39)
    seq.token_ids += [1, 2, 3]
    seq.open_exact, seq.state, seq.residency.decode_steps = False, State.DECODE, 2
    compute(seq, 3)
    seq.start_over("second")
    assert (seq.holder, seq.restarts, seq.state) == ("second", 1, State.WAITING)
    assert (seq.num_computed, seq.residency.decode_steps, seq.chunks, seq.chunk_of) == (0, 0, [], {})
    # what was said is not said again: it is part of what is to be computed
    assert seq.prefill_target == 43
    assert seq.output_ids == [1, 2, 3]
    assert len(list(seq.reusable_keys())) == 2
    compute(seq, 43)
    assert keys(seq) == list(prefix_keys(ROOT, seq.token_ids, CHUNK))


def test_a_session_finds_what_it_decoded_and_nobody_else_does() -> None:
    """The session's later requests find them after the exact chunks, on any worker."""

    def turn(tokens: int, session_id: str | None, holder: str) -> TokenSequence:
        cache = CacheOptions(session_id=session_id)
        request = GenerateRequest("id", tuple(range(tokens)), SamplingParams(max_tokens=64), cache)
        return TokenSequence(request, holder=holder, root=ROOT, chunk_tokens=CHUNK, keep_ratio=0.5, policy="lookahead")

    first = turn(2 * CHUNK, "s", "one")
    compute(first, 2 * CHUNK)
    first.open_exact = False
    first.token_ids += range(2 * CHUNK, 4 * CHUNK)
    compute(first, CHUNK)
    compute(first, CHUNK)
    assert [chunk.exact for chunk in first.chunks] == [True, True, False, False]
    second = turn(5 * CHUNK, "s", "two")
    assert list(second.reusable_keys())[:2] == keys(first)[:2]
    assert second.session_keys(2)[:2] == keys(first)[2:]
    assert not set(turn(5 * CHUNK, "other", "two").session_keys(2)) & set(keys(first))
    assert not set(turn(5 * CHUNK, None, "one").session_keys(2)) & set(keys(first))
    for key in second.session_keys(0):
        assert key not in keys(first)

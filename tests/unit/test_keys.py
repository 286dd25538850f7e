import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from forecache.workers.memory.format.keys import KEY_BYTES, child_key, prefix_keys, root_key

TOKENS = st.lists(st.integers(0, 200_000), max_size=40)


def test_roots_differ_by_layout_and_salt() -> None:
    roots = [root_key("ab"), root_key("a", "b"), root_key("", "ab"), root_key("ab", "b"), root_key("a")]
    assert len(set(roots)) == len(roots)
    assert all(len(root) == KEY_BYTES for root in roots)
    assert root_key("ab", "") == root_key("ab")


def test_salts_and_layouts_never_meet_below_the_root() -> None:
    tokens = list(range(32))
    chains = [list(prefix_keys(root_key(*names), tokens, 4)) for names in [("a",), ("a", "s"), ("b",)]]
    assert len({key for chain in chains for key in chain}) == 24


def test_key_tells_the_parent_and_the_tokens() -> None:
    root = root_key("layout")
    keys = [
        child_key(root, [1, 2]),
        child_key(root, [2, 1]),
        child_key(root, [1, 2, 0]),
        child_key(root, [513]),  # the bytes of [1, 2] as one number
        child_key(child_key(root, [1]), [2]),
    ]
    assert len(set(keys)) == len(keys)


def test_key_does_not_depend_on_the_container() -> None:
    root = root_key("layout")
    expected = child_key(root, [1, 70_000])
    assert child_key(root, (1, 70_000)) == expected
    assert child_key(root, np.array([1, 70_000], dtype=np.int32).tolist()) == expected


@given(TOKENS, st.integers(1, 8))
def test_only_full_chunks_have_keys(tokens: list[int], chunk_tokens: int) -> None:
    keys = list(prefix_keys(root_key("layout"), tokens, chunk_tokens))
    assert len(keys) == len(tokens) // chunk_tokens
    assert len(set(keys)) == len(keys)


@given(TOKENS, TOKENS, TOKENS, st.integers(1, 8))
def test_keys_agree_just_as_far_as_whole_chunks_of_tokens_do(
    common: list[int], left: list[int], right: list[int], chunk_tokens: int
) -> None:
    a, b = common + left, common + right
    agreeing = 0
    while (agreeing + 1) * chunk_tokens <= min(len(a), len(b)) and (
        a[: (agreeing + 1) * chunk_tokens] == b[: (agreeing + 1) * chunk_tokens]
    ):
        agreeing += 1
    root = root_key("layout")
    pairs = list(zip(prefix_keys(root, a, chunk_tokens), prefix_keys(root, b, chunk_tokens), strict=False))
    assert [x == y for x, y in pairs] == [i < agreeing for i in range(len(pairs))]


def test_names_stay_the_same_from_version_to_version() -> None:
    """Nodes find each other's chunks by these keys, so changing them changes a format."""
    root = root_key("layout", "salt")
    assert root.hex() == "ff4dc197f464a47ee87fb1e0f7a373fa"
    assert child_key(root, [1, 70_000]).hex() == "4e601616ecc28cab4dabf8b08c5372ac"

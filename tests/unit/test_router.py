"""Who holds the beginning of a prompt gets it, unless others wait less."""

from forecache.cluster.router import PrefixMemory, rank

KEYS = [bytes([number]) * 16 for number in range(10)]


def test_prefix_memory_counts_from_the_first_chunk_without_gaps() -> None:
    memory = PrefixMemory()
    memory.record(KEYS[:6], "a")
    memory.record(KEYS[:2], "b")
    memory.record(KEYS[4:8], "c")
    assert memory.prefix_chunks(KEYS) == {"a": 6, "b": 2}
    assert memory.prefix_chunks(KEYS[4:]) == {"a": 2, "c": 4}
    assert memory.prefix_chunks(KEYS[9:]) == {} and memory.prefix_chunks([]) == {}


def test_prefix_memory_forgets_the_least_recently_used() -> None:
    memory = PrefixMemory(capacity_chunks=4)
    memory.record(KEYS[:3], "a")
    memory.record(KEYS[3:6], "b")
    memory.record(KEYS[3:4], "b")
    assert memory.prefix_chunks(KEYS) == {}
    assert memory.prefix_chunks(KEYS[3:6]) == {"b": 3}


def test_rank_prefers_hot_then_stored_then_nobody() -> None:
    loads = {"a": 0, "b": 0, "c": 0}
    assert rank(loads, {"b": 3, "c": 1}, {"a": 9}, imbalance=8) == [["b"], ["a", "c"]]
    assert rank(loads, {}, {"a": 9, "c": 9}, imbalance=8) == [["a", "c"], ["b"]]
    assert rank(loads, {"a": 3, "b": 3}, {"b": 3}, imbalance=8) == [["b"], ["a", "c"]]
    assert rank(loads, {}, {}, imbalance=8) == [["a", "b", "c"]]


def test_rank_leaves_who_is_far_busier_than_others() -> None:
    assert rank({"a": 9, "b": 1}, {"a": 5}, {}, imbalance=8) == [["a", "b"]]
    assert rank({"a": 8, "b": 1}, {"a": 5}, {}, imbalance=8) == [["a"], ["b"]]
    assert rank({"a": 9, "b": 1, "c": 1}, {"a": 5, "c": 1}, {}, imbalance=8) == [["c"], ["a", "b"]]

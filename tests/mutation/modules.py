"""The modules that are mutated, each with the tests that must see it: under two minutes together."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutated:
    path: str
    tests: tuple[str, ...]


def _unit(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/unit/test_{name}.py" for name in names)


MODULES = {
    "keys": Mutated("workers/memory/format/keys.py", _unit("keys")),
    "headers": Mutated("workers/memory/arena/headers.py", _unit("headers", "arena", "store", "copies")),
    "arena": Mutated(
        "workers/memory/arena/arena.py",
        _unit("arena_file", "arena", "store", "copies", "records", "quarantine", "bad_slots"),
    ),
    "store": Mutated(
        "workers/memory/arena/store.py",
        _unit("store_books", "store", "records", "quarantine", "bad_slots", "pins", "holds"),
    ),
    "copies": Mutated("workers/memory/hot/copies.py", _unit("copies", "flipped_bits", "prefetcher", "integrity")),
    "prefetcher": Mutated(
        "workers/memory/hot/prefetcher.py", _unit("prefetcher", "prefetcher_runs", "locator", "holds")
    ),
    "window": Mutated("workers/residency/window.py", _unit("window")),
    "scheduler": Mutated("workers/engine/scheduler.py", _unit("scheduler")),
    "resume": Mutated("cluster/dispatch/failover.py", _unit("resume_stream")),
}

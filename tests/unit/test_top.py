"""`forecache top`: rates between two readings, also when processes start or end in between."""

import io

from rich.console import Console

from forecache.cluster.cli.top import Change, Snapshot, render


def page(*lines: str) -> str:
    names = {line.partition("{")[0] for line in lines}
    return "".join(
        f"# TYPE {name} untyped\n" + "".join(f"{line}\n" for line in lines if line.startswith(f"{name}{{"))
        for name in sorted(names)
    )


def sample(name: str, process: str, value: float, component: str = "worker", **more: str) -> str:
    labels = {"model_name": "m", "component": component, "process": process, **more}
    pairs = ",".join(f'{key}="{text}"' for key, text in labels.items())
    return f"{name}{{{pairs}}} {value}"


def test_rates_are_of_processes_that_were_there_before() -> None:
    tokens = "forecache_generation_tokens_total"
    before = Snapshot.parse(page(sample(tokens, "a", 10), sample(tokens, "b", 1000), sample(tokens, "c", 5)), 1.0)
    now = Snapshot.parse(page(sample(tokens, "a", 30), sample(tokens, "c", 2), sample(tokens, "d", 999)), 3.0)
    change = Change(before, now)
    assert change.rate(tokens) == 10, "b is gone, c began again, d is new"
    assert change.rate(tokens, "a") == 10 and change.rate(tokens, "c") == 0 and change.rate(tokens, "d") == 0


def test_a_process_that_did_not_answer_before_has_no_rate() -> None:
    tokens = "forecache_generation_tokens_total"
    before = Snapshot.parse(page(sample("up", "a", 0)), 1.0)
    now = Snapshot.parse(page(sample("up", "a", 1), sample(tokens, "a", 5_000_000)), 3.0)
    assert Change(before, now).rate(tokens) == 0 and Change(before, now).rate(tokens, "a") == 0


def test_shares_are_of_late_and_else_of_all_time() -> None:
    hits, queries = "forecache_prefix_cache_hits_total", "forecache_prefix_cache_queries_total"
    before = Snapshot.parse(page(sample(hits, "a", 10), sample(queries, "a", 100)), 1.0)
    now = Snapshot.parse(page(sample(hits, "a", 60), sample(queries, "a", 200)), 2.0)
    assert Change(before, now).share(hits, queries) == 0.5
    assert Change(now, now).share(hits, queries) == 0.3
    assert Change(now, now).share(hits, "other") is None


def test_labels_are_added_up_within_a_process() -> None:
    one, two = (
        sample("forecache_errors_total", "i", value, "ingress", kind=kind) for value, kind in ((1, "x"), (2, "y"))
    )
    assert Snapshot.parse(page(one, two), 0.0).value("forecache_errors_total", "i") == 3


def test_a_process_that_does_not_answer_is_shown_as_such() -> None:
    text = page(
        sample("up", "w1", 1),
        sample("up", "w2", 0),
        sample("up", "t1", 1, "tier"),
        sample("forecache_hot_pool_usage_perc", "w1", 0.5),
        sample("forecache_memory_tier_usage_perc", "t1", 0.25, "tier"),
        sample("forecache_memory_tier_bad_slots", "t1", 77, "tier"),
    )
    now = Snapshot.parse(text, 1.0)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(Change(now, now), "http://h:1"))
    lines = console.export_text().splitlines()
    assert lines[0].strip() == "m at http://h:1, chunks scored: no worker"
    assert any(line.startswith("w1") and "███░░░  50%" in line for line in lines)
    assert any(line.startswith("w2") and "no answer" in line for line in lines)
    assert any(line.startswith("t1") and " 25%" in line and " 77 " in line for line in lines)
    assert any("processes" in line and "2 / 3" in line for line in lines)

"""Kills the parts of a cluster of several nodes one after another while it answers requests. A script:

    python tests/cluster/faults.py --keep-ratio 1.0 --out tests/benchmarks/results/faults.json

First all requests are answered without a fault, then again while a memory tier, an indexer, a decode worker, Redis or a
whole node gets SIGKILL; the next kill comes two seconds after the last one's role is ready again. Exit status 1 unless
every request is answered, enough of them as without faults, and nothing is left over: no leaked hold, which is
anything that a memory tier still holds for anybody when nothing runs.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import ray
import redis
import torch
from processes import processes_below
from ray.cluster_utils import Cluster
from ray_nodes import HEAD, NODE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from forecache.cluster.cli.integrity import check_integrity
from forecache.cluster.config import ServeConfig
from forecache.cluster.launch.cluster import NAMESPACE, running
from forecache.cluster.tiers import Tiers, find_tiers

ROLES = ("tier", "indexer", "worker", "redis", "node")
PAUSE_S = 2.0
READY_WITHIN_S = 180.0
VOCABULARY = 257


@dataclass(frozen=True)
class Turn:
    """One request: new tokens after the conversation of its session so far. ``order`` counts all requests."""

    order: int
    session: int
    number: int
    new_tokens: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """``pauses``: (bytes of text before it, seconds) of each that is longer than a second; ``cached_tokens``: of the
    prompt, found in memory."""

    text: str
    error: str
    duration_s: float
    longest_pause_s: float
    pauses: tuple[tuple[int, float], ...]
    cached_tokens: int

    def difference(self, expected: "Answer") -> dict[str, Any]:
        """The place where this answer differs from the expected one, with what its client saw."""
        ours, theirs = self.text.encode(), expected.text.encode()
        parts = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        return {
            "parts_at_byte": parts,
            "bytes": len(theirs),
            "pauses": [[at, round(seconds, 1)] for at, seconds in self.pauses],
            "cached_tokens": self.cached_tokens,
            "cached_tokens_without_faults": expected.cached_tokens,
        }


@dataclass(frozen=True)
class Kill:
    role: str
    at_s: float
    ready_after_s: float


def make_model(path: Path, hidden_size: int = 64, layers: int = 2) -> None:
    """Write a model of random layers with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def plan(requests: int, sessions: int, seed: int) -> list[list[Turn]]:
    """The turns of each session: short and long questions, short and long answers."""
    rng = random.Random(seed)
    turns: list[list[Turn]] = [[] for _ in range(sessions)]
    for number in range(requests):
        session = turns[number % sessions]
        new = tuple(rng.randrange(1, VOCABULARY) for _ in range(rng.choice((20, 60, 150, 300))))
        session.append(Turn(number, number % sessions, len(session), new, rng.choice((60, 150, 300, 600))))
    return turns


class Client:
    """Sends the turns of all sessions, with the sessions in parallel."""

    def __init__(self, url: str, keep_ratio: float, salt: str) -> None:
        self._url = url
        self._keep_ratio = keep_ratio
        self._salt = salt

    def ask(self, turn: Turn, prompt: list[int]) -> Answer:
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": turn.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "forecache": {
                "keep_ratio": self._keep_ratio,
                "cache_salt": self._salt,
                "session_id": f"{self._salt}-{turn.session}",
            },
        }
        start_s = last_s = time.monotonic()
        pause_s, text, error, done, cached = 0.0, "", "", False, 0
        pauses: list[tuple[int, float]] = []
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=600) as response:
                for line in response.iter_lines():
                    if not line.startswith("data: "):
                        continue
                    now_s = time.monotonic()
                    if now_s - last_s > 1:
                        pauses.append((len(text.encode()), now_s - last_s))
                    pause_s, last_s = max(pause_s, now_s - last_s), now_s
                    if line == "data: [DONE]":
                        done = True
                        break
                    event = json.loads(line.removeprefix("data: "))
                    error = error or (event["error"]["message"] if "error" in event else "")
                    text += "".join(choice["text"] for choice in event.get("choices", []))
                    if usage := event.get("usage"):
                        cached = usage["prompt_tokens_details"]["cached_tokens"]
        except httpx.HTTPError as failure:
            error = repr(failure)
        if not done and not error:
            error = "the stream ended early"
        return Answer(text, error, time.monotonic() - start_s, pause_s, tuple(pauses), cached)

    def run(
        self,
        sessions: list[list[Turn]],
        before: Callable[[Turn], None] = lambda turn: None,
        said: dict[tuple[int, int], Answer] | None = None,
    ) -> dict[tuple[int, int], Answer]:
        """The answers to all turns.

        With ``said``, conversations continue with these answers, so that one different answer does not change all later
        ones.
        """
        answers: dict[tuple[int, int], Answer] = {}

        def talk(turns: list[Turn]) -> None:
            history: list[int] = []
            for turn in turns:
                before(turn)
                history += turn.new_tokens
                place = turn.session, turn.number
                answers[place] = self.ask(turn, history)
                history += list((said or answers)[place].text.encode()[: turn.max_tokens])

        threads = [threading.Thread(target=talk, args=(turns,)) for turns in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers


NAMES = {"tier": "ray::MemoryTier", "indexer": "ray::IndexerActor", "worker": "DecodeWorker", "redis": "redis-server"}


class Killer:
    """Kills a process of a role, and waits until the role is ready again."""

    def __init__(self, cluster: Any, tiers: Tiers, url: str, nodes: int, seed: int) -> None:
        self._cluster = cluster
        self._tiers = tiers
        self._url = url
        self._nodes = nodes
        self._rng = random.Random(seed)
        self._start_s = time.monotonic()
        self.begun = 0
        self.kills: list[Kill] = []

    def kill(self, role: str) -> None:
        before = self._pids(role)
        self.begun += 1
        time.sleep(self._rng.uniform(0.3, 1.5))
        at_s = time.monotonic() - self._start_s
        if role == "node":
            [_, *others] = self._cluster.list_all_nodes()
            self._cluster.remove_node(self._rng.choice(others), allow_graceful=False)
            self._cluster.add_node(**NODE)
        else:
            victim = self._rng.choice(sorted(before))
            os.kill(victim, signal.SIGKILL)
            before.discard(victim)
        killed_s = time.monotonic()
        while not self.ready(role, before):
            assert time.monotonic() - killed_s < READY_WITHIN_S, f"{role} is not ready again"
            time.sleep(0.2)
        self.kills.append(Kill(role, at_s, time.monotonic() - killed_s))
        print(f"{at_s:7.1f} s  {role:8} ready after {self.kills[-1].ready_after_s:5.1f} s", flush=True)

    def _pids(self, role: str) -> set[int]:
        return {pid for pid, name in processes_below(os.getpid()).items() if role in NAMES and NAMES[role] in name}

    def ready(self, role: str = "node", others: set[int] | None = None) -> bool:
        """Whether a process of the role that is not among ``others`` answers; for a node, whether all do."""
        if role == "redis":
            try:
                with redis.from_url(self._tiers.redis_url, socket_timeout=1) as client:
                    return bool(client.ping())
            except redis.RedisError:
                return False
        if others is not None and role != "node" and not self._pids(role) - others:
            return False
        if role == "indexer":
            return True
        if len(self._tiers.ask("arena_path")) < self._nodes:
            return False
        if role == "tier":
            return True
        try:
            told = httpx.get(f"{self._url}/ready", timeout=10).json()
        except (httpx.HTTPError, ValueError):
            return False
        return bool(told.get("workers") == self._nodes - 1)


def leaked_holds(tiers: Tiers, within_s: float = 60.0) -> list[str]:
    """The holders that tiers still hold, reserve or keep records for ``within_s`` after the last request."""
    end_s = time.monotonic() + within_s
    while True:
        leaked = [f"{name} holds for {holder}" for name, told in tiers.ask("holders").items() for holder in told]
        if not leaked or time.monotonic() > end_s:
            return leaked
        time.sleep(0.5)


def left_over(url: str, tiers: Tiers, arena_dir: Path) -> list[str]:
    """Everything that is left over although no request runs."""
    wrong = []
    stats = tiers.ask("stats")
    held = {name: tier.held_slots for name, tier in stats.items() if tier.held_slots}
    pinned = {name: tier.pinned_slots for name, tier in stats.items() if tier.pinned_slots}
    wrong += [f"{name} has {count} held slots" for name, count in held.items()]
    wrong += [f"{name} has {count} pinned slots" for name, count in pinned.items()]
    files = {path.name for path in arena_dir.glob("forecache-*")}
    # the file of a node that was killed stays until a tier starts on that machine
    wrong += [f"{name} is an arena without an owner" for name in files - {f"forecache-{tier}" for tier in stats}]
    metrics = httpx.get(f"{url}/metrics/cluster", timeout=30).text
    for series in ("forecache_num_requests_running", "forecache_hot_pool_usage_perc"):
        values = [float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(series)]
        wrong += [f"{series} is {values}" for _ in [0] if any(values)]
    return wrong + check_integrity(tiers, settle_s=30)


def run(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    model, arena_dir = directory / "tiny", directory / "arenas"
    make_model(model)
    arena_dir.mkdir()
    cluster: Any = Cluster(initialize_head=True, head_node_args={**HEAD, "num_cpus": 0})
    for _ in range(args.nodes):
        cluster.add_node(**NODE)
    config = ServeConfig.model_validate(
        {
            "address": cluster.address,
            "port": 0,
            "workers": args.nodes,
            "proxy_location": "HeadOnly",
            # on the head, which is never killed: an ingress takes the streams along that pass through it
            "ingresses": 1,
            "engine": {
                "model": str(model), "chunk_tokens": 16, "hot_bytes": "2MiB", "threads": 1, "late_policy": "wait",
                "window_steps": 32, "max_batch_size": 8,
            },
            "memory": {
                "cold_bytes": args.cold_bytes, "arena_dir": arena_dir, "replicas": args.replicas, "heartbeat_s": 0.5,
            },
            "indexer": {"manifest": "none"},
        }
    )  # fmt: skip
    sessions = plan(args.requests, args.sessions, args.seed)
    result: dict[str, Any] = {"keep_ratio": args.keep_ratio, "replicas": args.replicas, "requests": args.requests}
    try:
        with running(config, lambda text: print(text, flush=True)) as served:
            here = ray.get_runtime_context().get_node_id()
            assert here == cluster.head_node.node_id, "the driver must be on the head, which is never killed"
            tiers = find_tiers(NAMESPACE)
            killer = Killer(cluster, tiers, served.url, args.nodes + 1, args.seed)
            while not killer.ready():
                time.sleep(0.5)
            start_s = time.monotonic()
            expected = Client(served.url, args.keep_ratio, "sound").run(sessions)
            print(f"without faults: {time.monotonic() - start_s:.0f} s", flush=True)
            failed = [answer.error for answer in expected.values() if answer.error]
            assert not failed, failed
            result |= faulty(args, killer, sessions, expected, served.url)
            result["leaked_holds"] = leaked_holds(tiers)
            result["wrong"] = left_over(served.url, tiers, arena_dir)
    finally:
        cluster.shutdown()
    result["left_files"] = [path.name for path in arena_dir.iterdir()]
    return result


def faulty(
    args: argparse.Namespace,
    killer: Killer,
    sessions: list[list[Turn]],
    expected: dict[tuple[int, int], Answer],
    url: str,
) -> dict[str, Any]:
    """Send all requests again while parts are killed: each kill happens when some requests have just begun."""
    over = threading.Event()

    def before(turn: Turn) -> None:
        while killer.begun <= turn.order * args.kills // args.requests and not over.is_set():
            time.sleep(0.05)

    answers: dict[tuple[int, int], Answer] = {}
    start_s = time.monotonic()
    client = Client(url, args.keep_ratio, "faults")
    asking = threading.Thread(target=lambda: answers.update(client.run(sessions, before, expected)))
    asking.start()
    try:
        # in the main thread: only there can a node be added
        for number in range(args.kills):
            time.sleep(PAUSE_S)
            if time.monotonic() > start_s + 60 * args.minutes:
                break
            killer.kill(ROLES[number % len(ROLES)])
    finally:
        over.set()
        asking.join()
    errors = {f"{place}": answer.error for place, answer in answers.items() if answer.error}
    others = [place for place, answer in answers.items() if not answer.error and answer.text != expected[place].text]
    cached = {place: (answer.cached_tokens, expected[place].cached_tokens) for place, answer in sorted(answers.items())}
    return {
        "duration_s": time.monotonic() - start_s,
        "kills": [asdict(kill) for kill in killer.kills],
        "answered": len(answers) - len(errors),
        "equal": len(answers) - len(errors) - len(others),
        "others": {f"{place}": answers[place].difference(expected[place]) for place in others},
        "found_otherwise": {f"{place}": two for place, two in cached.items() if len(set(two)) > 1},
        "errors": errors,
        "longest_pause_s": max(answer.longest_pause_s for answer in answers.values()),
        "median_pause_s": statistics.median(answer.longest_pause_s for answer in answers.values()),
    }


def table(result: dict[str, Any]) -> str:
    rows = [f"{'role':10}{'kills':>6}{'ready after, s: median':>26}{'longest':>10}"]
    counts = Counter(kill["role"] for kill in result["kills"])
    for role in ROLES:
        times = [kill["ready_after_s"] for kill in result["kills"] if kill["role"] == role]
        if times:
            rows.append(f"{role:10}{counts[role]:>6}{statistics.median(times):>26.1f}{max(times):>10.1f}")
    rows += [
        f"keep ratio {result['keep_ratio']}: {result['answered']} of {result['requests']} answered, "
        f"{result['equal']} as without faults, in {result['duration_s']:.0f} s",
        f"longest pause of an answer: median {result['median_pause_s']:.1f} s, most {result['longest_pause_s']:.1f} s",
        f"errors: {result['errors'] or 'none'}",
        f"other answers: {result['others'] or 'none'}",
        f"prompt tokens found in memory and, without faults, others: {result['found_otherwise'] or 'none'}",
        f"leaked holds: {len(result['leaked_holds'])} {' '.join(result['leaked_holds'])}".rstrip(),
        f"left over: {result['wrong'] + result['left_files'] or 'nothing'}",
    ]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-ratio", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=20.0, help="no kill after that")
    parser.add_argument("--nodes", type=int, default=3, help="in addition to the head")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument(
        "--cold-bytes",
        default="32MiB",
        help="of each node; by default too little for all chunks twice, so that some make way for others",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forecache-faults-", dir="/dev/shm") as directory:
        result = run(args, Path(directory))
    print(table(result))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    enough = result["requests"] if args.keep_ratio == 1.0 else 0.95 * result["requests"]
    good = result["answered"] == result["requests"] and result["equal"] >= enough
    left = result["leaked_holds"] or result["wrong"] or result["left_files"]
    return int(not good or bool(left) or len(result["kills"]) < args.kills)


if __name__ == "__main__":
    sys.exit(main())

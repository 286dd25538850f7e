"""Sequences larger than their node's arena: on real nodes they give the same tokens as with one large arena."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray_nodes import NODE
from transformers import LlamaConfig, LlamaForCausalLM

from forecache.cluster.cli.integrity import check_integrity
from forecache.cluster.launch.cluster import NAMESPACE
from forecache.cluster.launch.supervisor import Supervisor
from forecache.cluster.tiers import Tiers
from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.serving.config import IndexerConfig, SelectionConfig
from forecache.indexer.serving.scorer import LocalIndexer
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams
from forecache.workers.engine.build import build_engine
from forecache.workers.llm import LLM
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.client.memory import RemoteMemory
from forecache.workers.memory.client.peers import RemotePeers
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.tier.actor import TierSettings, start_tier
from forecache.workers.memory.tier.catalog import Catalog
from forecache.workers.models.backbone import load_backbone
from forecache.workers.models.step.architecture import Backbone
from forecache.workers.residency.window import PROBE_TOKENS

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("by_value")]

CHUNK_TOKENS = 16
PROMPT_CHUNKS, ANSWER = 60, 100
CHUNKS = PROMPT_CHUNKS + -(-ANSWER // CHUNK_TOKENS)
# chunks of other nodes are asked for a window ahead: here all are, so that every run chooses the same sets
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "chunk_tokens": CHUNK_TOKENS,
    "window_steps": 16,
    "lead_steps": 16,
    "late_policy": "wait",
    "min_resident_tokens": 0,
    "threads": 1,
}


def load(model: Path) -> tuple[Backbone, IndexSpec]:
    backbone = load_backbone(model, dtype="float32", device="cpu", chunk_tokens=CHUNK_TOKENS)
    return backbone, backbone.architecture.choose_scorer(IndexerConfig(manifest="none"), "tiny", backbone).spec


class Worker:
    """A decode worker without Ray Serve: an engine that uses the memory tier of its node."""

    def __init__(self, name: str, tier: Any, model: Path, hot_chunks: int) -> None:
        torch.set_num_threads(1)
        backbone, spec = load(model)
        self.memory = RemoteMemory(lambda: tier, deadline_s=20, peers=RemotePeers(NAMESPACE, 5))
        self.engine = build_engine(
            backbone,
            None,
            EngineConfig(model=str(model), hot_bytes=hot_chunks * backbone.layout.nbytes, **SETTINGS),
            SelectionConfig(),
            self.memory,
            LocalIndexer(spec, 1, Arena.attach),
            spec,
            name,
        )
        self.tokens = 0

    def pid(self) -> int:
        return os.getpid()

    def progress(self) -> int:
        """The tokens so far of the running answer."""
        return self.tokens

    def run(self, number: int, prompt: list[int], keep_ratio: float, tokens: int = ANSWER) -> tuple[list[int], Any]:
        """Run a request to its end; returns the answer and its statistics, and checks that nothing is left."""
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        cache = CacheOptions(keep_ratio=keep_ratio, cache_salt=f"{keep_ratio}")
        self.engine.add_request(GenerateRequest(f"r{number}", tuple(prompt), sampling, cache))
        answer: list[int] = []
        while True:
            for event in self.engine.step():
                answer += event.token_ids
                self.tokens = len(answer)
                if event.finish_reason is not None:
                    assert event.error is None, event.error
                    self.engine.flush()
                    self.engine.flush()
                    self.engine.check_integrity()
                    assert self.engine.pool.referenced == 0
                    return answer, event.stats


def get(ref: Any) -> Any:
    return ray.get(ref, timeout=90)


def wait_until(condition: Callable[[], bool], within_s: float = 40) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"it did not come about in {within_s} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two random layers with weights so large that greedy tokens vary."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


class Nodes:
    """Tiers with arenas of so many slots, one on each node, each with a worker."""

    def __init__(self, cluster: Any, directory: Path, redis_url: str, model: Path) -> None:
        self.cluster = cluster
        self.directory = directory
        self.redis_url = redis_url
        self.model = model
        self.tiers: list[Any] = []
        self.workers: list[Any] = []

    def start(self, *slots: int, hot_chunks: int = 100, workers: int = 3, **options: Any) -> None:
        backbone, spec = load(self.model)
        nodes = self.cluster.list_all_nodes()
        for number, (node, count) in enumerate(zip(nodes, slots, strict=True)):
            arena_dir = self.directory / str(number)
            arena_dir.mkdir()
            cold_bytes = (2 << 20) + count * (backbone.layout.nbytes + spec.nbytes + 64)
            config = MemoryConfig(
                cold_bytes=cold_bytes, arena_dir=arena_dir, heartbeat_s=0.2, call_deadline_s=8,
                remote_index_bytes=200 * (spec.nbytes + 64), **options,
            )  # fmt: skip
            settings = TierSettings(config, backbone.layout, spec.nbytes, spec.fingerprint, NAMESPACE, self.redis_url)
            self.tiers.append(start_tier(settings, self.all.name(node.node_id), node.node_id))
            self.config = config
        for number, node in enumerate(nodes[:workers]):
            here = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            name = f"REPLICA {self.directory.name}#w{number}"  # by its end a worker is known to live
            worker = ray.remote(Worker).options(num_cpus=0, scheduling_strategy=here, name=name, max_concurrency=2)
            self.workers.append(worker.remote(f"w{number}", self.tiers[number], self.model, hot_chunks))
        get([worker.pid.remote() for worker in self.workers])
        with Catalog(self.redis_url) as catalog:
            wait_until(lambda: len(catalog.tiers()) == len(self.tiers))

    def stats(self, number: int) -> Any:
        return get(self.tiers[number].stats.remote())

    def tier_pid(self, number: int) -> int:
        return int(get(self.tiers[number].__ray_call__.remote(lambda self: os.getpid())))

    @property
    def all(self) -> Tiers:
        return Tiers(NAMESPACE, self.directory.name, self.redis_url, 20)

    def check(self) -> None:
        """Check that nothing is held on any node, and that all books agree."""
        living = sum(tier is not None for tier in self.tiers)

        def free() -> bool:
            stats = self.all.ask("stats").values()
            return len(stats) == living and not any(tier.held_slots or tier.remote_records for tier in stats)

        wait_until(free)
        assert check_integrity(self.all, settle_s=30) == []

    def stop(self) -> None:
        for worker in self.workers:
            ray.kill(worker)
        for tier in self.tiers:
            if tier is not None:
                get(tier.shutdown.remote())
                ray.kill(tier)


@pytest.fixture
def nodes(cluster: Any, tmp_path: Path, redis_server: Any, model: Path) -> Iterator[Nodes]:
    nodes = Nodes(cluster, tmp_path, redis_server.url, model)
    yield nodes
    nodes.stop()


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 256, (PROMPT_CHUNKS * CHUNK_TOKENS + 5,), generator=generator).tolist()


def test_a_session_with_a_tenth_of_its_chunks_here_is_decoded_as_one_that_has_all(
    nodes: Nodes, prompt: list[int]
) -> None:
    nodes.start(200, CHUNKS // 10, 8, workers=2)
    whole, tenth = nodes.workers
    for number, keep_ratio in enumerate((1.0, 0.135)):
        expected, _ = get(whole.run.remote(number, prompt, keep_ratio))
        assert len(set(expected)) > 10
        before = nodes.stats(1).fetched_chunks
        wait_until(lambda: nodes.stats(0).held_slots == 0)
        answer, stats = get(tenth.run.remote(number, prompt, keep_ratio))
        assert answer == expected
        # nothing was computed again but the last tokens, which choose the first resident set
        fresh = 1 if keep_ratio == 1 else PROBE_TOKENS
        assert stats.cached_tokens == (len(prompt) - fresh) // CHUNK_TOKENS * CHUNK_TOKENS
        assert 0 < stats.locate_s < stats.queue_s < stats.time_to_first_token_s
        assert nodes.stats(1).fetched_chunks - before >= stats.recalled_chunks // 2 > 0
        nodes.check()


def test_a_sequence_of_three_arenas_is_prefilled_and_decoded(nodes: Nodes, prompt: list[int]) -> None:
    slots = 25
    nodes.start(slots, slots, slots, workers=1)
    [worker] = nodes.workers
    assert 2 * slots < CHUNKS
    options: dict[str, Any] = {"max_tokens": ANSWER, "ignore_eos": True}
    with LLM(str(nodes.model), skip_tokenizer=True, cold_bytes=4 << 20, hot_bytes=4 << 20, **SETTINGS) as llm:
        for number, keep_ratio in enumerate((1.0, 0.135)):
            [expected] = llm.generate([prompt], keep_ratio=keep_ratio, cache_salt=f"{keep_ratio}", **options)
            answer, _ = get(worker.run.remote(number, prompt, keep_ratio))
            assert answer == expected.token_ids
            nodes.check()
    assert sum(nodes.stats(number).stored_chunks for number in range(3)) > 2 * slots


def test_a_tier_that_dies_costs_a_pause_a_node_a_prefill_and_a_worker_nothing(
    nodes: Nodes, prompt: list[int], cluster: Any
) -> None:
    nodes.start(8, 40, 200, workers=2, hot_chunks=30)
    part, whole = nodes.workers
    tokens, keep_ratio = 300, 0.135
    chunks = PROMPT_CHUNKS + -(-tokens // CHUNK_TOKENS)
    expected, _ = get(whole.run.remote(0, prompt, keep_ratio, tokens))  # over the second and the third node
    assert nodes.stats(1).stored_chunks >= 40 and nodes.stats(2).stored_chunks >= chunks - 40
    nodes.check()

    def begin(number: int) -> Any:
        answer = part.run.remote(number, prompt, keep_ratio, tokens)
        wait_until(lambda: get(part.progress.remote()) in range(20, tokens - 100))
        return answer

    for number, victim in enumerate((2, 0)):  # one that has the chunks, then the worker's own
        answer = begin(number)
        assert nodes.stats(0).remote_records > 40 and nodes.stats(2).held_slots > 20
        os.kill(nodes.tier_pid(victim), signal.SIGKILL)
        assert get(answer)[0] == expected
        nodes.check()

    answer = begin(2)
    cluster.remove_node(cluster.list_all_nodes()[1])
    nodes.tiers[1] = None
    nodes.workers.remove(whole)
    try:
        assert get(answer)[0] == expected
        nodes.check()

        begin(3)
        assert get(nodes.tiers[0].holding_workers.remote()) == get(nodes.tiers[2].holding_workers.remote()) == ["w0"]
        nodes.workers.remove(part)
        ray.kill(part)
        with Supervisor(nodes.config, nodes.all, period_s=0.2):
            nodes.check()
    finally:
        cluster.add_node(**NODE)

"""Sizes that are chosen fit what is free, grow with it, and a refusal names a size that fits."""

import gc
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forecache.cluster.config import ServeConfig
from forecache.cluster.launch import machine
from forecache.cluster.launch.preflight import check_model
from forecache.workers.core.config import CPU_BATCH_SIZE, GPU_BATCH_SIZE, EngineConfig, WorkerSettings
from forecache.workers.engine.sizes import LEAST_CHUNKS, graph_bytes, run_largest_step
from forecache.workers.errors import MemorySizeError
from forecache.workers.free_memory import available_bytes, room_bytes
from forecache.workers.llm import LLM
from forecache.workers.memory.arena.arena import Arena
from forecache.workers.memory.arena.cold_size import (
    CPU_SHARE,
    GPU_SHARE,
    LEAST_BYTES,
    MOST_BYTES,
    auto_cold_bytes,
    cold_bytes_within,
)
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.format.layout import attention_layout
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.pool_size import DeviceMemory, check_pool_fits, cpu_pool_bytes, gpu_pool_bytes
from forecache.workers.memory.tier.actor import TierSettings, _open_arena
from forecache.workers.models.backbone import expected_weight_bytes, load_backbone, load_config
from forecache.workers.models.step.runner import Runner

SHM = Path("/dev/shm")
GIB = 1 << 30
sizes = st.integers(0, 4 << 40)
shares = st.sampled_from([CPU_SHARE, GPU_SHARE])


@settings(deadline=None)
@given(sizes, sizes, st.integers(0, 64 << 30), st.integers(0, 1 << 30), sizes, shares)
def test_cold_memory_fits_or_the_refusal_says_what_would(
    available: int, room: int, claimed: int, store: int, most: int, share: float
) -> None:
    def chosen(available: int, room: int) -> int:
        return cold_bytes_within(
            available, room, SHM, share=share, claimed_bytes=claimed, claimed_room=store, most_bytes=most
        )

    try:
        size = chosen(available, room)
    except MemorySizeError as error:
        needed = int(re.findall(r"at least (\d+) bytes", str(error))[0])
        of_room = str(error).startswith(str(SHM))
        assert needed > (room if of_room else available)
        more_memory = available if of_room else needed
        more_room = needed if of_room else room
        if of_room:
            more_memory = max(more_memory, claimed + int(LEAST_BYTES / share) + 2)
        assert chosen(more_memory, more_room) == LEAST_BYTES
        return
    assert LEAST_BYTES <= size <= MOST_BYTES
    assert size + store <= room and size + claimed <= available
    assert size <= max(most, LEAST_BYTES)
    assert size <= chosen(available + GIB, room + GIB)


def test_the_least_shared_memory_is_named_as_docker_takes_it() -> None:
    with pytest.raises(MemorySizeError, match=r"--shm-size=200m or more") as refused:
        cold_bytes_within(64 * GIB, 64 << 20, SHM, share=CPU_SHARE, claimed_room=128 << 20)
    needed = int(re.findall(r"at least (\d+) bytes", str(refused.value))[0])
    assert needed <= 200 << 20
    assert cold_bytes_within(64 * GIB, 200 << 20, SHM, share=CPU_SHARE, claimed_room=128 << 20) >= LEAST_BYTES


@settings(deadline=None)
@given(
    total=st.integers(1 << 30, 256 << 30),
    used=st.floats(0, 1),
    own=st.floats(0, 1),
    runner=st.integers(0, 4 << 30),
    activations=st.integers(0, 8 << 30),
    graphs=st.integers(0, 4 << 30),
    utilization=st.integers(1, 100).map(lambda percent: percent / 100),
    least=st.integers(1, 1 << 30),
)
def test_the_pool_of_a_gpu_fits_or_the_refusal_says_what_would(
    total: int, used: float, own: float, runner: int, activations: int, graphs: int, utilization: float, least: int
) -> None:
    others = int(used * total)
    mine = int(own * (total - others))
    memory = DeviceMemory(total, total - others - mine, mine, runner, activations, graphs)
    taken = mine + runner + activations + graphs
    try:
        size = gpu_pool_bytes(memory, utilization, least)
    except MemorySizeError as error:
        advised = re.findall(r"(?:Lower|Raise) it to ([\d.]+)", str(error))
        assert all(gpu_pool_bytes(memory, float(share), least) >= least for share in advised)
        if not advised:  # then no share would do
            for percent in range(1, 101):
                with pytest.raises(MemorySizeError):
                    gpu_pool_bytes(memory, percent / 100, least)
        return
    assert least <= size
    assert size + taken <= utilization * total <= total - others
    more = DeviceMemory(total, memory.free, mine, runner, 0, graphs)
    assert gpu_pool_bytes(more, utilization, least) >= size


@settings(deadline=None)
@given(sizes, st.integers(1, 1 << 32), st.integers(1, 64), st.integers(0, 1 << 38))
def test_the_pool_of_a_cpu_fits_or_the_refusal_says_what_would(
    available: int, least: int, sharers: int, claimed: int
) -> None:
    try:
        size = cpu_pool_bytes(available, least, sharers=sharers, claimed_bytes=claimed)
    except MemorySizeError as error:
        needed = int(re.findall(r": (\d+) bytes would do", str(error))[0])
        assert needed > available
        assert cpu_pool_bytes(needed, least, sharers=sharers, claimed_bytes=claimed) >= least
        return
    assert least <= size
    assert sharers * size + claimed <= available
    assert size <= cpu_pool_bytes(available + GIB, least, sharers=sharers, claimed_bytes=claimed)


def test_a_size_that_the_user_names_must_fit() -> None:
    check_pool_fits(5, 5)
    with pytest.raises(MemorySizeError, match=r"--hot-bytes 6 .* lower it to 5 or less"):
        check_pool_fits(6, 5)


def test_batches_by_device() -> None:
    config = EngineConfig()
    assert (config.hot_bytes, config.max_batch_size, config.gpu_memory_utilization) == ("auto", "auto", 0.9)
    assert config.for_device("cpu").batch_size == CPU_BATCH_SIZE == 16
    assert config.for_device("cuda").batch_size == GPU_BATCH_SIZE == 256
    assert EngineConfig(max_batch_size=3).for_device("cuda").batch_size == 3


def test_graphs_keep_logits_and_the_activations_of_the_largest_step() -> None:
    config = EngineConfig().for_device("cuda")
    assert graph_bytes(config, 16, 1000, 5 << 30) >= 2 * 16 * 1000 * 4 + (5 << 30)
    assert graph_bytes(config, 256, 128256, 0) > graph_bytes(config, 16, 128256, 0)
    assert graph_bytes(config.model_copy(update={"cuda_graphs": False}), 256, 128256, 5 << 30) == 0


def test_an_engine_without_any_size(tiny_model: Path) -> None:
    with LLM(str(tiny_model), skip_tokenizer=True, chunk_tokens=16) as llm:
        longest, slot = llm.engine.max_model_len, llm.cold_layout.nbytes
        assert llm.config.batch_size == 16
        assert llm.engine.pool.num_slots * 16 >= 2 * 16 * longest
        assert llm.engine.pool.num_slots * slot <= available_bytes()
        assert LEAST_BYTES - (4 << 20) <= llm.memory.arena.description.file_bytes <= 0.9 * room_bytes(SHM)
        assert len(llm.generate([[3, 1, 4, 1, 5]], max_tokens=4)[0].token_ids) == 4


def test_a_pool_that_does_not_fit_is_refused(tiny_model: Path) -> None:
    with pytest.raises(MemorySizeError, match="lower it to"):
        LLM(str(tiny_model), skip_tokenizer=True, chunk_tokens=16, hot_bytes=1 << 60, cold_bytes=4 << 20)


@pytest.mark.parametrize(("step_tokens", "rows"), [(256, 4), (3000, 2), (16, 64)])
def test_the_largest_step_runs_before_there_is_a_pool(tiny_model: Path, step_tokens: int, rows: int) -> None:
    """With as many tokens as a step may have, over several prompts where one context is too short for them."""
    backbone = load_backbone(tiny_model, device="cpu", chunk_tokens=16)
    config = EngineConfig(max_step_tokens=step_tokens, chunk_tokens=16).for_device("cpu")
    spec = backbone.architecture.choose_scorer(ServeConfig().indexer, "tiny", backbone).spec
    pools: list[HotPool] = []

    def make_runner(pool: HotPool, rows: int) -> Runner:
        pools.append(pool)
        return backbone.architecture.make_runner(backbone, pool, None, spec, max_rows=rows)

    nbytes = run_largest_step(config, backbone, make_runner, rows)
    [pool] = pools
    assert nbytes == pool.memory.nbytes and pool.referenced == pool.num_slots
    assert step_tokens / 16 <= pool.num_slots < step_tokens / 16 + rows
    assert not (pool.memory == 0).all(1).any(), "every chunk was written"


def test_expected_weights_are_the_models(tiny_model: Path) -> None:
    backbone = load_backbone(tiny_model, device="cpu", chunk_tokens=16)
    found = sum(weight.nbytes for weight in backbone.model.parameters())
    assert expected_weight_bytes(load_config(tiny_model), torch.float32) == found


def test_cold_memory_of_a_server_leaves_the_models_theirs(tiny_model: Path, tmp_path: Path) -> None:
    engine = EngineConfig(model=str(tiny_model), device="cpu", chunk_tokens=16)
    config = ServeConfig(engine=engine, memory=MemoryConfig(arena_dir=tmp_path))
    facts = check_model(tiny_model, config)
    assert facts.cold_bytes is not None and facts.cold_bytes >= LEAST_BYTES
    assert facts.sized(config).memory.cold_size == facts.cold_bytes
    assert (facts.max_model_len, facts.cold_limit) == (2048, None)
    joined = check_model(tiny_model, config.model_copy(update={"address": "auto"}))
    assert joined.cold_bytes is None and joined.sized(config) is config, "each of its nodes chooses for itself"


def test_workers_that_share_a_node() -> None:
    served = ServeConfig()

    def settings_of(workers: int) -> WorkerSettings:
        engine = EngineConfig(device="cpu")
        return WorkerSettings(
            engine, served.memory, served.selection, served.indexer, namespace="n", run="r", workers=workers
        )

    assert settings_of(2).sharers({"Resources": {"CPU": 3.0}}) == 2
    assert settings_of(8).sharers({"Resources": {"CPU": 3.0}}) == 3
    assert settings_of(8).sharers({"Resources": {}}) == 1


def test_a_tier_that_restarts_keeps_the_size_that_was_chosen(tmp_path: Path) -> None:
    """What is free then is less by its own arena, whose chunks would be lost with another size."""
    layout = attention_layout("m", layers=2, kv_heads=1, head_dim=16, chunk_tokens=16, dtype=torch.float32)
    tier = TierSettings(MemoryConfig(arena_dir=tmp_path), layout, 128, "index")

    def slots(chunk_bytes: int, *, any_size: bool) -> tuple[int, int]:
        arena = _open_arena(tier, "tier", tmp_path, lambda: (chunk_bytes, 1 << 16), any_size=any_size)
        arena.close()
        del arena
        gc.collect()
        [file] = tmp_path.glob("forecache-*")
        return Arena.attach(file).slots, Arena.attach(file).record_slots

    first = slots(4 << 20, any_size=True)
    assert slots(8 << 20, any_size=True) == first
    chunks, records = slots(8 << 20, any_size=False)
    assert chunks > first[0] and records == first[1]


@pytest.fixture
def small_shm(tmp_path: Path) -> Iterator[Path]:
    """A real file system in memory of 64 MiB, as `/dev/shm` of a container."""
    place = tmp_path / "shm"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_the_shared_memory_of_a_container_is_refused_with_advice(small_shm: Path, tiny_model: Path) -> None:
    config = ServeConfig(memory=MemoryConfig(arena_dir=small_shm), port=0)
    for start in (lambda: machine.check(config), lambda: auto_cold_bytes(small_shm, share=CPU_SHARE)):
        with pytest.raises(MemorySizeError, match=r"too little for cold memory.*--shm-size=72m or more.*--arena-dir"):
            start()
    with pytest.raises(MemorySizeError, match="--shm-size"):
        LLM(str(tiny_model), skip_tokenizer=True, chunk_tokens=16, arena_dir=small_shm)
    subprocess.run(["mount", "-o", "remount,size=72m", str(small_shm)], check=True)
    machine.check(config)
    assert auto_cold_bytes(small_shm, share=CPU_SHARE) >= LEAST_BYTES
    assert LEAST_CHUNKS > 12, "a sequence at work needs as many hot chunks"

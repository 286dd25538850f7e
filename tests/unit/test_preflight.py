"""What a model's configuration and the settings tell before anything starts."""

from pathlib import Path

import pytest
import torch

from forecache.cluster.config import ServeConfig
from forecache.cluster.errors import StartError
from forecache.cluster.launch import preflight
from forecache.cluster.launch.preflight import check_model
from forecache.workers.core.config import EngineConfig
from forecache.workers.errors import ArenaError, UnsupportedModelError
from forecache.workers.llm import LLM
from forecache.workers.memory.config import MemoryConfig


def settings(model: Path, cold_bytes: int, max_model_len: int | None = None) -> ServeConfig:
    engine = EngineConfig(model=str(model), dtype="float32", device="cpu", chunk_tokens=16, max_model_len=max_model_len)
    return ServeConfig(engine=engine, memory=MemoryConfig(cold_bytes=cold_bytes))


def test_the_context_is_the_models_where_cold_memory_holds_it(tiny_model: Path) -> None:
    facts = check_model(tiny_model, settings(tiny_model, 8 << 20))
    assert (facts.max_model_len, facts.cold_limit, facts.has_manifest) == (2048, None, False)
    assert check_model(tiny_model, settings(tiny_model, 8 << 20, 512)).max_model_len == 512


def test_the_context_is_what_cold_memory_holds_where_that_is_less(tiny_model: Path, tmp_path: Path) -> None:
    """Else a request that leaves its `max_tokens` open would ask for more than any worker takes."""
    facts = check_model(tiny_model, settings(tiny_model, 3 << 20))
    with LLM(str(tiny_model), skip_tokenizer=True, chunk_tokens=16, cold_bytes=3 << 20, arena_dir=tmp_path) as llm:
        assert facts.max_model_len == facts.cold_limit == llm.memory.arena.slots * 16 < 2048


def test_workers_without_a_place_are_refused(tiny_model: Path) -> None:
    """Ray would wait for one until the start's deadline."""
    config = settings(tiny_model, 8 << 20)
    preflight.check_placement(config.model_copy(update={"workers": 2, "ray_num_cpus": 2}))
    with pytest.raises(StartError, match="--ray-num-cpus 2"):
        preflight.check_placement(config.model_copy(update={"workers": 3, "ray_num_cpus": 2}))
    with pytest.raises(StartError, match="--tier-resource, or join"):
        memory = config.memory.model_copy(update={"tier_resource": "memory"})
        preflight.check_placement(config.model_copy(update={"memory": memory}))
    engine = config.engine.model_copy(update={"device": "cuda"})
    with pytest.raises(StartError, match="need a GPU each"):
        workers = torch.cuda.device_count() + 1
        preflight.check_placement(config.model_copy(update={"engine": engine, "workers": workers}))


def test_what_cannot_be_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ArenaError, match="--cold-bytes"):
        check_model(tiny_model, settings(tiny_model, 1 << 20))
    with pytest.raises(UnsupportedModelError, match="2048 positions"):
        check_model(tiny_model, settings(tiny_model, 8 << 20, 4096))

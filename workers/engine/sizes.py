"""Chooses what an engine's settings leave open: the size of its hot pool, and of its batch."""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import GenerateRequest, SamplingParams
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.step_plan import Plan, StreamPart
from forecache.workers.errors import MemorySizeError
from forecache.workers.free_memory import available_bytes
from forecache.workers.memory.format.keys import root_key
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.pool_size import DeviceMemory, check_pool_fits, cpu_pool_bytes, gpu_pool_bytes
from forecache.workers.models.step.architecture import Backbone
from forecache.workers.models.step.graphs import batch_buckets, token_buckets
from forecache.workers.models.step.runner import Runner

logger = logging.getLogger(__name__)

LEAST_CHUNKS = 16
"""Of a pool whose size is chosen here: a sequence needs 8 resident chunks, half as many for a swap, and open ones."""
STATES_SHARE = 0.1
"""Of a GPU's memory, what the states of all sequences of a batch may take, for models whose sequences have one."""
GRAPH_BYTES = 8 << 20
"""Reserved for each CUDA graph, besides what it leaves for the host. A bound; the start checks it afterwards."""

MakeRunner = Callable[[HotPool, int], Runner]
"""Makes a runner for a pool and a number of rows."""


@dataclass(frozen=True)
class EngineSizes:
    """``config`` has numbers for ``hot_bytes`` and ``max_batch_size``; ``memory``: of a GPU, where it was measured."""

    config: EngineConfig
    memory: DeviceMemory | None = None

    @property
    def hot_bytes(self) -> int:
        assert self.config.hot_bytes != "auto"
        return self.config.hot_bytes


def choose_sizes(config: EngineConfig, backbone: Backbone, make_runner: MakeRunner, *, sharers: int = 1) -> EngineSizes:
    """``config`` with its device's defaults, and with sizes that fit the memory of this moment.

    Call it when weights and cold memory are in place. ``sharers``: workers on a CPU that share this machine.

    Raises :class:`MemorySizeError` if memory is too small; the message names a size that fits.
    """
    settings, device = config.for_device(backbone.device.type), backbone.device
    rows, nbytes = settings.batch_size, backbone.layout.nbytes
    if config.max_batch_size == "auto" and device.type == "cuda":
        rows = _rows_with_states(backbone, rows)
    memory = None
    if config.hot_bytes != "auto":
        check_pool_fits(config.hot_bytes, _free_bytes(device))
        hot_bytes = config.hot_bytes
    else:
        least = LEAST_CHUNKS * nbytes
        if device.type == "cuda":
            memory = _measure(settings, backbone, make_runner, rows)
            fitting = gpu_pool_bytes(memory, config.gpu_memory_utilization, least)
        else:
            weights = sum(weight.nbytes for weight in backbone.model.parameters())
            fitting = cpu_pool_bytes(available_bytes(), least, sharers=sharers, claimed_bytes=(sharers - 1) * weights)
        hot_bytes = max(min(fitting, settings.contexts_bytes(backbone.max_model_len, nbytes)), least)
        if config.max_batch_size == "auto":
            rows = max(min(rows, hot_bytes // least), 1)
    slots = hot_bytes // nbytes
    logger.info(
        "hot pool: %.2f GiB for %d chunks of %d tokens; batches of up to %d sequences",
        hot_bytes / 2**30, slots, settings.chunk_tokens, rows,
    )  # fmt: skip
    return EngineSizes(settings.model_copy(update={"hot_bytes": hot_bytes, "max_batch_size": rows}), memory)


def check_after_capture(sizes: EngineSizes, device: torch.device) -> None:
    """Check that the largest step still fits, now that pool and CUDA graphs are allocated.

    Raises :class:`MemorySizeError` if the graphs took more than was reserved and nothing is left for the step.
    """
    memory = sizes.memory
    if memory is None:
        return
    _release(device)
    # not what PyTorch keeps for graphs: eager steps can't use it
    left, utilization = torch.cuda.mem_get_info(device)[0], sizes.config.gpu_memory_utilization
    graphs = memory.free - (left + sizes.hot_bytes + memory.runner)
    logger.info("CUDA graphs took %d bytes, %d were reserved; %d bytes are free", graphs, memory.graphs, left)
    if left < memory.activations:
        fitting = int(100 * (utilization - (memory.activations - left) / memory.total)) / 100
        raise MemorySizeError(
            f"CUDA graphs took {graphs} bytes, more than the {memory.graphs} that were reserved: {left} bytes are "
            f"free, and the largest step takes {memory.activations}. Lower --gpu-memory-utilization to {fitting:g}, or "
            "lower --max-batch-size."
        )


def run_largest_step(config: EngineConfig, backbone: Backbone, make_runner: MakeRunner, rows: int) -> int:
    """Run the largest step that ``config`` allows, over prompts of its own, and wait for it; returns the bytes of the
    pool that it had.

    It computes as many prompt tokens as a step may have, and draws a token for each of ``rows`` sequences.
    """
    assert config.max_step_tokens is not None, "call for_device first"
    size, left = config.chunk_tokens, config.max_step_tokens
    lengths: list[int] = []
    for rest in range(min(rows, left), 0, -1):
        # one token for each that follows, and the others as early as contexts allow
        lengths.append(min(left - (rest - 1), backbone.max_model_len - 1))
        left -= lengths[-1]
    pool = HotPool(backbone.layout, sum(-(-tokens // size) for tokens in lengths), backbone.device)
    runner = make_runner(pool, rows)
    parts = [_part(config, number, tokens, pool) for number, tokens in enumerate(lengths)]
    runner.launch(Plan((), tuple(parts))).result()
    return pool.memory.nbytes


def _part(config: EngineConfig, number: int, tokens: int, pool: HotPool) -> StreamPart:
    """A prompt of ``tokens`` zeros, whose first token is drawn in the costliest way."""
    sampling = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, top_k=50)
    seq = TokenSequence(
        GenerateRequest(f"largest-step-{number}", (0,) * tokens, sampling),
        holder=f"largest-step/{number}",
        root=root_key(""),
        chunk_tokens=config.chunk_tokens,
        keep_ratio=config.keep_ratio,
        policy=config.policy,
    )
    seq.state = State.PREFILL
    for chunk in range(-(-tokens // config.chunk_tokens)):
        slot = pool.allocate()
        assert slot is not None, "the pool has a slot for each chunk"
        seq.open_slots[chunk] = slot
    return StreamPart(seq, tokens)


def _measure(config: EngineConfig, backbone: Backbone, make_runner: MakeRunner, rows: int) -> DeviceMemory:
    """Memory of the GPU now, and what the largest step takes of it."""
    device = backbone.device
    _release(device)
    allocated, other = torch.cuda.memory_allocated(device), _outside_torch(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept: list[int] = []

    def counted(pool: HotPool, rows: int) -> Runner:
        runner = make_runner(pool, rows)
        kept.append(torch.cuda.memory_allocated(device) - allocated - pool.memory.nbytes)
        return runner

    pool_bytes = run_largest_step(config, backbone, counted, rows)
    peak = torch.cuda.max_memory_allocated(device) - allocated - pool_bytes - kept[0]
    _release(device)
    # libraries keep workspaces and code outside PyTorch's allocator, which stay
    peak += max(_outside_torch(device) - other, 0)
    free, total = torch.cuda.mem_get_info(device)
    memory = DeviceMemory(
        total=total,
        free=free,
        own=torch.cuda.memory_reserved(device),
        runner=kept[0],
        activations=peak,
        graphs=graph_bytes(config, rows, int(backbone.config.vocab_size), peak),
    )
    logger.info("memory of %s before the hot pool: %s", device, memory)
    return memory


def graph_bytes(config: EngineConfig, rows: int, vocab: int, activations: int) -> int:
    """An estimate of what CUDA graphs take: of decode steps of up to ``rows`` sequences, and of steps with prompts.

    Graphs of one kind share the memory of their activations, and it is theirs alone. Those with prompts need as much as
    the largest step, and those of decode steps an eighth of it at most, having many times fewer tokens. Both keep
    logits, float32 [rows, vocab].
    """
    assert config.max_step_tokens is not None, "call for_device first"
    if config.cuda_graphs is False:
        return 0
    graphs = len(batch_buckets(rows)) + len(token_buckets(config.max_step_tokens + rows))
    return graphs * GRAPH_BYTES + activations + activations // 8 + 2 * rows * vocab * 4


def _rows_with_states(backbone: Backbone, rows: int) -> int:
    """``rows``, or fewer where states of so many sequences would take more than their share of the GPU."""
    nbytes = backbone.architecture.state_nbytes(backbone.config, backbone.dtype)
    total = torch.cuda.mem_get_info(backbone.device)[1]
    return rows if not nbytes else max(min(rows, int(STATES_SHARE * total) // nbytes), 1)


def _free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on ``device`` now."""
    if device.type != "cuda":
        return available_bytes()
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _outside_torch(device: torch.device) -> int:
    """Bytes in use on the GPU that PyTorch's allocator of this process has not."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _release(device: torch.device) -> None:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()

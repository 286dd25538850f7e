"""Steps that compute infinity or NaN: nothing of them is stored or shared, and only their request ends."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_llm import checked_llm
from torch import Tensor

from forecache.cluster.errors import from_exception
from forecache.workers.core.requests import CacheOptions, GenerateRequest, SamplingParams, TokenEvent
from forecache.workers.core.sequence import State
from forecache.workers.core.step_plan import Plan
from forecache.workers.errors import NonFiniteError
from forecache.workers.llm import LLM
from forecache.workers.models.backbone import expected_layout, load_config

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
    ),
]
WRONG = [float("nan"), float("inf")]
MOST_STEPS = 2000


@pytest.fixture(scope="module")
def tiny_dsv4(tmp_path_factory: pytest.TempPathFactory, make_deepseek_v4: Callable[..., Any]) -> Path:
    path = tmp_path_factory.mktemp("tiny-deepseek-v4")
    make_deepseek_v4(path)
    return path


@contextmanager
def open_llm(path: Path, device: str = "cpu", **settings: Any) -> Iterator[LLM]:
    """An LLM that checks at its end that nothing leaked, and that everything stored is finite."""
    chunk_tokens = 16 if "llama" in path.name else 128
    nbytes = expected_layout(load_config(path), chunk_tokens=chunk_tokens, dtype=torch.float32).nbytes
    defaults: dict[str, Any] = {
        "keep_ratio": 1.0,
        "min_resident_tokens": 0,
        "dtype": "float32",
        "chunk_tokens": chunk_tokens,
        "snapshot_tokens": chunk_tokens,
        "cold_bytes": 16 << 20,
        "hot_bytes": 64 * nbytes,
        "threads": 1,
        "device": device,
        "cuda_graphs": False,
        "torch_compile": False,  # compiled layers do not call the hooks of `Fault`
    }
    with checked_llm(path, **(defaults | settings)) as llm:
        yield llm
        assert_all_is_finite(llm)


def assert_all_is_finite(llm: LLM) -> None:
    """Check all stored chunks and snapshots, and all chunks that others can find in the pool."""
    llm.engine.flush()
    pool, fp8 = llm.engine.pool, llm.cold_layout != llm.engine.pool.layout
    found = [slots[0] for slots in pool._slots_of.values()]
    kv = pool.layout.fields[0].dtype
    if kv != torch.float8_e4m3fn:
        assert pool.memory[torch.tensor(found, dtype=torch.int64)].view(torch.float32).isfinite().all()
    refs = [ref for ref in llm.memory.find(llm.memory.keys()) if ref is not None]
    for ref in refs if not fp8 and kv != torch.float8_e4m3fn else ():
        assert llm.memory.arena.chunks[ref.slot].view(torch.float32).isfinite().all()


def prompt_of(tokens: int, seed: int) -> list[int]:
    return torch.randint(3, 256, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def add(llm: LLM, name: str, prompt: list[int], tokens: int, **cache: Any) -> None:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    llm.engine.add_request(GenerateRequest(name, tuple(prompt), sampling, CacheOptions(**cache)))


def finish(llm: LLM) -> dict[str, tuple[list[int], TokenEvent]]:
    """Run to the end; returns the tokens of all requests, and their last events."""
    tokens: dict[str, list[int]] = {}
    last: dict[str, TokenEvent] = {}
    for _ in range(MOST_STEPS):
        for event in llm.engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
            last[event.request_id] = event
        llm.engine.check_integrity()
        if llm.engine.idle:
            return {name: (tokens[name], last[name]) for name in last}
    raise AssertionError("no progress")


class Fault:
    """Sets one value of a module's output to ``wrong``, in ``times`` of the steps in which ``row`` returns a row."""

    def __init__(self, llm: LLM, module: Any, wrong: float, row: Callable[[Plan], int | None], times: int = 1) -> None:
        self.hits, self._times = 0, times
        self._wrong, self._row = wrong, row
        self._plan = Plan((), ())
        self._hook = module.register_forward_hook(self._break)
        runner: Any = llm.engine._runner
        launch = runner.launch

        def noted(plan: Plan, *args: Any) -> Any:
            self._plan = plan
            return launch(plan, *args)

        runner.launch = noted

    def _break(self, _module: Any, _inputs: Any, out: Tensor) -> Tensor:
        row, rows = self._row(self._plan), out.shape[-2]
        if row is None or self.hits >= self._times or not rows:
            return out
        self.hits += 1
        out = out.clone()
        out[..., min(row, rows - 1), 3] = self._wrong
        return out

    def mend(self) -> None:
        self._hook.remove()


def row_of(name: str, plan: Plan) -> int | None:
    """The row of request ``name`` in a step that only decodes, together with others."""
    names = [seq.request_id for seq in plan.decode]
    return names.index(name) if name in names and len(names) > 1 and not plan.streams else None


def module_of(llm: LLM, kind: str) -> Any:
    """A module to corrupt: a layer's projection of keys or values, DeepSeek-V4's state or entries, or the head."""
    model = llm.engine._backbone.model
    if kind == "lm_head":
        return model.lm_head
    layers = model.model.layers
    if kind in ("k_proj", "v_proj"):
        return getattr(layers[1].self_attn, kind)
    of_type = {layer.self_attn.layer_type: layer.self_attn for layer in layers}
    csa, hca = of_type["compressed_sparse_attention"], of_type["heavily_compressed_attention"]
    return {
        "window": layers[0].self_attn.kv_proj,
        "csa": csa.compressor.kv_proj,
        "index": csa.compressor.indexer.kv_proj,
        "entries": csa.compressor.kv_norm,
        "hca": hca.compressor.kv_proj,
        "hca entries": hca.compressor.kv_norm,
    }[kind]


DENSE = ["k_proj", "v_proj", "lm_head"]
DSV4 = ["window", "csa", "index", "entries", "hca", "hca entries", "lm_head"]
KINDS = [("dense", kind) for kind in DENSE] + [("dsv4", kind) for kind in DSV4]


@pytest.fixture
def path(request: pytest.FixtureRequest, tiny_model: Path, tiny_dsv4: Path) -> Path:
    return tiny_model if request.param == "dense" else tiny_dsv4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("path", "kind"), KINDS, indirect=["path"])
def test_one_step_of_a_prompt(path: Path, kind: str, device: str) -> None:
    """The step is repeated without an effect on the client, and the prefix stays usable."""
    prompt = prompt_of(300, 1)
    with open_llm(path, device, max_step_tokens=128) as llm:
        add(llm, "before", prompt, 6)
        expected, _ = finish(llm)["before"]
    with open_llm(path, device, max_step_tokens=128) as llm:
        fault = Fault(
            llm,
            module_of(llm, kind),
            WRONG[0],
            lambda plan: 5 if plan.streams and (kind != "lm_head" or plan.streams[0].draws) else None,
        )
        add(llm, "a", prompt, 6)
        tokens, last = finish(llm)["a"]
        assert fault.hits == 1 and last.finish_reason == "length" and tokens == expected
        assert llm.engine.stats().counters.non_finite_steps == 1
        assert_all_is_finite(llm)
        llm.engine.pool.evict_all()
        add(llm, "b", prompt[:200] + prompt_of(40, 2), 4)
        assert finish(llm)["b"][1].finish_reason == "length"
        add(llm, "c", prompt, 6)
        assert finish(llm)["c"][0] == expected
        assert llm.engine.stats().counters.non_finite_steps == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlap", [False, True], ids=["one by one", "overlapping"])
@pytest.mark.parametrize("wrong", WRONG, ids=["nan", "inf"])
@pytest.mark.parametrize(
    ("path", "kind"),
    [("dense", "v_proj"), ("dense", "lm_head"), ("dsv4", "window"), ("dsv4", "csa")],
    indirect=["path"],
)
def test_one_row_of_a_batch(path: Path, kind: str, wrong: float, overlap: bool, device: str) -> None:
    """The second of three requests fails in every decode step: it ends, and the others continue."""
    prompts = {name: prompt_of(250 + number, 10 + number) for number, name in enumerate("abc")}
    with open_llm(path, device, overlap_steps=overlap) as llm:
        for name, prompt in prompts.items():
            add(llm, name, prompt, 40)
        expected = finish(llm)
    with open_llm(path, device, overlap_steps=overlap) as llm:
        fault = Fault(llm, module_of(llm, kind), wrong, lambda plan: row_of("b", plan))
        for name, prompt in prompts.items():
            add(llm, name, prompt, 40)
        answers = finish(llm)
        fault.mend()
        assert fault.hits == 1 and llm.engine.stats().counters.non_finite_steps == 1
        assert {name: tokens for name, (tokens, _) in answers.items()} == {
            name: tokens for name, (tokens, _) in expected.items()
        }
    with open_llm(path, device, overlap_steps=overlap) as llm:
        fault = Fault(llm, module_of(llm, kind), wrong, lambda plan: row_of("b", plan), times=1000)
        for name, prompt in prompts.items():
            add(llm, name, prompt, 40)
        answers = finish(llm)
        fault.mend()
        last = answers["b"][1]
        assert last.finish_reason == "error"
        assert last.non_finite and "the model gave" in str(last.error) and "once more" in str(last.error)
        for name in ("a", "c"):
            assert answers[name][1].finish_reason == "length" and answers[name][0] == expected[name][0]
        assert llm.engine.stats().counters.non_finite_steps == 2
        add(llm, "again", prompts["b"], 40)
        assert finish(llm)["again"][0] == expected["b"][0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["dense", "dsv4"], indirect=True)
def test_compiled_layers_and_graphs_of_decode_steps_are_watched_too(path: Path, device: str) -> None:
    """With default settings; the embedding of a token that only one request has is NaN for one step."""
    prompts = {"a": prompt_of(250, 21), "b": prompt_of(251, 22)}
    defaults: dict[str, Any] = {"cuda_graphs": None, "torch_compile": True}
    with open_llm(path, device, **defaults) as llm:
        for name, prompt in prompts.items():
            add(llm, name, prompt, 40)
        expected = {name: tokens for name, (tokens, _) in finish(llm).items()}
        once = [token for token in expected["a"][5:] if token not in expected["b"] and expected["a"].count(token) == 1]
        position = 250 + expected["a"].index(once[0])
        weight = llm.engine._backbone.model.get_input_embeddings().weight
        runner: Any = llm.engine._runner
        launch, poisoned = runner.launch, []

        def launch_poisoned(plan: Plan, *args: Any) -> Any:
            if poisoned or not any(seq.request_id == "a2" and seq.num_computed == position for seq in plan.decode):
                return launch(plan, *args)
            assert len(plan.decode) == 2, "the other request decodes in the same step"
            poisoned.append(position)
            with torch.inference_mode():  # on a GPU all of this is in the stream's order
                sound = weight[once[0]].clone()
                weight[once[0]] = float("nan")
                step = launch(plan, *args)
                weight[once[0]] = sound
            return step

        runner.launch = launch_poisoned
        for name, prompt in prompts.items():
            add(llm, name + "2", prompt, 40)
        answers = finish(llm)
        assert poisoned and llm.engine.stats().counters.non_finite_steps == 1
        assert {name: tokens for name, (tokens, _) in answers.items()} == {
            name + "2": tokens for name, tokens in expected.items()
        }


@pytest.mark.parametrize("settings", [{"kv_dtype": "fp8"}, {"cold_dtype": "fp8"}, {"dtype": "bfloat16"}], ids=str)
def test_where_numbers_are_kept_in_fewer_bits(tiny_model: Path, settings: dict[str, Any]) -> None:
    """In an fp8 pool an infinity would be stored as the largest number, and not be noticed."""
    with open_llm(tiny_model, **settings) as llm:
        fault = Fault(llm, module_of(llm, "k_proj"), float("inf"), lambda plan: 5 if plan.streams else None, times=2)
        add(llm, "a", prompt_of(100, 1), 4)
        assert finish(llm)["a"][1].non_finite and fault.hits == 2
        add(llm, "b", prompt_of(100, 1), 4)
        assert finish(llm)["b"][1].finish_reason == "length"


def test_a_sequence_whose_next_set_is_on_its_way_starts_over_once_that_is_there(tiny_model: Path) -> None:
    """Until then a recall copies chunks into its slots."""
    nbytes = expected_layout(load_config(tiny_model), chunk_tokens=16, dtype=torch.float32).nbytes
    with open_llm(tiny_model, keep_ratio=0.2, hot_bytes=24 * nbytes, overlap_steps=True) as llm:
        prefetcher: Any = llm.engine._prefetcher
        recall, gates = prefetcher.recall, list[threading.Event]()

        def late(items: Any, holder: str = "") -> int:
            (seq,) = llm.engine._scheduler.running
            if seq.state is State.DECODE and not fault.hits:
                gates.append(threading.Event())
                prefetcher._post_urgent(lambda gate=gates[-1]: gate.wait(30))
            ticket: int = recall(items, holder)
            return ticket

        def while_it_turns(plan: Plan) -> int | None:
            return 0 if any(seq.residency.copying for seq in plan.decode) else None

        prefetcher.recall = late
        fault = Fault(llm, module_of(llm, "v_proj"), float("nan"), while_it_turns)
        add(llm, "a", prompt_of(600, 3), 60, policy="random")
        waited = False
        for _ in range(MOST_STEPS):
            events = llm.engine.step()
            llm.engine.check_integrity()
            if llm.engine._to_restart:
                waited = True
                for gate in gates:
                    gate.set()
            if any(event.finish_reason for event in events):
                break
        assert waited and fault.hits == 1 and events[-1].finish_reason == "length"
        assert llm.engine.stats().counters.non_finite_steps == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlap", [False, True], ids=["one by one", "overlapping"])
@pytest.mark.parametrize("path", ["dense", "dsv4"], indirect=True)
def test_a_chunk_that_a_wrong_step_completes_is_never_found(path: Path, overlap: bool, device: str) -> None:
    """When steps overlap, the next step is launched before the fault of this one is known."""
    kind = "v_proj" if "llama" in path.name else "entries"
    with open_llm(path, device, overlap_steps=overlap) as llm:
        size = llm.engine.config.chunk_tokens

        def completes(plan: Plan) -> int | None:
            return 0 if any((seq.num_computed + 1) % size == 0 for seq in plan.decode) else None

        fault = Fault(llm, module_of(llm, kind), float("nan"), completes)
        add(llm, "a", prompt_of(250, 5), 20)
        last = None
        for _ in range(MOST_STEPS):
            for event in llm.engine.step():
                last = event
            assert_all_is_finite(llm)
            if last is not None and last.finish_reason is not None:
                break
        assert fault.hits == 1 and last is not None and last.finish_reason == "length"
        assert llm.engine.stats().counters.non_finite_steps == 1


def test_a_step_that_read_a_damaged_chunk_may_be_wrong_as_well(tiny_model: Path) -> None:
    """The sequence starts over because the chunk was lost, and its released slots must not keep the step's values."""
    with open_llm(tiny_model, max_step_tokens=64) as llm:
        pool = llm.engine.pool
        fault = Fault(llm, module_of(llm, "v_proj"), float("nan"), lambda plan: 5 if armed else None)
        armed = list[int]()
        add(llm, "a", prompt_of(300, 7), 4)
        last = None
        for _ in range(MOST_STEPS):
            seq = llm.engine._sequences["a"]
            if not armed and seq.num_computed >= 192:
                llm.engine.flush()
                pool.evict_all()
                ref = seq.chunks[2].ref
                assert ref is not None
                llm.memory.arena.chunks[ref.slot, 9] ^= 1
                armed.append(ref.slot)
            for event in llm.engine.step():
                last = event
            if fault.hits and seq.restarts == 1:
                assert llm.engine.stats().counters.lost_chunks == 1
                assert pool.memory.view(torch.float32).isfinite().all()
            if last is not None and last.finish_reason is not None:
                break
        assert fault.hits == 1 and last is not None and last.finish_reason == "length"
        assert llm.engine.stats().counters.non_finite_steps == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", ["dense", "dsv4"], indirect=True)
def test_what_a_sequence_has_left_is_no_fault_of_the_next(path: Path, device: str) -> None:
    """The values that a sequence leaves behind must not affect the next owner of its slots and state.

    A request that is cancelled before its last step was read leaves them unwiped, and steps of fixed shape write
    entries at every step.
    """
    answers = []
    for left in (0, 255):
        with open_llm(path, device, cuda_graphs=None) as llm:
            runner: Any = llm.engine._runner
            if "llama" not in path.name and device == "cpu":
                runner.warm_up(
                    max_batch_size=2, max_step_tokens=64, max_chunks=4, cuda_graphs=True, torch_compile=False
                )
            llm.engine.pool.memory.fill_(left)
            if "llama" not in path.name:
                states = runner._states
                for state in (states.window, states.csa, states.index, states.hca, states.pages):
                    state.fill_(float("nan") if left else 0)
            for name, tokens in (("a", 120), ("b", 21)):
                add(llm, name, prompt_of(tokens, 31), 12)
            answers.append({name: tokens for name, (tokens, _) in finish(llm).items()})
            assert llm.engine.stats().counters.non_finite_steps == 0
    assert answers[0] == answers[1]


def test_what_a_client_is_told() -> None:
    error = from_exception(NonFiniteError("the model gave nan"))
    assert (error.status, error.type, error.code) == (500, "server_error", "non_finite")

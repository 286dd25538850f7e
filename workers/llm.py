"""The engine in-process, without Ray: for scripts, notebooks, tests and benchmarks."""

import itertools
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import PreTrainedTokenizerBase

from forecache.indexer.serving.config import IndexerConfig, SelectionConfig
from forecache.indexer.serving.cuda_scorer import CudaIndexer
from forecache.indexer.serving.protocol import Indexer
from forecache.indexer.serving.scorer import LocalIndexer
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.requests import (
    CacheOptions,
    FinishReason,
    GenerateRequest,
    Policy,
    SamplingParams,
    SequenceStats,
    TokenLogprobs,
)
from forecache.workers.engine.engine import Engine
from forecache.workers.errors import ForecacheError
from forecache.workers.memory.arena.arena import Arena, remove_abandoned
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.config import MemoryConfig
from forecache.workers.memory.format.layout import cold_layout
from forecache.workers.memory.hot.cuda_host import RegisteredMemory
from forecache.workers.models.backbone import load_backbone, load_config
from forecache.workers.models.loader import model_name, resolve_model
from forecache.workers.models.registry import architecture_of
from forecache.workers.models.tokenizer import load_tokenizer
from forecache.workers.models.verify import verify_backbone


@dataclass(frozen=True)
class Completion:
    """An answer. ``text`` is empty when the tokenizer was skipped."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stats: SequenceStats
    logprobs: tuple[TokenLogprobs, ...] = ()


class LLM:
    """One model with its hot pool, cold memory and indexer in this process.

    Keyword arguments are the fields of :class:`EngineConfig` and :class:`MemoryConfig`. Close it (or use it in a
    ``with`` statement): it owns a file in shared memory. ``wrap_indexer`` may put another indexer before its own one,
    which then belongs to it: to record predictions, or to answer otherwise.

    >>> with LLM("smollm2-135m", keep_ratio=0.135) as llm:
    ...     print(llm.generate(["The capital of France is"], max_tokens=8)[0].text)
    """

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer: bool = False,
        selection: SelectionConfig | None = None,
        indexer: IndexerConfig | None = None,
        wrap_indexer: Callable[[Indexer], Indexer] = lambda indexer: indexer,
        **settings: Any,
    ) -> None:
        memory = MemoryConfig(**{k: settings.pop(k) for k in list(settings) if k in MemoryConfig.model_fields})
        self.config = EngineConfig(model=model, **settings)
        indexer = indexer or IndexerConfig()
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.model_path: Path = resolve_model(model, load_format=self.config.load_format)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        if not skip_tokenizer:
            self.tokenizer = load_tokenizer(self.model_path)
        architecture = architecture_of(load_config(self.model_path).model_type)
        architecture.refuse_settings(self.config, model)
        self.config = self.config.for_model(architecture.chunk_tokens)
        self.backbone = backbone = load_backbone(
            self.model_path,
            dtype=self.config.dtype,
            device=self.config.device,
            chunk_tokens=self.config.chunk_tokens,
            max_model_len=self.config.max_model_len,
            load_format=self.config.load_format,
            seed=self.config.seed,
            kv_dtype=self.config.kv_dtype,
        )
        self.cold_layout = cold_layout(backbone.layout, memory.cold_dtype)
        self.scorer = chosen = architecture.choose_scorer(indexer, model_name(model), backbone)
        self.index_spec = spec = chosen.spec
        verify_backbone(backbone, spec)
        remove_abandoned(memory.arena_dir)
        with ExitStack() as cleanup:  # of what was made when a later part can't be
            self._arena = Arena.create(
                memory.arena_dir,
                f"local-{os.getpid()}-{uuid.uuid4().hex[:8]}",
                layout=self.cold_layout,
                index_nbytes=spec.nbytes,
                index_fingerprint=spec.fingerprint,
                capacity_bytes=memory.cold_bytes,
            )
            cleanup.callback(self._arena.close)
            cleanup.callback(self._arena.unlink)
            self.memory = ArenaStore(self._arena)
            own: Indexer
            if indexer.device_type(backbone.device.type) == "cuda":
                gpu = backbone.device if backbone.device.type == "cuda" else torch.device("cuda")
                own = CudaIndexer(
                    spec,
                    self._arena,
                    gpu,
                    indexer.device_bytes,
                    RegisteredMemory,
                    chosen.lookahead,
                    graph_chunks=self.config.graph_chunks(backbone.max_model_len),
                )
            else:
                own = LocalIndexer(spec, indexer.threads, lambda _path: self._arena, chosen.lookahead)
            self._indexer = wrap_indexer(own)
            cleanup.callback(self._indexer.close)
            self.engine = Engine(
                backbone,
                self.tokenizer,
                self.config,
                selection or SelectionConfig(),
                self.memory,
                self._indexer,
                spec,
                cold_layout=self.cold_layout,
                query_encoder=chosen.query_encoder,
            )
            cleanup.callback(self.engine.close)
            self._cleanup = cleanup.pop_all()
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: int | None = None,
        grammar: str | None = None,
        policy: Policy | None = None,
        keep_ratio: float | None = None,
        cache_salt: str = "",
        session_id: str | None = None,
        window_steps: int | None = None,
    ) -> list[Completion]:
        """Complete every prompt (text, or token ids as they are) in one batch; answers come in the prompts' order.

        What the arguments mean is said at :class:`SamplingParams` and :class:`CacheOptions`.

        Raises :class:`forecache.workers.errors.InvalidRequestError` before anything runs if a prompt can't be served.
        """
        sampling = SamplingParams(
            max_tokens, temperature, top_p, top_k, seed, tuple(stop), ignore_eos,
            presence_penalty, frequency_penalty, tuple((logit_bias or {}).items()), logprobs, grammar,
        )  # fmt: skip
        cache = CacheOptions(policy, keep_ratio, cache_salt, session_id, window_steps)
        ids: list[str] = []
        done: dict[str, Completion] = {}
        try:
            for prompt in prompts:
                ids.append(self._add(prompt, sampling, cache))  # noqa: PERF401 - known when a later one is refused
            tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
            texts = dict.fromkeys(ids, "")
            logprobs_of: dict[str, tuple[TokenLogprobs, ...]] = dict.fromkeys(ids, ())
            while len(done) < len(ids):
                for event in self.engine.step():
                    if event.request_id not in tokens:
                        continue
                    tokens[event.request_id] += event.token_ids
                    texts[event.request_id] += event.text
                    logprobs_of[event.request_id] += event.logprobs
                    if event.finish_reason is not None:
                        if event.error is not None or event.stats is None:
                            raise ForecacheError(event.error or "the request ended without its account")
                        done[event.request_id] = Completion(
                            tokens[event.request_id],
                            texts[event.request_id],
                            event.finish_reason,
                            event.stats,
                            logprobs_of[event.request_id],
                        )
        except BaseException:
            for request_id in ids:
                self.engine.cancel(request_id)
            self.engine.flush()  # their slots come back now, not when somebody next asks for something
            raise
        return [done[request_id] for request_id in ids]

    def _add(self, prompt: str | Sequence[int], sampling: SamplingParams, cache: CacheOptions) -> str:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ForecacheError("text prompts need a tokenizer; this LLM was made with skip_tokenizer=True")
            tokens = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        else:
            tokens = list(prompt)
        request_id = f"local-{next(self._ids)}"
        request = GenerateRequest(request_id, tuple(tokens), sampling, cache)
        self.engine.add_request(request, matcher=self.engine.grammars.matcher(sampling))
        return request_id

    def close(self) -> None:
        """Free the hot pool, the cold memory and its file."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

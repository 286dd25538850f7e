"""An engine in this process, without Ray: for scripts, notebooks, tests and benchmarks."""

import itertools
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from forecache.indexer.serving.config import IndexerConfig, SelectionConfig
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
from forecache.workers.engine.build import build_engine, build_gpu_indexer, load_model
from forecache.workers.errors import ForecacheError
from forecache.workers.memory.arena.arena import Arena, remove_abandoned
from forecache.workers.memory.arena.cold_size import auto_cold_bytes, cold_share
from forecache.workers.memory.arena.store import ArenaStore
from forecache.workers.memory.config import MemoryConfig


@dataclass(frozen=True)
class Completion:
    """An answer. ``text`` is empty if the tokenizer was skipped."""

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stats: SequenceStats
    logprobs: tuple[TokenLogprobs, ...] = ()


class LLM:
    """One model with its hot pool, cold memory and indexer in this process.

    Close it, or use it in a ``with`` statement: it owns a file in shared memory.

    Args:
        model: built-in name, local directory, .gguf file or hub id.
        skip_tokenizer: prompts are token ids, and answers have no text.
        selection: how scores choose resident chunks.
        indexer: settings of the indexer.
        wrap_indexer: returns an indexer that uses the given one and closes it, such as one that records predictions.
        **settings: fields of :class:`EngineConfig` and :class:`MemoryConfig`.

    Raises a :class:`forecache.workers.errors.ForecacheError` that says why the model can't be served.

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
        config = EngineConfig(model=model, **settings)
        indexer = indexer or IndexerConfig()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        loaded = load_model(config, memory, indexer, skip_tokenizer=skip_tokenizer)
        self.model_path = loaded.path
        self.tokenizer = loaded.tokenizer
        self.backbone = backbone = loaded.backbone
        self.cold_layout = loaded.cold_layout
        self.scorer = loaded.scorer
        self.index_spec = spec = loaded.scorer.spec
        remove_abandoned(memory.arena_dir)
        device_type = backbone.device.type
        cold_bytes = memory.cold_bytes
        if cold_bytes == "auto":
            cold_bytes = auto_cold_bytes(
                memory.arena_dir,
                share=cold_share(device_type),
                most_bytes=loaded.config.for_device(device_type).contexts_bytes(
                    backbone.max_model_len, self.cold_layout.nbytes + spec.nbytes
                ),
            )
        with ExitStack() as cleanup:  # if a later part fails, those made before it are closed
            self._arena = Arena.create(
                memory.arena_dir,
                f"local-{os.getpid()}-{uuid.uuid4().hex[:8]}",
                layout=self.cold_layout,
                index_nbytes=spec.nbytes,
                index_fingerprint=spec.fingerprint,
                capacity_bytes=cold_bytes,
            )
            cleanup.callback(self._arena.close)
            cleanup.callback(self._arena.unlink)
            self.memory = ArenaStore(self._arena)
            local_indexer: Indexer
            if indexer.device_type(backbone.device.type) == "cuda":
                local_indexer = build_gpu_indexer(loaded, indexer, self._arena)
            else:
                local_indexer = LocalIndexer(spec, indexer.threads, lambda _path: self._arena, self.scorer.lookahead)
            self._indexer = wrap_indexer(local_indexer)
            cleanup.callback(self._indexer.close)
            self.engine = build_engine(
                backbone,
                self.tokenizer,
                loaded.config,
                selection or SelectionConfig(),
                self.memory,
                self._indexer,
                spec,
                cold_layout=self.cold_layout,
                query_encoder=self.scorer.query_encoder,
            )
            cleanup.callback(self.engine.close)
            self.config = self.engine.config
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
        min_resident_tokens: int | None = None,
        priority: int = 0,
    ) -> list[Completion]:
        """Complete every prompt in one batch; answers come in the prompts' order.

        Args:
            prompts: texts, or token ids.

        :class:`SamplingParams`, :class:`CacheOptions` and :class:`GenerateRequest` describe the other arguments.

        Raises :class:`forecache.workers.errors.InvalidRequestError` before any prompt runs if one can't be served.
        """
        sampling = SamplingParams(
            max_tokens, temperature, top_p, top_k, seed, tuple(stop), ignore_eos,
            presence_penalty, frequency_penalty, tuple((logit_bias or {}).items()), logprobs, grammar,
        )  # fmt: skip
        cache = CacheOptions(policy, keep_ratio, cache_salt, session_id, window_steps, min_resident_tokens)
        ids: list[str] = []
        done: dict[str, Completion] = {}
        try:
            for prompt in prompts:
                ids.append(self._add(prompt, sampling, cache, priority))  # noqa: PERF401 - if a later one is refused, these are cancelled
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
                            raise ForecacheError(event.error or "the request ended without statistics")
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
            self.engine.flush()  # releases their slots now, not at the next request
            raise
        return [done[request_id] for request_id in ids]

    def _add(self, prompt: str | Sequence[int], sampling: SamplingParams, cache: CacheOptions, priority: int) -> str:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ForecacheError(
                    "text prompts need a tokenizer, and this LLM has skip_tokenizer=True: pass token ids"
                )
            tokens = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        else:
            tokens = list(prompt)
        request_id = f"local-{next(self._ids)}"
        request = GenerateRequest(request_id, tuple(tokens), sampling, cache, priority=priority)
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

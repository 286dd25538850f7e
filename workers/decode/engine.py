"""The engine: one step is absorb, plan, run, sample. It knows models and chunks, not Ray, HTTP or threads of others."""

import itertools
import threading
import time
from collections import deque

import torch
from transformers import PreTrainedTokenizerBase

from forecache.indexer.config import SelectionConfig
from forecache.indexer.index_keys import IndexSpec
from forecache.indexer.protocol import Indexer
from forecache.indexer.selection import budget_chunks
from forecache.workers.decode.accounting import EngineCounters, check_request, sequence_stats
from forecache.workers.decode.attention import StepAbortedError
from forecache.workers.decode.backbone import Backbone
from forecache.workers.decode.chunk_keeper import ChunkKeeper
from forecache.workers.decode.config import EngineConfig
from forecache.workers.decode.messages import FinishReason, GenerateRequest, TokenEvent
from forecache.workers.decode.model_runner import ModelRunner, Plan, StepOutput
from forecache.workers.decode.sampler import BadLogitsError, sample
from forecache.workers.decode.scheduler import Scheduler
from forecache.workers.decode.sequence import Sequence, State
from forecache.workers.decode.stats import EngineStats
from forecache.workers.decode.tokenizer import Detokenizer, eos_token_ids
from forecache.workers.decode.window import WindowCycle
from forecache.workers.errors import InvalidRequestError
from forecache.workers.memory.cuda_host import RegisteredMemory
from forecache.workers.memory.hot_pool import HotPool
from forecache.workers.memory.keys import root_key
from forecache.workers.memory.prefetcher import Prefetcher, PrefixHeld, Recalled, WrittenBack
from forecache.workers.memory.protocol import ColdMemory

IDLE_WAIT_S = 0.05


class Engine:
    """Continuous batching over one backbone.

    All methods belong to one thread, but for :meth:`cancel`, which any may call. ``name`` makes the engine's holds in
    shared cold memory its own.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase | None,
        config: EngineConfig,
        selection: SelectionConfig,
        memory: ColdMemory,
        indexer: Indexer,
        spec: IndexSpec,
        name: str = "local",
    ) -> None:
        self.config = config
        self._backbone = backbone
        self._tokenizer = tokenizer
        self._memory = memory
        self._name = name
        self._eos = eos_token_ids(backbone.config, backbone.model.generation_config, tokenizer)
        self.pool = HotPool(backbone.layout, config.hot_bytes // backbone.layout.nbytes, backbone.device)
        self._registered = RegisteredMemory(memory.arena.chunks) if backbone.device.type == "cuda" else None
        self._runner = ModelRunner(backbone, self.pool, memory.arena, spec)
        self._prefetcher = Prefetcher(self.pool, memory, self._runner.index_record)
        self.windows = WindowCycle(
            config, selection, spec, self.pool, memory.arena, self._prefetcher, indexer, self._runner
        )
        geometry = backbone.geometry
        self._scheduler = Scheduler(
            config,
            self.pool,
            self.windows,
            cold_slots=memory.arena.slots,
            # 2 FLOP per weight against 4 per (head, dim, past token) of each layer
            linear_equal=backbone.body_parameters / (2 * geometry.layers * geometry.heads * geometry.head_dim),
        )
        if config.cuda_graphs and backbone.device.type == "cuda":
            chunks = -(-backbone.max_model_len // config.chunk_tokens)
            budget = budget_chunks(chunks, config.keep_ratio, selection)
            self._runner.capture_graphs(
                max_batch_size=config.max_batch_size,
                max_chunks=min(budget + config.window_steps // config.chunk_tokens + 2, self.pool.num_slots),
            )
        self._sequences: dict[str, Sequence] = {}
        self._detokenizers: dict[str, Detokenizer] = {}
        self._leaving: list[Sequence] = []
        self._serial = itertools.count()
        self._cancelled: set[str] = set()
        self._cancel_lock = threading.Lock()
        self._events: deque[TokenEvent] = deque()
        self._counters = EngineCounters()
        self._keeper = ChunkKeeper(self.pool, memory.arena, self._prefetcher, self.windows, self._counters)

    @property
    def max_model_len(self) -> int:
        return self._backbone.max_model_len

    def add_request(self, request: GenerateRequest, arrived_s: float | None = None) -> None:
        """Queue a request that came at ``arrived_s`` of ``time.perf_counter``, or now.

        Raises :class:`InvalidRequestError` for one that can never be served.
        """
        check_request(request, self._backbone, self._memory.arena.slots, text=self._tokenizer is not None)
        if request.request_id in self._sequences:
            raise InvalidRequestError(f"request id '{request.request_id}' is running already", param="request_id")
        cache = request.cache
        seq = Sequence(
            request,
            holder=self._new_holder(request.request_id),
            root=root_key(self._backbone.layout.fingerprint, cache.cache_salt),
            chunk_tokens=self.config.chunk_tokens,
            keep_ratio=self.config.keep_ratio if cache.keep_ratio is None else cache.keep_ratio,
            policy=cache.policy or self.config.policy,
        )
        seq.counters.arrived_s = arrived_s or seq.counters.arrived_s
        self._sequences[request.request_id] = seq
        self._detokenizers[request.request_id] = Detokenizer(self._tokenizer, request.sampling.stop)
        self._scheduler.add(seq)
        self._prefetcher.wake()

    def _new_holder(self, request_id: str) -> str:
        """A name never used before: an older holder's release may still be on its way."""
        return f"{self._name}/{request_id}#{next(self._serial)}"

    def cancel(self, request_id: str) -> None:
        """Stop a request soon: between two layers of the running step. Unknown ids are fine. Any thread may call."""
        with self._cancel_lock:
            self._cancelled.add(request_id)
        self._prefetcher.wake()

    @property
    def idle(self) -> bool:
        """Nothing to do until a request comes."""
        return not self._sequences and not self._leaving and not self._events

    def step(self) -> list[TokenEvent]:
        """Advance every request that can; returns the news, possibly none."""
        self._absorb()
        self._scheduler.admit(self._keeper.locate)
        plan = self._scheduler.next_plan()
        if plan.tokens:
            self._run(plan)
        elif not self._events:
            self._wait()
        events, self._events = list(self._events), deque()
        return events

    def _run(self, plan: Plan) -> None:
        start = time.perf_counter()
        members = {part.sequence.request_id for part in plan.streams if part.tokens > 1}
        try:
            # only a long step is worth aborting: the other rows' work is lost with it
            output = self._runner.run(plan, lambda: not self._cancelled.isdisjoint(members))
        except StepAbortedError:
            return
        if plan.streams and self._backbone.device.type == "cuda":
            torch.cuda.synchronize()  # else a step without a sampled token has no duration, and has not read its past
        duration_s = time.perf_counter() - start
        if len(plan.streams) == 1 and plan.streams[0].tokens > 1:
            part = plan.streams[0]
            self._scheduler.rate.observe(part.tokens, part.sequence.num_computed, duration_s)
        self._counters.step(duration_s)
        self._advance(plan, output)

    def _advance(self, plan: Plan, output: StepOutput) -> None:
        """Account for a step that was computed: chunks completed, tokens sampled, windows turned."""
        lost: set[Sequence] = set()
        for seq in (part.sequence for part in plan.streams):
            # their past was read where it lies; that of decode rows was verified when it was recalled
            if gone := self._keeper.given_away(seq):
                self._counters.lost_chunks += gone
                lost.add(seq)
                self._restart(seq)
        for seq in plan.decode:
            seq.counters.kept_sum += seq.resident_share
            seq.counters.kept_steps += 1
            seq.open_exact = seq.open_exact and not seq.partial
            self._keeper.computed(seq, 1)
        for part in plan.streams:
            if part.sequence in lost:
                continue
            self._keeper.computed(part.sequence, part.tokens)
            if part.sequence.state is State.PREFILL:
                self._events.append(self._event(part.sequence, (), ""))
        queries = {plan.decode[row].request_id: i for i, row in enumerate(plan.capture)}
        for seq in plan.decode:
            row = queries.get(seq.request_id)
            self.windows.after_step(seq, None if row is None or output.queries is None else output.queries[row])
        for seq, logits in zip(output.sampled, output.logits, strict=True):
            if seq in lost:
                continue
            try:
                token = sample(logits, seq.sampling, len(seq.token_ids))
            except BadLogitsError as error:
                self._finish(seq, "error", (), "", str(error))
                continue
            if seq.state is State.PREFILL:
                self._begin_decode(seq, output.masses.get(seq.request_id))
            self._emit(seq, token)

    def _begin_decode(self, seq: Sequence, mass: torch.Tensor | None) -> None:
        seq.counters.first_token_s = seq.counters.first_token_s or time.perf_counter()
        self._counters.prompt_tokens += seq.prompt_len if not seq.restarts else 0
        if seq.streamed:
            seq.state = State.DECODE
            return
        seq.state = State.RECALLING
        self.windows.begin(seq, None if mass is None else mass.cpu().numpy())

    def _emit(self, seq: Sequence, token: int) -> None:
        """One more token of ``seq``: to the client, and maybe the last."""
        seq.token_ids.append(token)
        self._counters.generated_tokens += 1
        detokenizer = self._detokenizers[seq.request_id]
        reason: FinishReason | None = None
        text = ""
        if token in self._eos and not seq.sampling.ignore_eos:
            reason = "stop"
        else:
            text = detokenizer.push(token)
            if detokenizer.stopped:
                reason = "stop"
            elif len(seq.output_ids) >= seq.sampling.max_tokens:
                reason = "length"
        if reason is not None:
            text += detokenizer.flush()
            self._finish(seq, reason, (token,), text)
        else:
            self._events.append(self._event(seq, (token,), text))

    def _absorb(self) -> None:
        """Take in what happened elsewhere since the last step: copies, predictions, cancellations."""
        for done in self._prefetcher.drain():
            if isinstance(done, PrefixHeld):
                self._keeper.located(done)
            elif isinstance(done, WrittenBack):
                seq = self._keeper.written_back(done)
                if seq is not None:
                    self._finish(seq, "error", (), "", f"a chunk could not be stored: {done.reason}")
            else:
                self._recalled(done)
        with self._cancel_lock:
            cancelled, self._cancelled = self._cancelled, set()
        for request_id in cancelled:
            seq = self._sequences.get(request_id)
            if seq is not None:
                self._finish(seq, "cancelled", (), "")
        for seq in self._scheduler.running:
            self.windows.poll(seq)
        for seq in [seq for seq in self._leaving if not self.windows.busy(seq)]:
            self._leaving.remove(seq)
            self._keeper.let_go(seq)

    def _recalled(self, done: Recalled) -> None:
        self._counters.recall(done, self._backbone.layout.nbytes)
        seq = self.windows.recalled(done)
        if seq is not None and seq.state is not State.FINISHED:
            self._restart(seq)

    def _restart(self, seq: Sequence) -> None:
        """Chunks of ``seq`` are gone: compute its tokens again, behind the longest prefix that is still stored."""
        self._scheduler.remove(seq)
        self._keeper.let_go(seq)
        seq.start_over(self._new_holder(seq.request_id))
        self._scheduler.add(seq, first=True)

    def _finish(
        self,
        seq: Sequence,
        reason: FinishReason,
        tokens: tuple[int, ...],
        text: str,
        error: str | None = None,
    ) -> None:
        self._counters.leave(seq, reason)
        self._events.append(
            TokenEvent(
                seq.request_id,
                tokens,
                text,
                reason,
                sequence_stats(seq, self._backbone.layout.nbytes),
                error,
                seq.num_computed,
            )
        )
        self._scheduler.remove(seq)
        seq.state = State.FINISHED
        del self._sequences[seq.request_id], self._detokenizers[seq.request_id]
        if self.windows.busy(seq):
            self._leaving.append(seq)
        else:
            self._keeper.let_go(seq)

    def _wait(self) -> None:
        start = time.perf_counter()
        if self._sequences or self._leaving:
            self._prefetcher.wait(IDLE_WAIT_S)
            decoding = any(seq.state is State.DECODE for seq in self._scheduler.running)
            if decoding or self._scheduler.stalled:
                self._counters.prefetch_stall_s += time.perf_counter() - start

    def wait_for_work(self, timeout_s: float) -> None:
        """Sleep while there is nothing to do, at most ``timeout_s``; :meth:`wake` and :meth:`cancel` end it."""
        if self.idle:
            self._prefetcher.wait(timeout_s)

    def wake(self) -> None:
        """There is something to do. Any thread may call."""
        self._prefetcher.wake()

    def _event(self, seq: Sequence, tokens: tuple[int, ...], text: str) -> TokenEvent:
        return TokenEvent(seq.request_id, tokens, text, prefill_tokens_done=min(seq.num_computed, seq.prompt_len))

    def stats(self) -> EngineStats:
        """A snapshot; any thread may call."""
        return self._counters.snapshot(self.pool, self._scheduler)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` when the pool's references are not those of the running sequences."""
        self.pool.check_integrity()
        held: dict[int, int] = {}
        for seq in [*self._scheduler.running, *self._scheduler.waiting, *self._leaving]:
            for slot in itertools.chain(seq.resident.values(), seq.open_slots.values(), self.windows.incoming(seq)):
                held[slot] = held.get(slot, 0) + 1
        for slot in range(self.pool.num_slots):
            assert self.pool.references(slot) == held.get(slot, 0), (
                f"slot {slot} has {self.pool.references(slot)} references, sequences hold {held.get(slot, 0)}"
            )

    def flush(self) -> None:
        """Wait for the copies and releases that are under way, and take in what they say."""
        self._prefetcher.flush()
        self._absorb()

    def close(self) -> None:
        """Cancel what runs, give back all holds, end the copy thread. Memory and indexer stay the caller's."""
        for seq in list(self._sequences.values()):
            self._finish(seq, "cancelled", (), "")
        while self._leaving:
            self._prefetcher.wait(IDLE_WAIT_S)
            self._absorb()
        self._prefetcher.close()
        if self._registered is not None:
            self._registered.close()

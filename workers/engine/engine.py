"""The engine: one step is absorb, plan, launch, read. It knows models and chunks, not Ray, HTTP or other threads."""

import logging
import threading
import time
from collections import deque
from contextlib import ExitStack, nullcontext

from transformers import PreTrainedTokenizerBase

from forecache.indexer.records.index_spec import IndexSpec
from forecache.indexer.serving.config import SelectionConfig
from forecache.indexer.serving.protocol import Indexer
from forecache.workers.core.config import EngineConfig
from forecache.workers.core.grammar import Grammars, Matcher
from forecache.workers.core.requests import FinishReason, GenerateRequest, TokenEvent
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.stats import EngineStats
from forecache.workers.core.step_plan import Plan, Sampled, StepOutput
from forecache.workers.engine.chunk_lifecycle import ChunkKeeper
from forecache.workers.engine.counters import EngineCounters, check_references, check_request, most_chunks
from forecache.workers.engine.detokenize import NOTHING_NEW, Answers, News
from forecache.workers.engine.pulse import Pulse
from forecache.workers.engine.scheduler import Scheduler
from forecache.workers.engine.snapshots import Snapshots, state_layout
from forecache.workers.errors import InvalidRequestError, NonFiniteError
from forecache.workers.memory.client.protocol import ColdMemory
from forecache.workers.memory.format.hold_id import HoldId
from forecache.workers.memory.format.keys import root_key
from forecache.workers.memory.format.layout import ChunkLayout, chunk_fingerprint
from forecache.workers.memory.hot.completions import Recalled, Released
from forecache.workers.memory.hot.cuda_host import RegisteredMemory
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefetcher import Prefetcher
from forecache.workers.models.step.architecture import Backbone, QueryEncoder
from forecache.workers.models.step.in_flight_step import RunningStep
from forecache.workers.models.step.runner import PastLostError, StepAbortedError
from forecache.workers.models.tokenizer import eos_token_ids
from forecache.workers.residency.budgets import Reservations
from forecache.workers.residency.window import WindowCycle

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.05
NON_FINITE_RETRIES = 1
"""So often a request starts over since the model gave something that is not finite."""


class Engine:
    """Continuous batching over one backbone.

    All methods belong to one thread, but for :meth:`cancel`, which any calls. ``name`` makes its holds in cold memory
    its own; ``cold_layout``: that memory's, where not the pool's; ``query_encoder``: of the trained indexer.
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
        cold_layout: ChunkLayout | None = None,
        query_encoder: QueryEncoder | None = None,
    ) -> None:
        self.config = config = config.for_device(backbone.device.type)
        self._backbone = backbone
        self._has_tokenizer = tokenizer is not None
        self._memory, self._name = memory, name
        self._retrieval_heads = spec.kind == "tokens"
        eos = eos_token_ids(backbone.config, backbone.model.generation_config, tokenizer)
        self.grammars = Grammars(tokenizer, eos)
        pool = self.pool = HotPool(backbone.layout, config.hot_bytes // backbone.layout.nbytes, backbone.device)
        self._registered = RegisteredMemory(memory.arena.chunks) if backbone.device.type == "cuda" else None
        cold, rows, arena = cold_layout or backbone.layout, config.max_batch_size, memory.arena
        self._fingerprint, each = chunk_fingerprint(backbone.layout, cold), config.snapshot_tokens
        self._runner = backbone.architecture.make_runner(
            backbone,
            pool,
            arena,
            spec,
            max_rows=rows,
            cold_layout=cold,
            query_encoder=query_encoder,
            snapshot_tokens=each,
            spread=memory.spread,
        )
        states = state_layout(self._runner, cold.nbytes, each // config.chunk_tokens)
        self.pulse = Pulse()
        record, progress = self._runner.index_record, self.pulse.progress
        self._prefetcher = Prefetcher(self.pool, memory, record, cold, states, progress)
        self._snapshots = Snapshots(self._runner, states, self._prefetcher, arena)
        steps = 1 if query_encoder is None else query_encoder.steps
        reservations = Reservations(pool.num_slots)
        cycle = self.windows = WindowCycle(
            config, selection, pool, arena, self._prefetcher, indexer, reservations, steps
        )
        self._answers = Answers(tokenizer, eos, backbone.layout.nbytes, cycle)
        self._scheduler = Scheduler(config, pool, cycle, reservations, arena.slots, backbone.linear_equal)
        if backbone.device.type == "cuda":
            chunks = cycle.budgets.widest_table(backbone.max_model_len)
            graphs, compiled = config.cuda_graphs, config.torch_compile
            self._runner.warm_up(max_batch_size=rows, max_chunks=chunks, cuda_graphs=graphs, torch_compile=compiled)
        self._running: RunningStep | None = None
        self._launched_s = self._read_s = 0.0
        self._sequences: dict[str, TokenSequence] = {}
        self._leaving: list[TokenSequence] = []
        self._to_restart: dict[TokenSequence, str] = {}
        self._serial = 0
        self._cancelled: set[str] = set()
        self._cancel_lock = threading.Lock()
        self._events: deque[TokenEvent] = deque()
        self._counters = EngineCounters()
        self._keeper = ChunkKeeper(pool, arena, self._prefetcher, cycle, self._counters, self._snapshots)

    @property
    def max_model_len(self) -> int:
        return self._backbone.max_model_len

    def add_request(
        self, request: GenerateRequest, arrived_s: float | None = None, matcher: Matcher | None = None
    ) -> None:
        """Queue a request that came at ``arrived_s`` of ``time.perf_counter``, or now; ``matcher`` is what ``grammars``
        made of its grammar.

        Raises :class:`InvalidRequestError` for one that can never be served. Whatever it raises, nothing of the request
        is left behind.
        """
        check_request(request, self._backbone, self._most_chunks(), text=self._has_tokenizer)
        assert (matcher is None) == (request.sampling.grammar is None), "a grammar needs its matcher"
        if request.request_id in self._sequences:
            raise InvalidRequestError(f"request id '{request.request_id}' is running already", param="request_id")
        with ExitStack() as undo:  # each step may fail: what the ones before it have left is taken back
            holder = self._new_holder(request)
            undo.callback(self._prefetcher.release_holder, holder)
            seq = TokenSequence(
                request,
                holder=holder,
                root=root_key(self._fingerprint, request.cache.cache_salt),
                chunk_tokens=self.config.chunk_tokens,
                keep_ratio=self.config.keep_ratio if request.cache.keep_ratio is None else request.cache.keep_ratio,
                policy=request.cache.policy or self.config.policy,
                matcher=matcher,
            )
            seq.state_slots = self._snapshots.slots(seq)
            seq.counters.arrived_s = arrived_s or seq.counters.arrived_s
            self._answers.begin(seq)
            undo.callback(self._answers.forget, seq)
            self._scheduler.add(seq)
            undo.callback(self._scheduler.remove, seq)
            self._sequences[request.request_id] = seq
            undo.callback(self._sequences.pop, request.request_id)
            self.pulse.beat()
            self._prefetcher.wake()
            undo.pop_all()

    def _most_chunks(self) -> int:
        # what goes on elsewhere would need its state there too
        return most_chunks(self._memory, spreads=self._snapshots.layout is None)

    def _new_holder(self, request: GenerateRequest) -> str:
        name = HoldId(self._name, request.request_id, self._serial, request.traceparent).name
        self._serial += 1  # last: each serial that is given is released, or the ones after it are kept one by one
        return name

    def cancel(self, request_id: str) -> None:
        """Stop a request soon: between two layers of the running step. Unknown ids are fine. Any thread may call."""
        with self._cancel_lock:
            self._cancelled.add(request_id)
        self._prefetcher.wake()

    @property
    def idle(self) -> bool:
        """Nothing to do until a request comes."""
        return not self._sequences and not self._leaving and not self._events and self._running is None

    def step(self) -> list[TokenEvent]:
        """Advance every request that can; returns the news, possibly none.

        A decode step is launched before the tokens of the one before are read (where steps overlap): the device then
        never waits for what the host does between two steps.
        """
        self._absorb()
        for seq in self._scheduler.admit(self._keeper.releasing_slots):
            self._keeper.locate(seq)
        if self._scheduler.streams_next:
            self._read_running()  # a long step is planned, and timed, with nothing under way
        plan = self._scheduler.next_plan()
        running = self._launch(plan) if plan.tokens else None
        waited = self._read_running()
        if running is not None:
            if plan.streams or not self.config.overlap_steps:
                self._take(plan, running.result())
            else:
                self._advance(plan, set(), checked=False)
                self._running = running
        elif not waited and not self._events:
            self._wait()
        if running is not None or waited:
            self.pulse.beat()
        events, self._events = list(self._events), deque()
        return events

    def _launch(self, plan: Plan) -> RunningStep | None:
        members = {part.sequence.request_id for part in plan.streams if part.tokens > 1}
        self._launched_s = time.perf_counter()
        try:
            # only a long step is worth aborting: the other rows' work is lost with it
            return self._runner.launch(plan, lambda: self._between_layers(members))
        except StepAbortedError:
            return None
        except PastLostError as error:
            self._restart(self._sequences[error.request_id], "those on other nodes could not be read")
            return None

    def _between_layers(self, members: set[str]) -> bool:
        """Whether the step is aborted; a layer of it is over, and a long one may take longer than many steps."""
        self.pulse.beat()
        return not self._cancelled.isdisjoint(members)

    def _read_running(self) -> bool:
        """Take in the step that is under way, if there is one."""
        running, self._running = self._running, None
        if running is not None:
            self._read(running.result(), set())
        return running is not None

    def _take(self, plan: Plan, output: StepOutput) -> None:
        """A step is over before another was launched: check what it read, then account for it."""
        lost: set[TokenSequence] = set()
        for seq in (part.sequence for part in plan.streams):
            # their past was read where it lies; that of decode rows was verified when it was recalled
            if gone := self._keeper.lost(seq, output.damaged.get(seq.request_id, [])):
                self._counters.lost_chunks += gone
                lost.add(seq)
                if any(wrong.sequence is seq for wrong in output.non_finite):
                    self._wipe(seq)
                self._restart(seq, f"{gone} of them were gone, or their bytes wrong, when a step read them")
            elif (mass := output.masses.get(seq.request_id)) is not None:
                seq.add_prompt_mass(mass)
        self._scheduler.observe(plan, time.perf_counter() - self._launched_s)
        lost |= self._void(output)
        self._advance(plan, lost, checked=True)
        self._read(output, lost)

    def _void(self, output: StepOutput) -> set[TokenSequence]:
        """Sequences of which the step has computed something that is not finite: nothing of it is theirs. Each starts
        over behind what is stored, once; then its request ends, and no other."""
        void = set()
        for wrong in output.non_finite:
            seq = wrong.sequence
            if not _is_current(seq, wrong.restarts):
                continue
            void.add(seq)
            self._counters.non_finite_steps += 1
            seq.non_finite_steps += 1
            self._wipe(seq)
            said = f"the model gave {wrong.what}"
            if seq.non_finite_steps <= NON_FINITE_RETRIES and seq.restarts < self.config.max_restarts:
                logger.warning("%s starts over: %s", seq.request_id, said)
                self._restart(seq, said)
            else:
                error = NonFiniteError(
                    f"{said}, also when that was computed once more. Other requests go on. If it is always this "
                    "prompt, the model overflows on it: serve it with --dtype bfloat16 or float32; if it is not, "
                    "check the device."
                )
                self._finish(seq, "error", News(error=str(error), non_finite=True))
        return void

    def _wipe(self, seq: TokenSequence) -> None:
        """What a step has written of ``seq``, which starts over or ends, is not finite: leave nothing of it."""
        self._keeper.withhold(seq, wipe=True)
        self._runner.wipe(seq)

    def _advance(self, plan: Plan, lost: set[TokenSequence], *, checked: bool) -> None:
        """Account for what ``plan`` computes, whatever tokens come of it: chunks completed, windows turned.
        ``checked``: what it computes is known to be finite."""
        for seq in plan.decode:
            if seq.state is not State.DECODE:
                continue  # its last token was read meanwhile
            seq.count_kept()
            seq.open_exact = seq.open_exact and not seq.partial
            self._keeper.computed(seq, 1, checked=checked)
            self.windows.stepped(seq)
        for part in (part for part in plan.streams if part.sequence not in lost):
            if part.sequence.state is State.DECODE:
                part.sequence.count_kept()
            self._keeper.computed(part.sequence, part.tokens)
            if part.sequence.state is State.PREFILL:
                self._events.append(self._answers.event(part.sequence))

    def _read(self, output: StepOutput, lost: set[TokenSequence]) -> None:
        """Take in what a step gave: queries for the indexer, and tokens."""
        now = time.perf_counter()
        self._counters.step(now - max(self._launched_s, self._read_s))
        self._read_s = now
        lost = lost | self._void(output)
        self._keeper.show()
        for captured in output.captured:
            self.windows.captured(captured)
        for scored in output.scored:
            scored.take()
        for drawn in output.sampled:
            seq = drawn.sequence
            if seq in lost or not _is_current(seq, drawn.restarts):
                continue
            if seq.state is State.PREFILL:
                self._begin_decode(seq)
            self._emit(seq, drawn)

    def _begin_decode(self, seq: TokenSequence) -> None:
        seq.counters.first_token_s = seq.counters.first_token_s or time.perf_counter()
        self._counters.prompt_tokens += 0 if seq.restarts or seq.request.resume_token_ids else seq.prompt_len
        seq.state = State.DECODE if seq.residency.streamed else State.RECALLING
        if not seq.residency.streamed:
            self.windows.begin(seq, seq.prompt_mass, retrieval_heads=self._retrieval_heads)

    def _emit(self, seq: TokenSequence, drawn: Sampled) -> None:
        """One more token of ``seq``, maybe the last; or one that the client has: only that it goes on is news."""
        news = NOTHING_NEW
        if not seq.replays():
            seq.token_ids.append(drawn.token)
            self._counters.generated_tokens += 1
            news = self._answers.push(seq, drawn)
        if news.reason is None:
            self._events.append(self._answers.event(seq, news))
        else:
            self._finish(seq, news.reason, news)

    def _absorb(self) -> None:
        """Take in what happened elsewhere since the last step: copies, predictions, cancellations."""
        for done in self._prefetcher.drain():
            self.pulse.beat()
            if isinstance(done, Recalled):
                self._recalled(done)
            elif isinstance(done, Released):
                self._keeper.released(done.holder)
            elif (failed := self._keeper.settle(done)) is not None:
                self._finish(
                    failed, "error", News(error=done.failure, overloaded=done.overloaded, too_large=done.too_large)
                )
        with self._cancel_lock:
            cancelled, self._cancelled = self._cancelled, set()
        for request_id in cancelled & self._sequences.keys():
            self.pulse.beat()
            self._finish(self._sequences[request_id], "cancelled")
        for seq in list(self._scheduler.running):
            missing = self.windows.poll(seq) if seq.state is not State.WAITING else ()
            if missing and (damaged := self._keeper.damaged_records(seq, missing)):
                self._counters.lost_chunks += damaged
                self._restart(seq, f"index records of {damaged} of them were wrong when they were scored")
        for seq in [seq for seq in self._to_restart if not seq.residency.copying]:
            self._restart(seq, self._to_restart[seq])
        for seq in [seq for seq in self._leaving if not seq.residency.copying]:
            self._leaving.remove(seq)
            self._keeper.let_go(seq)

    def _recalled(self, done: Recalled) -> None:
        self._counters.recall(done)
        if (seq := self.windows.recalled(done)) is not None and seq.state is not State.FINISHED:
            self._restart(seq, f"{len(done.lost)} of them were gone, or their bytes wrong, when they were recalled")

    def _restart(self, seq: TokenSequence, cause: str) -> None:
        """Chunks of ``seq`` are gone, or void: compute its tokens again, behind the longest prefix that is still
        stored, as soon as nothing is copied into its slots. Not more often than is allowed: where memory is bad, it
        would never come to its end, and keep others from theirs."""
        if seq.restarts >= self.config.max_restarts:
            self._finish(seq, "error", News(error=_too_many_restarts(seq, cause), chunks_lost=True))
            return
        if seq.residency.copying:
            seq.state = State.WAITING
            self._to_restart[seq] = cause
            return
        self._to_restart.pop(seq, None)
        self._scheduler.remove(seq)
        self._runner.forget(seq)
        self._keeper.let_go(seq)
        seq.start_over(self._new_holder(seq.request))
        self._scheduler.add(seq, first=True)

    def _finish(self, seq: TokenSequence, reason: FinishReason, news: News = NOTHING_NEW) -> None:
        self._counters.leave(seq, reason)
        self._to_restart.pop(seq, None)
        self._keeper.withhold(seq)
        self._keeper.answered(seq, reason)
        self._events.append(self._answers.end(seq, reason, news))
        self._scheduler.remove(seq)
        self._runner.forget(seq)
        seq.state = State.FINISHED
        del self._sequences[seq.request_id]
        if seq.residency.copying:
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

    def stats(self) -> EngineStats:
        """A snapshot; any thread may call."""
        return self._counters.snapshot(self.pool, self._scheduler)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` when the pool's references are not those of the running sequences."""
        self.pool.check_integrity()
        self._runner.check_integrity()
        sequences = [*self._scheduler.running, *self._scheduler.waiting, *self._leaving]
        check_references(self.pool, sequences)

    def flush(self) -> None:
        """Wait for the copies and releases that are under way, and take in what they say."""
        self._prefetcher.flush()
        self._absorb()

    def close(self) -> None:
        """Cancel what runs, give back all holds, end the copy thread. Memory and indexer stay the caller's."""
        for seq in list(self._sequences.values()):
            self._finish(seq, "cancelled")
        self._read_running()
        while self._leaving:
            self._prefetcher.wait(IDLE_WAIT_S)
            self._absorb()
        with self._registered or nullcontext():
            self._prefetcher.close()


def _too_many_restarts(seq: TokenSequence, cause: str) -> str:
    return (
        f"stored chunks of this request were lost {seq.restarts + 1} times, and it starts over {seq.restarts} times at "
        f"most (--max-restarts): the last time {cause}. Send it again; if that fails too, the node has bad memory, or "
        "its memory tier starts again and again"
    )


def _is_current(seq: TokenSequence, restarts: int) -> bool:
    """Whether a step that was launched when ``seq`` had started over ``restarts`` times is still one of it."""
    return seq.restarts == restarts and seq.state not in (State.WAITING, State.FINISHED)

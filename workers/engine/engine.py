"""The step loop: admit, plan, launch, finish, store. It knows models and chunks, but not Ray, HTTP or other threads."""

import logging
import threading
import time
from collections import deque
from collections.abc import Set
from contextlib import ExitStack, nullcontext

from forecache.workers.core.config import EngineConfig
from forecache.workers.core.grammar import Grammars, Matcher
from forecache.workers.core.requests import FinishReason, GenerateRequest, TokenEvent
from forecache.workers.core.sequence import State, TokenSequence
from forecache.workers.core.stats import EngineCounters, EngineStats
from forecache.workers.core.step_plan import Plan, Sampled, StepOutput
from forecache.workers.engine.chunk_lifecycle import ChunkLifecycle
from forecache.workers.engine.counters import check_references, count_end, count_recall, engine_stats
from forecache.workers.engine.detokenize import NO_OUTPUT, Output, OutputProcessor
from forecache.workers.engine.pulse import Pulse
from forecache.workers.engine.scheduler import Scheduler
from forecache.workers.engine.snapshots import Snapshots
from forecache.workers.engine.validation import check_request, most_chunks
from forecache.workers.errors import InvalidRequestError, NonFiniteError
from forecache.workers.memory.client.protocol import ColdMemory
from forecache.workers.memory.format.hold_id import HoldId
from forecache.workers.memory.format.keys import root_key
from forecache.workers.memory.hot.completions import Recalled, Released
from forecache.workers.memory.hot.cuda_host import RegisteredMemory
from forecache.workers.memory.hot.pool import HotPool
from forecache.workers.memory.hot.prefetcher import Prefetcher
from forecache.workers.models.step.architecture import Backbone
from forecache.workers.models.step.in_flight_step import RunningStep
from forecache.workers.models.step.runner import PastLostError, Runner, StepAbortedError
from forecache.workers.residency.window import WindowCycle

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.05
NON_FINITE_RETRIES = 1
"""How often a request starts over because the model computed a value that is not finite."""


class AbortCheck:
    """Called between the layers of a step: shows that the step advances, and returns whether to abort it.

    A step is aborted when the id of one of its ``members`` is in ``cancelled``: a long step takes as long as many
    short ones.
    """

    def __init__(self, pulse: Pulse, cancelled: Set[str], members: Set[str]) -> None:
        self._pulse = pulse
        self._cancelled = cancelled
        self._members = members

    def __call__(self) -> bool:
        self._pulse.beat()
        return not self._cancelled.isdisjoint(self._members)


class Engine:
    """Continuous batching over one model; :func:`forecache.workers.engine.build.build_engine` makes it.

    All methods belong to one thread, except those that say otherwise.

    Args:
        name: prefix of the names under which it holds chunks in cold memory.
        registered: page-locked memory that is released at :meth:`close`, on a GPU.
        fingerprint: names the format of the chunks; part of their keys.
        retrieval_heads: the attention that chooses first resident sets is that of the model's retrieval heads.
    """

    def __init__(
        self,
        *,
        name: str,
        config: EngineConfig,
        backbone: Backbone,
        runner: Runner,
        pool: HotPool,
        memory: ColdMemory,
        prefetcher: Prefetcher,
        windows: WindowCycle,
        scheduler: Scheduler,
        snapshots: Snapshots,
        chunks: ChunkLifecycle,
        outputs: OutputProcessor,
        grammars: Grammars,
        counters: EngineCounters,
        pulse: Pulse,
        registered: RegisteredMemory | None,
        fingerprint: str,
        retrieval_heads: bool,
    ) -> None:
        self.config = config
        self.grammars = grammars
        self.pool = pool
        self.pulse = pulse
        self.windows = windows
        self._name = name
        self._backbone = backbone
        self._runner = runner
        self._memory = memory
        self._prefetcher = prefetcher
        self._scheduler = scheduler
        self._snapshots = snapshots
        self._chunks = chunks
        self._outputs = outputs
        self._counters = counters
        self._registered = registered
        self._fingerprint = fingerprint
        self._retrieval_heads = retrieval_heads
        self._in_flight: RunningStep | None = None
        self._launched_s = self._finished_s = 0.0
        self._sequences: dict[str, TokenSequence] = {}
        self._leaving: list[TokenSequence] = []
        self._to_restart: dict[TokenSequence, str] = {}
        self._serial = 0
        self._cancelled: set[str] = set()
        self._cancel_lock = threading.Lock()
        self._events: deque[TokenEvent] = deque()

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer at most."""
        return self._backbone.max_model_len

    def add_request(
        self, request: GenerateRequest, arrived_s: float | None = None, matcher: Matcher | None = None
    ) -> None:
        """Queue a request. If it raises, nothing of the request is left behind.

        Args:
            arrived_s: when it came, in ``time.perf_counter``; ``None``: now.
            matcher: made by :attr:`grammars`, for a request with a grammar.

        Raises:
            InvalidRequestError: it can never be served.
        """
        check_request(request, self._backbone, self._most_chunks(), text=self._outputs.has_tokenizer)
        assert (matcher is None) == (request.sampling.grammar is None), "a grammar needs its matcher"
        if request.request_id in self._sequences:
            raise InvalidRequestError(f"request id '{request.request_id}' is running already", param="request_id")
        with ExitStack() as undo:  # every call may fail: then the effects of those before it are undone
            holder = self._new_holder(request)
            undo.callback(self._prefetcher.release_holder, holder)
            cache, config = request.cache, self.config
            least_tokens = cache.min_resident_tokens
            seq = TokenSequence(
                request,
                holder=holder,
                root=root_key(self._fingerprint, cache.cache_salt),
                chunk_tokens=config.chunk_tokens,
                keep_ratio=config.keep_ratio if cache.keep_ratio is None else cache.keep_ratio,
                policy=cache.policy or config.policy,
                min_resident_tokens=config.min_resident_tokens if least_tokens is None else least_tokens,
                matcher=matcher,
            )
            seq.state_slots = self._snapshots.slots(seq)
            seq.counters.arrived_s = arrived_s or seq.counters.arrived_s
            self._outputs.begin(seq)
            undo.callback(self._outputs.forget, seq)
            self._scheduler.add(seq)
            undo.callback(self._scheduler.remove, seq)
            self._sequences[request.request_id] = seq
            undo.callback(self._sequences.pop, request.request_id)
            self.pulse.beat()
            self._prefetcher.wake()
            undo.pop_all()

    def _most_chunks(self) -> int:
        # a sequence with state outside its chunks can't be spread over nodes
        return most_chunks(self._memory, spreads=self._snapshots.layout is None)

    def _new_holder(self, request: GenerateRequest) -> str:
        name = HoldId(self._name, request.request_id, self._serial, request.traceparent).name
        self._serial += 1  # last: a serial that is used but never released keeps cold memory from merging later ones
        return name

    def cancel(self, request_id: str) -> None:
        """End a request soon, in a long step between two of its layers. Ignores unknown ids. Any thread may call."""
        with self._cancel_lock:
            self._cancelled.add(request_id)
        self._prefetcher.wake()

    @property
    def idle(self) -> bool:
        """No work until the next request."""
        return not self._sequences and not self._leaving and not self._events and self._in_flight is None

    def step(self) -> list[TokenEvent]:
        """Advance every request that can run by one step; returns their events, possibly none.

        Where steps overlap (on a GPU), a decode step is launched, and its chunks are accounted for, before the tokens
        of the step in flight are read: the device never waits for the host.
        """
        self._receive()
        for seq in self._scheduler.admit(self._chunks.releasing_slots):
            self._chunks.locate(seq)
        if self._scheduler.streams_next:
            self._finish_in_flight()  # a long step is planned, and timed, with no other step in flight
        plan = self._scheduler.next_plan()
        launched = self._launch(plan) if plan.tokens else None
        finished = self._finish_in_flight()
        if launched is not None:
            if plan.streams or not self.config.overlap_steps:
                output = launched.result()
                void = self._check(plan, output)
                self._store(plan, void, checked=True)
                self._finish(output, void)
            else:
                self._store(plan, set(), checked=False)
                self._in_flight = launched
        elif not finished and not self._events:
            self._wait()
        if launched is not None or finished:
            self.pulse.beat()
        events, self._events = list(self._events), deque()
        return events

    def _launch(self, plan: Plan) -> RunningStep | None:
        """Start computing ``plan``; ``None`` if it was aborted, or chunks that it reads were lost."""
        # only long steps are aborted: the other rows lose their work with it
        members = {part.sequence.request_id for part in plan.streams if part.tokens > 1}
        self._launched_s = time.perf_counter()
        try:
            return self._runner.launch(plan, AbortCheck(self.pulse, self._cancelled, members))
        except StepAbortedError:
            return None
        except PastLostError as error:
            self._restart(self._sequences[error.request_id], "chunks on other nodes could not be read")
            return None

    def _finish_in_flight(self) -> bool:
        """Finish the step in flight; returns whether there was one."""
        step, self._in_flight = self._in_flight, None
        if step is not None:
            self._finish(step.result(), set())
        return step is not None

    def _check(self, plan: Plan, output: StepOutput) -> set[TokenSequence]:
        """Check what a step read and computed before its tokens count; returns the sequences that it is void for."""
        void: set[TokenSequence] = set()
        for seq in (part.sequence for part in plan.streams):
            # streams read their past where it is stored; that of decode rows was verified when it was recalled
            if lost := self._chunks.lost(seq, output.damaged.get(seq.request_id, [])):
                self._counters.lost_chunks += lost
                void.add(seq)
                if any(found.sequence is seq for found in output.non_finite):
                    self._wipe(seq)
                self._restart(seq, f"{lost} chunks were gone or damaged when a step read them")
            elif (mass := output.masses.get(seq.request_id)) is not None:
                seq.add_prompt_mass(mass)
        self._scheduler.observe(plan, time.perf_counter() - self._launched_s)
        return void | self._drop_non_finite(output)

    def _drop_non_finite(self, output: StepOutput) -> set[TokenSequence]:
        """Void the step for sequences with values that are not finite, and return these.

        Each starts over after its stored chunks, once; if that happens again, its request ends, and no other.
        """
        void = set()
        for found in output.non_finite:
            seq = found.sequence
            if not _is_current(seq, found.restarts):
                continue
            void.add(seq)
            self._counters.non_finite_steps += 1
            seq.non_finite_steps += 1
            self._wipe(seq)
            cause = f"the model gave {found.what}"
            if seq.non_finite_steps <= NON_FINITE_RETRIES and seq.restarts < self.config.max_restarts:
                logger.warning("%s starts over: %s", seq.request_id, cause)
                self._restart(seq, cause)
            else:
                error = NonFiniteError(
                    f"{cause}, also when it was computed once more. Other requests continue. If this prompt always "
                    "fails, the model overflows on it: serve it with --dtype bfloat16 or float32. If not, check the "
                    "device."
                )
                self._end(seq, "error", Output(error=str(error), non_finite=True))
        return void

    def _wipe(self, seq: TokenSequence) -> None:
        """Remove everything that the last step wrote of ``seq``: it is not finite. ``seq`` starts over or ends."""
        self._chunks.withhold(seq, wipe=True)
        self._runner.wipe(seq)

    def _store(self, plan: Plan, void: set[TokenSequence], *, checked: bool) -> None:
        """Count the tokens of ``plan`` as computed, store the chunks that they complete, and advance the window cycle.

        ``checked``: the host has read that they are finite. Else their chunks are held back until :meth:`_finish`.
        """
        for seq in plan.decode:
            if seq.state is not State.DECODE:
                continue  # it ended when the step before was finished
            seq.count_kept()
            seq.open_exact = seq.open_exact and not seq.partial
            self._chunks.computed(seq, 1, checked=checked)
            self.windows.stepped(seq)
        for part in (part for part in plan.streams if part.sequence not in void):
            if part.sequence.state is State.DECODE:
                part.sequence.count_kept()
            self._chunks.computed(part.sequence, part.tokens)
            if part.sequence.state is State.PREFILL:
                self._events.append(self._outputs.event(part.sequence))

    def _finish(self, output: StepOutput, void: set[TokenSequence]) -> None:
        """Take the results of a step: finite chunks, queries for the indexer, log-probabilities and tokens.

        ``void``: sequences that the step is void for.
        """
        now = time.perf_counter()
        self._counters.steps += 1
        self._counters.step_s += now - max(self._launched_s, self._finished_s)
        self._finished_s = now
        void = void | self._drop_non_finite(output)
        self._chunks.show()
        for captured in output.captured:
            self.windows.captured(captured)
        for scored in output.scored:
            scored.take()
        for drawn in output.sampled:
            seq = drawn.sequence
            if seq in void or not _is_current(seq, drawn.restarts):
                continue
            if seq.state is State.PREFILL:
                self._begin_decode(seq)
            self._emit(seq, drawn)

    def _begin_decode(self, seq: TokenSequence) -> None:
        seq.counters.first_token_s = seq.counters.first_token_s or time.perf_counter()
        self._counters.prompt_tokens += 0 if seq.restarts or seq.request.resume_token_ids else seq.prompt_len
        if seq.residency.streamed:
            seq.state = State.DECODE
        else:
            seq.state = State.RECALLING
            self.windows.begin(seq, seq.prompt_mass, retrieval_heads=self._retrieval_heads)

    def _emit(self, seq: TokenSequence, drawn: Sampled) -> None:
        """Send a token of ``seq``; one that the client already has only shows that the request advances."""
        output = NO_OUTPUT
        if not seq.replays():
            seq.token_ids.append(drawn.token)
            self._counters.generated_tokens += 1
            output = self._outputs.push(seq, drawn)
        if output.reason is None:
            self._events.append(self._outputs.event(seq, output))
        else:
            self._end(seq, output.reason, output)

    def _receive(self) -> None:
        """Apply what happened since the last step: copies, cancellations, predictions, restarts that can start now."""
        for done in self._prefetcher.drain():
            self.pulse.beat()
            if isinstance(done, Recalled):
                self._recalled(done)
            elif isinstance(done, Released):
                self._chunks.released(done.holder)
            elif (failed := self._chunks.settle(done)) is not None:
                error = Output(error=done.failure, overloaded=done.overloaded, too_large=done.too_large)
                self._end(failed, "error", error)
        with self._cancel_lock:
            cancelled, self._cancelled = self._cancelled, set()
        for request_id in cancelled & self._sequences.keys():
            self.pulse.beat()
            self._end(self._sequences[request_id], "cancelled")
        for seq in list(self._scheduler.running):
            missing = self.windows.poll(seq) if seq.state is not State.WAITING else ()
            if missing and (damaged := self._chunks.damaged_records(seq, missing)):
                self._counters.lost_chunks += damaged
                self._restart(seq, f"{damaged} chunks had damaged index records when they were scored")
        for seq in [seq for seq in self._to_restart if not seq.residency.copying]:
            self._restart(seq, self._to_restart[seq])
        for seq in [seq for seq in self._leaving if not seq.residency.copying]:
            self._leaving.remove(seq)
            self._chunks.release(seq)

    def _recalled(self, done: Recalled) -> None:
        count_recall(self._counters, done)
        if (seq := self.windows.recalled(done)) is not None and seq.state is not State.FINISHED:
            self._restart(seq, f"{len(done.lost)} chunks were gone or damaged when they were recalled")

    def _restart(self, seq: TokenSequence, cause: str) -> None:
        """Compute the tokens of ``seq`` again, after the prefix that is still stored: its chunks are lost or void.

        Waits until no copy into its slots runs. Ends the request after ``max_restarts``: with bad memory it would never
        finish, and delay the others.
        """
        if seq.restarts >= self.config.max_restarts:
            self._end(seq, "error", Output(error=_too_many_restarts(seq, cause), chunks_lost=True))
            return
        if seq.residency.copying:
            seq.state = State.WAITING
            self._to_restart[seq] = cause
            return
        self._to_restart.pop(seq, None)
        self._scheduler.remove(seq)
        self._runner.forget(seq)
        self._chunks.release(seq)
        seq.start_over(self._new_holder(seq.request))
        self._scheduler.add(seq, first=True)

    def _end(self, seq: TokenSequence, reason: FinishReason, output: Output = NO_OUTPUT) -> None:
        """End the request of ``seq``; its slots are released once no copy into them runs."""
        count_end(self._counters, seq, reason)
        self._to_restart.pop(seq, None)
        self._chunks.withhold(seq)
        self._chunks.record_session(seq, reason)
        self._events.append(self._outputs.end(seq, reason, output))
        self._scheduler.remove(seq)
        self._runner.forget(seq)
        seq.state = State.FINISHED
        del self._sequences[seq.request_id]
        if seq.residency.copying:
            self._leaving.append(seq)
        else:
            self._chunks.release(seq)

    def _wait(self) -> None:
        start = time.perf_counter()
        if self._sequences or self._leaving:
            self._prefetcher.wait(IDLE_WAIT_S)
            decoding = any(seq.state is State.DECODE for seq in self._scheduler.running)
            if decoding or self._scheduler.stalled:
                self._counters.prefetch_stall_s += time.perf_counter() - start

    def wait_for_work(self, timeout_s: float) -> None:
        """Sleep while the engine is idle, at most ``timeout_s``; :meth:`wake` and :meth:`cancel` end it."""
        if self.idle:
            self._prefetcher.wait(timeout_s)

    def wake(self) -> None:
        """End :meth:`wait_for_work`. Any thread may call."""
        self._prefetcher.wake()

    def stats(self) -> EngineStats:
        """A snapshot of the engine's numbers. Any thread may call."""
        return engine_stats(self._counters, self.pool, self._scheduler)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if the pool's references are not exactly those of the sequences."""
        self.pool.check_integrity()
        self._runner.check_integrity()
        check_references(self.pool, [*self._scheduler.running, *self._scheduler.waiting, *self._leaving])

    def flush(self) -> None:
        """Wait for the copies and releases that run, and apply their results."""
        self._prefetcher.flush()
        self._receive()

    def close(self) -> None:
        """Cancel all requests, release all holds and end the copy thread. The caller closes memory and indexer."""
        for seq in list(self._sequences.values()):
            self._end(seq, "cancelled")
        self._finish_in_flight()
        while self._leaving:
            self._prefetcher.wait(IDLE_WAIT_S)
            self._receive()
        with self._registered or nullcontext():
            self._prefetcher.close()


def _too_many_restarts(seq: TokenSequence, cause: str) -> str:
    return (
        f"stored chunks of this request were lost {seq.restarts + 1} times, and it may start over {seq.restarts} times "
        f"(--max-restarts). The last time, {cause}. Send it again; if that fails too, the node has bad memory, or its "
        "memory tier restarts again and again"
    )


def _is_current(seq: TokenSequence, restarts: int) -> bool:
    """Whether a step launched when ``seq`` had started over ``restarts`` times still counts for it."""
    return seq.restarts == restarts and seq.state not in (State.WAITING, State.FINISHED)

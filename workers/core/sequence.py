"""One request inside the engine: its tokens and its chunks."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from itertools import islice

import numpy as np
import numpy.typing as npt

from forecache.workers.core.grammar import Matcher
from forecache.workers.core.requests import CacheOptions, GenerateRequest, Policy, SamplingParams, TokenLogprobs
from forecache.workers.core.residency import Residency
from forecache.workers.memory.format.keys import ChunkKey, child_key, prefix_keys
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.format.spread_quota import SpreadQuota, spread_quota
from forecache.workers.memory.hot.pool import HotPool

PRIVATE_MARK = -2
"""First element of the pseudo-chunk that private chunks follow. It is neither a token id nor ``STATE_MARK`` of
`snapshot_store.py`, so no real chunk has the key of that pseudo-chunk."""


class State(Enum):
    """Where a sequence is. It only moves forward, except that a sequence that starts over waits again.

    ``WAITING`` in the queue; ``LOCATING`` its stored prefix; ``RECALLING`` its first resident set.
    """

    WAITING = auto()
    LOCATING = auto()
    PREFILL = auto()
    RECALLING = auto()
    DECODE = auto()
    FINISHED = auto()


@dataclass
class Chunk:
    """Completed chunk ``number`` of one sequence.

    ``ref`` is its slot in the arena, once it is stored. ``exact``: every token of it was computed over all chunks, so
    other requests may reuse it.
    """

    number: int
    key: ChunkKey
    ref: SlotRef | None
    exact: bool


@dataclass
class Counters:
    """What a request used so far. Times ``*_s`` are seconds; ``arrived_s``, ``locating_s``, ``admitted_s`` and
    ``first_token_s`` are moments of ``time.perf_counter``."""

    cached_tokens: int = 0
    recalled_chunks: int = 0
    late_windows: int = 0
    failed_predictions: int = 0
    windows: int = 0
    coverage_sum: float = 0.0
    coverages: int = 0
    event_hits: int = 0
    event_misses: int = 0
    fallbacks: int = 0
    refused_fallbacks: int = 0
    kept_sum: float = 0.0
    kept_steps: int = 0
    arrived_s: float = field(default_factory=time.perf_counter)
    locating_s: float = 0.0
    admitted_s: float | None = None
    locate_s: float = 0.0
    first_token_s: float | None = None


class TokenSequence:
    """Tokens and chunks of one request. Belongs to the engine's thread.

    Attributes:
        request: as the client sent it; ``matcher`` follows its grammar.
        holder: the name under which cold memory holds its chunks; a new one each time it starts over.
        root: the parent key of its first chunk.
        keep_ratio, policy, min_resident_tokens: the request's, or the server's where the request names none.
        state: where it is; see :class:`State`.
        place: in the queue and among the prompts: its priority, then its arrival.
        token_ids: the prompt, then the generated tokens that the host has read.
        prompt_len: tokens of the prompt.
        num_computed: tokens whose K/V is in chunks; the token of a launched decode step counts.
        prefill_target: tokens that prefill computes; decode steps compute the rest.
        fresh_tokens: tokens at the end of the prompt that are computed even where they are stored.
        prompt_mass: float32 [chunks], the largest share of attention that one of the prompt's last tokens put on each
            chunk.
        replayed_tokens: coming decode steps whose token is known, because an earlier try drew it.
        restarts: how often it started over.
        chunks: completed chunks in order; ``chunk_of`` finds them by key.
        open_slots: chunk number → hot slot of chunks that are still being filled. Changing the open chunk of a decoding
            sequence changes ``residency.version``.
        open_exact: no token of the open chunk was computed over a partial resident set.
        held_back: chunk number → hot slot of completed chunks that other sequences can't find yet, because the host has
            not read whether they are finite.
        non_finite_steps: steps of it whose result was not finite.
        remote_chunks: its chunks that are stored on other nodes.
        quota: its quota of this node's arena, where its chunks are spread over nodes.
        state_slots: cold slots for snapshots of its per-sequence state.
        scores_prompt: log-probabilities of the prompt are wanted and not sent yet; ``prompt_logprobs`` collects them.
        residency: which chunks it reads, and its next resident set.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        holder: str,
        root: ChunkKey,
        chunk_tokens: int,
        keep_ratio: float,
        policy: Policy,
        min_resident_tokens: int = 0,
        matcher: Matcher | None = None,
    ) -> None:
        self.request = request
        self.matcher = matcher
        self.scores_prompt = request.sampling.prompt_logprobs and not request.resume_token_ids
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.holder = holder
        self.root = root
        self.chunk_tokens = chunk_tokens
        self.keep_ratio = keep_ratio
        self.policy = policy
        self.min_resident_tokens = min_resident_tokens
        self.state = State.WAITING
        self.place = request.priority, 0
        self.token_ids = [*request.prompt_token_ids, *request.resume_token_ids]
        self.prompt_len = len(request.prompt_token_ids)
        self.num_computed = 0
        self.prefill_target = len(self.token_ids)
        self.fresh_tokens = 1
        self.prompt_mass: npt.NDArray[np.float32] | None = None
        self.replayed_tokens = 0
        self.restarts = 0
        self.chunks: list[Chunk] = []
        self.chunk_of: dict[ChunkKey, Chunk] = {}
        self.open_slots: dict[int, int] = {}
        self.open_exact = True
        self.held_back: dict[int, int] = {}
        self.non_finite_steps = 0
        self.remote_chunks = 0
        self.quota: SpreadQuota | None = None
        self.state_slots = 0
        self.residency = Residency()
        self.counters = Counters()
        self._table: tuple[int, npt.NDArray[np.int32]] = (-1, np.zeros(0, dtype=np.int32))
        # arena slots and generations of its chunks, which the indexer reads; -1: not stored yet
        self._ref_slots = np.full(self.max_chunks, -1, dtype=np.int64)
        self._ref_generations = np.zeros(self.max_chunks, dtype=np.int64)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @cached_property
    def weighs_logits(self) -> bool:
        """Whether biases or penalties change its logits."""
        sampling = self.request.sampling
        return bool(sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty)

    @property
    def cache(self) -> CacheOptions:
        return self.request.cache

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_len :]

    @property
    def max_len(self) -> int:
        """Tokens of prompt and answer at most."""
        return self.prompt_len + self.sampling.max_tokens

    @property
    def max_chunks(self) -> int:
        """Chunks of prompt and answer at most."""
        return -(-self.max_len // self.chunk_tokens)

    @property
    def cold_slots(self) -> int:
        """Cold slots that it may need: for its chunks and for snapshots of its state."""
        return self.max_chunks + self.state_slots

    def slots_here(self, node_slots: int) -> int:
        """Cold slots that it may need in an arena of ``node_slots``: all, or its quota if its chunks are spread over
        nodes, or have to be."""
        if self.quota is None and self.cold_slots <= node_slots:
            return self.cold_slots
        return (self.quota or spread_quota(node_slots)).slots

    @property
    def tail_tokens(self) -> int:
        """Computed tokens of the chunk that is not full yet."""
        return self.num_computed - len(self.chunks) * self.chunk_tokens

    @property
    def resident_share(self) -> float:
        """Share of its chunks that a decode step reads."""
        return self.residency.share(len(self.chunks))

    def count_kept(self) -> None:
        """Count a launched decode step in the mean of ``resident_share``."""
        self.counters.kept_sum += self.resident_share
        self.counters.kept_steps += 1

    @property
    def partial(self) -> bool:
        """Whether a decode step skips completed chunks."""
        return not self.residency.streamed and len(self.residency.slots) < len(self.chunks)

    @property
    def awaited_tokens(self) -> int:
        """Tokens of a step in flight that the host has not read: 0 or 1."""
        return max(self.num_computed + 1 - len(self.token_ids), 0) if self.state is State.DECODE else 0

    def hot_slot(self, number: int, pool: HotPool) -> int | None:
        """The slot of completed chunk ``number`` in ``pool``; ``None``: it is not hot."""
        slot = self.residency.slots.get(number, self.held_back.get(number))
        return pool.lookup(self.chunks[number].key) if slot is None else slot

    def block_row(self) -> npt.NDArray[np.int32]:
        """Slots that a decode step reads, int32: the resident chunks by number, then the open chunk."""
        version, row = self._table
        if version != self.residency.version:
            resident = self.residency.slots
            slots = [resident[number] for number in sorted(resident)]
            row = np.array([*slots, self.open_slots[len(self.chunks)]], dtype=np.int32)
            self._table = (self.residency.version, row)
        return row

    def refs(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Arena slots and generations of the chunks, int64 [chunks] each; slot -1: not stored yet."""
        count = len(self.chunks)
        return self._ref_slots[:count], self._ref_generations[:count]

    def stored_at(self, chunk: Chunk, ref: SlotRef) -> None:
        """Note that ``chunk`` is stored at ``ref``, in the arena or on another node."""
        self.remote_chunks += ref.remote - (chunk.ref is not None and chunk.ref.remote)
        chunk.ref = ref
        self._ref_slots[chunk.number], self._ref_generations[chunk.number] = ref.slot, ref.generation

    def reusable_keys(self) -> Iterator[ChunkKey]:
        """Keys of the chunks that a stored prefix may fill, without the last ``fresh_tokens`` tokens."""
        return prefix_keys(self.root, self.token_ids[: self._reusable_tokens], self.chunk_tokens)

    def session_keys(self, chunks: int) -> list[ChunkKey]:
        """Keys of chunks that earlier requests of the session decoded over partial resident sets.

        They follow the first ``chunks`` of :meth:`reusable_keys`, which every request may use.
        """
        parent = list(islice(self.reusable_keys(), chunks))[-1] if chunks else self.root
        tokens = self.token_ids[chunks * self.chunk_tokens : self._reusable_tokens]
        return list(prefix_keys(self._private(parent), tokens, self.chunk_tokens))

    @property
    def _reusable_tokens(self) -> int:
        return max(self.prefill_target - self.fresh_tokens, 0)

    def _private(self, parent: ChunkKey) -> ChunkKey:
        """Parent key of chunks after ``parent`` that were decoded over a partial resident set.

        It names the session or the request, so that others never find these chunks as their prefix.
        """
        session_id = self.cache.session_id
        owner = self.holder if session_id is None else f"session {session_id}"
        return child_key(parent, [PRIVATE_MARK, *map(ord, f"private {owner}")])

    def complete_chunk(self, known: ChunkKey | None = None, *, exact: bool = True) -> Chunk:
        """Append the first open chunk, whose tokens are all computed.

        Args:
            known: its key, if that is one of :meth:`reusable_keys`, or, not ``exact``, of :meth:`session_keys`.
            exact: false for a chunk that an earlier request decoded over a partial resident set.
        """
        start = len(self.chunks) * self.chunk_tokens
        parent = self.chunks[-1].key if self.chunks else self.root
        exact = exact and self.open_exact and (not self.chunks or self.chunks[-1].exact)
        if not exact and (not self.chunks or self.chunks[-1].exact):
            parent = self._private(parent)
        key = known or child_key(parent, self.token_ids[start : start + self.chunk_tokens])
        chunk = Chunk(len(self.chunks), key, None, exact)
        self.chunks.append(chunk)
        self.chunk_of[key] = chunk
        self.open_exact = True
        return chunk

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """Log-probabilities of the prompt, which are sent once."""
        self.scores_prompt, logprobs = False, tuple(self.prompt_logprobs)
        self.prompt_logprobs.clear()
        return logprobs

    def replay(self) -> None:
        """Compute the answer so far by decode steps over newly chosen sets, as it was computed before, not by prefill.

        The tokens that follow are then the same as without the interruption. Call it before any token is computed.
        """
        self.prefill_target = self.prompt_len
        self.replayed_tokens = len(self.token_ids) - self.prompt_len

    def replays(self) -> bool:
        """Whether the token that was just drawn is known already; counts it."""
        if not self.replayed_tokens:
            return False
        self.replayed_tokens -= 1
        return True

    def add_prompt_mass(self, mass: npt.NDArray[np.float32]) -> None:
        """Merge ``mass``, float32 [chunks so far]: attention of some of the prompt's last tokens. Changes ``mass``."""
        if self.prompt_mass is not None:
            mass[: len(self.prompt_mass)] = np.maximum(mass[: len(self.prompt_mass)], self.prompt_mass)
        self.prompt_mass = mass

    def drop_chunks(self) -> None:
        """Forget the chunks that were found: they can't be used."""
        self.chunks.clear()
        self.chunk_of.clear()
        self._ref_slots.fill(-1)
        self.remote_chunks = 0

    def start_over(self, holder: str) -> None:
        """Forget all chunks: its tokens are computed again, and cold memory holds them for ``holder``."""
        self.restarts += 1
        self.holder = holder
        self.drop_chunks()
        self.prompt_logprobs.clear()
        self.prompt_mass = None
        self.quota = None
        self.residency = Residency(version=self.residency.version + 1)
        self.num_computed = 0
        self.prefill_target = len(self.token_ids)
        self.replayed_tokens = 0
        self.open_exact = True
        self.state = State.WAITING

"""One request inside the engine: its tokens, its chunks, and which of them are resident."""

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
from forecache.workers.memory.format.keys import ChunkKey, child_key, prefix_keys
from forecache.workers.memory.format.slots import SlotRef
from forecache.workers.memory.format.spread_quota import SpreadQuota, spread_quota

PRIVATE_MARK = -2
"""No token id, and not ``STATE_MARK`` of `snapshot_store.py`: no chunk has the key that private chunks follow."""


class State(Enum):
    """Where a sequence is. It only moves forward, but for a restart after a lost chunk."""

    WAITING = auto()
    LOCATING = auto()
    PREFILL = auto()
    RECALLING = auto()
    DECODE = auto()
    FINISHED = auto()


@dataclass
class Chunk:
    """Completed chunk ``number`` of one sequence.

    ``ref`` is its place in the arena, once it has one; ``exact`` says that no token of it was computed over a partial
    resident set, so that others may use it.
    """

    number: int
    key: ChunkKey
    ref: SlotRef | None
    exact: bool


@dataclass
class Counters:
    """What a request cost so far."""

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
    """Tokens and chunks of one request.

    ``token_ids`` is the prompt and what has been generated; the K/V of the first ``num_computed`` of them is in chunks.
    A decode step that was launched counts as computed; its token joins ``token_ids`` when the host has read it.
    ``replayed_tokens`` is for how many coming tokens it is known already what is drawn.
    ``resident`` maps chunk number → hot slot for the chunks that decode steps read, each referenced in the pool;
    ``open_slots`` does so for chunks that are still being filled. Who changes either raises ``table_version``.
    ``held_back`` maps chunk number → hot slot for completed chunks that no other sequence may find yet, since the host
    has not read whether they are finite; ``non_finite_steps`` of it were not.
    ``share`` is there when it is spread over nodes: what it may use of this one's arena; ``remote_chunks`` of its
    chunks lie on other nodes. Of the prompt, ``fresh_tokens`` at least are computed, whatever is stored;
    ``prompt_mass``, float32 [chunks], is the largest share of attention that one of its last tokens put on each chunk.
    ``scores_prompt``: log-probabilities of its prompt are wanted, and ``prompt_logprobs`` are those so far.
    ``widening`` is how often its first budget it may have resident; ``half_set``, bool [chunks], is what the last set
    would have been with half of that, which would have done at the last ``steady_boundaries``. ``attended``: resident
    chunks that retrieval heads looked at when that was last measured; ``shown`` is of :mod:`.chunk_states`.
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
        self.state = State.WAITING
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
        self.held_back: dict[int, int] = {}
        self.non_finite_steps = 0
        self.open_exact = True
        self.resident: dict[int, int] = {}
        self.table_version = 0
        self._table: tuple[int, npt.NDArray[np.int32]] = (-1, np.zeros(0, dtype=np.int32))
        # where its chunks are in the arena, for the indexer: -1 where they are not there yet
        self._ref_slots = np.full(self.max_chunks, -1, dtype=np.int64)
        self._ref_generations = np.zeros(self.max_chunks, dtype=np.int64)
        self.remote_chunks = 0
        self.quota: SpreadQuota | None = None
        self.state_slots = 0
        self.streamed = False
        self.reserved_slots = 0
        self.widening = 1
        self.half_set = np.zeros(0, dtype=np.bool_)
        self.steady_boundaries = 0
        self.attended: frozenset[int] = frozenset()
        self.shown: tuple[object, ...] = ()
        self.decode_steps = 0
        self.counters = Counters()

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @cached_property
    def weighs_logits(self) -> bool:
        """Whether its logits are changed by biases or penalties."""
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
        """Longest this sequence can become, in tokens."""
        return self.prompt_len + self.sampling.max_tokens

    @property
    def max_chunks(self) -> int:
        return -(-self.max_len // self.chunk_tokens)

    @property
    def cold_slots(self) -> int:
        """Slots of cold memory that it may need: its chunks, and ``state_slots`` for snapshots of its state."""
        return self.max_chunks + self.state_slots

    def slots_here(self, node_slots: int) -> int:
        """Those of an arena of ``node_slots``: all, or its share where it is, or has to be, spread over nodes."""
        if self.quota is None and self.cold_slots <= node_slots:
            return self.cold_slots
        return (self.quota or spread_quota(node_slots)).slots

    @property
    def tail_tokens(self) -> int:
        """Computed tokens in the chunk that is not full yet."""
        return self.num_computed - len(self.chunks) * self.chunk_tokens

    @property
    def resident_share(self) -> float:
        """Resident / all chunks, the open one counted on both sides; what is streamed is read whole."""
        if self.streamed:
            return 1.0
        return (len(self.resident) + 1) / (len(self.chunks) + 1)

    def count_kept(self) -> None:
        """A decode step of it was launched: account for what that reads."""
        self.counters.kept_sum += self.resident_share
        self.counters.kept_steps += 1

    @property
    def partial(self) -> bool:
        """Whether a decode step of it leaves completed chunks unread."""
        return not self.streamed and len(self.resident) < len(self.chunks)

    @property
    def awaited_tokens(self) -> int:
        """Tokens of launched steps that the host has not read yet: 0 or 1."""
        return max(self.num_computed + 1 - len(self.token_ids), 0) if self.state is State.DECODE else 0

    def block_row(self) -> npt.NDArray[np.int32]:
        """Slots that a decode step reads: resident chunks in their order, then the one that is being filled."""
        version, row = self._table
        if version != self.table_version:
            slots = [self.resident[number] for number in sorted(self.resident)]
            row = np.array([*slots, self.open_slots[len(self.chunks)]], dtype=np.int32)
            self._table = (self.table_version, row)
        return row

    def refs(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Arena slots and generations of the chunks, int64 [chunks] each; slot -1: not there yet."""
        count = len(self.chunks)
        return self._ref_slots[:count], self._ref_generations[:count]

    def stored_at(self, chunk: Chunk, ref: SlotRef) -> None:
        """``chunk`` has reached the arena, or another node and its record the arena."""
        self.remote_chunks += ref.remote - (chunk.ref is not None and chunk.ref.remote)
        chunk.ref = ref
        self._ref_slots[chunk.number], self._ref_generations[chunk.number] = ref.slot, ref.generation

    def reusable_keys(self) -> Iterator[ChunkKey]:
        """Keys of the chunks that a prefix hit may fill; ``fresh_tokens`` are left to compute."""
        return prefix_keys(self.root, self.token_ids[: self._reusable_tokens], self.chunk_tokens)

    def session_keys(self, chunks: int) -> list[ChunkKey]:
        """As :meth:`reusable_keys`, of what earlier requests of the session have decoded over partial resident sets
        behind the first ``chunks`` chunks, which are anybody's."""
        parent = list(islice(self.reusable_keys(), chunks))[-1] if chunks else self.root
        tokens = self.token_ids[chunks * self.chunk_tokens : self._reusable_tokens]
        return list(prefix_keys(self._private(parent), tokens, self.chunk_tokens))

    @property
    def _reusable_tokens(self) -> int:
        return max(self.prefill_target - self.fresh_tokens, 0)

    def _private(self, parent: ChunkKey) -> ChunkKey:
        """What was decoded over a partial resident set must not meet anybody else's prefix."""
        session_id = self.cache.session_id
        owner = self.holder if session_id is None else f"session {session_id}"
        return child_key(parent, [PRIVATE_MARK, *map(ord, f"private {owner}")])

    def complete_chunk(self, known: ChunkKey | None = None, *, exact: bool = True) -> Chunk:
        """The tokens of the first open chunk are all computed: name it and add it to the chunks.

        ``known``: its key, where that is one of :meth:`reusable_keys`, or, not ``exact``, of :meth:`session_keys`.
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

    def told_prompt(self) -> tuple[TokenLogprobs, ...]:
        """What is known of its prompt, to be told once."""
        self.scores_prompt, told = False, tuple(self.prompt_logprobs)
        self.prompt_logprobs.clear()
        return told

    def replay(self) -> None:
        """The answer so far is to be computed as it was, by decode steps over sets chosen anew, not by prefill: what
        follows is then what would have followed. Call it before any token is computed."""
        self.prefill_target = self.prompt_len
        self.replayed_tokens = len(self.token_ids) - self.prompt_len

    def replays(self) -> bool:
        """Whether the token that was drawn now is one that is known already."""
        if not self.replayed_tokens:
            return False
        self.replayed_tokens -= 1
        return True

    def attends(self, mass: npt.NDArray[np.float32]) -> None:
        """The last tokens of its prompt, or some of them, put ``mass``, float32 [chunks], on the chunks so far."""
        if self.prompt_mass is not None:
            mass[: len(self.prompt_mass)] = np.maximum(mass[: len(self.prompt_mass)], self.prompt_mass)
        self.prompt_mass = mass

    def drop_chunks(self) -> None:
        """What was found of it can't be used."""
        self.chunks.clear()
        self.chunk_of.clear()
        self._ref_slots.fill(-1)
        self.remote_chunks = 0

    def start_over(self, holder: str) -> None:
        """Forget all chunks: the tokens so far are to be computed again, held in the name of ``holder``."""
        self.restarts += 1
        self.holder = holder
        self.drop_chunks()
        self.prompt_logprobs.clear()
        self.prompt_mass = None
        self.quota = None
        self.table_version += 1
        self.num_computed = 0
        self.prefill_target = len(self.token_ids)
        self.replayed_tokens = 0
        self.decode_steps = 0
        self.widening = 1
        self.steady_boundaries = 0
        self.open_exact = True
        self.state = State.WAITING

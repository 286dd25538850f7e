"""The catalog, in Redis: which memory tier stores which chunk. Tiers write it, all read it; entries are hints.

Schema, under the prefix ``forecache:``

- ``chunk:<16 bytes of key>``: hash of tier id -> incarnation that published it; expires unless published again.
- ``tier:<id>``: hash of ``incarnation``, ``node_id``, ``slots``, ``used_slots``, ``heartbeat_unix_s``,
  ``expires_unix_ms``; void after that time, by the clock of Redis.
- ``tiers``: set of tier ids, some of them perhaps void.
- ``session:<id>``: hash of ``keys`` and ``state_keys`` (16 bytes each), ``pinned_until_unix_s`` and
  ``changed_unix_s``; ``sessions_by_use``: sorted set of their ids by the later of these two times; ``session_sizes``:
  hash of id -> bytes; ``session_bytes``: their sum.

Only entries of chunks have an expiry in Redis. So under ``maxmemory-policy volatile-lru`` a full Redis evicts entries
of chunks, which are hints and are published again, and never a tier or a pinned session.

An entry counts only while the tier lives in the incarnation it names, so a dead tier needs no cleanup.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from forecache.workers.errors import CatalogUnavailableError
from forecache.workers.masking import mask_secrets
from forecache.workers.memory.format.keys import KEY_BYTES, ChunkKey, batches

CHUNK_PREFIX = b"forecache:chunk:"
TIER_PREFIX = b"forecache:tier:"
TIERS_KEY = b"forecache:tiers"
SESSION_PREFIX = b"forecache:session:"
SESSION_KEYS = (b"forecache:sessions_by_use", b"forecache:session_sizes", b"forecache:session_bytes")
SESSION_OVERHEAD_BYTES = 512
"""Bytes of a session's record in Redis in addition to its keys and three times its id."""

CHUNK_EXPIRY_S = 3600
"""Entries of chunks expire after this time; tiers publish again well before."""
BATCH_KEYS = 1000
"""Keys of one pipelined write, so that no single one blocks Redis for long."""

_LIVING = """
local now, incarnations = redis.call('TIME'), {}
local now_ms = now[1] * 1000 + math.floor(now[2] / 1000)
local function incarnation(tier)
  if incarnations[tier] == nil then
    local known = redis.call('HMGET', ARGV[1] .. tier, 'incarnation', 'expires_unix_ms')
    incarnations[tier] = known[1] and tonumber(known[2]) > now_ms and known[1]
  end
  return incarnations[tier]
end
"""
"""The incarnation in which a tier lives; false for a dead tier. ARGV[1]: prefix of tier records."""

# KEYS: chunks in order. Returns the length of the run that tiers store together; then, per tier, its chunks of the run.
RUN = (
    _LIVING
    + """
local counts, run = {}, 0
for i, key in ipairs(KEYS) do
  local entries, any = redis.call('HGETALL', key), false
  for j = 1, #entries, 2 do
    local tier = entries[j]
    if incarnation(tier) == entries[j + 1] then counts[tier], any = (counts[tier] or 0) + 1, true end
  end
  if not any then break end
  run = i
end
local reply = {run}
for tier, chunks in pairs(counts) do
  reply[#reply + 1] = tier
  reply[#reply + 1] = chunks
end
return reply
"""
)

# KEYS: chunks. Returns for each chunk the tiers that store it.
LOCATE = (
    _LIVING
    + """
local reply = {}
for i, key in ipairs(KEYS) do
  local entries, holding = redis.call('HGETALL', key), {}
  for j = 1, #entries, 2 do
    local tier = entries[j]
    if incarnation(tier) == entries[j + 1] then holding[#holding + 1] = tier end
  end
  reply[i] = holding
end
return reply
"""
)

# KEYS: all tiers. Returns the living ones with the fields of their records, and removes the others.
TIERS = (
    _LIVING
    + """
local reply = {}
for _, tier in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  if incarnation(tier) then
    reply[#reply + 1] = {tier, redis.call('HGETALL', ARGV[1] .. tier)}
  else
    redis.call('DEL', ARGV[1] .. tier)
    redis.call('SREM', KEYS[1], tier)
  end
end
return reply
"""
)

# KEYS: all tiers; ARGV[2]: a tier's id, ARGV[3]: expiry in ms, then fields and values. Returns the incarnation in which
# the tier was known and had published all its chunks. A lost reply does no harm: the next heartbeat returns the same.
HEARTBEAT = (
    _LIVING
    + """
local name, known = ARGV[1] .. ARGV[2], incarnation(ARGV[2])
if known ~= redis.call('HGET', ARGV[1] .. ARGV[2], 'published') then known = false end
redis.call('HSET', name, 'expires_unix_ms', string.format('%d', now_ms + ARGV[3]), unpack(ARGV, 4))
redis.call('SADD', KEYS[1], ARGV[2])
return known
"""
)

# KEYS: a tier's record; ARGV[1]: its incarnation.
PUBLISHED = """
if redis.call('HGET', KEYS[1], 'incarnation') == ARGV[1] then redis.call('HSET', KEYS[1], 'published', ARGV[1]) end
"""

_FORGET_SESSION = """
local function forget(session)
  local size = redis.call('HGET', KEYS[2], session)
  redis.call('DEL', ARGV[1] .. session)
  redis.call('ZREM', KEYS[1], session)
  redis.call('HDEL', KEYS[2], session)
  if size then redis.call('DECRBY', KEYS[3], size) end
end
"""
"""KEYS: sessions by use, their sizes, the sum of these; ARGV[1]: prefix of session records."""

# ARGV[2]: a session.
REMOVE_SESSION = _FORGET_SESSION + "forget(ARGV[2])"

# ARGV from 2: a session, its changed_unix_s, the last time of its use or pin, its bytes, seconds after which a session
# is forgotten, limit for the bytes of all or -1, then fields and values. Does nothing where a newer record is known.
# Then forgets the least recently used sessions without a pin until the rest is within the limit.
SET_SESSION = (
    _FORGET_SESSION
    + """
local name, session = ARGV[1] .. ARGV[2], ARGV[2]
local known = redis.call('HGET', name, 'changed_unix_s')
if known and tonumber(known) > tonumber(ARGV[3]) then return end
local before = redis.call('HGET', KEYS[2], session) or 0
redis.call('HSET', name, 'changed_unix_s', ARGV[3], unpack(ARGV, 8))
redis.call('ZADD', KEYS[1], ARGV[4], session)
redis.call('HSET', KEYS[2], session, ARGV[5])
redis.call('INCRBY', KEYS[3], ARGV[5] - before)
local now_s, most = tonumber(redis.call('TIME')[1]), tonumber(ARGV[7])
while true do
  local first = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
  local used_s = tonumber(first[2])
  if not used_s or used_s > now_s then break end
  local full = most >= 0 and tonumber(redis.call('GET', KEYS[3])) > most
  if not full and used_s + ARGV[6] > now_s then break end
  forget(first[1])
end
"""
)


@dataclass(frozen=True)
class TierRecord:
    """What a tier publishes with each heartbeat. ``incarnation`` differs in each life of the tier; ``used_slots`` can't
    be freed without loss."""

    tier_id: str
    incarnation: str
    node_id: str
    slots: int
    used_slots: int
    heartbeat_unix_s: float = 0.0


@dataclass(frozen=True)
class StoredRun:
    """The longest run of chunks, from the first, that living tiers store together; and how many of its chunks each of
    them stores, anywhere in it."""

    chunks: int
    by_tier: Mapping[str, int]


RECORD_EXPIRY_S = 24 * 3600.0
"""A session without a pin is remembered this long after its last request or pin change."""


@dataclass(frozen=True)
class SessionRecord:
    """``keys``: the chunks of the session's last request, in order. ``state_keys``: pieces of the snapshot behind the
    last one, for models with a state. Pinned until ``pinned_until_unix_s``, if not 0. ``changed_unix_s``: time of this
    record; the later of two records wins."""

    session_id: str
    keys: tuple[ChunkKey, ...]
    pinned_until_unix_s: float = 0.0
    state_keys: tuple[ChunkKey, ...] = ()
    changed_unix_s: float = field(default_factory=time.time)

    @property
    def is_pinned(self) -> bool:
        return self.pinned_until_unix_s > time.time()

    def after(self, known: "SessionRecord") -> "SessionRecord":
        """This record, dated later than ``known`` even if the clocks of two nodes differ."""
        return replace(self, changed_unix_s=max(self.changed_unix_s, math.nextafter(known.changed_unix_s, math.inf)))

    @property
    def nbytes(self) -> int:
        """Approximate bytes in Redis."""
        keys = KEY_BYTES * (len(self.keys) + len(self.state_keys))
        return keys + 3 * len(self.session_id.encode()) + SESSION_OVERHEAD_BYTES

    @property
    def expiry_s(self) -> float:
        """Seconds from now; not above 0 once it has expired."""
        return max(self.changed_unix_s + RECORD_EXPIRY_S, self.pinned_until_unix_s) - time.time()


class Catalog:
    """A client of the catalog. Any thread may call.

    Every method raises :class:`CatalogUnavailableError` when Redis does not answer within ``timeout_s``.
    """

    def __init__(self, url: str, *, timeout_s: float = 1.0) -> None:
        """``url``: ``redis://host:port/db``, ``rediss://…`` or ``unix:///path``. Connects at first use."""
        self._shown_url = mask_secrets(url)
        try:
            self._redis = redis.Redis.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                # One retry at once: a pooled connection may belong to a server that has restarted since.
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError as error:
            raise CatalogUnavailableError(
                f"{mask_secrets(url)!r} is no Redis URL: use redis://host:port/db, rediss://… or unix:///path"
            ) from error
        self._run = self._redis.register_script(RUN)
        self._locate = self._redis.register_script(LOCATE)
        self._tiers = self._redis.register_script(TIERS)
        self._heartbeat = self._redis.register_script(HEARTBEAT)
        self._published = self._redis.register_script(PUBLISHED)
        self._set_session = self._redis.register_script(SET_SESSION)
        self._remove_session = self._redis.register_script(REMOVE_SESSION)

    def heartbeat(self, record: TierRecord, *, expiry_s: float) -> bool:
        """Publish that the tier lives, for ``expiry_s`` more. Returns False until :meth:`set_published` was called for
        its incarnation, and again after the catalog has lost it: the caller then publishes all its chunks."""
        fields: dict[str, Any] = {
            "incarnation": record.incarnation,
            "node_id": record.node_id,
            "slots": record.slots,
            "used_slots": record.used_slots,
            "heartbeat_unix_s": time.time(),
        }
        args: list[Any] = [TIER_PREFIX, record.tier_id, max(1, int(expiry_s * 1000))]
        for name, value in fields.items():
            args += [name, value]
        with self._errors():
            known = self._heartbeat(keys=[TIERS_KEY], args=args)
        return bool(known == record.incarnation.encode())

    def set_published(self, tier_id: str, incarnation: str) -> None:
        """The tier has published all its chunks: from now on :meth:`heartbeat` returns True.

        Does nothing where the catalog does not know this incarnation.
        """
        with self._errors():
            self._published(keys=[TIER_PREFIX + tier_id.encode()], args=[incarnation])

    def publish(self, tier_id: str, incarnation: str, keys: Iterable[ChunkKey]) -> None:
        """The tier stores these chunks."""
        for batch in batches(keys, BATCH_KEYS):
            with self._errors():
                pipeline = self._redis.pipeline(transaction=False)
                for key in batch:
                    pipeline.hset(CHUNK_PREFIX + key, tier_id, incarnation)
                    pipeline.expire(CHUNK_PREFIX + key, CHUNK_EXPIRY_S)
                pipeline.execute()

    def withdraw(self, tier_id: str, keys: Iterable[ChunkKey]) -> None:
        """The tier no longer stores these chunks."""
        for batch in batches(keys, BATCH_KEYS):
            with self._errors():
                pipeline = self._redis.pipeline(transaction=False)
                for key in batch:
                    pipeline.hdel(CHUNK_PREFIX + key, tier_id)
                pipeline.execute()

    def remove_tier(self, tier_id: str) -> None:
        """The tier ends: everything it has published is void."""
        with self._errors():
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.delete(TIER_PREFIX + tier_id.encode())
            pipeline.srem(TIERS_KEY, tier_id)
            pipeline.execute()

    def stored_run(self, keys: Sequence[ChunkKey]) -> StoredRun:
        """The longest run of ``keys``, from the first, that is stored anywhere.

        One round trip (three, the first time a Redis server meets the script).
        """
        if not keys:
            return StoredRun(0, {})
        with self._errors():
            run, *found = self._run(keys=[CHUNK_PREFIX + key for key in keys], args=[TIER_PREFIX])
        by_tier = {tier_id.decode(): int(chunks) for tier_id, chunks in zip(found[::2], found[1::2], strict=True)}
        return StoredRun(int(run), by_tier)

    def locate(self, keys: Sequence[ChunkKey]) -> list[set[str]]:
        """For each of ``keys`` the ids of the living tiers that store it. One round trip per batch."""
        places: list[set[str]] = []
        for batch in batches(keys, BATCH_KEYS):
            with self._errors():
                found = self._locate(keys=[CHUNK_PREFIX + key for key in batch], args=[TIER_PREFIX])
            places += [{tier_id.decode() for tier_id in tier_ids} for tier_ids in found]
        return places

    def entries(self) -> Iterator[tuple[ChunkKey, set[str]]]:
        """Every chunk that has an entry, and the living tiers that store it. Reads the whole catalog."""
        with self._errors():
            names = cast(Iterator[bytes], self._redis.scan_iter(CHUNK_PREFIX + b"*", count=BATCH_KEYS))
            for batch in batches((name.removeprefix(CHUNK_PREFIX) for name in names), BATCH_KEYS):
                yield from zip(batch, self.locate(batch), strict=True)

    def tiers(self) -> list[TierRecord]:
        """All living tiers, by id."""
        with self._errors():
            found = sorted(self._tiers(keys=[TIERS_KEY], args=[TIER_PREFIX]))
        records = [(tier_id, dict(zip(fields[::2], fields[1::2], strict=True))) for tier_id, fields in found]
        return [
            TierRecord(
                tier_id.decode(),
                record[b"incarnation"].decode(),
                record[b"node_id"].decode(),
                int(record[b"slots"]),
                int(record[b"used_slots"]),
                float(record[b"heartbeat_unix_s"]),
            )
            for tier_id, record in records
        ]

    def set_session(self, record: SessionRecord, most_bytes: int | None = None) -> None:
        """Store ``record``, unless a newer one is known.

        ``most_bytes``: limit for all sessions; beyond it the least recently used ones without a pin are forgotten.
        """
        fields: dict[str, Any] = {
            "keys": b"".join(record.keys),
            "state_keys": b"".join(record.state_keys),
            "pinned_until_unix_s": record.pinned_until_unix_s,
        }
        args: list[Any] = [
            SESSION_PREFIX,
            record.session_id,
            record.changed_unix_s,
            max(record.changed_unix_s, record.pinned_until_unix_s),
            record.nbytes,
            RECORD_EXPIRY_S,
            -1 if most_bytes is None else most_bytes,
        ]
        for name, value in fields.items():
            args += [name, value]
        with self._errors():
            self._set_session(keys=SESSION_KEYS, args=args)

    def session(self, session_id: str) -> SessionRecord | None:
        """``None`` for an unknown or expired session."""
        with self._errors():
            fields = cast(dict[bytes, bytes], self._redis.hgetall(SESSION_PREFIX + session_id.encode()))
        return _session(session_id, fields)

    def remove_session(self, session_id: str) -> None:
        with self._errors():
            self._remove_session(keys=SESSION_KEYS, args=[SESSION_PREFIX, session_id])

    def sessions(self) -> list[SessionRecord]:
        """All known sessions."""
        with self._errors():
            session_ids = sorted(cast(list[bytes], self._redis.zrange(SESSION_KEYS[0], 0, -1)))
            pipeline = self._redis.pipeline(transaction=False)
            for session_id in session_ids:
                pipeline.hgetall(SESSION_PREFIX + session_id)
            found = zip(session_ids, pipeline.execute(), strict=True)
        return [record for name, fields in found if (record := _session(name.decode(), fields)) is not None]

    def close(self) -> None:
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise CatalogUnavailableError(
                f"Redis at {self._shown_url} does not answer: {mask_secrets(str(error))}"
            ) from error


def _session(session_id: str, fields: dict[bytes, bytes]) -> SessionRecord | None:
    """``None`` for a record without fields, or an expired one."""
    if not fields:
        return None
    record = SessionRecord(
        session_id,
        _split(fields[b"keys"]),
        float(fields[b"pinned_until_unix_s"]),
        _split(fields.get(b"state_keys", b"")),  # missing in records of older versions, like the next field
        float(fields.get(b"changed_unix_s", 0)),
    )
    return record if record.expiry_s > 0 else None


def _split(joined: bytes) -> tuple[ChunkKey, ...]:
    return tuple(joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES))

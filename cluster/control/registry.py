"""The `Registry` records in Redis which processes are alive, which placement is published and which controller leads.

Backbones generate tokens without waiting for the registry. Every Redis command is one round trip with a short timeout
and no retry. If a command fails, callers keep the values that they read last and try again later. If Redis has lost its
data, the next heartbeats restore the records of the live processes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cluster.control.operator_orders import PoolSize, StandingOrder
from cluster.control.registry_store import (
    HEARTBEAT_TTL_S,
    LEASE_TTL_S,
    MAX_DECISIONS,
    POOL_SIZE_TTL_S,
    Lease,
    StoreUnavailable,
    stale_placement,
)
from cluster.topology import Placement, Shard

log = logging.getLogger(__name__)

# Timeouts in seconds. With redis-py's defaults a call waits 4 s for a dead server and 59 s for a server that hangs.
CONNECT_TIMEOUT_S = 0.2
CALL_TIMEOUT_S = 1.0
MAX_CONNECTIONS = 16  # The maximum number of connections of one client.


def connect(url: str, password: str | None = None) -> Redis:
    """Return a Redis client whose calls fail within a second if Redis is gone; the client reconnects by itself.

    Close the client with `aclose()`. A password in the URL takes precedence over `password`. Raises ValueError if the
    URL does not start with redis://, rediss:// or unix://.
    """
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError(f"The registry URL {url!r} must start with redis://, rediss:// or unix://.")
    return Redis.from_url(
        url,
        password=password,
        decode_responses=True,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=CALL_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        max_connections=MAX_CONNECTIONS,
    )


def key_prefix(model: str) -> str:
    """Return the prefix of a model's keys; the prefix has braces, which keep all keys on one node of a Redis Cluster.

    Raises ValueError if the name is empty or contains braces or white space.
    """
    if not model or any(char in "{}" or char.isspace() for char in model):
        raise ValueError(f"The model name {model!r} must not be empty and must not contain braces or white space.")
    return f"expertmesh:{{{model}}}:"


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn redis-py's errors into StoreUnavailable, so that callers need not know redis-py."""
    try:
        yield
    except RedisError as error:
        raise StoreUnavailable(f"Redis did not do what it was asked ({type(error).__name__}: {error}).") from error


# The script does not delete the record of another incarnation: a new shard with the same id has written this record.
REMOVE = """
if redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[1] then return 0 end
redis.call('SREM', KEYS[2], ARGV[2])
return redis.call('DEL', KEYS[1])
"""

# The script returns nothing if it stores the placement. Otherwise the script returns the epoch and the fencing token
# that prevent publishing. A leader's fencing token must be the newest one, because a newer leader may have read the
# placement already. A caller without a lease has the fencing token 0, which is enough only if no placement from a
# leader is stored.
PUBLISH = """
local stored = redis.call('HMGET', KEYS[1], 'epoch', 'fencing')
local epoch, fencing = tonumber(stored[1] or 0), tonumber(stored[2] or 0)
if tonumber(ARGV[3]) > 0 then fencing = math.max(fencing, tonumber(redis.call('GET', KEYS[2]) or 0)) end
if epoch ~= tonumber(ARGV[1]) or fencing > tonumber(ARGV[3]) then return {tostring(epoch), tostring(fencing)} end
redis.call('HSET', KEYS[1], 'epoch', ARGV[2], 'fencing', ARGV[3], 'value', ARGV[4])
return false
"""

# A new fencing token is at least the clock's time in milliseconds, so that fencing tokens keep growing even after Redis
# has lost its data.
ACQUIRE = """
if redis.call('EXISTS', KEYS[1]) == 1 then return false end
local now = redis.call('TIME')
local fencing = math.max(tonumber(redis.call('GET', KEYS[2]) or 0) + 1, now[1] * 1000 + math.floor(now[2] / 1000))
local text = string.format('%.0f', fencing)
redis.call('SET', KEYS[2], text)
redis.call('SET', KEYS[1], text .. ' ' .. ARGV[1], 'PX', ARGV[2])
return text
"""

RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""

# The script deletes the order only if its text is unchanged: the operator may have given a newer order meanwhile.
LIFT = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
return redis.call('HDEL', KEYS[1], ARGV[1])
"""


class Registry:
    """A `Registry` keeps the shared state of one model's fleet in Redis; every method may raise StoreUnavailable.

    The registry holds the live shards, the placement and its followers, the lease, the operator orders, the sizes of
    the pools, the manifest and the controllers' latest decisions.

    - `ttl_s`: seconds without a heartbeat after which a shard or a backbone counts as dead.
    - `lease_ttl_s`: seconds without renewal after which a lease ends.
    """

    def __init__(self, redis: Redis, model: str, ttl_s: float = HEARTBEAT_TTL_S, lease_ttl_s: float = LEASE_TTL_S):
        self.redis = redis
        self.prefix = key_prefix(model)
        self.ttl_ms = round(ttl_s * 1000)
        self.lease_ttl_ms = round(lease_ttl_s * 1000)

    async def heartbeat(self, shard: Shard) -> None:
        """Write the whole record of `shard`; the record expires if no other heartbeat follows within `ttl_s`."""
        key = self._shard_key(shard.id)
        with store_errors():
            async with self.redis.pipeline(transaction=True) as pipe:
                pipe.delete(key)
                pipe.hset(key, items=list(chain(*shard.to_record().items())))
                pipe.pexpire(key, self.ttl_ms)
                pipe.sadd(self.prefix + "shards", shard.id)
                await pipe.execute()

    async def remove(self, shard: Shard) -> None:
        """Delete a shard's record before the record expires, unless the record belongs to another incarnation."""
        await self._eval(REMOVE, [self._shard_key(shard.id), self.prefix + "shards"], shard.incarnation, shard.id)

    async def shards(self) -> list[Shard]:
        """Return the shards that are alive, in the order of their ids."""
        ids = sorted(await self._call("SMEMBERS", self.prefix + "shards"))
        with store_errors():
            async with self.redis.pipeline(transaction=False) as pipe:
                for id in ids:
                    pipe.hgetall(self._shard_key(id))
                records: list[Mapping[str, str]] = await pipe.execute()
        if dead := [id for id, record in zip(ids, records, strict=True) if not record]:
            await self._call("SREM", self.prefix + "shards", *dead)
        shards = []
        for id, record in zip(ids, records, strict=True):
            try:
                shards += [Shard.from_record(record)] if record else []
            except ValueError as error:  # Another version of this code wrote the record. Only this shard is left out.
                log.warning("The record of shard %s cannot be read: %s", id, error)
        return shards

    async def epoch(self) -> int:
        """Return the epoch of the published placement, or 0 if no placement is published; the call is cheap."""
        return int(await self._call("HGET", self.prefix + "placement", "epoch") or 0)

    async def placement(self) -> Placement | None:
        """Return the published placement, or None if no placement is published."""
        value = await self._call("HGET", self.prefix + "placement", "value")
        return Placement.from_json(value) if value is not None else None

    async def publish(self, placement: Placement, expected_epoch: int, fencing: int) -> None:
        """Publish `placement` if the stored placement has the epoch `expected_epoch`.

        - `expected_epoch`: the epoch of the placement to replace, or 0 if no placement is published yet.
        - `fencing`: the fencing token of the caller's lease, or 0 if the caller is not a controller.

        Raises StalePlacement if a placement of another epoch is stored or if a newer lease exists.
        """
        assert placement.epoch > expected_epoch >= 0
        arguments = (expected_epoch, placement.epoch, fencing, placement.to_json())
        keys = [self.prefix + "placement", self.prefix + "fencing"]
        newer = await self._eval(PUBLISH, keys, *arguments)
        if newer is not None:
            raise stale_placement(placement, expected_epoch, fencing, *map(int, newer))

    async def follow(self, follower: str, epoch: int) -> None:
        """Record that the backbone `follower` uses `epoch`; the entry expires like a heartbeat."""
        with store_errors():
            async with self.redis.pipeline(transaction=True) as pipe:
                pipe.set(self.prefix + "backbone:" + follower, epoch, px=self.ttl_ms)
                pipe.sadd(self.prefix + "backbones", follower)
                await pipe.execute()

    async def unfollow(self, follower: str) -> None:
        """Delete the entry of the backbone `follower` before the entry expires."""
        await self._call("DEL", self.prefix + "backbone:" + follower)

    async def followers(self) -> dict[str, int]:
        """Return the epoch that each live backbone uses, by the backbone's name."""
        names = sorted(await self._call("SMEMBERS", self.prefix + "backbones"))
        if not names:
            return {}
        epochs = await self._call("MGET", *(self.prefix + "backbone:" + name for name in names))
        if dead := [name for name, epoch in zip(names, epochs, strict=True) if epoch is None]:
            await self._call("SREM", self.prefix + "backbones", *dead)
        return {name: int(epoch) for name, epoch in zip(names, epochs, strict=True) if epoch is not None}

    async def note_decision(self, decision: Mapping[str, str]) -> None:
        """Add an entry to the log of decisions, which keeps about the last `MAX_DECISIONS` entries."""
        words = [word for field in decision.items() for word in field]
        await self._call("XADD", self.prefix + "decisions", "MAXLEN", "~", MAX_DECISIONS, "*", *words)

    async def decisions(self, count: int) -> list[dict[str, str]]:
        """Return the last `count` decisions, the newest first."""
        with store_errors():
            entries: Any = await self.redis.xrevrange(self.prefix + "decisions", count=count)
        return [dict(fields) for _, fields in entries]

    async def acquire_lease(self, owner: str) -> Lease | None:
        """Return a new lease for `owner`, or None while a controller (even `owner` itself) holds the lease."""
        keys = [self.prefix + "leader", self.prefix + "fencing"]
        fencing = await self._eval(ACQUIRE, keys, owner, self.lease_ttl_ms)
        return None if fencing is None else Lease(owner, int(fencing))

    async def renew_lease(self, lease: Lease) -> bool:
        """Renew `lease`, so that it lasts for the full `lease_ttl_s` from now; return False if the lease is lost."""
        return bool(await self._eval(RENEW, [self.prefix + "leader"], _lease_text(lease), self.lease_ttl_ms))

    async def release_lease(self, lease: Lease) -> None:
        """Release `lease`; do nothing if another controller has acquired the lease in the meantime."""
        await self._eval(RELEASE, [self.prefix + "leader"], _lease_text(lease))

    async def has_leader(self) -> bool:
        """Return True if any controller holds the lease."""
        return bool(await self._call("EXISTS", self.prefix + "leader"))

    async def leader(self) -> str | None:
        """Return the name of the controller that holds the lease, or None if no controller holds the lease."""
        text = await self._call("GET", self.prefix + "leader")
        return None if text is None else str(text).partition(" ")[2]

    async def give_order(self, order: StandingOrder) -> None:
        """Store `order` until it is lifted; `order` replaces an older order of the same kind and subject."""
        await self._call("HSET", self.prefix + "orders", order.name, order.to_json())

    async def lift_order(self, order: StandingOrder) -> bool:
        """Delete `order`; return False if `order` is not stored or if a newer order has replaced it."""
        return bool(await self._eval(LIFT, [self.prefix + "orders"], order.name, order.to_json()))

    async def orders(self) -> dict[str, StandingOrder]:
        """Return all orders by name; an order that cannot be read is logged and left out."""
        orders = {}
        for name, text in sorted((await self._call("HGETALL", self.prefix + "orders")).items()):
            try:
                orders[name] = StandingOrder.from_json(text)
            except ValueError as error:
                log.warning("%s", error)
        return orders

    async def set_pool_size(self, pool: str, size: PoolSize) -> None:
        """Store how many shards `pool` should have; the entry expires after `POOL_SIZE_TTL_S`."""
        await self._call("SET", self._pool_key(pool), size.to_json(), "PX", round(1000 * POOL_SIZE_TTL_S))

    async def pool_size(self, pool: str) -> PoolSize | None:
        """Return how many shards `pool` should have, or None if no leader has stored a size lately."""
        text = await self._call("GET", self._pool_key(pool))
        return None if text is None else PoolSize.from_json(text)

    async def checksums(self, weights: str, layer: int) -> dict[int, int]:
        """Return the manifest's checksums of a layer's experts; `weights` names the checkpoint and the dtype."""
        known = await self._call("HGETALL", self._manifest_key(weights, layer))
        return {int(expert): int(checksum, 16) for expert, checksum in known.items()}

    async def note_checksums(self, weights: str, layer: int, seen: Mapping[int, int]) -> dict[int, int]:
        """Add the checksums in `seen`, by expert, to the manifest; return the manifest's checksums of these experts.

        A checksum that is already in the manifest is not changed.
        """
        if not seen:
            return {}
        key = self._manifest_key(weights, layer)
        with store_errors():
            async with self.redis.pipeline(transaction=True) as pipe:
                for expert, checksum in seen.items():
                    pipe.hsetnx(key, str(expert), f"{checksum:016x}")
                pipe.hmget(key, [str(expert) for expert in seen])
                known: list[str] = (await pipe.execute())[-1]
        return {expert: int(checksum, 16) for expert, checksum in zip(seen, known, strict=True)}

    def _manifest_key(self, weights: str, layer: int) -> str:
        return f"{self.prefix}manifest:{weights}:{layer}"

    def _pool_key(self, pool: str) -> str:
        return f"{self.prefix}pool:{pool}"

    def _shard_key(self, shard_id: str) -> str:
        return f"{self.prefix}shard:{shard_id}"

    async def _eval(self, script: str, keys: list[str], *arguments: str | int) -> Any:
        # EVALSHA would fail after Redis has lost its data, because Redis has then lost its scripts, too.
        return await self._call("EVAL", script, len(keys), *keys, *arguments)

    async def _call(self, *command: str | int) -> Any:
        with store_errors():
            return await self.redis.execute_command(*command)  # type: ignore[no-untyped-call]


def _lease_text(lease: Lease) -> str:
    return f"{lease.fencing} {lease.owner}"

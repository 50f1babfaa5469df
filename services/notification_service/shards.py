"""Who follows which part of the user feed: what a replica does about it, from what it sees in the database.

Each replica looks every so often, and acts for itself alone. Living replicas, in the order in which they joined, have
the same number of shards each, the first ones one more where it does not come out even; so one that joins takes from
the others and none is moved besides. A replica takes what nobody has, up to its share, and gives up what is above it.

Into how many shards the feed is divided is what all living replicas want. As long as they do not agree, for instance in
a rollout, it stays as it is; the first that joined divides it anew.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from notification_service.store.shards import Division, Shard


@dataclass(frozen=True, slots=True)
class Plan:
    """What a replica is to do. `divide` is a number of shards, or 0."""

    divide: int
    mine: tuple[Shard, ...] = ()
    give_up: tuple[Shard, ...] = ()
    take: tuple[Shard, ...] = ()


def plan(seen: Division, me: uuid.UUID) -> Plan:
    """What is to be done by a living replica."""
    of = len(seen.shards)
    # By an operator, or by an earlier release, the feed was set to one place: each shard goes on from there.
    is_void = of > 1 and not seen.divided
    wanted = {one.shards for one in seen.replicas}
    to = wanted.pop() if len(wanted) == 1 else of or seen.replicas[0].shards
    divide = to if (to != of or is_void) and seen.replicas[0].id == me else 0
    if is_void:
        return Plan(divide)
    mine = tuple(one for one in seen.shards if one.owner == me)
    share = _share(of, [one.id for one in seen.replicas], me)
    free = tuple(one for one in seen.shards if one.owner is None)
    return Plan(divide, mine[:share], mine[share:], free[: max(share - len(mine), 0)])


def _share(shards: int, replicas: list[uuid.UUID], me: uuid.UUID) -> int:
    each, more = divmod(shards, len(replicas))
    return each + (replicas.index(me) < more)

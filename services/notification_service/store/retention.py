"""The SQL of what is no longer kept: notifications with all that became of them, sends, digests, and the marks of users
who were deleted.

Each statement takes a bounded number of rows and passes over those that somebody has locked; it waits for nobody but
who marks notifications in the app. So replicas may do the same at once, and nothing waits for them longer than for one
batch.

A notification goes with its deliveries, and with what explains these. A send and a digest go once no notification of
theirs is left, so what stands beside a notification is there as long as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    Interval,
    Text,
    and_,
    any_,
    delete,
    exists,
    func,
    literal_column,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert

from notification_service.domain import IN_APP, DigestState, SendState, State
from notification_service.store import standing
from notification_service.store.parts import bind, number
from notification_service.tables import (
    deliveries,
    digest_items,
    digests,
    in_app_changes,
    inbox,
    notifications,
    recipients,
    recipients_feed,
    sends,
)
from servicekit.database import Connection, sql

# Rows of one statement. A notification has some more of other tables, which go with it.
CHUNK = 500

_note, _send, _digest, _user, _copy = notifications.c, sends.c, digests.c, recipients.c, recipients_feed.c
_cutoff = func.now() - bind("kept", Interval())
_count: Any = select(func.count())

# In the order of positions, so that what has to stay is passed once in a round. Positions are in the order of commits,
# and times nearly so.
_looked_at = (
    select(_note.id, _note.position, _note.create_time)
    .where(_note.position > bind("after", BigInteger()))
    .order_by(_note.position)
    .limit(number(CHUNK))
    .cte("looked_at")
)
# What is pending is to be sent, and what is parked is for an operator to decide.
_is_unfinished = exists().where(
    deliveries.c.notification_id == _note.id,
    # Hidden from the planner: the deliveries are found by their notification, however few are unfinished.
    or_(*(deliveries.c.state + number(0) == number(state) for state in (State.PENDING, State.PARKED))),
)
_is_gathered = exists().where(
    digest_items.c.notification_id == _note.id,
    digest_items.c.digest_id == _digest.id,
    _digest.state == number(DigestState.OPEN),
)
_over = (
    select(_note.id, _note.user_id, _note.channels, _note.archive_time)
    .join(_looked_at, _looked_at.c.id == _note.id)
    .where(_looked_at.c.create_time < _cutoff, not_(_is_unfinished), not_(_is_gathered))
    .with_for_update(of=notifications, skip_locked=True)
    .cte("over")
)
_removed = delete(notifications).where(_note.id == _over.c.id).returning(_note.id).cte("removed")
# Not delivered, and counted among those that were as soon as they are gone, unless somebody counts them.
_undelivered = _count.select_from(deliveries.join(_over, _over.c.id == deliveries.c.notification_id)).where(
    deliveries.c.state + number(0) != number(State.DELIVERED)
)
# The counts of these users are others now, if they still are. In one order, for replicas do this at once.
_changed = insert(in_app_changes).from_select(
    ["user_id", "version"],
    select(_over.c.user_id, number(1))
    .distinct()
    .join(recipients, and_(_user.user_id == _over.c.user_id, _user.delete_time.is_(None)))
    .where(literal_column(f"'{IN_APP}'", Text()) == any_(_over.c.channels), _over.c.archive_time.is_(None))
    .order_by(_over.c.user_id),
)
_counted_up = _changed.on_conflict_do_update(
    index_elements=["user_id"], set_={"version": in_app_changes.c.version + number(1)}
).cte("counted_up")
_REMOVE_NOTIFICATIONS = sql(
    select(
        select(func.max(_looked_at.c.position)).scalar_subquery(),
        _count.select_from(_looked_at).where(_looked_at.c.create_time < _cutoff).scalar_subquery(),
        _count.select_from(_removed).scalar_subquery(),
        _undelivered.scalar_subquery(),
    ).add_cte(_counted_up)
)
_NOTE_UNDELIVERED = sql(update(inbox).values(removed=inbox.c.removed + bind("undelivered", BigInteger())))


def _remove(table: Any, key: Any, over: Any, *conditions: Any) -> Any:
    """Removes rows that are over the longest, by an index of when that was, under further conditions."""
    chunk = (
        select(key)
        .where(over < _cutoff, *conditions)
        .order_by(over)
        .limit(number(CHUNK))
        .with_for_update(of=table, skip_locked=True)
        .cte("chunk")
    )
    return delete(table).where(key == chunk.c[key.name])


_has_ended = or_(
    *(_send.state == number(state) for state in (SendState.SENT, SendState.FAILED)),
    # Until it is settled something of it may be pending.
    and_(_send.state == number(SendState.CANCELLED), _send.settled),
)
_REMOVE_SENDS = sql(
    _remove(sends, _send.id, _send.end_time, _has_ended, not_(exists().where(_note.send_id == _send.id)))
)
_item_is_there = exists().where(digest_items.c.digest_id == _digest.id, _note.id == digest_items.c.notification_id)
_REMOVE_DIGESTS = sql(
    _remove(
        digests,
        _digest.id,
        _digest.end_time,
        _digest.state != number(DigestState.OPEN),
        not_(exists().where(_note.digest_id == _digest.id)),
        not_(_item_is_there),
    )
)

# What the copy of the users or the inbox has yet to come past may say of a user what was before the deletion; so may a
# snapshot that is still read. Where nobody knows when a user was deleted, it was before the head as it was last told.
_deletion = func.coalesce(_user.delete_position, _copy.head_position)
_log, _place = (
    select(what).select_from(inbox).scalar_subquery() for what in (standing.PROCESSED_LOG, standing.PROCESSED)
)
_is_passed = exists().where(
    _copy.resume_token.is_not(None),
    not_(_copy.inside),
    or_(
        and_(_log == _copy.log_id, _deletion <= _copy.position, _deletion <= _place),
        # Of a history of the log that a later snapshot has replaced: what follows compares with it no more.
        and_(_copy.position.is_not(None), _user.snapshot < _copy.history),
    ),
)
_gone = _remove(recipients, _user.user_id, _user.delete_time, _is_passed).returning(_user.user_id).cte("gone")
# Nobody looks at their in-app inbox any more.
_uncounted = delete(in_app_changes).where(in_app_changes.c.user_id == _gone.c.user_id).cte("uncounted")
_REMOVE_TOMBSTONES = sql(_count.select_from(_gone).add_cte(_uncounted))


@dataclass(frozen=True, slots=True)
class Removed:
    """How many notifications were removed, and after which position to go on: None at the end."""

    count: int
    after: int | None


async def remove_notifications(connection: Connection, kept: timedelta, after: int) -> Removed:
    """Of some notifications after a position removes those that were made longer ago than `kept`, but for those with a
    delivery that is pending or parked, and those that an open digest has gathered.
    """
    async with connection.transaction():
        row = await (
            await connection.execute(_REMOVE_NOTIFICATIONS, {"kept": kept, "after": after}, binary=True)
        ).fetchone()
        if row is None:
            raise LookupError("an aggregate without a row")
        last, old, count, undelivered = row
        if undelivered:
            # Last: whoever stores notifications waits for the lock of this row.
            await connection.execute(_NOTE_UNDELIVERED, {"undelivered": undelivered})
    return Removed(count, last if old == CHUNK else None)


async def remove_sends(connection: Connection, kept: timedelta) -> int:
    """Removes some sends that ended longer ago than `kept` and have no notification any more. Returns how many."""
    return (await connection.execute(_REMOVE_SENDS, {"kept": kept})).rowcount


async def remove_digests(connection: Connection, kept: timedelta) -> int:
    """Removes some digests that ended longer ago than `kept` and have neither a notification nor an item that is there
    any more, with their items. Returns how many.
    """
    return (await connection.execute(_REMOVE_DIGESTS, {"kept": kept})).rowcount


async def remove_tombstones(connection: Connection, kept: timedelta) -> int:
    """Removes the marks of some users who were deleted longer ago than `kept`, once both the copy of the users and the
    inbox are past the deletion. Returns how many.
    """
    row = await (await connection.execute(_REMOVE_TOMBSTONES, {"kept": kept})).fetchone()
    return int(row[0]) if row else 0

"""The tables of the notifications database, as this release needs them.

Migrations bring a database here; `alembic check` compares.
"""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    and_,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

SCHEMA_REVISION = "0011"

NAMING = {
    "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "ck": "%(table_name)s_%(constraint_name)s_check",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "pk": "%(table_name)s_pkey",
}

metadata = MetaData(naming_convention=NAMING)

# At most one row, made by the service when it first starts. Whoever holds its lock may store what was made of events:
# the cursor moves in the transaction that stores notifications, and their dense positions are taken under its lock.
inbox = Table(
    "inbox",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False, server_default=text("1")),
    # The user feed's identity, the token to resume it with and the last position that is processed.
    Column("log_id", UUID(as_uuid=True)),
    Column("resume_token", Text),
    Column("position", BigInteger, nullable=False, server_default=text("0")),
    Column("position_time", DateTime(timezone=True)),
    # How many notifications and deliveries there are, which is the position of the newest of each.
    Column("notification_position", BigInteger, nullable=False, server_default=text("0")),
    Column("delivery_position", BigInteger, nullable=False, server_default=text("0")),
    # How many deliveries were removed when their time was over that had ended other than by being delivered.
    Column("removed", BigInteger, nullable=False, server_default=text("0")),
    # The identity of this log of notifications: drawn once, and never changed.
    Column("notification_log_id", UUID(as_uuid=True), nullable=False, server_default=text("gen_random_uuid()")),
    # When a subscriber last stored something: replicas that stand by judge by it whether there is one.
    Column("update_time", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    CheckConstraint("id = 1", name="single"),
)

# The parts of the user feed that are followed, each by one replica at a time. How far each is says its row while the
# inbox's token is `divided`, else the inbox's row. Whoever stores what was made of a shard's events holds the lock of
# its row, and takes that of the inbox after it.
shards = Table(
    "shards",
    metadata,
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("of", Integer, nullable=False),
    Column("log_id", UUID(as_uuid=True)),
    # Null until something was stored since the feed was divided.
    Column("resume_token", Text),
    Column("position", BigInteger, nullable=False, server_default=text("0")),
    Column("position_time", DateTime(timezone=True)),
    # The feed's newest position, as last told.
    Column("head_position", BigInteger, nullable=False, server_default=text("0")),
    # Of each earlier division that is not passed yet: how far each of its shards was.
    Column("floors", JSONB),
    # Who may store: a replica, from when it took the shard until the next epoch.
    Column("owner", UUID(as_uuid=True)),
    Column("epoch", BigInteger, nullable=False, server_default=text("1")),
    Column("update_time", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    CheckConstraint("shard BETWEEN 0 AND of - 1", name="shard"),
    # Few rows, each updated with every batch: the new version finds room beside the old one.
    postgresql_with={"fillfactor": 50},
)

# Who follows shards or would: a replica whose lease is over owns nothing.
replicas = Table(
    "replicas",
    metadata,
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("name", Text, nullable=False),
    # Into how many shards it wants the feed divided.
    Column("shards", Integer, nullable=False),
    Column("join_time", DateTime(timezone=True), nullable=False),
    Column("lease_until", DateTime(timezone=True), nullable=False),
    postgresql_with={"fillfactor": 50},
)

notifications = Table(
    "notifications",
    metadata,
    # UUIDv5 of the event and the rule.
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("position", BigInteger, nullable=False),
    Column("user_id", UUID(as_uuid=True), nullable=False),
    Column("event_id", UUID(as_uuid=True), nullable=False),
    Column("event_position", BigInteger, nullable=False),
    Column("rule", Text, nullable=False),
    Column("category", Text, nullable=False),
    Column("template", Text, nullable=False),
    Column("channels", ARRAY(Text), nullable=False),
    # As rendered for the in-app stream; empty where the notification is not in-app.
    Column("subject", Text, nullable=False, server_default=text("''")),
    Column("body", Text, nullable=False, server_default=text("''")),
    Column("create_time", DateTime(timezone=True), nullable=False),
    Column("trace_parent", Text, nullable=False, server_default=text("''")),
    Column("trace_state", Text, nullable=False, server_default=text("''")),
    # What its user did with it in the app. What is read is seen.
    Column("seen_time", DateTime(timezone=True)),
    Column("read_time", DateTime(timezone=True)),
    Column("archive_time", DateTime(timezone=True)),
    # The set of templates that it was rendered with, and the locale; empty if it was not rendered.
    Column("template_version", Text, nullable=False, server_default=text("''")),
    Column("locale", Text, nullable=False, server_default=text("''")),
    # Of its user, as the event had it: quiet hours without a zone of their own count in it.
    Column("time_zone", Text, nullable=False, server_default=text("''")),
    # Of one that was sent by a call: then its event's id is its own id, and its rule is empty.
    Column("send_id", UUID(as_uuid=True)),
    # The digest that its mails went into, of several the first; or the digest that it is the mail of.
    Column("digest_id", UUID(as_uuid=True)),
    UniqueConstraint("position"),
    UniqueConstraint("event_id", "rule"),
    Index(None, "user_id", "position"),
    Index(None, "category", "position"),
)
Index(
    "notifications_send_idx",
    notifications.c.send_id,
    notifications.c.position,
    postgresql_where=notifications.c.send_id.is_not(None),
)
# The in-app inbox of each user: its lists, its counts, and what is still to be marked.
_is_in_app = text("'in_app' = ANY (channels)")
for _name, _conditions in (
    ("in_app", (notifications.c.archive_time.is_(None),)),
    ("unseen", (notifications.c.archive_time.is_(None), notifications.c.seen_time.is_(None))),
    ("unread", (notifications.c.archive_time.is_(None), notifications.c.read_time.is_(None))),
    ("archived", (notifications.c.archive_time.is_not(None),)),
):
    Index(
        f"notifications_{_name}_idx",
        notifications.c.user_id,
        notifications.c.position,
        postgresql_where=and_(_is_in_app, *_conditions),
    )

Index("notifications_digest_idx", notifications.c.digest_id, postgresql_where=notifications.c.digest_id.is_not(None))

# Counts what was changed by hand in a user's in-app inbox, so that other replicas notice. No row is as zero.
in_app_changes = Table(
    "in_app_changes",
    metadata,
    Column("user_id", UUID(as_uuid=True), primary_key=True),
    Column("version", BigInteger, nullable=False),
)

deliveries = Table(
    "deliveries",
    metadata,
    # UUIDv5 of the notification, the channel and the target.
    Column("id", UUID(as_uuid=True), primary_key=True),
    Column("position", BigInteger, nullable=False),
    Column("notification_id", UUID(as_uuid=True), ForeignKey(notifications.c.id, ondelete="CASCADE"), nullable=False),
    Column("user_id", UUID(as_uuid=True), nullable=False),
    Column("event_id", UUID(as_uuid=True), nullable=False),
    Column("channel", Text, nullable=False),
    Column("target", Text, nullable=False),
    # Delivery.State
    Column("state", SmallInteger, nullable=False, server_default=text("1")),
    # How many attempts were begun. Every lease takes the next number, so it also fences: only the holder of the newest
    # lease may record an outcome.
    Column("tries", Integer, nullable=False, server_default=text("0")),
    # Those of them that the policy does not count: begun before its last replay, or ended by an outage of who was
    # asked.
    Column("tries_before", Integer, nullable=False, server_default=text("0")),
    # Null, too, while it waits for another one.
    Column("next_attempt_time", DateTime(timezone=True)),
    Column("lease_until", DateTime(timezone=True)),
    Column("create_time", DateTime(timezone=True), nullable=False),
    Column("end_time", DateTime(timezone=True)),
    Column("idempotency_key", Text, nullable=False),
    Column("trace_parent", Text, nullable=False, server_default=text("''")),
    Column("trace_state", Text, nullable=False, server_default=text("''")),
    # Why it ended other than by being delivered.
    Column("end_reason", Text, nullable=False, server_default=text("''")),
    # Why it stands aside until its next attempt, and holds nobody back: a gate's reason.
    Column("deferred", SmallInteger),
    # The earlier delivery that it waits for.
    Column("behind", UUID(as_uuid=True)),
    # The first attempt sets when tries come to their end however many are left.
    Column("give_up_time", DateTime(timezone=True)),
    # The provider whose outage ended the last attempt: another one is asked first.
    Column("failed_provider", Text, nullable=False, server_default=text("''")),
    UniqueConstraint("position"),
    UniqueConstraint("notification_id", "channel", "target"),
    Index(None, "user_id", "position"),
    Index(None, "channel", "position"),
    # Taking a lease changes no indexed column: with room on the page it is a heap-only update.
    postgresql_with={"fillfactor": 80},
)
# What the dispatcher leases from: small however many deliveries have ended.
Index(
    "deliveries_due_idx",
    deliveries.c.channel,
    deliveries.c.next_attempt_time,
    postgresql_where=deliveries.c.state == text("1"),
)
# The same of one target: one that is away, or slow, hides nothing of the others.
Index(
    "deliveries_target_due_idx",
    deliveries.c.target,
    deliveries.c.next_attempt_time,
    postgresql_where=text("state = 1 AND channel = 'webhook'"),
)
# Whom a delivery may not overtake, and who waits for one.
Index(
    "deliveries_order_idx",
    deliveries.c.user_id,
    deliveries.c.channel,
    deliveries.c.position,
    postgresql_where=text("state IN (1, 3)"),
)
Index("deliveries_behind_idx", deliveries.c.behind, postgresql_where=deliveries.c.behind.is_not(None))
# Lists and counts by state: all but DELIVERED, which is nearly every row.
Index(
    "deliveries_open_idx", deliveries.c.state, deliveries.c.position, postgresql_where=deliveries.c.state != text("2")
)

# What a delivery carries, the same at every attempt. Apart, for deliveries are updated and this never is.
contents = Table(
    "contents",
    metadata,
    Column("delivery_id", UUID(as_uuid=True), ForeignKey(deliveries.c.id, ondelete="CASCADE"), primary_key=True),
    Column("content", LargeBinary, nullable=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("delivery_id", UUID(as_uuid=True), ForeignKey(deliveries.c.id, ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    # Delivery.Attempt.Outcome; UNKNOWN from the lease until the answer is recorded.
    Column("outcome", SmallInteger, nullable=False, server_default=text("4")),
    # The SMTP or HTTP status; 0 if there was none.
    Column("code", Integer, nullable=False, server_default=text("0")),
    Column("detail", Text, nullable=False, server_default=text("''")),
    Column("start_time", DateTime(timezone=True), nullable=False),
    Column("end_time", DateTime(timezone=True)),
    # The mail provider that was asked; empty for other channels.
    Column("provider", Text, nullable=False, server_default=text("''")),
)

# Webhook endpoints that are made by the API.
endpoints = Table(
    "endpoints",
    metadata,
    Column("id", UUID(as_uuid=True), primary_key=True),
    # What lists are ordered by.
    Column("position", BigInteger, Identity(always=True), nullable=False),
    Column("name", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("description", Text, nullable=False, server_default=text("''")),
    # Empty: all.
    Column("events", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("categories", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    # Endpoint.State
    Column("state", SmallInteger, nullable=False, server_default=text("1")),
    Column("disable_reason", Text, nullable=False, server_default=text("''")),
    Column("disable_time", DateTime(timezone=True)),
    # Calls per second; 0 for no limit.
    Column("rate_limit", Float, nullable=False, server_default=text("0")),
    Column("version", BigInteger, nullable=False, server_default=text("1")),
    Column("create_time", DateTime(timezone=True), nullable=False),
    Column("update_time", DateTime(timezone=True), nullable=False),
    # What made it, so that a retry is known: the request's id and the hash of caller and request.
    Column("request_id", UUID(as_uuid=True)),
    Column("request_hash", LargeBinary),
    UniqueConstraint("position"),
    UniqueConstraint("name"),
    UniqueConstraint("request_id"),
    CheckConstraint("state IN (1, 2)", name="state"),
)

# In the clear, for they must sign. Every row that has not expired signs.
endpoint_secrets = Table(
    "endpoint_secrets",
    metadata,
    Column("endpoint_id", UUID(as_uuid=True), ForeignKey(endpoints.c.id, ondelete="CASCADE"), primary_key=True),
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("secret", Text, nullable=False),
    # Whether the endpoint began with it.
    Column("is_first", Boolean, nullable=False, server_default=text("false")),
    Column("create_time", DateTime(timezone=True), nullable=False),
    Column("expire_time", DateTime(timezone=True)),
)

# What was done to deliveries by hand: who, when and why.
delivery_operations = Table(
    "delivery_operations",
    metadata,
    Column("delivery_id", UUID(as_uuid=True), ForeignKey(deliveries.c.id, ondelete="CASCADE"), primary_key=True),
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    # Delivery.Operation.Kind
    Column("kind", SmallInteger, nullable=False),
    Column("actor", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("time", DateTime(timezone=True), nullable=False),
    CheckConstraint("kind IN (1, 2)", name="kind"),
)

preferences = Table(
    "preferences",
    metadata,
    Column("user_id", UUID(as_uuid=True), primary_key=True),
    # What the user decided and nothing else; the preferences module gives its keys.
    Column("document", JSONB, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("update_time", DateTime(timezone=True), nullable=False),
)

# Addresses that are not written to, and why.
suppressions = Table(
    "suppressions",
    metadata,
    Column("channel", Text, primary_key=True),
    # Case-folded.
    Column("target", Text, primary_key=True),
    # UNSUBSCRIBED, BOUNCED, COMPLAINED or MANUAL
    Column("reason", Text, nullable=False),
    Column("detail", Text, nullable=False, server_default=text("''")),
    Column("actor", Text, nullable=False, server_default=text("''")),
    Column("create_time", DateTime(timezone=True), nullable=False),
)

# Why deliveries were deferred or cancelled.
delivery_decisions = Table(
    "delivery_decisions",
    metadata,
    Column("delivery_id", UUID(as_uuid=True), ForeignKey(deliveries.c.id, ondelete="CASCADE"), primary_key=True),
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    # The gate's Reason.
    Column("kind", SmallInteger, nullable=False),
    Column("detail", Text, nullable=False, server_default=text("''")),
    Column("time", DateTime(timezone=True), nullable=False),
)

# This service's own copy of the users: whom a send may go to.
recipients = Table(
    "recipients",
    metadata,
    Column("user_id", UUID(as_uuid=True), primary_key=True),
    Column("version", BigInteger, nullable=False),
    # Null of a user who is deleted, of whom nothing else is kept.
    Column("username", Text),
    Column("email", Text),
    Column("display_name", Text),
    Column("locale", Text),
    Column("time_zone", Text),
    Column("labels", JSONB),
    Column("create_time", DateTime(timezone=True)),
    Column("update_time", DateTime(timezone=True)),
    Column("delete_time", DateTime(timezone=True)),
    # The snapshot that has named the user last, or that was the newest one when a change did.
    Column("snapshot", BigInteger, nullable=False, server_default=text("0")),
    # Of a user who is deleted: the position of the feed at which that was known. Null where nobody said.
    Column("delete_position", BigInteger),
)
# Whose time may be over.
Index("recipients_deleted_idx", recipients.c.delete_time, postgresql_where=recipients.c.delete_time.is_not(None))

# At most one row, made by the service: how far the copy is, and which replica follows the user feed for it.
recipients_feed = Table(
    "recipients_feed",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False, server_default=text("1")),
    # Of which log the copy is.
    Column("log_id", UUID(as_uuid=True)),
    Column("resume_token", Text),
    # Everything up to here is in the copy; null before the first snapshot has ended.
    Column("position", BigInteger),
    # The feed's newest position, as last told.
    Column("head_position", BigInteger, nullable=False, server_default=text("0")),
    # The number of the newest snapshot that was begun, and of the first of this history of the log: rows of earlier
    # ones are replaced whatever their version.
    Column("snapshot", BigInteger, nullable=False, server_default=text("0")),
    Column("history", BigInteger, nullable=False, server_default=text("0")),
    # Whether the token stands inside of that snapshot.
    Column("inside", Boolean, nullable=False, server_default=text("false")),
    # Who may store: a replica, until the lease is over or the next epoch.
    Column("owner", UUID(as_uuid=True)),
    Column("epoch", BigInteger, nullable=False, server_default=text("0")),
    Column("lease_until", DateTime(timezone=True)),
    # When something was last stored.
    Column("update_time", DateTime(timezone=True), nullable=False, server_default=text("now()")),
    CheckConstraint("id = 1", name="single"),
    postgresql_with={"fillfactor": 50},
)

# What callers asked to be sent, and how far that is.
sends = Table(
    "sends",
    metadata,
    Column("id", UUID(as_uuid=True), primary_key=True),
    # What lists are ordered by.
    Column("position", BigInteger, Identity(always=True), nullable=False),
    Column("template", Text, nullable=False),
    Column("category", Text, nullable=False),
    Column("channels", ARRAY(Text), nullable=False),
    Column("params", JSONB, nullable=False),
    # To whom: ids, in their order, or, where these are null, whoever a filter matches.
    Column("user_ids", ARRAY(UUID(as_uuid=True))),
    Column("filter", JSONB),
    Column("send_time", DateTime(timezone=True), nullable=False),
    # Send.State
    Column("state", SmallInteger, nullable=False, server_default=text("1")),
    # Why it failed.
    Column("failure", Text, nullable=False, server_default=text("''")),
    Column("matched", BigInteger, nullable=False, server_default=text("0")),
    Column("made", BigInteger, nullable=False, server_default=text("0")),
    Column("unknown", BigInteger, nullable=False, server_default=text("0")),
    Column("deleted", BigInteger, nullable=False, server_default=text("0")),
    Column("no_address", BigInteger, nullable=False, server_default=text("0")),
    Column("not_composed", BigInteger, nullable=False, server_default=text("0")),
    # The first of those that are unknown.
    Column("unknown_ids", ARRAY(UUID(as_uuid=True)), nullable=False, server_default=text("'{}'")),
    # Everybody up to this user is passed.
    Column("passed", UUID(as_uuid=True)),
    # The place of the user feed at the call: the copy of the users is to have passed it.
    Column("log_id", UUID(as_uuid=True)),
    Column("feed_position", BigInteger, nullable=False, server_default=text("0")),
    # Who expands it: each lease has the next epoch, and only the newest may store.
    Column("epoch", BigInteger, nullable=False, server_default=text("0")),
    Column("lease_until", DateTime(timezone=True)),
    # When it had its last turn: sends take turns.
    Column("turn_time", DateTime(timezone=True)),
    # Whether, once it is cancelled, nothing of it is pending any more.
    Column("settled", Boolean, nullable=False, server_default=text("false")),
    Column("actor", Text, nullable=False, server_default=text("''")),
    # What made it, so that a retry is known: the request's id, and the hash of what it asked for.
    Column("request_id", UUID(as_uuid=True), nullable=False),
    Column("request_hash", LargeBinary, nullable=False),
    Column("trace_parent", Text, nullable=False, server_default=text("''")),
    Column("trace_state", Text, nullable=False, server_default=text("''")),
    Column("create_time", DateTime(timezone=True), nullable=False),
    Column("start_time", DateTime(timezone=True)),
    Column("end_time", DateTime(timezone=True)),
    UniqueConstraint("position"),
    UniqueConstraint("actor", "request_id"),
    Index(None, "state", "position"),
    Index(None, "category", "position"),
    Index(None, "actor", "position"),
    CheckConstraint("state BETWEEN 1 AND 5", name="state"),
    postgresql_with={"fillfactor": 50},
)
# What the sender takes from: small however many sends have ended.
Index("sends_due_idx", sends.c.send_time, postgresql_where=text("state IN (1, 2)"))
Index("sends_unsettled_idx", sends.c.id, postgresql_where=text("state = 4 AND NOT settled"))
# Whose time may be over.
Index("sends_ended_idx", sends.c.end_time, postgresql_where=sends.c.end_time.is_not(None))

# Mails to one address that are gathered until their window closes, and then go out as one.
digests = Table(
    "digests",
    metadata,
    # UUIDv5 of its first notification, its name and its target.
    Column("id", UUID(as_uuid=True), primary_key=True),
    # What lists are ordered by.
    Column("position", BigInteger, Identity(always=True), nullable=False),
    Column("user_id", UUID(as_uuid=True), nullable=False),
    # As the rules file names it.
    Column("name", Text, nullable=False),
    Column("target", Text, nullable=False),
    # What the file said, and how its user was, when its last item came in.
    Column("category", Text, nullable=False),
    Column("template", Text, nullable=False),
    Column("locale", Text, nullable=False, server_default=text("''")),
    Column("time_zone", Text, nullable=False, server_default=text("''")),
    # Digest.State
    Column("state", SmallInteger, nullable=False, server_default=text("1")),
    # Whether it takes further items; one that does not is about to close.
    Column("gathers", Boolean, nullable=False, server_default=text("true")),
    Column("items", Integer, nullable=False),
    Column("open_time", DateTime(timezone=True), nullable=False),
    # When it is due.
    Column("close_time", DateTime(timezone=True), nullable=False),
    # Whoever closes it has it for so long.
    Column("lease_until", DateTime(timezone=True)),
    Column("end_time", DateTime(timezone=True)),
    # Why it was cancelled.
    Column("end_reason", Text, nullable=False, server_default=text("''")),
    # What it became.
    Column("notification_id", UUID(as_uuid=True)),
    # Of its first item.
    Column("event_id", UUID(as_uuid=True), nullable=False),
    Column("event_position", BigInteger, nullable=False),
    Column("trace_parent", Text, nullable=False, server_default=text("''")),
    Column("trace_state", Text, nullable=False, server_default=text("''")),
    UniqueConstraint("position"),
    Index(None, "user_id", "position"),
    Index(None, "name", "position"),
    CheckConstraint("state IN (1, 2, 3)", name="state"),
)
# One window at a time.
Index(
    "digests_gathering_idx",
    digests.c.user_id,
    digests.c.name,
    digests.c.target,
    unique=True,
    postgresql_where=text("state = 1 AND gathers"),
)
# What is due; and lists by state, all but CLOSED, which is nearly every row.
Index("digests_due_idx", digests.c.close_time, postgresql_where=digests.c.state == text("1"))
Index("digests_open_idx", digests.c.state, digests.c.position, postgresql_where=digests.c.state != text("2"))
Index("digests_notification_idx", digests.c.notification_id, postgresql_where=digests.c.notification_id.is_not(None))
# Whose time may be over.
Index("digests_ended_idx", digests.c.end_time, postgresql_where=digests.c.end_time.is_not(None))

# What was gathered, with all that its mail needs.
digest_items = Table(
    "digest_items",
    metadata,
    Column("digest_id", UUID(as_uuid=True), ForeignKey(digests.c.id, ondelete="CASCADE"), primary_key=True),
    # From 1 on, in the order in which they came.
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("notification_id", UUID(as_uuid=True), nullable=False),
    # As templates see it.
    Column("view", JSON, nullable=False),
    # No mail is in it twice; and which digests a notification went into.
    UniqueConstraint("notification_id", "digest_id"),
)

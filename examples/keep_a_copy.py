"""Keeps a copy of all users, and a record of every change, in a Postgres of one's own: each event has one effect.

    python examples/keep_a_copy.py --users 127.0.0.1:50051 --database postgresql:///mine

The token is stored in the transaction that stores what came of the events, so both are there or neither is, whenever
this process is killed. Whoever starts it again goes on there. What a killed process had sent may still be committed
after its successor has looked: a transaction counts only if the token is the one that its batch follows.
"""

from __future__ import annotations

import argparse

import psycopg
from psycopg.types.json import Jsonb

from tidings.client import Batch, PositionExpiredError, UserEvent, leaves, sync

TABLES = """
CREATE TABLE IF NOT EXISTS place (one boolean PRIMARY KEY DEFAULT true CHECK (one), token text, snapshot bigint);
INSERT INTO place (token, snapshot) VALUES (NULL, 0) ON CONFLICT DO NOTHING;
CREATE TABLE IF NOT EXISTS copied_users (
    id uuid PRIMARY KEY, version bigint NOT NULL, username text NOT NULL, email text NOT NULL, labels jsonb NOT NULL,
    snapshot bigint NOT NULL);
CREATE TABLE IF NOT EXISTS changes (position bigint NOT NULL, type text NOT NULL, user_id uuid NOT NULL)
"""

# Of two transactions that follow the same token only one moves the place.
MOVE = "UPDATE place SET token = %s WHERE token IS NOT DISTINCT FROM %s"

# A user of a snapshot replaces what was there; a change counts only if it is newer. `snapshot` is the number of the
# snapshot that has named the user last.
NAME = """
INSERT INTO copied_users SELECT %s, %s, %s, %s, %s, snapshot FROM place
ON CONFLICT (id) DO UPDATE SET version = EXCLUDED.version, username = EXCLUDED.username, email = EXCLUDED.email,
    labels = EXCLUDED.labels, snapshot = EXCLUDED.snapshot
"""
CHANGE = f"{NAME} WHERE copied_users.version < EXCLUDED.version"
REMOVE = "DELETE FROM copied_users WHERE id = %s AND version < %s"


class Place:
    """The token in the database. The feed reads it when it connects; `store` writes it."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection = connection
        self._token: str | None = None

    def load(self) -> str | None:
        """The token to go on after."""
        row = self._connection.execute("SELECT token FROM place").fetchone()
        self._token = row[0] if row else None
        return self._token

    def save(self, token: str) -> None:
        """Does nothing: the transaction has stored it."""

    def store(self, batch: Batch) -> bool:
        """Applies a batch and moves the place, in one transaction; False if another process has moved it already."""
        with self._connection.transaction() as transaction, self._connection.cursor() as cursor:
            if cursor.execute(MOVE, (batch.resume_token, self._token)).rowcount == 0:
                raise psycopg.Rollback(transaction)
            apply(cursor, batch)
            self._token = batch.resume_token
            return True
        return False


def apply(cursor: psycopg.Cursor, batch: Batch) -> None:
    """What comes of a batch."""
    match batch.snapshot:
        case "begin":
            cursor.execute("UPDATE place SET snapshot = snapshot + 1")
        case "within":
            cursor.executemany(NAME, [columns(event) for event in batch.events])
        case "end":
            cursor.execute("DELETE FROM copied_users WHERE snapshot < (SELECT snapshot FROM place)")
        case None:
            for event in batch.events:
                if leaves(event):
                    cursor.execute(REMOVE, (event.user.id, event.user.version))
                else:
                    cursor.execute(CHANGE, columns(event))
            cursor.executemany(
                "INSERT INTO changes VALUES (%s, %s, %s)",
                [(event.position, UserEvent.Type.Name(event.type), event.user.id) for event in batch.events],
            )


def columns(event: UserEvent) -> tuple[object, ...]:
    """A user as the copy has it."""
    user = event.user
    return user.id, user.version, user.username, user.email, Jsonb(dict(user.labels))


def main() -> None:
    """Follows until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", default="127.0.0.1:50051", help="address of the user service [%(default)s]")
    parser.add_argument("--database", required=True, help="libpq URL of the database that holds the copy")
    given = parser.parse_args()
    with psycopg.connect(given.database, autocommit=True) as connection, sync.connect(given.users) as channel:
        connection.execute(TABLES)
        place = Place(connection)
        # Bookmarks tell of progress, too: their tokens keep the place from expiring while no user changes.
        feed = sync.UserFeed(
            channel, cursor=place, start="snapshot", snapshot_on=PositionExpiredError, max_batch=500, progress=True
        )
        while True:
            for batch in feed:
                if not place.store(batch):
                    break  # the feed goes on where the place is


if __name__ == "__main__":
    main()

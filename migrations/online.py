"""Steps of a revision for a table that is in use: in commits of their own, so that nothing stays locked for long.

A revision is one transaction unless it uses `own_commits`. One that does and then fails is not applied but has done
some of its steps; the next run does all of them again. So each of its steps must bear being repeated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from alembic import context, op

from servicekit import logs

log = logs.get(__name__)

_SAY_EVERY = 5.0


@contextmanager
def own_commits() -> Iterator[None]:
    """Commits what the revision has done so far; inside, every statement commits itself."""
    _still_alone()
    with op.get_context().autocommit_block():
        yield
        _still_alone()


def create_index(name: str, table: str, columns: Sequence[str], **options: Any) -> None:
    """Builds an index while the table is written to; builds it anew if an earlier try has left one, valid or not."""
    with own_commits():
        # It waits for the transactions that were there before it, and blocks none of those that come after.
        op.execute("SET lock_timeout = 0")
        op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
        op.create_index(name, table, columns, postgresql_concurrently=True, **options)
        op.execute("RESET lock_timeout")


def chunks(query: sa.Select[Any], key: sa.ColumnClause[Any], size: int = 1000) -> Iterator[Sequence[sa.Row[Any]]]:
    """The rows of a query in the order of a unique column of it, some at a time; says how far it is."""
    connection, page, count, said = op.get_bind(), query.order_by(key).limit(size), 0, time.monotonic()
    rows = connection.execute(page).all()
    while rows:
        yield rows
        _still_alone()
        count += len(rows)
        if time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            log.info("rows are being migrated", rows=count)
        rows = connection.execute(page.where(key > rows[-1]._mapping[key])).all()
    if count:
        log.info("rows migrated", rows=count)


def _still_alone() -> None:
    """Raises if the run has lost its lock and another may be at work."""
    if not context.is_offline_mode():
        context.config.attributes["still_alone"]()

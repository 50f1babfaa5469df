"""A service whose role owns nothing: it serves, and can do nothing to tables, versions or other databases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from sqlalchemy import make_url

from servicekit import database
from tests.harness import Database, Databases, MailCatcher, Services
from tests.migrations.commands import KINDS, Kind, Run, migrate, step
from tests.users.calls import create, replay, stub_of

_ROLE = {kind: f"test_{kind}_service" for kind in KINDS}


@dataclass(frozen=True)
class Shared:
    """A database of one kind, and the URL by which its service has it."""

    kind: Kind
    made: Database
    service_url: str

    async def migrate(self, *arguments: str) -> Run:
        """Runs the migrations as the owner."""
        role = {f"TIDINGS_MIGRATIONS_{self.kind.upper()}_ROLE": _ROLE[self.kind]}
        return await migrate(self.kind, self.made, *arguments, **role)

    async def as_service(self, query: str) -> None:
        """Runs a statement as the service's role."""
        async with await database.connect(self.service_url, "test") as connection:
            await connection.execute(query.encode())


@pytest.fixture
async def shared(databases: Databases) -> AsyncIterator[dict[Kind, Shared]]:
    """A database of each kind, not migrated, and roles that nobody has given anything."""
    found: dict[Kind, Shared] = {}
    for kind in KINDS:
        made = await databases.blank(kind)
        await made.fetch(
            f"DO $$ BEGIN CREATE ROLE {_ROLE[kind]} LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$"
        )
        url = make_url(made.url).set(username=_ROLE[kind]).render_as_string(hide_password=False)
        found[kind] = Shared(kind, made, url)
    yield found
    for kind, one in found.items():
        await one.made.fetch(f"DROP OWNED BY {_ROLE[kind]}")


async def test_services_that_own_nothing_do_all_they_do(
    shared: dict[Kind, Shared], services: Services, mail_catcher: MailCatcher
) -> None:
    for one in shared.values():
        assert (await one.migrate()).code == 0
    users = await services.users(
        shared["users"].service_url, segment_events=2, unsealed_events=0, seal_interval=0.05, retention_interval=0.05
    ).start()
    notifications = await services.notifications(shared["notifications"].service_url, users, mail_catcher).start()
    stub = stub_of(users)
    made = [await stub.CreateUser(create()) for _ in range(6)]
    assert [event.user.id for event in await replay(stub)] == [one.id for one in made]
    await mail_catcher.wait(6)
    for service in (users, notifications):
        assert "permission denied" not in "\n".join(service.lines)
        assert await service.stop() == 0


_FORBIDDEN = (
    "CREATE TABLE mine (id int)",
    "CREATE TEMPORARY TABLE mine (id int)",
    "CREATE SCHEMA mine",
    "CREATE INDEX ON users (username)",
    "ALTER TABLE users ADD mine int",
    "DROP TABLE users",
    "TRUNCATE users",
    "UPDATE alembic_version SET version_num = '9999'",
    "DELETE FROM alembic_version",
)


async def test_what_the_role_of_a_service_cannot_do(shared: dict[Kind, Shared]) -> None:
    one = shared["users"]
    assert (await one.migrate()).code == 0
    await one.as_service("SELECT version_num FROM alembic_version")
    for statement in _FORBIDDEN:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await one.as_service(statement)


async def test_nobody_else_gets_in(shared: dict[Kind, Shared]) -> None:
    users, notifications = shared["users"], shared["notifications"]
    for one in shared.values():
        assert (await one.migrate()).code == 0
    astray = make_url(users.service_url).set(database=notifications.made.name).render_as_string(hide_password=False)
    with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
        await database.connect(astray, "test")


async def test_rights_reach_what_was_there_and_what_comes(shared: dict[Kind, Shared]) -> None:
    one = shared["users"]
    # Migrated by a release that gave nothing, and then halfway.
    await step(one.made, "0002")
    await one.made.fetch(f"GRANT CONNECT ON DATABASE {one.made.name} TO {_ROLE['users']}")
    waiting = await migrate(
        "users",
        Database(one.made.name, one.service_url, one.made.admin_url),
        "wait",
        "users",
        TIDINGS_MIGRATIONS_SCHEMA_WAIT="0",
    )
    assert waiting.code == 1
    assert "schema cannot be read: permission denied" in waiting.output
    assert (await one.migrate()).code == 0
    async with await one.made.connect() as admin:
        await admin.execute(SQL("SET ROLE {}").format(Identifier("tidings_users")))
        await admin.execute("CREATE TABLE later (id serial, name text)")
    await one.as_service("INSERT INTO later (name) VALUES ('x')")
    await one.as_service("SELECT count(*) FROM users, feed, later")
    # Nothing to migrate is no reason to give nothing.
    await one.made.fetch(f"REVOKE ALL ON users FROM {_ROLE['users']}")
    run = await one.migrate()
    assert (run.code, "nothing to do" in run.output) == (0, True)
    await one.as_service("SELECT count(*) FROM users")


async def test_a_role_that_is_not_there_or_that_migrates_is_refused(shared: dict[Kind, Shared]) -> None:
    made = shared["users"].made
    run = await migrate("users", made, TIDINGS_MIGRATIONS_USERS_ROLE="nobody_at_all")
    assert run.code == 1
    assert 'error: users: role "nobody_at_all" does not exist' in run.output
    run = await migrate("users", made, TIDINGS_MIGRATIONS_USERS_ROLE="tidings_users")
    assert run.code == 1
    assert "tidings_users is the role of the service and cannot be the one that migrates" in run.output
    assert await made.fetch("SELECT 1 FROM pg_tables WHERE tablename = 'users'") == []

"""What the services log names no user, whatever goes wrong, and says who called in which trace."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import grpc.aio
import psycopg
import pytest
from aiosmtpd.controller import Controller

from tests.harness import Callers, Databases, ServiceProcess, Services, free_port, until
from tests.users.calls import stub_of
from tidings.client import Notifications, connect
from tidings.users.v1 import users_pb2

SECRETIVE = ("adalovelace", "Ada Lovelace", "augusta")

# Postgres has the last word on a user's name, and tells what it refuses.
_REFUSE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.username = 'augusta' THEN
        RAISE unique_violation USING MESSAGE = 'duplicate key value violates unique constraint "other"',
            DETAIL = 'Key (username, email)=(augusta, augusta@example.com) already exists.';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION refuse();
"""


class Refusing:
    """An SMTP server's handler that refuses everyone by name."""

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        return f"550 5.1.1 <{address}>: Ada Lovelace does not live here"


async def test_no_line_names_a_user(databases: Databases, services: Services, tmp_path: Path) -> None:
    services.environment["TIDINGS_LOG_LEVEL"] = "INFO"
    database = await databases.users()
    async with await psycopg.AsyncConnection.connect(database.url, autocommit=True) as connection:
        await connection.execute(_REFUSE)
    users = await services.users(database).start()
    # aiosmtpd's controller runs in a thread of its own.
    port = free_port()
    controller = Controller(Refusing(), hostname="127.0.0.1", port=port)
    controller.start()
    try:
        notifications = await services.notifications(await databases.notifications(), users, smtp_port=port).start()
        stub = stub_of(users)
        ada = users_pb2.User(username="adalovelace", email="adalovelace@example.com", display_name="Ada Lovelace")
        await stub.CreateUser(users_pb2.CreateUserRequest(user=ada))
        for refused in (ada, users_pb2.User(username="augusta", email="augusta@example.com")):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.CreateUser(users_pb2.CreateUserRequest(user=refused))
        await until(lambda: _parked(notifications))
    finally:
        controller.stop()
    assert (await notifications.stop(), await users.stop()) == (0, 0)

    assert users.events("unexpected error in a call")
    assert notifications.events("delivery parked")
    lines = [line for process in (users, notifications) for line in process.lines]
    assert not [line for line in lines for name in SECRETIVE if name in line]
    assert any("Key (username, email)=(***)" in line for line in lines)


async def _parked(process: ServiceProcess) -> bool:
    async with connect(process.address) as channel:
        return (await Notifications(channel).inbox()).parked == 1


async def test_lines_say_who_called_and_in_which_trace(
    databases: Databases, services: Services, tmp_path: Path
) -> None:
    services.environment |= {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    database = await databases.users()
    async with await psycopg.AsyncConnection.connect(database.url, autocommit=True) as connection:
        await connection.execute(_REFUSE)
    callers = Callers(tmp_path / "callers.toml")
    token = callers.add("crm", "*")
    users = await services.users(database, callers_file=callers.path).start()
    trace = secrets.token_hex(16)
    metadata = (("traceparent", f"00-{trace}-{secrets.token_hex(8)}-01"), ("authorization", f"Bearer {token}"))
    user = users_pb2.User(username="augusta", email="augusta@example.com")
    with pytest.raises(grpc.aio.AioRpcError):
        await stub_of(users).CreateUser(users_pb2.CreateUserRequest(user=user), metadata=metadata)
    assert await users.stop() == 0

    [said] = users.events("unexpected error in a call")
    assert (said["caller"], said["trace_id"], len(said["span_id"])) == ("crm", trace, 16)
    assert all(json.loads(line)["level"] for line in users.lines if line.startswith("{"))

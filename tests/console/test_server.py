"""What the console refuses, how it ends, and what it does not start as: over HTTP, without a browser."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from console.security import CONTENT_SECURITY_POLICY
from console.settings import ConsoleSettings
from servicekit.settings import InvalidSettingsError, load
from tests.harness import ServiceProcess, Services, free_port, until

_NOBODY = "01a21081-a95a-777c-a754-394a6b3c47fd"


@pytest.fixture
async def services() -> AsyncIterator[Services]:
    """Processes that need no database."""
    started = Services()
    yield started
    await started.stop()


@pytest.fixture(scope="module")
async def url() -> AsyncIterator[str]:
    """Of the module's console, which has no services behind it."""
    services = Services()
    yield (await _console(services))[1]
    await services.stop()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def _post(url: str, **headers: str | None) -> dict[str, Any]:
    """A change as the page asks for it, with other headers; None leaves one out."""
    given = {
        "Origin": url.rstrip("/"),
        "Sec-Fetch-Site": "same-origin",
        "X-Tidings-Console": "1",
        "Content-Type": "application/json",
    } | headers
    body = json.dumps({"ids": [_NOBODY], "reason": "a test"})
    return {"headers": {name: value for name, value in given.items() if value is not None}, "data": body}


async def test_every_answer_carries_the_policy(url: str, http: aiohttp.ClientSession) -> None:
    for path in ("", "static/main.js", "static/style.css", "api/notifications", "api/nothing", "healthz"):
        async with http.get(url + path) as answer:
            assert answer.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY, path
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            assert "Access-Control-Allow-Origin" not in answer.headers
    directives = dict(one.split(" ", 1) for one in CONTENT_SECURITY_POLICY.split("; "))
    assert directives.pop("default-src") == "'none'"
    assert not any("unsafe" in sources or "*" in sources or "http" in sources for sources in directives.values())


async def test_another_name_for_this_machine_is_refused(url: str, http: aiohttp.ClientSession) -> None:
    port = url.rstrip("/").rpartition(":")[2]
    for host, status in {
        f"rebound.example.com:{port}": 403,
        "": 403,
        f"localhost:{port}": 200,
        f"[::1]:{port}": 200,
        "127.0.0.1": 200,
    }.items():
        async with http.get(url, headers={"Host": host}) as answer:
            assert answer.status == status, host
    # A kubelet asks by an address that nobody knows before.
    async with http.get(f"{url}healthz", headers={"Host": "10.1.2.3:8081"}) as answer:
        assert (answer.status, await answer.text()) == (200, "ok")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.example.com"},
        {"Origin": "null"},
        {"Origin": None},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"X-Tidings-Console": None},
        {"Content-Type": "text/plain"},
    ],
    ids=str,
)
async def test_a_change_that_another_site_asks_for_is_refused(
    url: str, http: aiohttp.ClientSession, headers: dict[str, str | None]
) -> None:
    async with http.post(f"{url}api/deliveries/discard", **_post(url, **headers)) as answer:
        assert answer.status == 403
    # The same request of the page itself gets through to the service.
    async with http.post(f"{url}api/deliveries/discard", **_post(url)) as answer:
        assert answer.status != 403, await answer.text()
        assert (await answer.json())["error"]["code"] not in ("FORBIDDEN", "400")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        '{"ids": [], "reason": "x"}',
        '{"ids": ["x"], "reason": "x"}',
        f'{{"ids": ["{_NOBODY}"], "reason": " "}}',
        f'{{"ids": ["{_NOBODY}"]}}',
        f'{{"ids": ["{_NOBODY}"], "reason": "x", "filter": {{}}}}',
    ],
)
async def test_a_change_that_says_too_little_is_refused(url: str, http: aiohttp.ClientSession, body: str) -> None:
    async with http.post(f"{url}api/deliveries/replay", **(_post(url) | {"data": body})) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["message"]


async def test_a_body_without_end_is_not_read(url: str, http: aiohttp.ClientSession) -> None:
    async with http.post(f"{url}api/deliveries/replay", **(_post(url) | {"data": "x" * 100_000})) as answer:
        assert answer.status == 413


@pytest.mark.parametrize("query", ["limit=0", "limit=1000", "limit=x", "state=LOST"])
async def test_a_list_that_cannot_be_given_is_refused(url: str, http: aiohttp.ClientSession, query: str) -> None:
    async with http.get(f"{url}api/deliveries?{query}") as answer:
        assert answer.status == 400


async def test_without_its_services_the_console_serves_and_says_so(url: str, http: aiohttp.ClientSession) -> None:
    async def states() -> set[str]:
        status = (await _first_update(http, url))["status"]
        assert status["feed"] is None
        return {service["state"] for service in status["services"].values()}

    async def both_down() -> bool:
        return await states() == {"down"}

    await until(both_down, what="both services are said to be down")
    async with http.get(f"{url}api/deliveries") as answer:
        assert answer.status == 503
    async with http.get(f"{url}healthz") as answer:
        assert answer.status == 200


async def test_a_service_that_is_not_ready_says_why(services: Services, http: aiohttp.ClientSession) -> None:
    users = services.users(f"postgresql://nobody@127.0.0.1:{free_port()}/nothing")
    await users.launch()
    listening = await users.wait_log("listening")
    _, url = await _console(services, TIDINGS_CONSOLE_USERS_ADDRESS=listening["address"])

    async def reason() -> str:
        told = (await _first_update(http, url))["status"]["services"]["users"]
        return str(told["reason"]) if told["state"] == "not ready" else ""

    assert "schema" in await until(reason, what="the user service is said not to be ready")


async def test_open_pages_are_bounded_and_end_with_the_console(services: Services, http: aiohttp.ClientSession) -> None:
    console, url = await _console(services, TIDINGS_CONSOLE_MAX_BROWSERS="2")
    first, second = [await http.get(f"{url}api/live") for _ in range(2)]
    for stream in (first, second):
        await _until_event(stream, "update")
    async with http.get(f"{url}api/live") as third:
        await _until_event(third, "full")
        assert await third.content.read() is not None
    # One that is closed leaves its place to another, though nothing has happened meanwhile.
    first.close()

    async def has_place() -> bool:
        nonlocal first
        first = await http.get(f"{url}api/live")
        return b"event: config\n" in [await first.content.readline() for _ in range(3)]

    await until(has_place, what="a closed page has left its place")
    console.send(signal.SIGTERM)
    for stream in (first, second):
        # To its end, which is clean.
        await stream.content.read()
        stream.release()
    assert await console.wait() == 0
    assert console.events("stopped")
    assert not [line for line in console.lines if "graceful" in line or "Traceback" in line]


async def _console(services: Services, **environment: str) -> tuple[ServiceProcess, str]:
    nobody = f"127.0.0.1:{free_port()}"
    addresses = {"TIDINGS_CONSOLE_USERS_ADDRESS": nobody, "TIDINGS_CONSOLE_NOTIFICATIONS_ADDRESS": nobody}
    console = services.process(
        "console", "serve", environment={**addresses, **environment}, listen_variable="TIDINGS_CONSOLE_LISTEN"
    )
    await console.launch()
    return console, f"http://{await console.wait_serving()}/"


async def _until_event(stream: aiohttp.ClientResponse, name: str) -> dict[str, Any]:
    while (line := await stream.content.readline()) != f"event: {name}\n".encode():
        assert line, f"the stream ended before {name}"
    data = (await stream.content.readline()).removeprefix(b"data: ")
    found: dict[str, Any] = json.loads(data)
    return found


async def _first_update(http: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with http.get(f"{url}api/live") as stream:
        return await _until_event(stream, "update")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"LISTEN": "0.0.0.0:8080"}, "TIDINGS_CONSOLE_LISTEN: other machines reach 0.0.0.0:8080"),
        ({"LISTEN": "8080"}, "TIDINGS_CONSOLE_LISTEN: "),
        ({"OTLP_LISTEN": "0.0.0.0:4317"}, "TIDINGS_CONSOLE_OTLP_LISTEN: "),
        ({"JAEGER_URL": "javascript:alert(1)"}, "TIDINGS_CONSOLE_JAEGER_URL: "),
        ({"USERS_TOKEN_FILE": "/nowhere"}, "TIDINGS_CONSOLE_USERS_TOKEN_FILE: "),
        ({"LISTENS": "127.0.0.1:0"}, "TIDINGS_CONSOLE_LISTENS: no such setting"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_settings_are_refused_with_a_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"TIDINGS_CONSOLE_{name}", value)
    with pytest.raises(InvalidSettingsError) as refused:
        load(ConsoleSettings)
    [line] = str(refused.value).splitlines()
    assert line.startswith(said)


async def test_a_token_does_not_go_out_in_the_clear(services: Services, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("tidings_secret")
    console = services.process(
        "console",
        "serve",
        environment={"TIDINGS_CONSOLE_USERS_TOKEN_FILE": str(token), "TIDINGS_CONSOLE_USERS_ADDRESS": "10.0.0.1:50051"},
    )
    await console.launch()
    assert await console.wait() == 2
    assert console.lines == [
        "error: TIDINGS_CONSOLE_USERS_*: the token would go to 10.0.0.1:50051 in the clear: use TLS"
    ]


async def test_beyond_this_machine_it_starts_when_told_that_others_are_kept_out(
    services: Services, http: aiohttp.ClientSession
) -> None:
    console, _ = await _console(
        services,
        TIDINGS_CONSOLE_LISTEN="0.0.0.0:0",
        TIDINGS_CONSOLE_AUTHENTICATED_ELSEWHERE="true",
        TIDINGS_CONSOLE_HOSTS="console.example.com",
        TIDINGS_CONSOLE_HEALTH_LISTEN="127.0.0.1:0",
    )
    assert console.events("beyond this machine: something else must let only operators through")
    url = f"http://127.0.0.1:{console.address.rpartition(':')[2]}/"
    for host, status in {"console.example.com": 200, "other.example.com": 403}.items():
        async with http.get(url, headers={"Host": host}) as answer:
            assert answer.status == status
    # Health has an address of its own, which has nothing else.
    for path, status in {"healthz": 200, "": 404, "api/live": 404}.items():
        async with http.get(f"http://{console.health_address}/{path}") as answer:
            assert answer.status == status, path
    assert await console.stop() == 0

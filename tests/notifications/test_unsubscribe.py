"""Unsubscribe links as mail programs and people use them: real HTTP, a real database, and a real browser."""

from __future__ import annotations

import asyncio
import gzip
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from notification_service import categories, lanes, links, metrics, pages, rules, web
from notification_service.breaker import Breaker, Patience
from notification_service.channels.email import EmailChannel
from notification_service.compose import Composer
from notification_service.dispatcher import Lane
from notification_service.domain import EMAIL, State
from notification_service.inbox import Inbox
from notification_service.links import Links
from notification_service.retries import Policy
from notification_service.routes import Providers, Route
from notification_service.store import feed, reads
from notification_service.store import preferences as stored_preferences
from notification_service.store import suppressions as stored_suppressions
from notification_service.templates import Templates
from notification_service.unsubscribe import Switches
from servicekit import listening
from servicekit.database import Connection, Pool
from tests.harness import Database, Databases, MailCatcher, Services, free_port
from tests.notifications.conftest import SENDER, Events, MailServer, batch, dispatching, eventually, write
from tests.notifications.test_links import key
from tidings.users.v1 import users_pb2

ONE_CLICK = {"List-Unsubscribe": "One-Click"}
_PATH = "/mail"


@dataclass(frozen=True, slots=True)
class Site:
    """A server of links. `base` is where it listens, with the path of its public URL."""

    links: Links
    base: str
    server: web.Server
    session: aiohttp.ClientSession
    keys: Path
    composer: Composer

    def of(self, event: users_pb2.UserEvent, category: str = "account") -> str:
        """The link in a mail about an event."""
        url = self.links.url(uuid.UUID(event.user.id), category, event.user.email)
        return self.base + url.removeprefix(self.links.public_url)

    async def get(self, url: str, language: str = "") -> tuple[int, str]:
        """Status and text of an answer; every answer has the headers."""
        headers = {"Accept-Language": language} if language else {}
        async with self.session.get(url, headers=headers, allow_redirects=False) as answer:
            _check_headers(answer)
            return answer.status, await answer.text()

    async def post(self, url: str, data: Any = None, **options: Any) -> tuple[int, str, Mapping[str, str]]:
        """Status, text and headers of an answer."""
        async with self.session.post(url, data=data, allow_redirects=False, **options) as answer:
            _check_headers(answer)
            return answer.status, await answer.text(), answer.headers

    async def do(self, url: str, what: str) -> str:
        """Presses a button: the page that its reader is led to."""
        async with self.session.post(url, data={"do": what}) as answer:
            assert (answer.status, [one.status for one in answer.history], str(answer.url)) == (200, [303], url)
            return await answer.text()


def _check_headers(answer: aiohttp.ClientResponse) -> None:
    assert answer.headers["Content-Security-Policy"] == pages.CONTENT_SECURITY_POLICY
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["X-Robots-Tag"] == "noindex, nofollow"
    assert answer.headers["Connection"] == "close"
    assert "Set-Cookie" not in answer.headers
    assert "aiohttp" not in answer.headers["Server"].lower()


@asynccontextmanager
async def serving(pool: Pool, folder: Path, *, category_file: Path | None = None) -> AsyncIterator[Site]:
    keys = write(folder / "links.keys", key(1))
    known = categories.load(category_file)
    made = Links(f"https://notifications.example.com{_PATH}", links.load(keys), known)
    bound = listening.bound("127.0.0.1:0")
    assert bound is not None
    server = web.Server(web.application(made, Switches(pool, known), SENDER), bound, grace=5.0)
    running = asyncio.create_task(server.run())
    composer = Composer(rules.load(None), Templates(), lanes.writers(SENDER, ()), made.url)
    async with aiohttp.ClientSession() as session:
        yield Site(made, f"http://{listening.address_of(bound)}{_PATH}", server, session, keys, composer)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
async def site(pool: Pool, tmp_path: Path) -> AsyncIterator[Site]:
    async with serving(pool, tmp_path) as started:
        yield started


async def store(connection: Connection, composer: Composer, *made: users_pb2.UserEvent) -> None:
    await Inbox(composer, lambda: None).store(connection, await feed.read_cursor(connection), batch(*made))


async def document(connection: Connection, event: users_pb2.UserEvent) -> Mapping[str, Any]:
    return (await stored_preferences.find(connection, uuid.UUID(event.user.id))).document


def told(page: str) -> list[str]:
    """What a page says in its status, without markup."""
    status = page.partition('<div role="status">')[2].partition("</div>")[0]
    return re.findall("<p>(.*?)</p>", status)


def buttons(page: str) -> list[str]:
    return re.findall('<button name="do" value="([a-z-]+)">', page)


def counted(kind: str, outcome: str) -> int:
    return metrics.UNSUBSCRIBES.of(kind, outcome).value


async def test_one_click_switches_the_category_off(site: Site, connection: Connection, events: Events) -> None:
    event = events.created("ada")
    url, before = site.of(event), counted("one_click", "changed")
    assert (await site.post(url, ONE_CLICK))[:2] == (200, "Unsubscribed.\n")
    assert await document(connection, event) == {"categories": {"account": {"email": False}}}
    # Once more, as a form of the other kind, and by a program that leaves out what kind it is.
    form = aiohttp.FormData()
    form.add_field("List-Unsubscribe", "One-Click", content_type="text/plain")
    assert (await site.post(url, form, headers={"Accept-Language": "de"}))[:2] == (200, "Abbestellt.\n")
    assert (await site.post(url, b"List-Unsubscribe=One-Click", skip_auto_headers=["Content-Type"]))[0] == 200
    assert (await stored_preferences.find(connection, uuid.UUID(event.user.id))).version == 1
    assert counted("one_click", "changed") == before + 1
    assert counted("one_click", "unchanged") >= 2


async def test_to_look_changes_nothing(site: Site, connection: Connection, events: Events) -> None:
    event = events.created("ada")
    await store(connection, site.composer, event)
    for _ in range(2):
        status, page = await site.get(site.of(event))
        assert (status, buttons(page)) == (200, ["category-off", "all-off"])
        assert told(page) == ["Mail of the kind “account” is switched on."]
        assert event.user.email not in page
    async with site.session.head(site.of(event)) as answer:
        assert answer.status == 200
    assert (await stored_preferences.find(connection, uuid.UUID(event.user.id))).update_time is None
    assert await stored_suppressions.find(connection, channel="email", target=event.user.email) is None


async def test_a_category_is_switched_off_and_on_again(site: Site, connection: Connection, events: Events) -> None:
    event = events.created("ada")
    url = site.of(event)
    page = await site.do(url, "category-off")
    assert (told(page), buttons(page)) == (["Mail of the kind “account” is switched off."], ["category-on"])
    page = await site.do(url, "category-on")
    assert buttons(page) == ["category-off"]
    # As if it had never been off: what the user decides about all mail counts.
    assert await document(connection, event) == {}
    # Where that is not enough, it is switched on by a decision of its own.
    await stored_preferences.change(connection, uuid.UUID(event.user.id), {"channels": {"email": False}})
    assert buttons(await site.do(url, "category-off")) == ["category-on"]
    assert buttons(await site.do(url, "category-on")) == ["category-off"]
    wanted = {"channels": {"email": False}, "categories": {"account": {"email": True}}}
    assert await document(connection, event) == wanted


async def test_all_mail_is_switched_off_and_on_again(
    site: Site, pool: Pool, connection: Connection, events: Events, mail: MailServer
) -> None:
    ada, bob = events.created("Ada"), events.created("bob")
    moved = events.updated(ada.user, email="ada@new.example")
    before = counted("all", "changed"), counted("all_undone", "changed")
    await store(connection, site.composer, ada, bob)
    # Before a mail to the address is known, there is nothing that could be switched.
    stranger = site.base + site.links.url(uuid.UUID(ada.user.id), "account", "x@example.com").removeprefix(
        site.links.public_url
    )
    assert buttons((await site.get(stranger))[1]) == ["category-off"]
    assert (await site.post(stranger, {"do": "all-off"}))[0] == 409
    page = await site.do(site.of(ada), "all-off")
    assert (told(page), buttons(page)) == (
        [
            "All mail to this address is switched off.",
            "What cannot be switched off, such as mail about your security, still comes.",
        ],
        ["all-on"],
    )
    kept = await stored_suppressions.find(connection, channel="email", target="ada@example.com")
    assert kept is not None
    assert (kept.reason, kept.actor) == ("UNSUBSCRIBED", "unsubscribe link")
    assert kept.detail == "by the link in a mail of the category account"
    assert await site.do(site.of(ada), "all-off") == page
    # What the gate makes of it: the notice about the account is cancelled, that about its security is sent.
    await store(connection, site.composer, moved)
    async with sending(pool, mail.port):
        await eventually(lambda: done(connection, 4))
    found = [one.delivery for one in await reads.list_deliveries(connection, {}, 1 << 62, 10)][::-1]
    assert [(one.target, State(one.state).name, one.end_reason) for one in found[:2]] == [
        ("Ada@example.com", "CANCELLED", "SUPPRESSED"),
        ("bob@example.com", "DELIVERED", ""),
    ]
    security = {(one.target, State(one.state).name) for one in found[2:]}
    assert security == {("Ada@example.com", "DELIVERED"), ("ada@new.example", "DELIVERED")}
    sent = {one.recipient: one.message for one in mail.received}
    link = site.links.url(uuid.UUID(bob.user.id), "account", "bob@example.com")
    assert sent["bob@example.com"]["List-Unsubscribe"] == f"<{link}>"
    assert "List-Unsubscribe" not in sent["Ada@example.com"]
    assert buttons(await site.do(site.of(ada), "all-on")) == ["category-off", "all-off"]
    assert await stored_suppressions.find(connection, channel="email", target="ada@example.com") is None
    assert (counted("all", "changed"), counted("all_undone", "changed")) == (before[0] + 1, before[1] + 1)


@asynccontextmanager
async def sending(pool: Pool, port: int) -> AsyncIterator[None]:
    """Delivers mail, as the service does."""
    channel = EmailChannel("127.0.0.1", port, sender=SENDER, timeout=5.0)
    routes = Providers([Route("smtp", channel, Breaker(Patience(3, 0.05, 0.2)), 8)])
    policy = Policy(tries=3, base=0.01, factor=2.0, cap=0.05, timeout=5.0)
    async with dispatching(pool, {EMAIL: Lane(routes, policy, 8)}):
        yield


async def done(connection: Connection, count: int) -> bool:
    found = [one.delivery for one in await reads.list_deliveries(connection, {}, 1 << 62, 10)]
    return sum(State(one.state) in (State.DELIVERED, State.CANCELLED) for one in found) == count


async def test_an_address_that_bounced_stays_suppressed(site: Site, connection: Connection, events: Events) -> None:
    event = events.created("ada")
    await store(connection, site.composer, event)
    given = {"channel": "email", "target": event.user.email, "reason": "BOUNCED", "detail": "", "actor": "x"}
    await stored_suppressions.create(connection, **given)
    status, page = await site.get(site.of(event))
    assert (status, told(page), buttons(page)) == (200, ["No mail is sent to this address at present."], [])
    for what in ("all-off", "all-on"):
        await site.do(site.of(event), what)
        kept = await stored_suppressions.find(connection, channel="email", target=event.user.email)
        assert kept is not None
        assert kept.reason == "BOUNCED"


async def test_a_category_that_has_become_mandatory_cannot_be_switched_off(
    pool: Pool, connection: Connection, events: Events, tmp_path: Path
) -> None:
    event = events.created("ada")
    async with serving(pool, tmp_path) as before:
        link = before.of(event).removeprefix(before.base)
    file = write(tmp_path / "c.toml", '[[categories]]\nname = "account"\nmandatory = true\n')
    async with serving(pool, tmp_path, category_file=file) as site:
        await store(connection, before.composer, event)
        refused = counted("one_click", "refused")
        assert (await site.post(site.base + link, ONE_CLICK))[0] == 409
        assert counted("one_click", "refused") == refused + 1
        status, page = await site.get(site.base + link)
        assert (status, told(page)) == (200, ["Mail of the kind “account” cannot be switched off."])
        assert buttons(page) == ["all-off"]
    assert await document(connection, event) == {}


async def test_what_is_no_link_tells_nothing(site: Site, connection: Connection, events: Events) -> None:
    event = events.created("ada")
    url = site.of(event)
    forged = url[:-1] + ("A" if url[-1] != "A" else "B")
    pages_of = {
        await site.get(one) for one in (forged, f"{site.base}/u/x", f"{site.base}/u/", f"{site.base}/", f"{url}/x")
    }
    assert [(status, told(page), buttons(page)) for status, page in pages_of] == [
        (404, ["Part of it may be missing. Please open it once more from the mail."], [])
    ]
    status, page = await site.get(forged, "de")
    assert (status, told(page)) == (
        404,
        ["Vielleicht fehlt ein Teil davon. Bitte öffnen Sie ihn noch einmal aus der Nachricht."],
    )
    assert (await site.post(forged, ONE_CLICK))[0] == 404
    assert await document(connection, event) == {}


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"", "application/x-www-form-urlencoded", 400),
        (b"do=nothing", "application/x-www-form-urlencoded", 400),
        (b"do=One-Click", "application/x-www-form-urlencoded", 400),
        (b"&".join([b"a=b"] * 20), "application/x-www-form-urlencoded", 400),
        (b"\xff\xfe", "application/x-www-form-urlencoded", 400),
        (b"no parts", "multipart/form-data; boundary=x", 400),
        (b"--x\r\nContent-Disposition: nonsense; =\r\n\r\n\r\n--x--\r\n", "multipart/form-data; boundary=x", 400),
        (b"--x\r\n\r\n", "multipart/form-data", 400),
        (b"do=category-off&x=" + b"x" * 5000, "application/x-www-form-urlencoded", 413),
        (
            b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n' + b"x" * 9000 + b"\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
            413,
        ),
    ],
    ids=range(10),
)
@pytest.mark.filterwarnings("ignore::aiohttp.multipart.BadContentDispositionParam")
async def test_bodies_that_say_nothing(
    site: Site, connection: Connection, events: Events, body: bytes, content_type: str, status: int
) -> None:
    event = events.created("ada")
    assert (await site.post(site.of(event), body, headers={"Content-Type": content_type}))[0] == status
    assert await document(connection, event) == {}


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /mail/u/secret" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n",
        b"POST /mail/u/secret HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["nonsense", "tls", "long", "chunks"],
)
async def test_what_is_no_http_is_let_go_without_a_word(
    site: Site, sent: bytes, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    host, port = site.base.removeprefix("http://").partition("/")[0].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    writer.write_eof()
    assert b"200" not in await reader.read()
    writer.close()
    assert "secret" not in (said := "".join(capfd.readouterr()))
    assert "error" not in said.lower()
    assert caplog.records == []


async def test_what_is_packed_is_not_unpacked(site: Site, connection: Connection, events: Events) -> None:
    event, packed = events.created("ada"), gzip.compress(b"List-Unsubscribe=One-Click" + b"&" * 10_000_000)
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Content-Encoding": "gzip"}
    assert (await site.post(site.of(event), packed[:4000], headers=headers))[0] == 400
    assert (await site.post(site.of(event), gzip.compress(b"List-Unsubscribe=One-Click"), headers=headers))[0] == 400
    assert await document(connection, event) == {}


async def test_other_methods(site: Site, events: Events) -> None:
    async with site.session.put(site.of(events.created("ada"))) as answer:
        _check_headers(answer)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET,HEAD,POST")


@pytest.mark.parametrize(
    ("asked", "language"),
    [
        ("", "en"),
        ("de", "de"),
        ("de-AT, de;q=0.9, en;q=0.8", "de"),
        ("en-US,en;q=0.9,de;q=0.8", "en"),
        ("fr, de;q=0.5", "de"),
        ("fr", "en"),
        ("en;q=0.1, *;q=0.5", "de"),
        ("de;q=0", "en"),
        ("de;q=2, \0;;,=", "en"),
    ],
)
def test_languages(asked: str, language: str) -> None:
    assert pages.words(asked).language == language


async def test_a_category_is_text_wherever_it_stands(site: Site, events: Events) -> None:
    _, page = await site.get(site.of(events.created("ada"), "<b>{0}"), "de")
    assert told(page) == ["Nachrichten der Art „&lt;b&gt;{0}“ sind eingeschaltet."]
    assert '<html lang="de">' in page


async def test_others_change_the_preferences_at_the_same_time(
    site: Site, pool: Pool, connection: Connection, events: Events
) -> None:
    event = events.created("ada")
    user = uuid.UUID(event.user.id)
    names = [f"kind-{number}" for number in range(12)]

    async def elsewhere(number: int) -> None:
        async with pool.connection() as mine:
            await stored_preferences.change(mine, user, {"channels": {"webhook": bool(number % 2)}})

    clicks = [site.post(site.of(event, name), ONE_CLICK) for name in names]
    others = asyncio.gather(*(elsewhere(number) for number in range(6)))
    answers = await asyncio.gather(*clicks)
    await others
    assert {status for status, *_ in answers} == {200}
    stored = await stored_preferences.find(connection, user)
    assert stored.document["categories"] == {name: {"email": False} for name in names}
    assert "webhook" in stored.document["channels"]
    assert stored.version == 18


async def test_keys_are_read_again(site: Site, events: Events) -> None:
    following = asyncio.create_task(site.links.keys.follow(0.01))
    try:
        old = site.of(events.created("ada"))
        write(site.keys, f"{key(2)}\n{key(1)}\n")
        await eventually(lambda: len(site.links.keys.value) == 2)
        new = site.of(events.created("bob"))
        assert [(await site.get(url))[0] for url in (old, new)] == [200, 200]
        write(site.keys, key(2))
        await eventually(lambda: len(site.links.keys.value) == 1)
        assert [(await site.get(url))[0] for url in (old, new)] == [404, 200]
    finally:
        following.cancel()


async def test_a_database_that_is_away(
    notifications_database: Database, pool: Pool, connection: Connection, site: Site, events: Events
) -> None:
    url = site.of(events.created("ada"))
    failed = counted("category", "failed")
    await pool.close()
    assert (await site.get(url))[0] == 503
    status, page, headers = await site.post(url, {"do": "category-off"})
    assert (status, headers["Retry-After"], told(page)) == (503, "10", ["Please try again in a minute."])
    assert counted("category", "failed") == failed + 1


async def test_a_client_that_says_nothing_is_let_go(
    site: Site, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_LONGEST", 0.05)
    host, port = site.base.removeprefix("http://").partition("/")[0].split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET / HTTP/1.1\r\nHost:")
    async with asyncio.timeout(10):
        assert await reader.read() == b""
    writer.close()
    monkeypatch.setattr(web, "_LONGEST", 20.0)
    monkeypatch.setattr(web, "_MOST_CONNECTIONS", 0)
    with pytest.raises(aiohttp.ClientError):
        await site.get(site.of(events.created("ada")))


async def test_what_runs_is_answered_before_the_end(site: Site, connection: Connection, events: Events) -> None:
    event = events.created("ada")
    user = uuid.UUID(event.user.id)
    await stored_preferences.change(connection, user, {"channels": {"email": True}})
    async with connection.transaction():
        await connection.execute("SELECT 1 FROM preferences WHERE user_id = %s FOR UPDATE", (user,))
        asked = asyncio.create_task(site.post(site.of(event), ONE_CLICK))
        await eventually(lambda: waits(connection))
        draining = asyncio.create_task(site.server.drain())
        await asyncio.sleep(0.1)
        assert not draining.done()
    assert (await asked)[0] == 200
    await draining
    with pytest.raises(aiohttp.ClientConnectorError):
        await site.get(site.of(event))


async def waits(connection: Connection) -> bool:
    [(count,)] = await (
        await connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    ).fetchall()
    return bool(count)


async def test_the_way_of_a_link(
    databases: Databases, services: Services, mail_catcher: MailCatcher, tmp_path: Path
) -> None:
    port = free_port()
    users = await services.users(await databases.users()).start()
    settings = {
        "public_url": f"http://127.0.0.1:{port}",
        "link_keys_file": str(write(tmp_path / "links.keys", key(1))),
        "http_listen": f"127.0.0.1:{port}",
    }
    database = await databases.notifications()
    process = await services.notifications(database, users, mail_catcher, **settings).start()
    await process.wait_log("serving unsubscribe links", address=f"127.0.0.1:{port}")
    from tidings.client import Users, connect

    async with connect(users.address) as channel:
        await Users(channel).create({"username": "ada", "email": "ada@example.com"})
    [caught] = await mail_catcher.wait(1)
    assert caught.message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    link = caught.message["List-Unsubscribe"].removeprefix("<").removesuffix(">")
    html = caught.message.get_body(("html",))
    assert html is not None
    assert f'href="{link}"' in html.get_content()
    async with aiohttp.ClientSession() as session:
        async with session.post(link, data=ONE_CLICK) as answer:
            assert answer.status == 200
        async with session.get(link) as answer:
            assert buttons(await answer.text()) == ["category-on", "all-off"]
    # A second one on the port ends at once, and says why.
    second = services.notifications(await databases.notifications(), users, mail_catcher, **settings)
    await second.launch()
    assert await second.wait() == 1
    [said] = second.events("address is taken or not allowed")
    assert said["address"] == f"127.0.0.1:{port}"
    assert await process.stop() == 0


async def test_a_service_that_cannot_sign_does_not_start(services: Services, tmp_path: Path) -> None:
    url = "TIDINGS_NOTIFICATIONS_PUBLIC_URL"
    bad = write(tmp_path / "links.keys", "short")
    cases = {
        f"error: {url}: needs TIDINGS_NOTIFICATIONS_LINK_KEYS_FILE: the links are signed": {},
        f"error: {bad}: line 1: must be base64 of at least 32 bytes": {"link_keys_file": bad},
        "error: TIDINGS_NOTIFICATIONS_HTTP_LISTEN: Value error, must be HOST:PORT": {
            "link_keys_file": write(tmp_path / "good.keys", key(1)),
            "http_listen": "8090",
        },
    }
    started = [
        services.notifications(
            "postgresql:///x", "127.0.0.1:1", public_url="https://notifications.example.com", **given
        )
        for given in cases.values()
    ]
    await asyncio.gather(*(one.launch() for one in started))
    assert [await one.wait() for one in started] == [2, 2, 2]
    assert [one.lines for one in started] == [[line] for line in cases]

"""Templates: languages, versions, reloads, what bounds them, and the API over a real gRPC connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import psutil  # type: ignore[import-untyped]
import pytest

from notification_service import lanes, rules, template_reload
from notification_service.api.templates import TemplateService
from notification_service.channels.email import EmailChannel
from notification_service.compose import Composer
from notification_service.inbox import Inbox
from notification_service.store import feed, reads
from notification_service.template_process import Bounds
from notification_service.templates import Asked, Need, RenderError, Templates
from servicekit import callers, guard
from servicekit.configfile import InvalidConfigError
from servicekit.database import Connection
from tests.notifications.conftest import SENDER, Events, MailServer, batch, write
from tidings.client import ApiError
from tidings.client import Templates as Client
from tidings.notifications.v1 import notifications_pb2, templates_pb2_grpc

NEED = [Need("r", "t", html=True)]


def put(
    folder: Path, locale: str = "", parts: tuple[str, ...] = ("subject.txt", "txt", "html"), text: str = ""
) -> None:
    for part in parts:
        write(folder / ".".join(filter(None, ("t", locale, part))), text or f"{locale or 'all'} {part}")


@pytest.mark.parametrize(
    ("locale", "used", "subject"),
    [
        ("", "", "all subject.txt"),
        ("fr", "", "all subject.txt"),
        ("de", "de", "de subject.txt"),
        ("DE-at", "de-AT", "de-AT subject.txt"),
        ("de_CH", "de", "de subject.txt"),
        ("nl", "", "all subject.txt"),
    ],
)
def test_a_notification_is_said_in_one_language(tmp_path: Path, locale: str, used: str, subject: str) -> None:
    put(tmp_path)
    put(tmp_path, "de")
    put(tmp_path, "de-AT", ("subject.txt",))
    put(tmp_path, "nl", ("subject.txt", "txt"))
    said = Templates(tmp_path).render("t", {}, locale=locale, html=True)
    assert (said.locale, said.subject) == (used, subject)
    language = used[:2] or "all"
    assert (said.text, said.html) == (f"{language} txt\n", f"{language} html")


def test_a_language_without_html_will_do_where_none_is_needed(tmp_path: Path) -> None:
    put(tmp_path)
    put(tmp_path, "nl", ("subject.txt", "txt"))
    assert Templates(tmp_path).render("t", {}, locale="nl", html=False).locale == "nl"


def test_built_in_translations_are_not_mixed_with_an_operators_text(tmp_path: Path) -> None:
    assert Templates().current.locale("welcome", "de-AT", html=True) == "de"
    write(tmp_path / "welcome.txt", "mine")
    assert Templates(tmp_path).current.locale("welcome", "de-AT", html=True) == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
        ("{{ 10 ** (10 ** 9) }}", "processor time"),
        ("{{ name * 10 ** 9 }}", "takes more than 96 MiB of memory"),
        ("{{ name.center(10 ** 9) }}", "takes more than 96 MiB of memory"),
        ("{{ '%1000000000s' % name }}", "takes more than 96 MiB of memory"),
        ("{{ '{:>1000000000}'.format(name) }}", "takes more than 96 MiB of memory"),
        ("{{ name | center(2000000) }}", "becomes larger than 1,048,576 bytes"),
        ("{% for a in range(99999) %}{{ name * 99 }}{% endfor %}", "becomes larger than 1,048,576 bytes"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    ],
)
def test_what_never_ends_or_is_too_much_is_one_notifications_matter(tmp_path: Path, text: str, says: str) -> None:
    put(tmp_path)
    write(tmp_path / "t.txt", text)
    templates = Templates(tmp_path, Bounds(seconds=0.3))
    with pytest.raises(RenderError, match=says):
        templates.render("t", {"name": "Ada"}, html=False)
    write(tmp_path / "t.txt", "well")
    assert templates.reload(NEED)
    assert templates.render("t", {"name": "Ada"}, html=False).text == "well\n"


def test_a_template_that_always_takes_too_long_is_let_alone(tmp_path: Path) -> None:
    put(tmp_path)
    write(tmp_path / "t.txt", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    templates = Templates(tmp_path, Bounds(seconds=0.05))
    for _ in range(3):
        with pytest.raises(RenderError, match="processor time"):
            templates.render("t", {}, html=False)
    with pytest.raises(RenderError, match="not tried, for it took too long 3 times in a row"):
        templates.render("t", {}, html=False)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def names(*given: str, template: str = "t") -> list[Asked]:
    return [Asked(template, {"name": name}, html=False) for name in given]


def test_what_cannot_be_rendered_costs_none_of_the_others(tmp_path: Path) -> None:
    put(tmp_path)
    write(tmp_path / "t.txt", "{% if name == 'loop' %}" + LOOP + "{% endif %}{{ 1 / (name != 'zero') }} {{ name }}")
    templates = Templates(tmp_path, Bounds(seconds=0.3))
    asked = [*names("a", "zero", "b", "loop", "c"), Asked("absent", {}, html=False), *names("d", "loop")]
    said = templates.current.render_all(asked)
    texts = [str(one) if isinstance(one, RenderError) else one.text for one in said]
    assert (texts[0], texts[2], texts[4], texts[6]) == ("1.0 a\n", "1.0 b\n", "1.0 c\n", "1.0 d\n")
    assert "ZeroDivisionError" in texts[1]
    assert texts[3] == texts[7] == "template t: takes more than 0.3 s of processor time"
    assert texts[5] == "template absent.subject.txt is missing"


def test_a_template_that_takes_too_long_is_let_alone_among_others(tmp_path: Path) -> None:
    put(tmp_path)
    write(tmp_path / "t.txt", LOOP)
    for part in ("subject.txt", "txt"):
        write(tmp_path / f"u.{part}", "well")
    templates = Templates(tmp_path, Bounds(seconds=0.05))
    said = templates.current.render_all(names("a", "b", "c", "d", "e") + names("f", template="u"))
    texts = [str(one) if isinstance(one, RenderError) else one.text for one in said]
    assert [("processor time" in text, "not tried" in text) for text in texts[:5]] == [(True, False)] * 3 + [
        (False, True)
    ] * 2
    assert texts[5] == "well\n"


def test_much_is_rendered_at_once_in_little_memory(tmp_path: Path) -> None:
    put(tmp_path)
    write(tmp_path / "t.txt", "{{ name * 500000 }}")
    said = Templates(tmp_path).current.render_all(names(*map(str, range(300))))
    for number, one in enumerate(said):
        text = str(number) * 500_000
        assert isinstance(one, RenderError) == (len(text) > 1 << 20)
        assert isinstance(one, RenderError) or one.text == text + "\n"


def test_a_process_that_was_killed_is_replaced(tmp_path: Path) -> None:
    put(tmp_path)
    write(tmp_path / "t.txt", "{{ name }}")
    current = Templates(tmp_path).current
    before = set(psutil.Process().children())
    current.render_all(names("a"))
    [worker] = set(psutil.Process().children()) - before
    worker.kill()
    worker.wait()
    said = current.render_all(names("b", "c"))
    assert [one.text for one in said if not isinstance(one, RenderError)] == ["b\n", "c\n"]


def test_a_mounted_folder_is_swapped_as_a_whole(tmp_path: Path) -> None:
    """As Kubernetes mounts a ConfigMap."""
    for name, text in (("..one", "one"), ("..two", "two"), ("..bad", "{% if %}")):
        (tmp_path / name).mkdir()
        put(tmp_path / name, text=text)
    (tmp_path / "..data").symlink_to("..one")
    for part in ("subject.txt", "txt", "html"):
        (tmp_path / f"t.{part}").symlink_to(f"..data/t.{part}")

    def swap(to: str) -> None:
        (tmp_path / "..tmp").symlink_to(to)
        (tmp_path / "..tmp").replace(tmp_path / "..data")

    templates = Templates(tmp_path)
    first = templates.current.version
    assert not templates.reload(NEED)
    swap("..bad")
    with pytest.raises(InvalidConfigError, match=r"rule 'r': template t\.html, line 1: "):
        templates.reload(NEED)
    assert len(templates.refused.splitlines()) == 3
    assert templates.render("t", {}, html=True).version == first
    swap("..two")
    assert templates.reload(NEED)
    assert templates.refused == ""
    said = templates.render("t", {}, html=True)
    assert (said.html, said.version != first) == ("two", True)


def test_what_a_template_is_made_of_is_checked(tmp_path: Path) -> None:
    put(tmp_path, text='{% include "absent.txt" %}{% include "maybe.txt" ignore missing %}')
    (tmp_path / "t.de.txt").write_bytes(b"\xff")
    with pytest.raises(InvalidConfigError) as caught:
        Templates(tmp_path).check(NEED)
    assert "template t.de.txt is not UTF-8" in str(caught.value)
    assert "template t.txt, line 1: absent.txt is missing" in str(caught.value)
    assert "maybe" not in str(caught.value)


def test_the_reason_is_that_of_the_files_there_are_now(tmp_path: Path) -> None:
    put(tmp_path)
    templates = Templates(tmp_path)
    write(tmp_path / "t.txt", "{% if %}")
    with pytest.raises(InvalidConfigError, match=r"template t\.txt, line 1"):
        templates.reload(NEED, again=False)
    for number in range(33):
        (tmp_path / f"large{number}.txt").write_bytes(b" " * (256 << 10))
    with pytest.raises(InvalidConfigError, match="8 MiB of templates"):
        templates.reload(NEED, again=False)
    for number in range(33):
        (tmp_path / f"large{number}.txt").unlink()
    with pytest.raises(InvalidConfigError, match=r"template t\.txt, line 1"):
        templates.reload(NEED, again=False)
    assert "line 1" in templates.refused


async def test_changed_files_are_followed(tmp_path: Path) -> None:
    put(tmp_path)
    templates = Templates(tmp_path)
    first = templates.current.version
    following = asyncio.create_task(template_reload.follow(templates, lambda: NEED, interval=0.01))

    async def until(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not holds():
                assert not following.done()
                await asyncio.sleep(0.01)

    try:
        write(tmp_path / "t.txt", "{% if %}")
        await until(lambda: templates.refused != "")
        assert templates.current.version == first
        write(tmp_path / "t.txt", "anew")
        await until(lambda: templates.current.version != first)
        assert templates.refused == ""
        assert templates.render("t", {}, html=False).text == "anew\n"
        tmp_path.rename(tmp_path.with_name("away"))
        await until(lambda: templates.refused != "")
        tmp_path.with_name("away").rename(tmp_path)
        await until(lambda: templates.refused == "")
    finally:
        following.cancel()
        await asyncio.wait([following])
    assert following.cancelled()


async def test_a_notification_remembers_version_and_locale(
    connection: Connection, composer: Composer, events: Events
) -> None:
    made = batch(events.created("ada", locale="de-AT"), events.created("bob"))
    await Inbox(composer, lambda: None).store(connection, await feed.read_cursor(connection), made)
    bob, ada = await reads.list_notifications(connection, {}, 1 << 62, 10)
    version = composer.templates.current.version
    assert (ada.template_version, ada.locale, bob.template_version, bob.locale) == (version, "de", version, "")
    assert ada.subject == "Willkommen, ada"


@dataclass
class Api:
    client: Client
    folder: Path


@pytest.fixture
async def api(mail: MailServer, tmp_path: Path) -> AsyncIterator[Api]:
    composer = Composer(rules.load(None), Templates(tmp_path), lanes.writers(SENDER, ()))
    email = EmailChannel("127.0.0.1", mail.port, sender=SENDER, timeout=5.0)
    server = grpc.aio.server()
    guard.add(
        server,
        callers.anyone,
        templates_pb2_grpc.add_TemplateServiceServicer_to_server,
        TemplateService(composer, email, SENDER, send_timeout=5.0),
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Api(Client(channel), tmp_path)
    await server.stop(1.0)
    await email.close()


async def test_list(api: Api) -> None:
    found = {one.name: one async for one in api.client.list(page_size=2)}
    assert list(found) == ["announcement", "digest", "email-changed", "goodbye", "welcome"]
    assert [one.locale for one in found["welcome"].translations] == ["", "de"]
    assert list(found["welcome"].translations[1].parts) == ["subject", "text", "html"]
    assert list(found["welcome"].rules) == ["welcome"]


async def test_preview_of_what_is_sent(api: Api) -> None:
    sample: dict[str, object] = {"params": {"subject": "Rain", "text": "Today.\n\n<b>All</b> day."}}
    said = await api.client.preview("announcement", sample={**sample, "user": {"locale": "de"}})
    assert (said.subject, said.text) == ("Rain", "Guten Tag Ada Lovelace,\n\nToday.\n\n<b>All</b> day.\n")
    assert "<p>Today.</p>" in said.html
    assert "<p>&lt;b&gt;All&lt;/b&gt; day.</p>" in said.html
    for wrong, field in (
        ({"event": {}, **sample}, "sample.event"),
        ({"params": "Rain"}, "sample.params"),
        ({"recipient": "previous", **sample}, "sample.recipient"),
    ):
        with pytest.raises(ApiError) as caught:
            await api.client.preview("announcement", sample=wrong)
        assert [one.field for one in caught.value.violations] == [field]
    for template, given in (("announcement", {}), ("welcome", sample)):
        with pytest.raises(ApiError, match="is undefined"):
            await api.client.preview(template, sample=given)


async def test_preview(api: Api) -> None:
    sample = {"user": {"display_name": "<Ada>", "locale": "de"}, "event": {"time": "2026-02-03T04:05:06Z"}}
    said = await api.client.preview("welcome", sample=sample)
    assert (said.subject, said.locale) == ("Willkommen, <Ada>", "de")
    assert "&lt;Ada&gt;" in said.html
    assert "2026-02-03 04:05 UTC" in said.text
    assert "Abbestellen" not in said.html
    linked = await api.client.preview("welcome", sample={**sample, "unsubscribe_url": "https://example.com/?a=1&b"})
    assert '<a href="https://example.com/?a=1&amp;b" style="color:inherit">Abbestellen</a>' in linked.html
    assert (await api.client.preview("welcome", locale="fr", sample=sample)).subject == "Welcome, <Ada>"


async def test_a_preview_that_cannot_be_had(api: Api) -> None:
    with pytest.raises(ApiError, match="no such template"):
        await api.client.preview("absent")
    with pytest.raises(ApiError) as caught:
        await api.client.preview("welcome", sample={"user": {"colour": "red"}, "recipient": "who"})
    assert [one.field for one in caught.value.violations] == ["sample.recipient", "sample.user.colour"]
    with pytest.raises(ApiError, match="must be a text"):
        await api.client.preview("welcome", sample={"unsubscribe_url": 1})
    write(api.folder / "welcome.txt", "one\n{{ user.labels.tier }}")
    await api.client.reload()
    with pytest.raises(ApiError) as caught:
        await api.client.preview("welcome")
    assert caught.value.reason == "TEMPLATE_FAILED"
    assert caught.value.message.startswith("template welcome.txt, line 2: ")


async def test_send_test(api: Api, mail: MailServer) -> None:
    sent = await api.client.send_test("goodbye", "grace@example.com", locale="de")
    assert (sent.outcome, sent.code) == (notifications_pb2.Delivery.Attempt.SUCCEEDED, 250)
    (got,) = mail.received
    assert got.recipient == "grace@example.com"
    assert got.message["Subject"] == sent.subject == "[Test] Auf Wiedersehen, Ada Lovelace"
    assert got.message["Message-ID"] == sent.message_id
    mail.answers["no@example.com"] = ["550 5.1.1 nobody"]
    refused = await api.client.send_test("goodbye", "no@example.com")
    assert (refused.outcome, refused.code) == (notifications_pb2.Delivery.Attempt.REFUSED, 550)
    with pytest.raises(ApiError, match="must be an email address"):
        await api.client.send_test("goodbye", "a@b\r\nBcc: c@d")


async def test_reload(api: Api) -> None:
    write(api.folder / "welcome.txt", "{% if %}")
    with pytest.raises(ApiError) as caught:
        await api.client.reload()
    assert caught.value.reason == "TEMPLATES_REFUSED"
    assert "rule 'welcome': template welcome.txt, line 1: " in caught.value.message
    write(api.folder / "welcome.txt", "anew")
    changed = await api.client.reload()
    assert changed.changed
    assert (await api.client.preview("welcome")).text == "anew\n"

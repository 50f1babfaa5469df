"""Unsubscribe links: tokens that are not to be forged, keys that are changed, and the headers of mails."""

from __future__ import annotations

import base64
import re
import string
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from email import message_from_bytes, policy
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from notification_service import categories, lanes, links, rules
from notification_service.channels import Message
from notification_service.channels.email import Mail, build
from notification_service.compose import Composer, no_link
from notification_service.links import Links
from notification_service.settings import NotificationServiceSettings
from notification_service.templates import Templates
from servicekit.configfile import InvalidConfigError
from servicekit.settings import InvalidSettingsError, load
from tests.notifications.conftest import SENDER, Events, write

URL = "https://notifications.example.com"
USER = uuid.UUID("0194787f-edbf-70d8-b96f-0311b82b0a8b")
ADDRESS = "ada@example.com"
_LONGEST = "c" * 63


def key(number: int) -> str:
    return base64.b64encode(bytes([number]) * 32).decode()


def made(path: Path, *keys: str, url: str = URL) -> Links:
    file = write(path / "links.keys", "\n".join(keys) + "\n")
    return Links(url, links.load(file), categories.load(None))


def token(made: Links, category: str = "account", user: uuid.UUID = USER, address: str = ADDRESS) -> str:
    return made.url(user, category, address).removeprefix(f"{URL}/u/")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Links:
    return made(tmp_path_factory.mktemp("links"), key(1))


@given(
    user=st.uuids(),
    category=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True),
    address=st.emails(),
)
def test_a_link_says_whose_mail_it_is(ours: Links, user: uuid.UUID, category: str, address: str) -> None:
    assume(category != "security")
    text = token(ours, category, user, address)
    assert re.fullmatch("[A-Za-z0-9_-]{20,149}", text)
    assert token(ours, category, user, address) == text
    claim = ours.read(text)
    assert claim is not None
    assert (claim.user_id, claim.category, claim.channel) == (user, category, "email")
    assert claim.is_of(address)
    assert claim.is_of(address.upper().lower())
    assert not claim.is_of(f"x{address}")


def test_no_address_can_be_read_or_found_by_trying(ours: Links, tmp_path: Path) -> None:
    text = token(ours, _LONGEST)
    assert len(text) < 150
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    assert b"ada" not in raw
    # With another key the same address is another hash.
    other = made(tmp_path, key(2)).read(token(made(tmp_path, key(2)), _LONGEST))
    claim = ours.read(text)
    assert claim is not None
    assert other is not None
    assert claim.address_hash != other.address_hash


@given(data=st.data())
def test_what_was_changed_does_not_verify(ours: Links, data: st.DataObject) -> None:
    text = token(ours, data.draw(st.sampled_from(["a", "account", "news-2", _LONGEST])))
    place = data.draw(st.integers(0, len(text)))
    way = data.draw(st.sampled_from(["replace", "insert", "remove", "cut"]))
    other = data.draw(st.characters(codec="utf-8") | st.sampled_from("=-_+/AZaz09 "))
    changed = {
        "replace": text[:place] + other + text[place + 1 :],
        "insert": text[:place] + other + text[place:],
        "remove": text[:place] + text[place + 1 :],
        "cut": text[:place],
    }[way]
    assume(changed != text)
    assert ours.read(changed) is None


@pytest.mark.parametrize("category", ["a", "ab", "abc"])
def test_there_is_one_way_to_write_a_token(ours: Links, category: str) -> None:
    """Of the last letter some bits say nothing."""
    text = token(ours, category)
    letters = string.ascii_letters + string.digits + "-_"
    assert [one for one in letters if ours.read(text[:-1] + one)] == [text[-1]]
    assert ours.read(text + "=") is None


@given(raw=st.binary(max_size=200))
def test_what_nobody_signed_does_not_verify(ours: Links, raw: bytes) -> None:
    assert ours.read(base64.urlsafe_b64encode(raw).rstrip(b"=").decode()) is None


def test_a_signed_token_of_another_version_is_none_of_ours(ours: Links) -> None:
    raw = base64.urlsafe_b64decode(token(ours) + "==")
    for number, wrong in ((0, 2), (1, 9)):
        payload = bytearray(raw[:-16])
        payload[number] = wrong
        signed = bytes(payload) + ours.keys.value[0].sign(bytes(payload))
        assert ours.read(base64.urlsafe_b64encode(signed).rstrip(b"=").decode()) is None
    short = raw[:26]
    signed = short + ours.keys.value[0].sign(short)
    assert ours.read(base64.urlsafe_b64encode(signed).rstrip(b"=").decode()) is None


def test_keys_are_changed_one_after_the_other(tmp_path: Path) -> None:
    old, both, new = (made(tmp_path, *map(key, numbers)) for numbers in ((1,), (2, 1), (2,)))
    before, after = token(old), token(both)
    assert before != after == token(new)
    for reader, text, reads in (
        (old, before, True), (old, after, False), (both, before, True), (both, after, True), (new, before, False),
    ):  # fmt: skip
        claim = reader.read(text)
        assert (claim is not None) is reads
        assert claim is None or claim.is_of(ADDRESS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key: one a line, such as `openssl rand -base64 32` makes"),
        (f"{key(1)}\n\nnot base64!\n", "line 3: must be base64 of at least 32 bytes"),
        (base64.b64encode(b"short").decode(), "line 1: must be base64 of at least 32 bytes"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "links.keys", text)
    with pytest.raises(InvalidConfigError) as caught:
        links.load(path)
    assert str(caught.value) == f"{path}: {message}"


def _settings(monkeypatch: pytest.MonkeyPatch, given: Mapping[str, str]) -> NotificationServiceSettings:
    for name, value in {"DATABASE_URL": "postgresql:///x", **given}.items():
        monkeypatch.setenv(f"TIDINGS_NOTIFICATIONS_{name}", value)
    return load(NotificationServiceSettings)


def test_a_public_url_needs_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettingsError) as caught:
        _settings(monkeypatch, {"PUBLIC_URL": URL})
    assert str(caught.value) == (
        "TIDINGS_NOTIFICATIONS_PUBLIC_URL: needs TIDINGS_NOTIFICATIONS_LINK_KEYS_FILE: the links are signed"
    )


@pytest.mark.parametrize(
    ("url", "taken"),
    [
        (URL, URL),
        (f"{URL}/mail/", f"{URL}/mail"),
        ("http://127.0.0.1:8090", "http://127.0.0.1:8090"),
        ("http://[::1]:8090", "http://[::1]:8090"),
        ("http://localhost:8090", "http://localhost:8090"),
    ],
)
def test_public_urls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, taken: str) -> None:
    file = write(tmp_path / "links.keys", key(1))
    settings = _settings(monkeypatch, {"PUBLIC_URL": url, "LINK_KEYS_FILE": str(file)})
    assert settings.public_url == taken
    found = links.read(settings, categories.load(None))
    assert found is not None
    assert found.url(USER, "account", ADDRESS).startswith(f"{taken}/u/")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com", "must begin with https://"),
        ("notifications.example.com", "must be such as https://"),
        ("https://me@example.com", "must be such as https://"),
        ("https://example.com/?a=b", "must be such as https://"),
        ("https://exämple.com", "must be such as https://"),
        ("https://example.com/a>b", "must be such as https://"),
        (f"https://example.com/{'a' * 300}", "must be such as https://"),
    ],
)
def test_public_urls_that_mails_cannot_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, message: str
) -> None:
    file = write(tmp_path / "links.keys", key(1))
    with pytest.raises(InvalidSettingsError) as caught:
        _settings(monkeypatch, {"PUBLIC_URL": url, "LINK_KEYS_FILE": str(file)})
    assert f"TIDINGS_NOTIFICATIONS_PUBLIC_URL: Value error, {message}" in str(caught.value)


@pytest.fixture
def composer(ours: Links) -> Composer:
    return Composer(rules.load(None), Templates(), lanes.writers(SENDER, ()), ours.url)


def test_mails_that_can_be_switched_off_have_a_link(composer: Composer, ours: Links, events: Events) -> None:
    event = events.created("ada", locale="de-AT")
    (notification,) = composer.compose([event])
    assert composer.compose([event]) == [notification]
    (delivery,) = notification.deliveries
    mail = Mail.decode(delivery.content)
    assert mail.unsubscribe_url == ours.url(uuid.UUID(event.user.id), "account", ADDRESS)
    assert f'<a href="{mail.unsubscribe_url}" style="color:inherit">Abbestellen</a>' in mail.html
    (english,) = composer.compose([events.created("bob")])
    assert ">Unsubscribe</a>" in Mail.decode(english.deliveries[0].content).html
    # As what is sent: every attempt has the same.
    message = Message(ADDRESS, delivery.idempotency_key, delivery.content, datetime.now(UTC))
    sent = build(message, SENDER, ADDRESS)
    assert build(message, SENDER, ADDRESS) == sent
    head = sent.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    assert f"List-Unsubscribe: <{mail.unsubscribe_url}>" in head
    assert "List-Unsubscribe-Post: List-Unsubscribe=One-Click" in head
    parsed = message_from_bytes(sent, policy=policy.default)
    assert parsed.get_all("List-Unsubscribe") == [f"<{mail.unsubscribe_url}>"]
    assert not parsed.defects


def test_mandatory_mails_have_none(composer: Composer, events: Events) -> None:
    (notification,) = composer.compose([events.updated(events.user("ada"), email="ada@new.example")])
    assert notification.category == "security"
    for delivery in notification.deliveries:
        mail = Mail.decode(delivery.content)
        assert (mail.unsubscribe_url, "Unsubscribe" in mail.html) == ("", False)
        message = Message(ADDRESS, delivery.idempotency_key, delivery.content, datetime.now(UTC))
        assert b"List-Unsubscribe" not in build(message, SENDER, ADDRESS)


def test_without_a_public_url_the_content_is_as_it_was(composer: Composer, events: Events) -> None:
    event = events.created("ada")
    (notification,) = replace(composer, unsubscribe=no_link).compose([event])
    content = notification.deliveries[0].content
    # A replica of the release before this reads it.
    assert b"unsubscribe" not in content.lower()
    # And one of this release reads what a later one has put in besides.
    assert Mail.decode(content[:-1] + b', "more": [1]}') == Mail.decode(content)


def test_each_address_has_a_link_of_its_own_and_the_app_none(ours: Links, events: Events, tmp_path: Path) -> None:
    write(tmp_path / "n.subject.txt", "n")
    write(tmp_path / "n.txt", "text {{ unsubscribe_url }}")
    write(tmp_path / "n.html", "{{ unsubscribe_url }}")
    text = (
        '[[rules]]\nname = "n"\non = ["UPDATED"]\ntemplate = "n"\ncategory = "news"\n'
        'channels = ["email", "in_app"]\nrecipients = ["current", "previous"]\n'
    )
    composer = Composer(
        rules.load(write(tmp_path / "r.toml", text)), Templates(tmp_path), lanes.writers(SENDER, ()), ours.url
    )
    event = events.updated(events.user("ada"), email="ada@new.example")
    (notification,) = composer.compose([event])
    assert notification.body == "text\n"
    found = {one.target: Mail.decode(one.content) for one in notification.deliveries}
    assert found.keys() == {"ada@new.example", ADDRESS}
    for address, mail in found.items():
        assert mail.text == f"text {mail.unsubscribe_url}\n"
        assert mail.html == mail.unsubscribe_url
        claim = ours.read(mail.unsubscribe_url.rpartition("/")[2])
        assert claim is not None
        assert [one for one in found if claim.is_of(one)] == [address]

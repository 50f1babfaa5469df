"""Rules, templates and endpoints: what an operator's file may say, and how it is refused."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from notification_service import endpoints, lanes, rules
from notification_service.compose import Composer
from notification_service.rules import Rule
from notification_service.templates import RenderError, Templates
from servicekit.configfile import InvalidConfigError
from tests.notifications.conftest import SENDER, Events, write

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

GOOD = """
[[rules]]
name = "hello"
on = ["CREATED"]
template = "welcome"
category = "account"
channels = ["email"]
"""


def by_name(name: str) -> Rule:
    return next(rule for rule in rules.load(None) if rule.name == name)


def test_default_rules(events: Events, composer: Composer) -> None:
    composer.check()
    user = events.user("ada")
    created, moved, renamed = (
        events.created("ada"),
        events.updated(user, email="new@example.com"),
        events.updated(user, display_name="Ada"),
    )
    matching = {
        kind: [rule.name for rule in composer.rules if rule.matches(event)]
        for kind, event in (
            ("created", created),
            ("moved", moved),
            ("renamed", renamed),
            ("gone", events.deleted(user)),
        )
    }
    assert matching == {"created": ["welcome"], "moved": ["email-changed"], "renamed": [], "gone": ["goodbye"]}


def test_a_rule_of_several_fields_matches_any_of_them(events: Events, tmp_path: Path) -> None:
    text = GOOD.replace('"CREATED"', '"UPDATED"') + 'changed_fields = ["username", "display_name"]'
    (rule,) = rules.load(write(tmp_path / "rules.toml", text))
    user = events.user("ada")
    assert rule.matches(events.updated(user, display_name="Ada"))
    assert not rule.matches(events.updated(user, locale="de"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD.replace("CREATED", "MADE"), "rule 'hello': on: Value error, MADE: not an event type"),
        (GOOD.replace('"email"', '"pigeon"'), "rule 'hello': channels.0: "),
        (GOOD.replace('category = "account"', ""), "rule 'hello': category: Field required"),
        (GOOD.replace('name = "hello"', ""), "rule number 1: name: Field required"),
        (GOOD + 'changed_fields = ["mail"]', "rule 'hello': changed_fields: Value error, mail: not a field of User"),
        (GOOD + 'colour = "red"', "rule 'hello': colour: Extra inputs"),
        (GOOD + GOOD, "rule 'hello': another one has this name"),
        (GOOD + "rules", "Expected '='"),
        ("[other]", "has [[rules]] and [[digests]] tables and nothing else, but found: other"),
    ],
)
def test_a_wrong_rule_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        rules.load(write(tmp_path / "rules.toml", text))
    assert str(caught.value).startswith(f"{tmp_path}/rules.toml: ")
    assert says in str(caught.value)


def test_a_missing_or_broken_template_is_named_with_its_rule(tmp_path: Path) -> None:
    text = GOOD.replace('"welcome"', '"absent"') + GOOD.replace("hello", "second").replace('"welcome"', '"broken"')
    for suffix in ("subject.txt", "html"):
        write(tmp_path / f"broken.{suffix}", "fine")
    write(tmp_path / "broken.txt", "one\n{% if %}")
    composer = Composer(
        rules.load(write(tmp_path / "rules.toml", text)), Templates(tmp_path), lanes.writers(SENDER, ())
    )
    with pytest.raises(InvalidConfigError) as caught:
        composer.check()
    first, second = str(caught.value).splitlines()
    assert first == "rule 'hello': template absent.subject.txt is missing"
    assert second.startswith("rule 'second': template broken.txt, line 2: ")


def test_templates_escape_html_and_only_html(tmp_path: Path) -> None:
    for suffix in ("subject.txt", "txt", "html"):
        write(tmp_path / f"t.{suffix}", "{{ name }}")
    said = Templates(tmp_path).render("t", {"name": "<b>&\n\0Ada"}, html=True)
    assert said.subject == "<b>& Ada"
    assert said.text == "<b>&\nAda\n"
    assert said.html == "&lt;b&gt;&amp;\nAda"


@pytest.mark.parametrize("text", ["{{ nobody }}", "{{ name.__class__.__mro__ }}", "{{ 1 / 0 }}", "{{ name.x.y }}"])
def test_what_cannot_be_rendered_says_why(tmp_path: Path, text: str) -> None:
    write(tmp_path / "t.subject.txt", "fine")
    write(tmp_path / "t.txt", f"one\n{text}")
    with pytest.raises(RenderError, match=r"template t\.txt, line 2: "):
        Templates(tmp_path).render("t", {"name": "Ada"}, html=False)


def test_endpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRM_SECRETS", f"{SECRET} {SECRET[:-4]}AAAA")
    text = """
[[endpoints]]
name = "crm"
url = "https://crm.example.com/hook"
secret_env = "CRM_SECRETS"
events = ["CREATED"]
categories = ["account"]
"""
    (read,) = endpoints.load(write(tmp_path / "webhooks.toml", text))
    endpoint = read.destination()
    assert len(endpoint.signers(datetime.now(UTC))) == 2
    assert endpoint.wants("CREATED", "account")
    assert not endpoint.wants("DELETED", "account")
    assert not endpoint.wants("CREATED", "security")
    assert endpoints.load(None) == ()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "either secret or secret_env"),
        ('secret_env = "NOT_SET_ANYWHERE"', "NOT_SET_ANYWHERE is not set"),
        ('secret = "whsec_?"', "whsec_ and the base64"),
        ('secret = "hunter2"', "whsec_ and the base64"),
        (f'secret = "{SECRET}"\nevents = ["SNAPSHOT"]', "SNAPSHOT: not an event type"),
    ],
)
def test_a_wrong_endpoint_is_named_and_its_secret_is_not(tmp_path: Path, line: str, says: str) -> None:
    text = f'[[endpoints]]\nname = "crm"\nurl = "http://127.0.0.1/hook"\n{line}\n'
    with pytest.raises(InvalidConfigError) as caught:
        endpoints.load(write(tmp_path / "webhooks.toml", text))
    assert "endpoint 'crm': " in str(caught.value)
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_an_endpoint_needs_an_http_url(tmp_path: Path) -> None:
    text = f'[[endpoints]]\nname = "crm"\nurl = "ftp://x/"\nsecret = "{SECRET}"\n'
    with pytest.raises(InvalidConfigError, match="endpoint 'crm': url: Value error, must be an http or https URL"):
        endpoints.load(write(tmp_path / "webhooks.toml", text))

"""The gate: who is sent what, and why not."""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from notification_service import categories
from notification_service.categories import Categories
from notification_service.gate import Cancel, Candidate, Defer, Reason, Send, decide
from servicekit.configfile import InvalidConfigError
from tests.notifications.conftest import write

NOW = datetime(2026, 11, 25, 23, 30, tzinfo=UTC)
NIGHT = {"quiet_hours": {"start": "22:00", "end": "07:00"}}

ASKED = Candidate(
    user_id=uuid.UUID(int=1),
    category="account",
    channel="email",
    target="ada@example.com",
    time_zone="Europe/Berlin",
    document=None,
    suppressed="",
)
SECURITY = replace(ASKED, category="security")


@pytest.fixture
def known() -> Categories:
    return categories.load(None)


def test_who_decided_nothing_gets_everything(known: Categories) -> None:
    for channel in ("email", "in_app", "webhook"):
        for category in ("account", "security", "news"):
            assert decide(replace(ASKED, category=category, channel=channel), known, NOW) == Send()


@pytest.mark.parametrize(
    ("document", "sent"),
    [
        ({"channels": {"email": False}}, False),
        ({"channels": {"in_app": False}}, True),
        ({"categories": {"account": {"email": False}}}, False),
        ({"categories": {"news": {"email": False}}}, True),
        ({"channels": {"email": False}, "categories": {"account": {"email": True}}}, True),
    ],
)
def test_the_most_particular_decision_counts(known: Categories, document: dict[str, object], sent: bool) -> None:
    verdict = decide(replace(ASKED, document=document), known, NOW)
    assert isinstance(verdict, Send) == sent
    assert sent or (isinstance(verdict, Cancel) and verdict.reason is Reason.SWITCHED_OFF)


def test_a_mandatory_category_cannot_be_switched_off_and_does_not_wait(known: Categories) -> None:
    document = {"channels": {"email": False}, "categories": {"security": {"email": False}}, **NIGHT}
    assert decide(replace(SECURITY, document=document), known, NOW) == Send()


def test_quiet_hours_defer_by_the_users_zone_or_their_own(known: Categories) -> None:
    in_berlin = decide(replace(ASKED, document=NIGHT), known, NOW)
    assert in_berlin == Defer(
        datetime(2026, 11, 26, 6, tzinfo=UTC), Reason.QUIET_HOURS, "quiet hours until 2026-11-26 07:00 Europe/Berlin"
    )
    own = {"quiet_hours": {**NIGHT["quiet_hours"], "time_zone": "America/New_York"}}
    assert decide(replace(ASKED, document=own), known, NOW) == Send()
    unknown = decide(replace(ASKED, document=NIGHT, time_zone="Mars/Base"), known, NOW)
    assert isinstance(unknown, Defer)
    assert unknown.until == datetime(2026, 11, 26, 7, tzinfo=UTC)


def test_a_machine_is_not_left_alone(known: Categories) -> None:
    assert decide(replace(ASKED, document=NIGHT, channel="webhook"), known, NOW) == Send()


def test_what_is_switched_off_is_not_deferred(known: Categories) -> None:
    verdict = decide(replace(ASKED, document={**NIGHT, "channels": {"email": False}}), known, NOW)
    assert verdict == Cancel(Reason.SWITCHED_OFF, "account on email is off by the user's choice for the channel")


def test_a_suppressed_address_gets_nothing(known: Categories) -> None:
    for reason in ("BOUNCED", "COMPLAINED", "MANUAL"):
        verdict = decide(replace(SECURITY, suppressed=reason), known, NOW)
        assert verdict == Cancel(Reason.SUPPRESSED, f"the address is suppressed: {reason}")


def test_who_unsubscribed_still_gets_what_is_mandatory(known: Categories) -> None:
    assert isinstance(decide(replace(ASKED, suppressed="UNSUBSCRIBED"), known, NOW), Cancel)
    assert decide(replace(SECURITY, suppressed="UNSUBSCRIBED"), known, NOW) == Send()


def test_an_operators_file_sets_defaults(tmp_path: Path) -> None:
    text = """
[[categories]]
name = "*"
off = ["email"]
[[categories]]
name = "alerts"
quiet_hours = false
"""
    own = categories.load(write(tmp_path / "categories.toml", text))
    assert decide(replace(ASKED, category="alerts", document=NIGHT), own, NOW) == Send()
    assert decide(ASKED, own, NOW) == Cancel(Reason.SWITCHED_OFF, "account on email is off by default")
    assert decide(replace(ASKED, document={"channels": {"email": True}}), own, NOW) == Send()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[categories]]\nname = "Bad Name"', "name: "),
        ('[[categories]]\nname = "a"\nmandatory = true\noff = ["email"]', "a mandatory category is on"),
        ('[[categories]]\nname = "a"\noff = ["fax"]', "off"),
        ('[[categories]]\nname = "a"\n[[categories]]\nname = "a"', "another one has this name"),
        ('[[rules]]\nname = "a"', "has [[categories]] tables and nothing else"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "categories.toml", text)
    with pytest.raises(InvalidConfigError) as caught:
        categories.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)

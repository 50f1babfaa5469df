"""What is accepted and what is stored of it."""

from __future__ import annotations

import email_validator
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servicekit.errors import ResourceExhaustedError
from tidings.users.v1 import users_pb2
from user_service import validation

_LOCAL_PARTS = st.text("abcXYZ09._+-'\"é好 ", min_size=0, max_size=70)
_DOMAINS = st.sampled_from(
    [
        "example.com",
        "EXAMPLE.com",
        "bücher.example",
        "xn--bcher-kva.example",
        "localhost",
        "a..b",
        "",
        "例え.jp",
        "x" * 64 + ".com",
    ]
)


def _by_library(text: str) -> tuple[str, str] | None:
    try:
        checked = email_validator.validate_email(text, check_deliverability=False)
    except email_validator.EmailNotValidError:
        return None
    return checked.normalized, f"{checked.local_part.casefold()}@{checked.ascii_domain}"


@given(_LOCAL_PARTS, _DOMAINS)
def test_the_quick_way_accepts_and_normalizes_as_the_library_does(local: str, domain: str) -> None:
    text = f"{local}@{domain}"
    violations: validation.Violations = []
    found = validation.email(text, "email", violations)
    assert (None if violations else found) == _by_library(text)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("Anna@Example.COM", "anna@example.com"),
        ("anna@bücher.example", "anna@xn--bcher-kva.example"),
        ("straße@example.com", "strasse@example.com"),
    ],
)
def test_the_key_of_an_address_has_no_case(text: str, key: str) -> None:
    assert validation.email_key(text) == key


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("username", ""),
        ("username", "Anna"),
        ("username", "anna maria"),
        ("username", "a" * 65),
        ("username", "änna"),
        ("email", ""),
        ("email", "anna"),
        ("email", "anna@"),
        ("email", "anna@localhost"),
        ("display_name", "x" * 257),
        ("display_name", "a\nb"),
        ("display_name", "a\x00b"),
        ("locale", "de_CH"),
        ("locale", "deutsch!"),
        ("time_zone", "Europe/Atlantis"),
        ("time_zone", "europe/zurich"),
    ],
)
def test_an_invalid_field_is_named(field: str, value: str) -> None:
    given_user = users_pb2.User(username="anna", email="anna@example.com")
    setattr(given_user, field, value)
    violations: validation.Violations = []
    validation.check(given_user, dict(given_user.labels), validation.CALLER_FIELDS, "user", violations)
    assert [violation.field for violation in violations] == [f"user.{field}"]


@pytest.mark.parametrize(
    ("labels", "fields"),
    [
        ({"": "x"}, ["user.labels"]),
        ({"k" * 64: "x"}, ["user.labels"]),
        ({"team": "x" * 257}, ["user.labels.team"]),
        ({f"k{n}": "" for n in range(33)}, ["user.labels"]),
        ({"team": "a\x00"}, ["user.labels"]),
    ],
)
def test_invalid_labels_are_named(labels: dict[str, str], fields: list[str]) -> None:
    given_user = users_pb2.User(username="anna", email="anna@example.com", labels=labels)
    violations: validation.Violations = []
    validation.check(given_user, dict(given_user.labels), validation.CALLER_FIELDS, "user", violations)
    assert [violation.field for violation in violations] == fields


def test_every_invalid_field_is_named_at_once() -> None:
    violations: validation.Violations = []
    validation.check(users_pb2.User(locale="??"), {}, validation.CALLER_FIELDS, "user", violations)
    assert [violation.field for violation in violations] == ["user.username", "user.email", "user.locale"]


def test_names_of_any_script_are_kept() -> None:
    names = ["Åsa Öberg", "Ἀριστοτέλης", "محمد", "نیما\u200cصالحی", "山田 太郎", "김민수", "นภา"]
    for name in names:
        violations: validation.Violations = []
        given_user = users_pb2.User(username="anna", email="anna@example.com", display_name=name)
        validation.check(given_user, dict(given_user.labels), validation.CALLER_FIELDS, "user", violations)
        assert not violations
        assert given_user.display_name == name


def test_a_user_that_is_too_large_is_refused_with_the_limit() -> None:
    longest = users_pb2.User(username="anna", email="anna@example.com", display_name="\U0001f600" * 256)
    longest.labels.update({f"{n:02}{'k' * 61}": "ä" * 128 for n in range(32)})
    violations: validation.Violations = []
    validation.check(longest, dict(longest.labels), validation.CALLER_FIELDS, "user", violations)
    assert not violations
    longest.locale = "x-" + "-".join(["abcdefgh"] * 1000)
    with pytest.raises(ResourceExhaustedError, match=str(validation.LARGEST_USER)):
        validation.check(longest, dict(longest.labels), validation.CALLER_FIELDS, "user", violations)


def test_only_what_callers_set_is_kept_of_a_user() -> None:
    user = users_pb2.User(
        id="a", username="b", email="c", display_name="d", locale="e", time_zone="f", labels={"g": "h"}, version=1,
        create_time={"seconds": 1}, update_time={"seconds": 1}, delete_time={"seconds": 1}, purge_time={"seconds": 1},
    )  # fmt: skip
    assert {field.name for field, _ in user.ListFields()} == set(users_pb2.User.DESCRIPTOR.fields_by_name)
    validation.keep_caller_fields(user)
    assert tuple(field.name for field, _ in user.ListFields()) == validation.CALLER_FIELDS

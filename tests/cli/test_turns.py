"""Which lines of an import wait for each other."""

from __future__ import annotations

import asyncio
import random

import pytest

from tidings.cli.import_turns import Turns, names_of
from tidings.users.v1 import users_pb2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ada@example.com", "ada@EXAMPLE.com"),
        ("ada@straße.de", "ada@xn--strae-oqa.de"),
        ("ada@bücher.example", "ada@BU\u0308CHER。example"),
        ("jos\u00e9@example.com", "jose\u0301@example.com"),
    ],
)
def test_what_may_be_one_address_has_one_name(one: str, other: str) -> None:
    assert names_of(users_pb2.User(email=one)) == names_of(users_pb2.User(email=other))


@pytest.mark.parametrize("text", ["", "@", "xn--", "xn--99999999", "a@xn--\u00fc.de", "xn--" + "a" * 100_000])
def test_any_text_has_a_name_or_none(text: str) -> None:
    names_of(users_pb2.User(username=text, email=text))


def test_a_username_and_an_email_are_different_things() -> None:
    assert not set(names_of(users_pb2.User(username="ada"))) & set(names_of(users_pb2.User(email="ada")))


async def test_the_same_name_in_turn_and_nothing_is_kept() -> None:
    turns = Turns()
    begun: list[int] = []
    inside: set[str] = set()

    async def one(number: int, user: users_pb2.User) -> None:
        async with turns.taken(user):
            names = set(names_of(user))
            assert not inside & names
            inside.update(names)
            begun.append(number)
            await asyncio.sleep(random.uniform(0, 0.003))
            inside.difference_update(names)

    async with asyncio.TaskGroup() as group:
        for number in range(60):
            user = users_pb2.User(username=f"u{number % 3}", email=f"e{number % 5}@example.com")
            group.create_task(one(number, user))
    for mod in (3, 5):
        for rest in range(mod):
            mine = [number for number in begun if number % mod == rest]
            assert mine == sorted(mine)
    assert not turns._last

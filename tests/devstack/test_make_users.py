"""examples/make_users.py: good lines are good, the lines it lists are bad, and the same seed gives the same file."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from tidings.users.v1 import users_pb2
from user_service import validation
from user_service.validation import Violations

SCRIPT = Path(__file__).parents[2] / "examples" / "make_users.py"


def _make(directory: Path, *arguments: str) -> tuple[str, list[str]]:
    users, bad = directory / "users.csv", directory / "bad.txt"
    subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(users), "--bad-list", str(bad), *arguments],
        check=True,
        timeout=30,
    )
    return users.read_text(encoding="utf-8"), bad.read_text(encoding="utf-8").splitlines()


def _refused_lines(text: str) -> list[int]:
    """The numbers of the lines that the user service would refuse, one after the other."""
    header, *rows = csv.reader(text.splitlines())
    usernames, email_keys, refused = set(), set(), []
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            refused.append(number)
            continue
        username, email, display_name, locale, time_zone, team = row
        user = users_pb2.User(
            username=username,
            email=email,
            display_name=display_name,
            locale=locale,
            time_zone=time_zone,
            labels={"team": team},
        )
        violations: Violations = []
        key = validation.check(user, {"team": team}, validation.CALLER_FIELDS, "user", violations)
        if violations or username in usernames or key in email_keys:
            refused.append(number)
            continue
        usernames.add(username)
        email_keys.add(key)
    return refused


def test_exactly_the_listed_lines_are_bad(tmp_path: Path) -> None:
    text, listed = _make(tmp_path, "--count", "10000", "--bad", "20")
    assert len(text.splitlines()) == 10_001
    assert _refused_lines(text) == [int(line.partition(":")[0]) for line in listed]
    assert len({line.partition(": ")[2] for line in listed}) == 20


def test_a_seed_is_a_file(tmp_path: Path) -> None:
    first = _make(tmp_path, "--count", "500", "--bad", "25", "--seed", "7")
    assert _make(tmp_path, "--count", "500", "--bad", "25", "--seed", "7") == first
    assert _make(tmp_path, "--count", "500", "--bad", "25", "--seed", "8") != first


def test_names_come_in_several_scripts(tmp_path: Path) -> None:
    text, _ = _make(tmp_path, "--count", "300")
    for first, last in ("αω", "ая", "اي", "את", "अह", "一龥", "ァヶ", "가힣", "กฮ"):
        assert any(first <= letter <= last for letter in text), f"no letter between {first} and {last}"

"""`mail list|show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tidings.cli.app import app

_MESSAGE = (
    "X-Envelope-From: tidings@example.com\r\n"
    "X-Envelope-To: zoë@example.com\r\n"
    "X-Envelope-To: second@example.com\r\n"
    "From: Tidings <tidings@example.com>\r\n"
    "To: =?utf-8?q?Zo=C3=AB?= <zoe@example.com>\r\n"
    "Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n"
    "Date: Tue, 14 Nov 2023 22:13:20 +0000\r\n"
    "Message-ID: <one@example.com>\r\n"
    "MIME-Version: 1.0\r\n"
    'Content-Type: multipart/alternative; boundary="b"\r\n'
    "\r\n"
    "--b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\nHallo Zoë \x1b[31m\r\n"
    "--b\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<p>Hallo</p>\r\n--b--\r\n"
).encode()


@pytest.fixture
def mail_dir(tmp_path: Path) -> Path:
    """Three mails and what is none."""
    for number in (1, 2, 10):
        text = _MESSAGE.replace(b"second@", b"second%d@" % number)
        (tmp_path / f"{number:08d}.eml").write_bytes(text)
    (tmp_path / "123.tmp").write_bytes(b"")
    return tmp_path


def run(*arguments: str, code: int = 0) -> str:
    """What a command prints."""
    result = CliRunner().invoke(app, ["mail", *arguments], prog_name="tidings")
    assert result.exit_code == code, result.output
    return result.output


def test_list_shows_the_newest_first(mail_dir: Path) -> None:
    lines = run("list", "--dir", str(mail_dir), "--limit", "2").splitlines()
    assert [line.split()[0] for line in lines] == ["NUMBER", "10", "2", "2"]
    assert lines[0].split() == ["NUMBER", "DATE", "FROM", "TO", "SUBJECT", "MESSAGE-ID"]
    assert "Tidings <tidings@example.com>" in lines[1]
    assert "zoë@example.com, second10@example.com" in lines[1]
    assert lines[1].split()[-2:] == ["Grüße", "<one@example.com>"]
    (one,) = run("list", "--dir", str(mail_dir), "--to", "SECOND2@example.com", "--json").splitlines()
    assert json.loads(one) == {
        "number": 2,
        "file": str(mail_dir / "00000002.eml"),
        "envelope_from": "tidings@example.com",
        "envelope_to": ["zoë@example.com", "second2@example.com"],
        "from": "Tidings <tidings@example.com>",
        "to": "Zoë <zoe@example.com>",
        "subject": "Grüße",
        "date": "Tue, 14 Nov 2023 22:13:20 +0000",
        "message_id": "<one@example.com>",
    }


def test_show(mail_dir: Path) -> None:
    text = run("show", "latest", "--dir", str(mail_dir))
    assert "Message-ID    <one@example.com>" in text
    assert "Unsubscribe" not in text
    assert text.endswith("\n\nHallo Zoë \\x1b[31m\n")
    assert run("show", "2", "--html", "--dir", str(mail_dir)).endswith("\n\n<p>Hallo</p>\n")
    assert json.loads(run("show", "1", "--json", "--dir", str(mail_dir)))["html"].strip() == "<p>Hallo</p>"


def test_show_has_the_link_to_unsubscribe_by(tmp_path: Path) -> None:
    link = "http://127.0.0.1:8090/u/" + "A1_-" * 30
    content = _MESSAGE.replace(b"Date:", f"List-Unsubscribe: <{link}>\r\nDate:".encode())
    (tmp_path / "00000001.eml").write_bytes(content)
    text = run("show", "latest", "--dir", str(tmp_path))
    assert f"Unsubscribe   {link}\n" in text


def test_headers_that_are_folded_raw_or_missing(tmp_path: Path) -> None:
    content = (
        b"X-Envelope-From: \r\nsubject: a\r\n long =?utf-8?q?=C3=BC?=\r\n  one\r\nFROM: a,\r\n\tb\r\n\r\nDate: none\r\n"
    )
    (tmp_path / "00000001.eml").write_bytes(content)
    (tmp_path / "00000002.eml").write_bytes(b"")
    empty, folded = map(json.loads, run("list", "--dir", str(tmp_path), "--json").splitlines())
    assert (folded["subject"], folded["from"], folded["date"]) == ("a long ü one", "a, b", "")
    assert (empty["number"], empty["from"], empty["envelope_to"]) == (2, "", [])


def test_what_is_not_there(mail_dir: Path) -> None:
    assert "no mail 3 in" in run("show", "3", "--dir", str(mail_dir), code=4)
    assert "neither a number nor latest" in run("show", "x", "--dir", str(mail_dir), code=2)
    assert "no directory" in run("list", "--dir", str(mail_dir / "missing"), code=4)

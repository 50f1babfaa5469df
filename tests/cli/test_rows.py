"""Reading files: every record is a user or a problem with its physical line, and reading goes on."""

from __future__ import annotations

import io
import itertools

import pytest

from tests.cli.rows import problems, read, users
from tidings.cli.exits import CommandError, ExitCode
from tidings.cli.import_rows import LONGEST_LINE, Lines, Problem, Row, read_csv, read_json_lines

HEADER = b"username,email,display_name\n"


class TestCsv:
    def test_columns_become_fields(self) -> None:
        data = (
            "\ufeffusername,email,display_name,locale,time_zone,labels.team\r\n"
            'ada,ada@example.com,"Lovelace, Ada ""Countess""",en-GB,Europe/London,engines\r\n'
            "joe,joe@example.com,,,,\r\n"
        ).encode()
        ada, joe = users(read_csv, data)
        assert (ada.line, joe.line) == (2, 3)
        assert ada.user.display_name == 'Lovelace, Ada "Countess"'
        assert ada.user.labels == {"team": "engines"}
        assert (ada.user.locale, ada.user.time_zone) == ("en-GB", "Europe/London")
        assert [field.name for field, _ in joe.user.ListFields()] == ["username", "email"]

    def test_lines_are_counted_as_an_editor_does(self) -> None:
        data = HEADER + b'a,a@x,"one\ntwo\n\nthree"\n\nb,b@x,\nc,c@x\nd,d@x,"last\nline"'
        records = read(read_csv, data)
        assert [(type(record), record.line) for record in records] == [
            (Row, 2), (Row, 7), (Problem, 8), (Row, 9),
        ]  # fmt: skip
        assert records[2] == Problem(8, "", "WRONG_COLUMN_COUNT", "has 2 columns, the header has 3")

    @pytest.mark.parametrize(
        "bad",
        [b'b,"b@x,Bo\n', b'b,b@x,"Bo" X\n', b'"\n', b'b,b@x,"' + b"x" * 70_000 + b'"\n'],
        ids=["never closed", "text after the quote", "alone", "huge"],
    )
    def test_a_stray_quote_costs_its_line_only(self, bad: bytes) -> None:
        good = b"".join(b"u%d,u%d@x,\n" % (number, number) for number in range(10_000))
        records = read(read_csv, HEADER + b"a,a@x,\n" + bad + b'c,c@x,"C"\n' + good)
        assert [record.line for record in records if isinstance(record, Problem)] == [3]
        assert len(records) == 10_003

    def test_a_quote_open_at_the_end(self) -> None:
        records = read(read_csv, HEADER + b'a,a@x,"A\nb,b@x,\nc,c@x,\n')
        assert [(type(record), record.line) for record in records] == [(Problem, 2), (Row, 3), (Row, 4)]

    def test_bad_utf8_names_its_field(self) -> None:
        (problem,) = problems(read_csv, HEADER + b"a,a@x,\xff\xfe\n" + "b,b@x,Zoë\n".encode())
        assert problem == Problem(2, "user.display_name", "BAD_UTF8", "is not UTF-8")

    def test_an_endless_line_is_skipped(self) -> None:
        data = HEADER + b"a," * LONGEST_LINE + b"\nb,b@x,\n"
        assert [(type(record), record.line) for record in read(read_csv, data)] == [(Problem, 2), (Row, 3)]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "line 1: the file is empty"),
            (b"username,email,nick\n", "line 1: 'nick' is not a column"),
            (b"username,email,labels.\n", "line 1: 'labels.' is not a column"),
            (b"username,email,email\n", "line 1: the column email is there twice"),
            (b"username,display_name\n", "line 1: the column email is missing"),
            (b'"username,email\n', "line 1: unexpected end of data"),
        ],
    )
    def test_a_bad_header_refuses_the_file(self, data: bytes, message: str) -> None:
        with pytest.raises(CommandError) as caught:
            read(read_csv, data)
        assert str(caught.value).startswith(message)
        assert caught.value.code is ExitCode.USAGE


class TestJsonLines:
    def test_objects_become_users(self) -> None:
        data = (
            b'{"username": "ada", "email": "ada@example.com", "displayName": "Ada", "labels": {"a": "b"}}\n'
            b"\n"
            b'{"username": "joe", "email": "joe@example.com", "display_name": null, "id": "x", "version": "7"}'
        )
        ada, joe = users(read_json_lines, data)
        assert (ada.line, joe.line) == (1, 3)
        assert (ada.user.display_name, dict(ada.user.labels)) == ("Ada", {"a": "b"})
        assert [field.name for field, _ in joe.user.ListFields()] == ["username", "email"]

    @pytest.mark.parametrize(
        ("line", "field", "reason"),
        [
            (b"{", "", "BAD_JSON"),
            (b"[" * 100_000, "", "BAD_JSON"),
            (b"[]", "", "BAD_JSON"),
            (b'"text"', "", "BAD_JSON"),
            (b'{"username": "\xff"}', "", "BAD_UTF8"),
            (b'{"username": "\\ud800"}', "user.username", "BAD_UTF8"),
            (b'{"username": 1}', "user.username", "WRONG_TYPE"),
            (b'{"labels": []}', "user.labels", "WRONG_TYPE"),
            (b'{"labels": {"a": 1}}', "user.labels.a", "WRONG_TYPE"),
            (b'{"nick": "a"}', "user.nick", "UNKNOWN_FIELD"),
            (b'{"username": "' + b"x" * LONGEST_LINE + b'"}', "", "LINE_TOO_LONG"),
        ],
    )
    def test_bad_lines_say_why(self, line: bytes, field: str, reason: str) -> None:
        records = read(read_json_lines, b'{"username": "a"}\n' + line + b'\n{"username": "b"}\n')
        assert [record.line for record in records] == [1, 2, 3]
        problem = records[1]
        assert isinstance(problem, Problem)
        assert (problem.field, problem.reason) == (field, reason)


def test_files_are_read_as_they_are_needed() -> None:
    file = io.BytesIO(HEADER + b"a,a@x,\n" * 1_000_000)
    lines = Lines(file)
    assert len(list(itertools.islice(read_csv(lines), 10))) == 10
    assert lines.read < 1000

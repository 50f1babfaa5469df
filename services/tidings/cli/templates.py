"""`tidings templates list|preview|send-test|reload`: what notifications are said with."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer

from tidings.cli import output
from tidings.cli.exits import CommandError, ExitCode, run
from tidings.cli.options import NOTIFICATIONS_ADDRESS, Json, NotificationsAddress, channel_to, examples
from tidings.client import Templates
from tidings.notifications.v1 import notifications_pb2, templates_pb2

app = typer.Typer(
    help="Templates: what notifications are said with.",
    epilog=examples("tidings templates list", "tidings templates preview welcome --locale de"),
    no_args_is_help=True,
)

_COLUMNS = ("NAME", "LOCALES", "RULES", "PROBLEMS")
_Outcome = notifications_pb2.Delivery.Attempt.Outcome


class Part(StrEnum):
    """A part of a template."""

    SUBJECT = "subject"
    TEXT = "text"
    HTML = "html"


_Name = Annotated[str, typer.Argument(metavar="TEMPLATE", help="Its name, without a locale and a suffix.")]
_Locale = Annotated[
    str, typer.Option("--locale", metavar="TAG", help="The recipient's, such as de-AT; else that of the sample's user.")
]
_Sample = Annotated[
    str,
    typer.Option(
        "--sample",
        metavar="JSON",
        help='What differs from a made-up sample, such as {"user": {"username": "bob"}, "recipient": "previous"}.',
    ),
]


@asynccontextmanager
async def _templates_at(address: str) -> AsyncIterator[Templates]:
    async with channel_to("notification service", address) as channel:
        yield Templates(channel)


def _parsed(sample: str) -> dict[str, Any]:
    try:
        given = json.loads(sample or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"is no JSON: {error}", param_hint="--sample") from None
    if not isinstance(given, dict):
        raise typer.BadParameter("must be a JSON object", param_hint="--sample")
    return given


@app.command("list", epilog=examples("tidings templates list", "tidings templates list --json"))
def list_templates(address: NotificationsAddress = NOTIFICATIONS_ADDRESS, as_json: Json = False) -> None:
    """List the templates in use, by name; `-` is the language of everybody.

    If changed files are refused, standard error says why, a line for each problem.
    """

    async def body() -> None:
        async with _templates_at(address) as templates:
            pages = [page async for page in templates.pages()]
        found = [one for page in pages for one in page.templates]
        if as_json:
            output.write(output.json_line(one) for one in found)
        else:
            output.table(_COLUMNS, map(_row, found))
            output.note(f"version {pages[-1].version}")
        for problem in pages[-1].refused:
            output.note(f"refused: {problem}")

    run(body())


def _row(template: templates_pb2.Template) -> list[str]:
    locales = " ".join(one.locale or "-" for one in template.translations)
    return [template.name, locales, ", ".join(template.rules), "; ".join(template.problems)]


@app.command(
    epilog=examples(
        "tidings templates preview welcome --locale de-AT",
        "tidings templates preview welcome --part html > welcome.html",
        """tidings templates preview email-changed --sample '{"recipient": "previous"}'""",
        """tidings templates preview announcement --sample '{"params": {"subject": "Rain", "text": "All day."}}'""",
    )
)
def preview(
    name: _Name,
    locale: _Locale = "",
    sample: _Sample = "",
    part: Annotated[Part | None, typer.Option("--part", help="Print this part alone, as it is.")] = None,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Render a template for a sample.

    Exit code 4 if there is no such template, 5 if it cannot be rendered, with the file and the line.
    """
    given = _parsed(sample)

    async def body() -> None:
        async with _templates_at(address) as templates:
            said = await templates.preview(name, locale=locale, sample=given)
        if as_json:
            output.write([output.json_line(said)])
        elif part is not None:
            output.write([str(getattr(said, part.value)).rstrip("\n")])
        else:
            output.record(
                [("subject", said.subject), ("locale", said.locale or "everybody's"), ("version", said.version)]
            )
            for label, text in (("text", said.text), ("html", said.html)):
                output.heading(label)
                output.write(output.shown(line) for line in text.rstrip("\n").splitlines())

    run(body())


@app.command("send-test", epilog=examples("tidings templates send-test welcome --to me@example.com --locale de"))
def send_test(
    name: _Name,
    to: Annotated[str, typer.Option("--to", metavar="ADDRESS", help="Where to mail it.")],
    locale: _Locale = "",
    sample: _Sample = "",
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Render a template for a sample and mail it to one address, once.

    Exit code 1 if the mail server does not take it.
    """
    given = _parsed(sample)

    async def body() -> None:
        async with _templates_at(address) as templates:
            sent = await templates.send_test(name, to, locale=locale, sample=given)
        answer = " ".join(part for part in (str(sent.code or ""), sent.detail) if part)
        if as_json:
            output.write([output.json_line(sent)])
        if sent.outcome != _Outcome.Value("SUCCEEDED"):
            raise CommandError(f"{_Outcome.Name(sent.outcome).lower()}: {answer}", ExitCode.UNEXPECTED)
        if not as_json:
            output.record([("subject", sent.subject), ("message-id", sent.message_id), ("answer", answer)])

    run(body())


@app.command(epilog=examples("tidings templates reload"))
def reload(address: NotificationsAddress = NOTIFICATIONS_ADDRESS, as_json: Json = False) -> None:
    """Use the files as they are now, at once.

    Of the replica that answers; each does so by itself within seconds. Exit code 5 if they lack what the rules need:
    those before stay in use.
    """

    async def body() -> None:
        async with _templates_at(address) as templates:
            done = await templates.reload()
        if as_json:
            output.write([output.json_line(done)])
        else:
            output.record([("version", done.version), ("files", "changed" if done.changed else "as before")])

    run(body())

"""The command tree."""

from __future__ import annotations

import sys
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated

import typer

from tidings.cli import (
    access,
    deliveries,
    deliveries_change,
    deliveries_explain,
    digests,
    doctor,
    endpoints,
    in_app,
    mail,
    new_token,
    notifications,
    preferences,
    sends,
    smoke_test,
    suppressions,
    templates,
    users,
    users_import,
    users_watch,
)
from tidings.cli.exits import EXIT_CODES_HELP
from tidings.cli.options import examples

app = typer.Typer(
    help="The user directory Tidings, and what became of its changes.",
    epilog=EXIT_CODES_HELP
    + "\n"
    + examples(
        "tidings users create --username ada --email ada@example.com",
        "tidings users import people.csv",
        "tidings users watch --from earliest --json",
        "tidings mail show latest",
        "tidings --token-file admin.token --ca ca.pem doctor",
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tidings {version('tidings')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    token_file: access.TokenFileOption = None,
    tls: access.TlsOption = False,
    ca: access.CaOption = None,
    certificate: access.CertificateOption = None,
    key: access.KeyOption = None,
    token_in_clear: access.TokenInClearOption = False,
) -> None:
    access.use(access.Access(token_file, tls, ca, certificate, key, token_in_clear))


for _group in (users, users_import, users_watch):
    _group.register(users.app)
deliveries_change.register(deliveries.app)
deliveries.app.command("explain", epilog=deliveries_explain.EXAMPLES)(deliveries_explain.explain)
app.add_typer(users.app, name="users")
notifications.app.add_typer(in_app.app, name="inbox")
app.add_typer(notifications.app, name="notifications")
app.add_typer(deliveries.app, name="deliveries")
app.add_typer(sends.app, name="sends")
app.add_typer(endpoints.app, name="endpoints")
app.add_typer(templates.app, name="templates")
app.add_typer(preferences.app, name="preferences")
app.add_typer(suppressions.app, name="suppressions")
app.add_typer(digests.app, name="digests")
app.add_typer(mail.app, name="mail")
app.add_typer(new_token.app, name="token")
doctor.register(app)
smoke_test.register(app)


def main() -> None:
    """Runs a command and ends the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # Where the locale cannot show a name, an escape stands for it instead of a failure.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="tidings")

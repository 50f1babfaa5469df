"""`tidings token new`."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from typing import Annotated

import typer

from tidings.cli import output
from tidings.cli.options import Json, examples

app = typer.Typer(
    help="Tokens: what callers are known by.",
    epilog=examples("tidings token new crm --method 'tidings.users.v1.UserService/*'"),
    no_args_is_help=True,
)

# What secret scanners can look for.
_PREFIX = "tidings_"
_BYTES = 32
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")

_EXAMPLES = examples(
    "tidings token new crm --method WatchUsers --method 'Get*'",
    "tidings token new admin --method '*' --json | jq -r .token > admin.token",
)


@app.callback()
def _group() -> None:
    pass


@app.command("new", epilog=_EXAMPLES)
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The caller, as events and limits will name it.")],
    method: Annotated[
        list[str], typer.Option("--method", metavar="NAME", help="What it may call, * for any text; may be repeated.")
    ],
    as_json: Json = False,
) -> None:
    """Make a token and its entry for a server's file of callers.

    Asks no service. The token is shown this once: give it to the caller. The entry holds its hash only: append it to
    the file that TIDINGS_USERS_CALLERS_FILE or TIDINGS_NOTIFICATIONS_CALLERS_FILE names.
    """
    if not _NAME.fullmatch(name):
        raise typer.BadParameter("must be 1 to 63 of a-z, 0-9, '.', '_' and '-'", param_hint="NAME")
    token = _PREFIX + secrets.token_urlsafe(_BYTES)
    entry = {
        "name": name,
        "hash": "sha256:" + hashlib.sha256(token.encode()).hexdigest(),
        "methods": method,
    }
    if as_json:
        output.write([output.json_line({"token": token, **entry})])
        return
    output.note("The token, shown this once:")
    output.write([token])
    output.note("Its entry in the file of callers:")
    # Strings and lists of strings look the same in JSON and in TOML.
    output.write(["", "[[callers]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())])

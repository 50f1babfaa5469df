"""`tidings users create|get|list|update|delete|undelete`."""

from __future__ import annotations

from typing import Annotated

import typer

from tidings.cli import listing, output
from tidings.cli.exits import CommandError, ExitCode, run
from tidings.cli.options import (
    DEFAULT_LIMIT,
    USERS_ADDRESS,
    All,
    Json,
    Limit,
    UsersAddress,
    examples,
    parsed_labels,
    users_at,
)
from tidings.client import Users
from tidings.users.v1 import users_pb2

app = typer.Typer(
    help="Users: create, read, change, import, watch.",
    epilog=examples("tidings users list", "tidings users import people.csv", "tidings users watch --from earliest"),
    no_args_is_help=True,
)

_Id = Annotated[str, typer.Argument(metavar="ID", help="The user's id.")]
_Version = Annotated[
    int, typer.Option("--version", min=0, metavar="N", help="Only if this is the user's current version.")
]
_RequestId = Annotated[
    str, typer.Option("--request-id", metavar="UUID", help="Repeat a call: the same id gets the first answer.")
]
_Labels = Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A label; may be repeated.")]


def register(group: typer.Typer) -> None:
    """Adds the commands."""
    group.command("create", epilog=_CREATE_EXAMPLES)(create)
    group.command("get", epilog=_GET_EXAMPLES)(get)
    group.command("list", epilog=_LIST_EXAMPLES)(list_users)
    group.command("update", epilog=_UPDATE_EXAMPLES)(update)
    group.command("delete", epilog=_DELETE_EXAMPLES)(delete)
    group.command("undelete", epilog=_UNDELETE_EXAMPLES)(undelete)


_CREATE_EXAMPLES = examples(
    "tidings users create --username ada --email ada@example.com",
    'tidings users create --username ada --email ada@example.com --display-name "Ada Lovelace" --label team=engines',
)


def create(
    username: Annotated[str, typer.Option("--username", help="1 to 64 of a-z, 0-9, '.', '_' and '-'.")],
    email: Annotated[str, typer.Option("--email", help="The address.")],
    display_name: Annotated[str, typer.Option("--display-name", help="The name as people write it.")] = "",
    locale: Annotated[str, typer.Option("--locale", help="BCP 47, for example de-CH.")] = "",
    time_zone: Annotated[str, typer.Option("--time-zone", help="IANA, for example Europe/Zurich.")] = "",
    label: _Labels = None,
    request_id: _RequestId = "",
    address: UsersAddress = USERS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Create a user."""
    user = users_pb2.User(
        username=username,
        email=email,
        display_name=display_name,
        locale=locale,
        time_zone=time_zone,
        labels=parsed_labels(label),
    )

    async def body() -> None:
        async with users_at(address) as users:
            _show(await users.create(user, request_id=request_id or None), as_json)

    run(body())


_GET_EXAMPLES = examples(
    "tidings users get 0193a5f0-7b1c-7e2a-9d41-2f6c0a8b5e17",
    "tidings users get --username ada --json",
)


def get(
    user_id: Annotated[str, typer.Argument(metavar="[ID]", help="The user's id.")] = "",
    username: Annotated[str, typer.Option("--username", help="Instead of the id: the name of a living user.")] = "",
    address: UsersAddress = USERS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Show a user.

    By id a deleted one too.
    """
    if bool(user_id) == bool(username):
        raise typer.BadParameter("give either an id or --username")

    async def body() -> None:
        async with users_at(address) as users:
            _show(await (_named(users, username) if username else users.get(user_id)), as_json)

    run(body())


async def _named(users: Users, username: str) -> users_pb2.User:
    # The name itself is the first in the order of names that begin with it, but pages are by id: look at all.
    async for user in users.list(username_prefix=username):
        if user.username == username:
            return user
    raise CommandError(f"username: no user {username}", ExitCode.NOT_FOUND)


_LIST_EXAMPLES = examples(
    "tidings users list --limit 10",
    "tidings users list --email-prefix ada@ --deleted",
    "tidings users list --all --json > users.jsonl",
)


def list_users(
    username_prefix: Annotated[str, typer.Option("--username-prefix", help="Only names that begin so.")] = "",
    email_prefix: Annotated[str, typer.Option("--email-prefix", help="Only addresses that begin so.")] = "",
    deleted: Annotated[bool, typer.Option("--deleted", help="Also soft-deleted users.")] = False,
    limit: Limit = DEFAULT_LIMIT,
    everything: All = False,
    address: UsersAddress = USERS_ADDRESS,
    as_json: Json = False,
) -> None:
    """List users in the order of their creation."""

    def row(user: users_pb2.User) -> list[str]:
        cells = [
            user.id,
            user.username,
            user.email,
            user.display_name,
            str(user.version),
            output.time(user.create_time),
        ]
        return [*cells, output.time(user.delete_time)] if deleted else cells

    columns = ["ID", "USERNAME", "EMAIL", "DISPLAY NAME", "VERSION", "CREATED", *(["DELETED"] if deleted else [])]

    async def body() -> None:
        async with users_at(address) as users:
            found = users.list(
                username_prefix=username_prefix,
                email_prefix=email_prefix,
                show_deleted=deleted,
                page_size=listing.page_size(limit, everything),
            )
            await listing.show(found, columns, row, limit=limit, everything=everything, as_json=as_json)

    run(body())


_UPDATE_EXAMPLES = examples(
    "tidings users update ID --email ada@example.org",
    'tidings users update ID --display-name "" --label team=engines --remove-label guest --version 3',
)


def update(
    user_id: _Id,
    username: Annotated[str | None, typer.Option("--username", help="The new name.")] = None,
    email: Annotated[str | None, typer.Option("--email", help="The new address.")] = None,
    display_name: Annotated[str | None, typer.Option("--display-name", help='"" clears it.')] = None,
    locale: Annotated[str | None, typer.Option("--locale", help='"" clears it.')] = None,
    time_zone: Annotated[str | None, typer.Option("--time-zone", help='"" clears it.')] = None,
    label: _Labels = None,
    remove_label: Annotated[
        list[str] | None, typer.Option("--remove-label", metavar="KEY", help="A label to remove; may be repeated.")
    ] = None,
    version: _Version = 0,
    request_id: _RequestId = "",
    address: UsersAddress = USERS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Change the given fields of a user.

    Labels that are not named stay as they are.
    """
    texts = {
        "username": username,
        "email": email,
        "display_name": display_name,
        "locale": locale,
        "time_zone": time_zone,
    }
    changes = {field: value for field, value in texts.items() if value is not None}
    added, removed = parsed_labels(label), remove_label or []
    if not (changes or added or removed):
        raise typer.BadParameter("nothing to change")
    user = users_pb2.User(id=user_id, version=version)
    for field, value in changes.items():
        setattr(user, field, value)

    async def body() -> None:
        async with users_at(address) as users:
            fields = list(changes)
            if added or removed:
                # The server replaces all labels: the version makes sure that they are still those read here.
                current = await users.get(user_id)
                user.version = version or current.version
                user.labels.update({key: value for key, value in current.labels.items() if key not in removed})
                user.labels.update(added)
                fields.append("labels")
            _show(await users.update(user, fields, request_id=request_id or None), as_json)

    run(body())


_DELETE_EXAMPLES = examples("tidings users delete ID", "tidings users delete ID --version 3")


def delete(
    user_id: _Id,
    version: _Version = 0,
    request_id: _RequestId = "",
    address: UsersAddress = USERS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Delete a user softly.

    Username and email are free again; undelete is possible until the purge time.
    """

    async def body() -> None:
        async with users_at(address) as users:
            _show(await users.delete(user_id, version=version, request_id=request_id or None), as_json)

    run(body())


_UNDELETE_EXAMPLES = examples("tidings users undelete ID")


def undelete(
    user_id: _Id, request_id: _RequestId = "", address: UsersAddress = USERS_ADDRESS, as_json: Json = False
) -> None:
    """Take a deletion back.

    Username and email must still be free.
    """

    async def body() -> None:
        async with users_at(address) as users:
            _show(await users.undelete(user_id, request_id=request_id or None), as_json)

    run(body())


def _show(user: users_pb2.User, as_json: bool) -> None:
    if as_json:
        output.write([output.json_line(user)])
        return
    output.record(
        [
            ("id", user.id),
            ("username", user.username),
            ("email", user.email),
            ("display name", user.display_name),
            ("locale", user.locale),
            ("time zone", user.time_zone),
            ("labels", " ".join(f"{key}={value}" for key, value in sorted(user.labels.items()))),
            ("version", str(user.version)),
            ("created", output.time(user.create_time)),
            ("updated", output.time(user.update_time)),
            ("deleted", output.time(user.delete_time)),
            ("purged after", output.time(user.purge_time)),
        ]
    )

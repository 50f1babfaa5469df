"""`tidings endpoints create|list|get|update|delete|rotate-secret|test|enable|disable`."""

from __future__ import annotations

from typing import Annotated

import typer

from tidings.cli import listing, output
from tidings.cli.exits import CommandError, ExitCode, run
from tidings.cli.options import (
    DEFAULT_LIMIT,
    NOTIFICATIONS_ADDRESS,
    All,
    Json,
    Limit,
    NotificationsAddress,
    channel_to,
    examples,
)
from tidings.client import WebhookEndpoints
from tidings.notifications.v1 import endpoints_pb2 as pb

app = typer.Typer(
    help="Webhook endpoints: where webhooks go.",
    epilog=examples(
        "tidings endpoints create --name crm --url https://crm.example.com/hook", "tidings endpoints test ID"
    ),
    no_args_is_help=True,
)

_SERVICE = "notification service"
_Id = Annotated[str, typer.Argument(metavar="ID", help="The endpoint's id.")]
_Version = Annotated[int, typer.Option("--version", min=0, metavar="N", help="Only if this is the current version.")]
_Events = Annotated[
    list[str] | None, typer.Option("--event", metavar="TYPE", help="A type of event; may be repeated; all if none.")
]
_Categories = Annotated[list[str] | None, typer.Option("--category", help="A category; may be repeated; all if none.")]
_OwnSecret = Annotated[
    str, typer.Option("--secret", envvar="TIDINGS_ENDPOINT_SECRET", help="A secret of your own: whsec_...")
]


@app.command(epilog=examples("tidings endpoints create --name crm --url https://crm.example.com/hook --event DELETED"))
def create(
    name: Annotated[str, typer.Option("--name", help="1 to 63 of a-z, 0-9, '.', '_' and '-'.")],
    url: Annotated[str, typer.Option("--url", help="Where to call: http or https.")],
    description: Annotated[str, typer.Option("--description", help="What it is for.")] = "",
    event: _Events = None,
    category: _Categories = None,
    rate_limit: Annotated[float, typer.Option("--rate-limit", help="Calls per second; 0: no limit.")] = 0.0,
    secret: _OwnSecret = "",
    request_id: Annotated[str, typer.Option("--request-id", metavar="UUID", help="Repeat a call.")] = "",
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Create an endpoint and show its secret, this once."""
    endpoint = pb.Endpoint(
        name=name, url=url, description=description, events=event, categories=category, rate_limit=rate_limit
    )

    async def body() -> None:
        async with channel_to(_SERVICE, address) as channel:
            made, made_secret = await WebhookEndpoints(channel).create(
                endpoint, secret=secret, request_id=request_id or None
            )
        _show(made, as_json, made_secret)

    run(body())


@app.command("list", epilog=examples("tidings endpoints list --all --json"))
def list_endpoints(
    limit: Limit = DEFAULT_LIMIT,
    everything: All = False,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """List endpoints, newest first; those of the operator's file last."""

    def row(one: pb.Endpoint) -> list[str]:
        return [one.name, pb.Endpoint.State.Name(one.state).lower(), pb.Endpoint.Origin.Name(one.origin).lower(),
                one.url, one.id, one.disable_reason]  # fmt: skip

    async def body() -> None:
        async with channel_to(_SERVICE, address) as channel:
            found = WebhookEndpoints(channel).list(page_size=listing.page_size(limit, everything))
            columns = ["NAME", "STATE", "ORIGIN", "URL", "ID", "REASON"]
            await listing.show(found, columns, row, limit=limit, everything=everything, as_json=as_json)

    run(body())


@app.command(epilog=examples("tidings endpoints get ID --json"))
def get(endpoint_id: _Id, address: NotificationsAddress = NOTIFICATIONS_ADDRESS, as_json: Json = False) -> None:
    """Show an endpoint, without its secrets."""

    async def body() -> None:
        async with channel_to(_SERVICE, address) as channel:
            _show(await WebhookEndpoints(channel).get(endpoint_id), as_json)

    run(body())


@app.command(
    epilog=examples(
        "tidings endpoints update ID --url https://crm.example.com/new", 'tidings endpoints update ID --event ""'
    )
)
def update(
    endpoint_id: _Id,
    name: Annotated[str | None, typer.Option("--name", help="The new name.")] = None,
    url: Annotated[str | None, typer.Option("--url", help="The new URL.")] = None,
    description: Annotated[str | None, typer.Option("--description", help='"" clears it.')] = None,
    event: Annotated[list[str] | None, typer.Option("--event", help='Instead of the present ones; "": all.')] = None,
    category: Annotated[
        list[str] | None, typer.Option("--category", help='Instead of the present ones; "": all.')
    ] = None,
    rate_limit: Annotated[float | None, typer.Option("--rate-limit", help="Calls per second; 0: none.")] = None,
    version: _Version = 0,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Change the given fields of an endpoint."""
    single = {"name": name, "url": url, "description": description, "rate_limit": rate_limit}
    lists = {"events": event, "categories": category}
    fields = [field for field, value in (*single.items(), *lists.items()) if value]
    fields += [field for field, value in single.items() if value is not None and field not in fields]
    if not fields:
        raise typer.BadParameter("nothing to change")
    endpoint = pb.Endpoint(id=endpoint_id, version=version)
    for field, value in single.items():
        if value is not None:
            setattr(endpoint, field, value)
    endpoint.events.extend(one for one in event or () if one)
    endpoint.categories.extend(one for one in category or () if one)

    async def body() -> None:
        async with channel_to(_SERVICE, address) as channel:
            _show(await WebhookEndpoints(channel).update(endpoint, fields), as_json)

    run(body())


@app.command(epilog=examples("tidings endpoints delete ID --version 3"))
def delete(endpoint_id: _Id, version: _Version = 0, address: NotificationsAddress = NOTIFICATIONS_ADDRESS) -> None:
    """Delete an endpoint; its pending deliveries are parked."""

    async def body() -> None:
        async with channel_to(_SERVICE, address) as channel:
            await WebhookEndpoints(channel).delete(endpoint_id, version=version)

    run(body())


@app.command("rotate-secret", epilog=examples("tidings endpoints rotate-secret ID --overlap 3600"))
def rotate_secret(
    endpoint_id: _Id,
    overlap: Annotated[
        float, typer.Option("--overlap", min=0, metavar="SECONDS", help="How long the old ones go on signing.")
    ] = 86_400.0,
    secret: _OwnSecret = "",
    version: _Version = 0,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Give an endpoint another secret and show it, this once."""

    async def body() -> None:
        async with channel_to(_SERVICE, address) as channel:
            rotated = await WebhookEndpoints(channel).rotate_secret(
                endpoint_id, secret=secret, overlap=overlap, version=version
            )
        _show(rotated[0], as_json, rotated[1])

    run(body())


@app.command("test", epilog=examples("tidings endpoints test ID"))
def call_once(endpoint_id: _Id, address: NotificationsAddress = NOTIFICATIONS_ADDRESS, as_json: Json = False) -> None:
    """Send an example event at once. Exit code 1 unless it is answered with 2xx."""

    async def body() -> None:
        async with channel_to(_SERVICE, address) as channel:
            answer = await WebhookEndpoints(channel).test(endpoint_id)
        outcome = pb.TestEndpointResponse.Outcome.Name(answer.outcome).lower()
        seconds = answer.duration.ToTimedelta().total_seconds()
        line = f"{outcome} {answer.code} in {seconds:.3f} s: {output.shown(answer.detail)}"
        output.write([output.json_line(answer) if as_json else line])
        if answer.outcome != pb.TestEndpointResponse.SUCCEEDED:
            raise CommandError(f"the endpoint was not reached as it should: {outcome}", ExitCode.UNEXPECTED)

    run(body())


@app.command(epilog=examples("tidings endpoints enable ID"))
def enable(
    endpoint_id: _Id,
    version: _Version = 0,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Switch an endpoint on."""

    async def body() -> None:
        async with channel_to(_SERVICE, address) as channel:
            _show(await WebhookEndpoints(channel).enable(endpoint_id, version=version), as_json)

    run(body())


@app.command(epilog=examples("tidings endpoints disable ID --reason 'moves today'"))
def disable(
    endpoint_id: _Id,
    reason: Annotated[str, typer.Option("--reason", help="Why; at most 500 characters.")] = "",
    version: _Version = 0,
    address: NotificationsAddress = NOTIFICATIONS_ADDRESS,
    as_json: Json = False,
) -> None:
    """Switch an endpoint off; its pending deliveries wait."""

    async def body() -> None:
        async with channel_to(_SERVICE, address) as channel:
            _show(await WebhookEndpoints(channel).disable(endpoint_id, reason=reason, version=version), as_json)

    run(body())


def _show(one: pb.Endpoint, as_json: bool, secret: str = "") -> None:
    if as_json:
        message = pb.CreateEndpointResponse(endpoint=one, secret=secret)
        output.write([output.json_line(message if secret else one)])
        return
    output.record(
        [
            ("id", one.id),
            ("name", one.name),
            ("url", one.url),
            ("description", one.description),
            ("events", " ".join(one.events)),
            ("categories", " ".join(one.categories)),
            ("state", pb.Endpoint.State.Name(one.state).lower()),
            ("reason", one.disable_reason),
            ("disabled", output.time(one.disable_time)),
            ("rate limit", f"{one.rate_limit:g}" if one.rate_limit else ""),
            ("origin", pb.Endpoint.Origin.Name(one.origin).lower()),
            ("version", str(one.version)),
            ("created", output.time(one.create_time)),
            ("updated", output.time(one.update_time)),
            ("secret", secret),
        ]
    )

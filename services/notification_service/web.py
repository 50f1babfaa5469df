"""The web server of unsubscribe links: what RFC 8058 asks for, and a page for people.

    GET  .../u/TOKEN     how things are, with buttons; changes nothing, for scanners of mail follow links
    POST .../u/TOKEN     a button's `do`, answered with 303 to the page; or `List-Unsubscribe=One-Click`, as mail
                         programs send it, which switches the category off and is answered with 200

The token is all that is asked for: there is no login and no cookie. A client has one request per connection, a body of
4 KiB and 20 seconds, whatever it does with them; an ingress stands before it for all else.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from email.utils import parseaddr
from urllib.parse import parse_qs, urlsplit

from aiohttp import web

from notification_service import metrics, pages
from notification_service.links import PATH, Claim, Links
from notification_service.unsubscribe import NotToBeSwitchedError, Switches
from servicekit import database, logs
from servicekit.listening import address_of

log = logs.get(__name__)

_LARGEST_BODY = 4 << 10
_LONGEST = 20.0  # seconds of a connection
_LONGEST_ANSWER = 10.0  # seconds of a request that has come
_MOST_CONNECTIONS = 256
# Of the connections to the database, which calls need too.
_AT_ONCE = 4
_RETRY_AFTER = "10"

_FIELD, _ONE_CLICK = "List-Unsubscribe", "One-Click"
_HEADERS = {
    "Content-Security-Policy": pages.CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "X-Robots-Tag": "noindex, nofollow",
    "Cache-Control": "no-store",
    "Vary": "Accept-Language",
    "Server": "tidings",
}

# What is no HTTP at all is no error of ours, and what it holds may be a token: aiohttp would log both.
_SILENT = logging.getLogger(f"{__name__}.http")
_SILENT.setLevel(logging.CRITICAL)
_AWAY = (*database.AWAY, TimeoutError)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Routes:
    def __init__(self, links: Links, switches: Switches, sender: str) -> None:
        self._links = links
        self._sender = sender
        self._switches = switches
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._does: dict[str, tuple[str, Callable[[Claim], Awaitable[bool]]]] = {
            pages.CATEGORY_OFF: ("category", lambda claim: switches.switch_category(claim, on=False)),
            pages.CATEGORY_ON: ("category_undone", lambda claim: switches.switch_category(claim, on=True)),
            pages.ALL_OFF: ("all", lambda claim: switches.switch_everything(claim, on=False)),
            pages.ALL_ON: ("all_undone", lambda claim: switches.switch_everything(claim, on=True)),
            _ONE_CLICK: ("one_click", lambda claim: switches.switch_category(claim, on=False)),
        }
        metrics.unsubscribing(*(kind for kind, _ in self._does.values()))

    def _claim(self, request: web.Request) -> Claim:
        claim = self._links.read(request.match_info["token"])
        if claim is None:
            raise web.HTTPNotFound
        return claim

    async def show(self, request: web.Request) -> web.StreamResponse:
        claim = self._claim(request)
        async with self._turns:
            found = await self._switches.standing(claim)
        return _page(pages.standing(_words(request), found, self._sender))

    async def act(self, request: web.Request) -> web.StreamResponse:
        claim = self._claim(request)
        asked = await _asked(request)
        if asked not in self._does:
            raise web.HTTPBadRequest
        kind, do = self._does[asked]
        outcome = "failed"
        try:
            async with self._turns:
                outcome = "changed" if await do(claim) else "unchanged"
        except NotToBeSwitchedError:
            outcome = "refused"
            raise web.HTTPConflict from None
        finally:
            metrics.unsubscribed(kind, outcome)
        if asked == _ONE_CLICK:
            return web.Response(text=f"{_words(request).unsubscribed}\n")
        # Relative: whatever stands before this server may have another path.
        return web.Response(status=303, headers={"Location": request.match_info["token"]})


async def _asked(request: web.Request) -> str:
    """What a form says is to be done; empty if it says nothing. RFC 8058 has forms of both kinds."""
    try:
        if request.content_type == "multipart/form-data":
            fields = {name: str(value) for name, value in (await request.post()).items()}
        else:
            found = parse_qs((await request.read()).decode(), max_num_fields=10)
            fields = {name: values[0] for name, values in found.items()}
    except ValueError:
        return ""
    if fields.get(_FIELD) == _ONE_CLICK:
        return _ONE_CLICK
    asked = fields.get("do", "")
    return "" if asked == _ONE_CLICK else asked


def _words(request: web.Request) -> pages.Words:
    return pages.words(request.headers.get("Accept-Language", ""))


def _page(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, content_type="text/html", status=status)


@web.middleware
async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every answer has its headers and is the last of its connection; what went wrong is a page that tells nothing of
    the inside.
    """
    try:
        async with asyncio.timeout(_LONGEST_ANSWER):
            response = await handler(request)
    except web.HTTPException as error:
        response = _told(request, error.status)
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
    except _AWAY as error:
        log.warning("an unsubscribe link was not served", error=str(error).strip() or type(error).__name__)
        response = _told(request, 503)
        response.headers["Retry-After"] = _RETRY_AFTER
    except Exception:
        log.exception("an unsubscribe link failed unexpectedly")
        response = _told(request, 500)
    response.headers.update(_HEADERS)
    response.headers["Content-Language"] = _words(request).language
    response.force_close()
    return response


def _told(request: web.Request, status: int) -> web.Response:
    words = _words(request)
    if status >= 500:
        return _page(pages.told(words, words.try_again), status)
    said = {404: words.not_found, 409: words.not_possible}.get(status, words.not_understood)
    return _page(pages.told(words, said), status)


def application(links: Links, switches: Switches, mail_from: str) -> web.Application:
    """The routes, at the path of the public URL; `mail_from` is the sender of all mails."""
    name, address = parseaddr(mail_from)
    routes = _Routes(links, switches, name or address.rpartition("@")[2])
    made = web.Application(client_max_size=_LARGEST_BODY, middlewares=[_answered])
    path = f"{urlsplit(links.public_url).path}{PATH}{{token:[A-Za-z0-9_-]{{1,200}}}}"
    made.router.add_get(path, routes.show)
    made.router.add_post(path, routes.act)
    return made


class Server:
    """Serves an application on a socket. What runs at its end gets `grace` seconds."""

    def __init__(self, made: web.Application, listening: socket.socket, *, grace: float) -> None:
        # Nobody packs what is this small: what is packed stays so, and says nothing.
        self._runner = web.AppRunner(
            made,
            logger=_SILENT,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=grace,
            auto_decompress=False,
        )
        self._listening = listening
        self._server: asyncio.Server | None = None

    async def run(self) -> None:
        """A background loop: serves until it is cancelled."""
        await self._runner.setup()
        try:
            self._server = await asyncio.get_running_loop().create_server(self._accepted, sock=self._listening)
            log.info("serving unsubscribe links", address=address_of(self._listening))
            await asyncio.Event().wait()
        finally:
            await self.drain()

    def _accepted(self) -> asyncio.BaseProtocol:
        """What speaks on a connection that has come; one that goes on for too long is closed, whatever it waits for."""
        server = self._runner.server
        if server is None or len(server.connections) >= _MOST_CONNECTIONS:
            return _Refused()
        spoken = server()
        asyncio.get_running_loop().call_later(_LONGEST, spoken.force_close)
        return spoken

    async def drain(self) -> None:
        """Takes no more requests; returns when those that run are answered, or gives them up."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()


class _Refused(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()

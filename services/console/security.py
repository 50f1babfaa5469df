"""Who may ask what: the middleware before every answer.

The page has no login: the machine's loopback, or whatever stands before it, keeps others out. What is left are other
pages in an operator's browser:
- one that gives its own name the loopback's address (DNS rebinding) is refused by its Host;
- one that sends a request across is refused by its Origin, by what the browser says in Sec-Fetch-Site, and for want of
  a header that no form can set;
- what users call themselves stays text: the policy runs no script and no style but the files of this package.
"""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-tidings-console"
HEALTH_PATH = "/healthz"

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_READS = frozenset({"GET", "HEAD"})
# What a browser says of a request that the page itself makes, or a person who types the address.
_OWN_SITES = frozenset({"same-origin", "none"})


class Guard:
    """Refuses what a page of ours would not ask, and gives every answer its headers."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-cache" if scope["path"].startswith("/static/") else "no-store")
            await send(message)

        app = self._app
        # A kubelet asks by the pod's address; nothing is told there.
        if scope["path"] != HEALTH_PATH and (reason := refusal(scope["method"], scope["path"], scope, self._hosts)):
            app = JSONResponse({"error": {"code": "FORBIDDEN", "message": reason}}, status_code=403)
        await app(scope, receive, send_guarded)


def refusal(method: str, path: str, scope: Scope, hosts: Collection[str]) -> str | None:
    """Why a request is refused; None if it is not."""
    headers = Headers(scope=scope)
    named = headers.getlist("host")
    if len(named) != 1 or _name(named[0]) not in hosts:
        return "this host name is not the console's: see TIDINGS_CONSOLE_HOSTS"
    site = headers.get("sec-fetch-site")
    if path.startswith("/api/") and site is not None and site not in _OWN_SITES:
        return "another site asks"
    if method in _READS:
        return None
    origin = headers.get("origin")
    if origin is None or urlsplit(origin).netloc.lower() != named[0].lower():
        return "a change must come from the console's own page"
    if HEADER not in headers or headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        return f"a change must be JSON and have the header {HEADER}"
    return None


def _name(host: str) -> str:
    """The host without its port, in lower case; IPv6 addresses keep their brackets."""
    host = host.lower()
    if host.startswith("["):
        return host[: host.find("]") + 1]
    return host.rpartition(":")[0] if ":" in host else host

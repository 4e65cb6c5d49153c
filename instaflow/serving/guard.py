"""Who may ask: the Host and Origin of requests, the token, and the headers that keep a page to itself."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from instaflow.serving.answers import refusing
from instaflow.serving.requests import Refused

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]

LOCAL = {"localhost", "127.0.0.1", "::1"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every answer: no script but the page's own files, nothing from elsewhere, in no other site's frame."""


class Guard:
    """Lets pass to `app` what comes from this machine's own pages and programs, or with the token.

    hosts: names under which a server of this machine alone may be asked, besides LOCAL; None: under any, which wants a
    token. A name that leads here but is another one is a foreign page's (DNS rebinding).
    """

    def __init__(self, app: Any, *, hosts: set[str] | None, token: str | None) -> None:
        if hosts is None and token is None:
            raise ValueError("a server that is asked under any name wants a token")
        self.app, self.token = app, token
        self.hosts = None if hosts is None else hosts | LOCAL

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def shielded(message: Scope) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            answer = self.stopped(Request(scope))
        except Refused as error:
            answer = refusing(error)
        await (answer or self.app)(scope, receive, shielded)

    def stopped(self, request: Request) -> Response | None:
        """What is answered in place of the app; None: nothing. Raises Refused."""
        self.check_names(request.method, request.headers)
        if self.token is None:
            return None
        given = request.query_params.get("token")
        if given is not None and request.method == "GET" and same(given, self.token):
            return self.with_cookie(request)
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if same(bearer, self.token) or same(request.cookies.get(cookie_of(request), ""), fingerprint(self.token)):
            return None
        if "text/html" in request.headers.get("accept", ""):
            text = "This server wants its token: open the address that it printed when it was started.\n"
            return PlainTextResponse(text, 401)
        raise Refused(
            401,
            "This server wants its token",
            "Send the header 'Authorization: Bearer TOKEN', or open /?token=TOKEN",
            **{"WWW-Authenticate": "Bearer"},
        )

    def check_names(self, method: str, headers: Headers) -> None:
        """Raises Refused for a Host that is not this server's, or where another site's page asks."""
        host = headers.get("host", "")
        if self.hosts is not None and hostname(f"//{host}") not in self.hosts:
            raise Refused(
                403,
                f"This server is asked as {', '.join(sorted(self.hosts))}, not as {host!r}",
                "Open it under the address that it printed; for other names start it with --host and a token",
            )
        if method in ("GET", "HEAD"):
            return
        origin = headers.get("origin")
        if headers.get("sec-fetch-site") == "cross-site" or (origin and origin.partition("://")[2] != host):
            raise Refused(
                403, "Another site's page asks, which may not", "Ask from this server's own page or a program"
            )

    def with_cookie(self, request: Request) -> Response:
        """To the same address without the token, which the browser keeps as a cookie until it is closed."""
        assert self.token is not None
        answer = RedirectResponse(request.url.path, 303)
        answer.set_cookie(cookie_of(request), fingerprint(self.token), httponly=True, samesite="lax")
        return answer


def same(given: str, wanted: str) -> bool:
    """Compared in a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode(), wanted.encode())


def fingerprint(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def cookie_of(request: Request) -> str:
    """A name of the port's own, for cookies do not know ports."""
    return f"instaflow-{(request.scope.get('server') or ('', 0))[1]}"


def hostname(netloc: str) -> str:
    try:
        return urlsplit(netloc).hostname or ""
    except ValueError:
        return ""

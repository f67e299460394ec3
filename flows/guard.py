"""Prefect's server as ``make up`` serves it: only for programs and pages of this machine's own address.

A page of any web site that is open in a browser on this machine can send requests to 127.0.0.1. Prefect's password
(``PREFECT_SERVER_API_AUTH_STRING``) refuses those that know none. The check here refuses them before Prefect sees them:
by their Origin, and by their Host, which is the site's own name where the site made its name point to 127.0.0.1.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

OWN_NAMES = ("127.0.0.1", "localhost")


class LocalOnly:
    """Refuses requests that come from pages of other origins, or that call this server by a foreign name.

    Args:
        app: the application behind the check.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with 403; a web socket is closed before it is accepted.

        Args:
            scope: the request, or the event of the server's start and end.
            receive: gives the request's body.
            send: takes the answer.
        """
        if scope["type"] == "lifespan" or _is_local(Headers(scope=scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # policy violation; answered with 403
        else:
            answer = PlainTextResponse("foreign Host or Origin: open http://127.0.0.1 on this machine\n", 403)
            await answer(scope, receive, send)


def _is_local(headers: Headers) -> bool:
    """Whether Host names this machine, and Origin, which browsers add, is this server itself."""
    hosts, origins = headers.getlist("host"), headers.getlist("origin")
    if len(hosts) != 1 or hosts[0].rsplit(":", 1)[0] not in OWN_NAMES:
        return False
    return all(origin == f"http://{hosts[0]}" for origin in origins)


def create_app() -> ASGIApp:
    """Makes the application for uvicorn (``--factory``), with Prefect's settings of this process's environment.

    Returns:
        Prefect's API and pages behind the check.
    """
    from prefect.server.api.server import create_app  # takes seconds to import

    return LocalOnly(create_app(final=True))

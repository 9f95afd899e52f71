"""Routes whose endpoints take the request and nothing else: called straight, without FastAPI's solving of parameters for each request."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

Endpoint = Callable[[Request], Coroutine[Any, Any, Any]]


class DirectRoute(APIRoute):
    """Its dependencies too are functions of the request alone, and are called in their order. Errors are the app's to show."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        checks: list[Endpoint] = [dependency.dependency for dependency in self.dependencies if dependency.dependency]
        endpoint: Endpoint = self.endpoint

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            request = Request(scope, receive, send)
            for check in checks:
                await check(request)
            response = await endpoint(request)
            await response(scope, receive, send)

        self.app = app

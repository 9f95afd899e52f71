"""Routes whose endpoints take the request and nothing else: called straight, without FastAPI's solving of parameters for each request."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope, Send

Endpoint = Callable[[Request], Coroutine[Any, Any, Any]]


class DirectRoute(APIRoute):
    """Its dependencies too are functions of the request alone, and are called in their order. Errors are the app's to show."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        handle = self.get_route_handler()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response = await handle(Request(scope, receive, send))
            await response(scope, receive, send)

        self.app = app

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        checks: list[Endpoint] = [dependency.dependency for dependency in self.dependencies if dependency.dependency]
        endpoint: Endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            for check in checks:
                await check(request)
            return await endpoint(request)

        return handle

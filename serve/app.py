"""The FastAPI app over a Gateway: which routes there are, who may reach them, and how errors look. No logic of its own."""

from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from embedft.errors import EmbedftError
from serve.access import AccessLog
from serve.admin_routes import admin_routes
from serve.direct import DirectRoute
from serve.door import Door
from serve.embedding_routes import embedding_routes
from serve.errors import NotReady, as_envelope, envelope, headers_of, status_of
from serve.gateway import Gateway
from serve.generation_routes import generation_routes
from serve.leaving import ClientGone
from serve.openapi import complete
from serve.rerank_routes import rerank_routes
from serve.status_routes import model_routes, status_routes
from serve.tracing import tracing
from serve.who import known

NO_INDEXES = "the server was started without --indexes: nothing is searched here; start it with --indexes DIR"


def create_app(gateway: Gateway) -> FastAPI:
    """All routes over `gateway`, which the caller starts and stops."""
    app = FastAPI(title="embedft", summary="Many adapters over one frozen base, chosen per request with adapter=", redoc_url=None)
    responses: dict[int | str, dict[str, Any]] = {"default": {"description": "OpenAI's error envelope with a stable code"}}

    async def started(_: Request) -> None:
        if not gateway.started:
            raise NotReady("the server is starting: /ready says when it is done")

    asked_by = [Depends(known(gateway)), Depends(started)]
    app.include_router(status_routes(gateway), responses=responses)
    for routes in (model_routes, generation_routes, embedding_routes, rerank_routes, admin_routes):
        app.include_router(routes(gateway), dependencies=asked_by, responses=responses)
    if gateway.config.indexes is not None:
        from serve.rag_routes import rag_routes  # FAISS and BM25 are loaded only where there is something to search

        app.include_router(rag_routes(gateway), dependencies=asked_by, responses=responses)
    app.router.routes.sort(key=lambda route: not isinstance(route, DirectRoute))  # the most asked for are found first
    _errors(app, gateway)
    complete(app)
    app.add_middleware(Door, config=gateway.config)
    app.add_middleware(AccessLog, write=None if gateway.config.access_log else _nothing, texts=gateway.config.log_texts, trace=tracing())
    return app


def _nothing(_: str) -> None:
    return


def _errors(app: FastAPI, gateway: Gateway) -> None:
    @app.exception_handler(EmbedftError)
    async def ours(request: Request, error: EmbedftError) -> Response:
        gateway.meters.refused.labels(error.code).inc()
        request.state.record.tell(code=error.code)
        return JSONResponse(as_envelope(error), status_code=status_of(error), headers=headers_of(error))

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        unindexed = code == "route_not_found" and gateway.config.indexes is None and f"{request.url.path}/".startswith("/v1/rag/")
        body = envelope(NO_INDEXES if unindexed else str(error.detail), code=code, status=error.status_code)
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse(envelope(str(error)[:300], code="invalid_parameter", status=400), status_code=400)

    @app.exception_handler(OSError)
    async def disk(request: Request, error: OSError) -> Response:
        request.state.record.tell(code="storage_failed")
        body = envelope(f"the server's disk did not take or give it: {error.strerror}", code="storage_failed", status=507)
        return JSONResponse(body, status_code=507)

    @app.exception_handler(ClientGone)
    async def gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, _: Exception) -> Response:
        body = envelope("the server failed at this request; its log says how", code="internal_error", status=500)
        return JSONResponse(body, status_code=500, headers={"x-request-id": request.state.record.identity})

"""/health, /ready, /metrics and /v1/models: how the server is, and what may be asked for."""

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve.errors import RETRY_AFTER, ModelNotFound
from serve.gateway import Gateway
from serve.visible import Visible, visible
from serve.who import admin_only


def status_routes(gateway: Gateway) -> APIRouter:
    router, lifecycle = APIRouter(tags=["status"]), gateway.lifecycle

    @router.get("/health", summary="The gateway is alive")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/ready", summary="Every engine is warm and every served adapter passed its probes")
    async def ready() -> JSONResponse:
        states = {base.name: _state(base.name) for base in gateway.config.bases}
        content: dict[str, Any] = {"ready": gateway.ready, "bases": states}
        if not gateway.tenants.keyed:
            content["adapters"] = sorted(lifecycle.live)
        return JSONResponse(content) if gateway.ready else JSONResponse(content, status_code=503, headers={"retry-after": RETRY_AFTER})

    def _state(name: str) -> str:
        engine = lifecycle.engines.get(name)
        return engine.supervisor.state if engine else "starting"

    only_admin = admin_only(gateway) if gateway.tenants.keyed else []

    @router.get("/metrics", dependencies=only_admin, summary="Prometheus' text form; where there are keys, for an admin's")
    def metrics() -> Response:
        return Response(gateway.meters.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


def model_routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["status"])

    @router.get("/v1/models", summary="Bases and the adapters served over them")
    async def models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": _models(visible(gateway, request))}

    @router.get("/v1/models/{model:path}", summary="One base or adapter")
    async def model(model: str, request: Request) -> dict[str, Any]:
        rows = _models(visible(gateway, request))
        found = next((row for row in rows if row["id"] == model), None)
        if found is None:
            raise ModelNotFound(model, [row["id"] for row in rows])
        return found

    def _models(seen: Visible) -> list[dict[str, Any]]:
        common = {"object": "model", "created": 0, "owned_by": "embedft"}
        bases = [
            {
                "id": engine.name,
                **common,
                "parent": None,
                "task": engine.config.task,
                "engine": engine.config.engine,
                "max_model_len": engine.reads(),
            }
            for engine in seen.engines.values()
        ]
        adapters = [
            {
                "id": name,
                **common,
                "parent": resident.engine.name,
                "task": resident.passport.task,
                "max_model_len": resident.engine.reads(resident.passport),
                "root": resident.id,
                "unproven": resident.passport.unproven,
            }
            for name, resident in sorted(seen.live.items())
        ]
        aliases = [{"id": name, **common, "parent": None, "variants": variants} for name, variants in sorted(seen.aliases.items())]
        return [*bases, *adapters, *aliases]

    return router

"""/health, /ready, /metrics and /v1/models: how the server is, and what may be asked for."""

from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from serve.errors import RETRY_AFTER, ModelNotFound
from serve.gateway import Gateway


def status_routes(gateway: Gateway) -> APIRouter:
    router, lifecycle = APIRouter(tags=["status"]), gateway.lifecycle

    @router.get("/health", summary="The gateway is alive")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/ready", summary="Every engine is warm and every served adapter passed its probes")
    async def ready() -> JSONResponse:
        states = {base.name: _state(base.name) for base in gateway.config.bases}
        content = {"ready": gateway.ready, "bases": states, "adapters": sorted(lifecycle.live)}
        return JSONResponse(content) if gateway.ready else JSONResponse(content, status_code=503, headers={"retry-after": RETRY_AFTER})

    def _state(name: str) -> str:
        engine = lifecycle.engines.get(name)
        return engine.supervisor.state if engine else "starting"

    @router.get("/metrics", summary="Prometheus' text form")
    def metrics() -> Response:
        return Response(gateway.meters.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models", summary="Bases and the adapters served over them")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": _models()}

    @router.get("/v1/models/{model:path}", summary="One base or adapter")
    async def model(model: str) -> dict[str, Any]:
        found = next((row for row in _models() if row["id"] == model), None)
        if found is None:
            raise ModelNotFound(model, [row["id"] for row in _models()])
        return found

    def _models() -> list[dict[str, Any]]:
        common = {"object": "model", "created": 0, "owned_by": "embedft"}
        bases = [
            {
                "id": engine.name,
                **common,
                "parent": None,
                "task": engine.config.task,
                "engine": engine.config.engine,
                "max_model_len": engine.max_length,
            }
            for engine in lifecycle.engines.values()
        ]
        adapters = [
            {"id": name, **common, "parent": resident.engine.name, "task": resident.passport.task, "root": resident.id}
            for name, resident in sorted(lifecycle.live.items())
        ]
        return [*bases, *adapters]

    return router

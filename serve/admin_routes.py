"""/v1/adapters and vLLM's load and unload: what is served, and its change by those who hold the admin token."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic_core import to_json

from embedft.adapters.probes import ProbeReport
from embedft.adapters.store import check_name
from embedft.errors import AdapterInvalid, InputInvalid
from serve.body import read_body
from serve.embedding import way_of
from serve.gateway import Gateway
from serve.openapi import described
from serve.resident import MIX, Resident
from serve.schemas import LoadLora, PutAdapter, PutAlias, UnloadLora
from serve.visible import visible
from serve.who import admin_only

ADMIN_BODY = 64 << 10


def admin_routes(gateway: Gateway) -> APIRouter:
    router, lifecycle = APIRouter(tags=["adapters"]), gateway.lifecycle
    only_admin = admin_only(gateway)

    @router.get(
        "/v1/adapters",
        summary="All adapters: served, earlier generations that were asked for, draining, and those not served, with the reason",
    )
    def adapters(request: Request) -> Response:
        may_use = visible(gateway, request).may_use
        held = [*lifecycle.live.values(), *lifecycle.earlier(), *lifecycle.draining()]
        rows = [view(resident) for resident in held if may_use(resident.name)]
        for row in rows:
            if row["name"] in lifecycle.refused:
                row["refused"] = lifecycle.refused[row["name"]]  # a newer generation, which is not the one that serves
        rows += [{"name": name, "state": "unserved", "reason": reason} for name, reason in lifecycle.unserved().items() if may_use(name)]
        return _json({"object": "list", "data": sorted(rows, key=lambda row: row["name"])})

    @router.get("/v1/adapters/{name}", summary="One adapter")
    def adapter(name: str, request: Request) -> Response:
        seen = visible(gateway, request)
        if seen.may_use(name) and (reason := lifecycle.why_unserved(name)):
            return _json({"name": name, "state": "unserved", "reason": reason})
        return _json(view(seen.get(name)))

    put_body = described(PutAdapter, "Load or replace: the new generation is proven beside the old, then the name moves in one step")

    @router.put("/v1/adapters/{name}", dependencies=only_admin, **put_body)
    async def put(name: str, request: Request) -> Response:
        body = await read_body(request, PutAdapter, limit=ADMIN_BODY)
        _check_free(gateway, name)
        async with gateway.importer.source_of(name, body.source, base=body.base) as source:
            resident = await lifecycle.put(name, source=source, generation=body.generation, pin=body.pin, expected=body.expected_generation)
        return _json(view(resident))

    @router.delete("/v1/adapters/{name}", dependencies=only_admin, summary="Stop serving; what runs is finished, the store keeps it")
    async def delete(name: str) -> Response:
        return _json(view(await lifecycle.delete(name)))

    @router.post("/v1/adapters/{name}/verify", dependencies=only_admin, summary="Replay the probes through the live engine")
    async def verify(name: str) -> Response:
        resident, report = await lifecycle.verify(name)
        return _json({"name": name, "generation": resident.generation, "probe": _report(report)})

    @router.get("/v1/aliases", summary="Names that split traffic")
    def aliases(request: Request) -> Response:
        return _json({"object": "list", "data": visible(gateway, request).aliases})

    alias_body = described(PutAlias, "Split a name's traffic between adapters or generations, sticky by the header x-embedft-sticky")

    @router.put("/v1/aliases/{name}", dependencies=only_admin, **alias_body)
    async def put_alias(name: str, request: Request) -> Response:
        body = await read_body(request, PutAlias, limit=ADMIN_BODY)
        if name in lifecycle.live or name in lifecycle.engines or name.startswith(MIX):
            raise AdapterInvalid(name, "an adapter or a base has that name: choose another")
        if name in await asyncio.to_thread(lifecycle.store.names):  # it would be served beside the alias from the next start on
            raise AdapterInvalid(name, "the store has an adapter of that name: embedft adapters remove it, or choose another")
        if len({lifecycle.get(variant).engine.name for variant in body.variants}) > 1:
            raise InputInvalid("alias_invalid", "the variants are of different bases", "variants")
        await asyncio.to_thread(gateway.aliases.put, name, body.variants)
        return _json({"name": name, "variants": body.variants})

    @router.delete("/v1/aliases/{name}", dependencies=only_admin, summary="Forget an alias")
    async def delete_alias(name: str) -> Response:
        await asyncio.to_thread(gateway.aliases.delete, name)
        return _json({"name": name, "variants": None})

    @router.post("/v1/load_lora_adapter", dependencies=only_admin, **described(LoadLora, "vLLM's alias of PUT"))
    async def load(request: Request) -> Response:
        body = await read_body(request, LoadLora, limit=ADMIN_BODY)
        _check_free(gateway, body.lora_name)
        if body.lora_name in lifecycle.live and not body.load_inplace:
            raise InputInvalid("adapter_exists", f"{body.lora_name!r} is served already: load_inplace replaces it", "lora_name")
        await lifecycle.put(body.lora_name, source=body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", dependencies=only_admin, **described(UnloadLora, "vLLM's alias of DELETE"))
    async def unload(request: Request) -> Response:
        body = await read_body(request, UnloadLora, limit=ADMIN_BODY)
        await lifecycle.delete(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _check_free(gateway: Gateway, name: str) -> None:
    """AdapterInvalid for what is no name, or stands for something else. A base's name is the lifecycle's to refuse."""
    check_name(name)
    if name in gateway.aliases.all or name.startswith(MIX):
        raise AdapterInvalid(name, "an alias or a mix has that name: choose another")


def view(resident: Resident) -> dict[str, Any]:
    """What clients see of one generation; no path of this machine."""
    passport = resident.passport
    shown: dict[str, Any] = {
        "name": resident.name,
        "state": "draining" if resident.retired else "earlier" if resident.earlier else "serving",
        "id": resident.id,
        "generation": resident.generation,
        "base": resident.engine.name,
        "task": passport.task,
        "method": passport.method,
        "r": passport.r,
        "side": passport.side,
        "max_length": passport.max_length,
        "dimensions": list(passport.dimensions),
        "prompts": passport.prompts,
        "metrics": passport.metrics,
        "pinned": resident.pinned,
        "loaded": resident.loaded,
        "leases": resident.leases,
        "unproven": passport.unproven,
        "probe": _report(resident.report) if resident.report else None,
    }
    if passport.task == "embedding":
        shown["lineage"] = way_of(resident.engine, resident, input_type="query", dimensions=None).lineage
    return shown


def _report(report: ProbeReport) -> dict[str, Any]:
    shown = {"error": report.error, "signal": report.signal, "noise": report.noise}
    return {**shown, "tolerance": report.tolerance, "passed": report.passed, "reason": report.reason}


def _json(content: Any) -> Response:
    return Response(to_json(content, inf_nan_mode="null"), media_type="application/json")

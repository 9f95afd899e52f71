"""The bodies that routes parse themselves, told to OpenAPI."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serve import answers

REF = "#/components/schemas/{model}"
_schemas: dict[str, dict[str, Any]] = {}
OPEN = {"/health", "/ready"}
STREAMED = {"/v1/chat/completions", "/v1/completions", "/v1/rag/{index}/query"}
RERANK = ("/v1/rerank", "/v2/rerank", "/rerank")
BY_ADAPTER = {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/embed", *RERANK}
_BY_PATH: dict[str, dict[str, type[BaseModel] | str]] = {  # a text is a media type: a text, or JSON vectors
    "/health": {"get": answers.Health},
    "/ready": {"get": answers.Readiness},
    "/metrics": {"get": "text/plain"},
    "/v1/models": {"get": answers.ModelList},
    "/v1/models/{model}": {"get": answers.Model},
    **{path: {"post": answers.Generated} for path in ("/v1/chat/completions", "/v1/completions")},
    "/v1/embeddings": {"post": answers.EmbeddingList},
    "/embed": {"post": "application/json"},
    **{path: {"post": answers.RankedList} for path in RERANK},
    "/v1/adapters": {"get": answers.AdapterList},
    "/v1/adapters/{name}": dict.fromkeys(("get", "put", "delete"), answers.AdapterShown),
    "/v1/adapters/{name}/verify": {"post": answers.Verified},
    "/v1/aliases": {"get": answers.AliasList},
    "/v1/aliases/{name}": dict.fromkeys(("put", "delete"), answers.AliasShown),
    **{path: {"post": "text/plain"} for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")},
    "/v1/rag": {"get": answers.Rows},
    "/v1/rag/{index}": dict.fromkeys(("get", "put", "delete"), answers.Shown),
    "/v1/rag/{index}/query": {"post": answers.Shown},
}
ANSWERS = {(method, path): answer for path, methods in _BY_PATH.items() for method, answer in methods.items()}
_VECTORS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
_NAMING = [
    {"name": "adapter", "in": "query", "required": False, "schema": {"type": "string", "minLength": 1}},
    {"name": "x-embedft-sticky", "in": "header", "required": False, "schema": {"type": "string"}},
]


def described(body: type[BaseModel], summary: str) -> dict[str, Any]:
    """Arguments of a route whose JSON body is `body`."""
    schema = body.model_json_schema(ref_template=REF)
    _schemas.update(schema.pop("$defs", {}))
    _schemas[body.__name__] = schema
    content = {"application/json": {"schema": {"$ref": REF.format(model=body.__name__)}}}
    return {"summary": summary, "openapi_extra": {"requestBody": {"required": True, "content": content}}}


def complete(app: FastAPI) -> None:
    """Make app.openapi() tell what the routes themselves do not: bodies, answers, errors, keys and where an adapter may be named."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        content = plain()
        if "x-complete" not in content:
            _describe(content)
            content["x-complete"] = True
        return content

    app.openapi = openapi


def _describe(content: dict[str, Any]) -> None:
    components = content.setdefault("components", {})
    schemas: dict[str, Any] = components.setdefault("schemas", {})
    for model in (answers.Error, *{model for model in ANSWERS.values() if not isinstance(model, str)}):
        schema = model.model_json_schema(ref_template=REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    schemas.update(_schemas)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in content["paths"].items():
        for method, operation in methods.items():
            _answered(operation, path, method)
            if path not in OPEN:
                operation["security"] = [{"key": []}]
            if path in BY_ADAPTER:
                operation.setdefault("parameters", []).extend(_NAMING)


def _answered(operation: dict[str, Any], path: str, method: str) -> None:
    """The answer's schema, and the error's for everything else."""
    told: dict[str, Any] = operation["responses"]
    told.pop("422", None)
    error = {"application/json": {"schema": {"$ref": REF.format(model="Error")}}}
    told["default"] = {"description": "OpenAI's error envelope with a stable code", "content": error}
    found = ANSWERS[method, path]
    if isinstance(found, str):
        plain: dict[str, Any] = {"schema": _VECTORS if found == "application/json" else {"type": "string"}}
        told["200"] = {"description": "Done", "content": {found: plain}}
        return
    shape = {"schema": {"$ref": REF.format(model=found.__name__)}}
    streamed: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}} if path in STREAMED else {}
    told["200"] = {"description": "Done", "content": {"application/json": shape, **streamed}}
    if path == "/ready":
        told["503"] = {"description": "Not yet", "content": {"application/json": shape}}

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
ANSWERS: dict[tuple[str, str], type[BaseModel] | str] = {  # a media type: a text, or JSON vectors
    ("get", "/health"): answers.Health,
    ("get", "/ready"): answers.Readiness,
    ("get", "/metrics"): "text/plain",
    ("get", "/v1/models"): answers.ModelList,
    ("get", "/v1/models/{model}"): answers.Model,
    ("post", "/v1/chat/completions"): answers.Generated,
    ("post", "/v1/completions"): answers.Generated,
    ("post", "/v1/embeddings"): answers.EmbeddingList,
    ("post", "/embed"): "application/json",
    **{("post", path): answers.RankedList for path in RERANK},
    ("get", "/v1/adapters"): answers.AdapterList,
    ("get", "/v1/adapters/{name}"): answers.AdapterShown,
    ("put", "/v1/adapters/{name}"): answers.AdapterShown,
    ("delete", "/v1/adapters/{name}"): answers.AdapterShown,
    ("post", "/v1/adapters/{name}/verify"): answers.Verified,
    ("get", "/v1/aliases"): answers.AliasList,
    ("put", "/v1/aliases/{name}"): answers.AliasShown,
    ("delete", "/v1/aliases/{name}"): answers.AliasShown,
    ("post", "/v1/load_lora_adapter"): "text/plain",
    ("post", "/v1/unload_lora_adapter"): "text/plain",
    ("get", "/v1/rag"): answers.Rows,
    ("get", "/v1/rag/{index}"): answers.Shown,
    ("put", "/v1/rag/{index}"): answers.Shown,
    ("delete", "/v1/rag/{index}"): answers.Shown,
    ("post", "/v1/rag/{index}/query"): answers.Shown,
}
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

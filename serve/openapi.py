"""The bodies that routes parse themselves, told to OpenAPI."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

REF = "#/components/schemas/{model}"
_schemas: dict[str, dict[str, Any]] = {}


def described(body: type[BaseModel], summary: str) -> dict[str, Any]:
    """Arguments of a route whose JSON body is `body`."""
    schema = body.model_json_schema(ref_template=REF)
    _schemas.update(schema.pop("$defs", {}))
    _schemas[body.__name__] = schema
    content = {"application/json": {"schema": {"$ref": REF.format(model=body.__name__)}}}
    return {"summary": summary, "openapi_extra": {"requestBody": {"required": True, "content": content}}}


def complete(app: FastAPI) -> None:
    """Make app.openapi() hold the schemas that `described` collected."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        content = plain()
        content.setdefault("components", {}).setdefault("schemas", {}).update(_schemas)
        return content

    app.openapi = openapi

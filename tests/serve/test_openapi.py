"""The whole of OpenAPI against the running server: no 5xx, no answer that breaks its schema, whatever schemathesis thinks of."""

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.openapi import ROUTES, examine
from serve.engines.fake import text
from tests.serve.test_generation import engine_id
from tests.serve.world import ADMIN, Server, World

EXAMPLES = 12  # an operation; benchmarks/openapi.py runs many more


@pytest.fixture(scope="module")
def described(changing: Server) -> dict[str, Any]:
    return changing.client.get("/openapi.json").json()


def test_every_route_is_told_with_its_answer(described: dict[str, Any]) -> None:
    routes = {(method, path) for path, methods in described["paths"].items() for method in methods}
    assert routes == set(ROUTES)


@pytest.mark.parametrize("where", ROUTES)
def test_no_request_is_answered_by_a_5xx_or_against_the_schema(changing: Server, described: dict[str, Any], where: tuple[str, str]) -> None:
    examine(described, *where, url=changing.url, headers=ADMIN, examples=EXAMPLES)
    assert changing.client.get("/health").status_code == 200


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(body=JSON)
def test_no_json_at_all_is_a_5xx(shared: Server, body: Any) -> None:
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    for path in ("/v1/embeddings", "/v1/completions", "/embed", "/v1/rerank"):
        answer = shared.client.post(path, content=content, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, answer.text


def test_what_a_valid_request_gets_fits_its_schema(shared: Server, shared_world: World) -> None:
    """Generated requests are mostly refused; these are not."""
    schema: Any = schemathesis.openapi.from_dict(shared.client.get("/openapi.json").json())
    bodies: dict[tuple[str, str], Any] = {
        ("POST", "/v1/embeddings"): {"input": ["x", "y"], "adapter": ["a", None]},
        ("POST", "/v1/completions"): {"model": "s", "prompt": "x", "max_tokens": 2},
        ("POST", "/v1/chat/completions"): {"model": "s", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
        ("POST", "/v1/rerank"): {"query": "x", "documents": ["y", {"text": "z"}], "adapter": "a"},
        ("POST", "/embed"): {"inputs": "x"},
        ("GET", "/v1/models"): None,
        ("GET", "/v1/adapters"): None,
        ("GET", "/v1/aliases"): None,
        ("GET", "/ready"): None,
        ("GET", "/metrics"): None,
    }
    for (method, path), body in bodies.items():
        answer = shared.client.request(method, path, json=body)
        assert answer.status_code == 200, answer.text
        schema[path][method.lower()].validate_response(schemathesis.Response.from_any(answer))
    streamed = shared.post("/v1/completions", {"model": "s", "prompt": "x", "max_tokens": 1, "stream": True})
    assert text(engine_id(shared_world, "s"), "x") in streamed.text

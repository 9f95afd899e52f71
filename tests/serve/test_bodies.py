"""What a body may be: parsed once, closed, capped; who may send it."""

import gzip

import httpx
import pytest

from embedft.errors import InputInvalid
from serve.body import parse, validated
from serve.schemas import EmbeddingRequest
from tests.serve.test_choice import refused
from tests.serve.world import ADMIN, Server

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b'{"input": "x", "adapter": "a", "adapter": "b"}', "duplicate_key"),
        (b'{"input": "x", "\\u0061dapter": "a", "adapter": "b"}', "duplicate_key"),
        (b'{"input": NaN}', "json_invalid"),
        (b'{"input": "\\ud800"}', "json_invalid"),
        (b'{"input": "x"', "json_invalid"),
        (b"\xff", "json_invalid"),
        (b"", "json_invalid"),
        (b"[" * 100_000, "json_invalid"),
        (b'{"input": "x", "lora_path": "/etc"}', "unknown_parameter"),
        (b'{"input": []}', "invalid_parameter"),
        (b'{"input": "x", "truncate": "yes"}', "invalid_parameter"),
        (b'{"input": "x", "input_type": "passage"}', "invalid_parameter"),
        (b"[]", "invalid_parameter"),
    ],
)
def test_a_malformed_body_is_a_400_with_its_code(shared: Server, content: bytes, code: str) -> None:
    refused(shared.client.post("/v1/embeddings", content=content, headers=JSON), 400, code)


def test_what_fits_no_kind_of_a_field_is_told_of_the_kind_it_comes_nearest_to(shared: Server) -> None:
    answer = shared.post("/v1/embeddings", {"input": [], "model": "texts"})
    refused(answer, 400, "invalid_parameter")
    told = answer.json()["error"]
    assert told["message"].startswith("input: List should have at least 1 item")
    assert told["param"] == "input"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"adaptor": "a"}, "adaptor: there is no such field; did you mean 'adapter'?"),
        ({"nothing": 1}, "nothing: there is no such field"),
        ({"x" * 10_000_000: 1}, "x" * 120 + ": there is no such field"),
        ({"adapter": {"mix": [{"adapter": "a"}]}}, "adapter.mix.0.weight: Field required"),
        (
            {"adapter": {"mix": [{"adapter": "a", "weight": 1, "wieght": 2}]}},
            "adapter.mix.0.wieght: there is no such field; did you mean 'weight'?",
        ),
        ({"adapter": {"mix": [{"adapter": "a", "weight": 11}]}}, "adapter.mix.0.weight: Input should be less than or equal to 10"),
        ({"adapter": ["a", 7]}, "adapter.1: Input should be a valid string"),
    ],
)
def test_a_fault_is_told_with_its_place_and_a_typo_with_the_field_that_was_meant(body: dict[str, object], told: str) -> None:
    with pytest.raises(InputInvalid) as caught:
        validated(EmbeddingRequest, {"input": "x", **body})
    assert str(caught.value) == told


def test_duplicate_keys_deep_inside_are_found() -> None:
    with pytest.raises(InputInvalid, match="twice"):
        parse(b'{"messages": [{"role": "user", "content": "a", "role": "system"}]}')


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"max_tokens": 10**6}, "max_tokens_too_large"),
        ({"n": 17}, "n_too_large"),
        ({"prompt": ["x"] * 10, "n": 2}, "n_too_large"),
        ({"temperature": 3}, "invalid_parameter"),
        ({"best_of": 5}, "unknown_parameter"),
        ({"stream_options": {"include_usage": True}}, "invalid_parameter"),
    ],
)
def test_what_one_request_may_ask_for_is_capped(shared: Server, body: dict[str, object], code: str) -> None:
    refused(shared.post("/v1/completions", {"model": "words", "prompt": "x", **body}), 400, code)


def test_likely_tokens_without_log_probabilities_are_a_400(shared: Server) -> None:
    body = {"model": "words", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}
    refused(shared.post("/v1/chat/completions", body), 400, "invalid_parameter")
    assert shared.post("/v1/chat/completions", {**body, "logprobs": True}).status_code == 200


def test_too_large_a_body_is_a_413(shared: Server) -> None:
    refused(shared.client.post("/v1/embeddings", content=b" " * (17 << 20), headers=JSON), 413, "body_too_large")


def test_a_packed_body_is_a_415(shared: Server) -> None:
    content, kind = b'{"model": "texts", "input": "x"}', {"content-type": "application/json"}
    answer = shared.client.post("/v1/embeddings", content=gzip.compress(content), headers={**kind, "content-encoding": "gzip"})
    refused(answer, 415, "media_type_unsupported")
    assert "gzip" in answer.json()["error"]["message"]
    assert shared.client.post("/v1/embeddings", content=content, headers={**kind, "content-encoding": "Identity"}).status_code == 200


def test_another_content_type_is_a_415(shared: Server) -> None:
    refused(
        shared.client.post("/v1/embeddings", content=b'{"input": "x"}', headers={"content-type": "text/plain"}),
        415,
        "media_type_unsupported",
    )


def test_a_web_page_cannot_reach_the_server(shared: Server) -> None:
    refused(shared.client.get("/v1/models", headers={"host": "evil.example"}), 400, "host_refused")
    refused(shared.client.get("/v1/models", headers={"origin": "http://evil.example"}), 403, "origin_refused")
    refused(shared.client.get("/v1/models", headers={"origin": "null"}), 403, "origin_refused")
    own = shared.client.get("/v1/models", headers={"origin": shared.url})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/adapters/a"),
        ("DELETE", "/v1/adapters/a"),
        ("POST", "/v1/adapters/a/verify"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    ],
)
def test_changes_need_the_admin_token(shared: Server, method: str, path: str) -> None:
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer tést".encode()},
        {"authorization": ADMIN["authorization"][:-1]},
    ):
        refused(shared.client.request(method, path, json={"lora_name": "a"}, headers=headers), 401, "not_authorized")


def test_only_the_named_routes_exist(shared: Server) -> None:
    for path in ("/invocations", "/pooling", "/tokenize", "/v1/nix"):
        refused(shared.post(path, {}), 404, "route_not_found")
    refused(shared.client.get("/v1/embeddings"), 405, "method_not_allowed")


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/rag/foo/query"), ("GET", "/v1/rag"), ("PUT", "/v1/rag/foo")])
def test_a_server_without_indexes_says_that_it_was_started_so(shared: Server, method: str, path: str) -> None:
    answer = shared.client.request(method, path, json={}, headers=ADMIN)
    refused(answer, 404, "route_not_found")
    assert "started without --indexes" in answer.json()["error"]["message"]
    assert "indexes" not in shared.post("/v1/ragtime", {}).json()["error"]["message"]


def test_health_metrics_and_docs_answer(shared: Server) -> None:
    assert shared.client.get("/health").json() == {"status": "alive"}
    assert shared.client.get("/ready").json()["ready"] is True
    shared.post("/v1/embeddings", {"input": "x", "adapter": "a"})
    text = shared.client.get("/metrics").text
    assert 'embedft_requests_total{adapter="a",base="texts",route="embeddings",status="ok"}' in text
    assert 'running_lora_adapters="a,b,q"' in text
    assert shared.client.get("/docs").status_code == 200


def test_openapi_resolves_every_reference(shared: Server) -> None:
    content = shared.client.get("/openapi.json").json()
    schemas = content["components"]["schemas"]

    def references(node: object) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [found for value in node.values() for found in references(value)]
        return [found for value in node for found in references(value)] if isinstance(node, list) else []

    assert all(reference.rpartition("/")[2] in schemas for reference in references(content))
    assert {"ChatRequest", "EmbeddingRequest", "PutAdapter"} <= set(schemas)


def test_engine_errors_keep_openais_envelope(shared: Server) -> None:
    response: httpx.Response = shared.post("/v1/chat/completions", {"model": "words", "messages": []})
    refused(response, 400, "invalid_parameter")

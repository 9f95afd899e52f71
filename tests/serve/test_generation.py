"""Chat and completions through the gateway: whole, streamed, cancelled; also by the real OpenAI client."""

import json
import re
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedft.errors import InputInvalid
from serve.config import BaseConfig
from serve.engines.fake import text
from serve.generation_routes import check_tools, renamed, without_choices
from serve.metrics import Meters, Outcome
from serve.schemas import ChatRequest
from tests.serve.test_choice import expected
from tests.serve.world import Server, World, put_adapter, wait_for

MESSAGES = [{"role": "user", "content": "say \u2028 it"}]


def engine_id(world: World, name: str) -> str:
    return f"{name}@{world.store.current(name)[:12]}"


@pytest.mark.parametrize("adapter", [None, "s", "t"])
def test_chat_is_answered_by_the_adapter_that_was_asked(shared: Server, shared_world: World, adapter: str | None) -> None:
    body = {"model": "words", "messages": MESSAGES, "adapter": adapter, "max_tokens": 3}
    response = shared.post("/v1/chat/completions", body)
    own = engine_id(shared_world, adapter) if adapter else "base"
    assert response.json()["choices"][0]["message"]["content"] == text(own, MESSAGES) + " word word"
    assert response.json()["model"] == (adapter or "words")
    assert response.headers["x-embedft-adapter"] == own


def test_several_prompts_and_n_are_answered_in_order(shared: Server, shared_world: World) -> None:
    body = {"model": "s", "prompt": ["one", "two"], "n": 2, "max_tokens": 1}
    choices = shared.post("/v1/completions", body).json()["choices"]
    own = engine_id(shared_world, "s")
    assert [choice["text"] for choice in choices] == [text(own, prompt) for prompt in ("one", "one", "two", "two")]


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_passes_through_under_the_public_name(shared: Server, shared_world: World, usage: bool) -> None:
    body = {"model": "words", "adapter": "s", "messages": MESSAGES, "stream": True, "max_tokens": 3}
    if usage:
        body["stream_options"] = {"include_usage": True}
    with shared.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = [line for line in response.read().decode().split("\n") if line]
        assert response.headers["x-embedft-adapter"] == engine_id(shared_world, "s")
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {event["model"] for event in events} == {"s"}
    assert len(events) == (4 if usage else 3)
    assert bool(events[-1].get("usage")) is usage
    assert events[0]["choices"][0]["delta"]["content"] == text(engine_id(shared_world, "s"), MESSAGES)


NASTY = [
    '"model":"x"',
    "\\",
    '\\"model": "y"',
    '"choices":[]',
    '\\\\"choices": []',
    "\u2028é",
    '{"model":"z","choices":[]}',
    '",\\"model\\":"',
]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    said=st.text() | st.sampled_from(NASTY) | st.lists(st.sampled_from(NASTY)).map("".join),
    public=st.text(min_size=1) | st.sampled_from(NASTY),
    empty=st.booleans(),
)
def test_an_event_gets_its_public_name_whatever_is_said_in_it(said: str, public: str, empty: bool) -> None:
    choice = {"index": 0, "delta": {"content": said}, "logprobs": {"content": [{"token": said}]}}
    event = {"id": said, "object": "chat.completion.chunk", "model": f"s@{said}", "choices": [] if empty else [choice]}
    for written in (json.dumps(event), json.dumps(event, ensure_ascii=False), json.dumps(event, separators=(",", ":"))):
        payload = written.encode("utf-8", "replace")
        assert json.loads(renamed(payload, public)) == {**json.loads(payload), "model": public}
        assert without_choices(payload) is empty


def test_streams_are_counted_though_nobody_asked_for_usage(shared: Server) -> None:
    before = _tokens(shared)
    shared.post("/v1/completions", {"model": "t", "prompt": "x", "stream": True, "max_tokens": 5})
    assert _tokens(shared) == before + 5


@pytest.mark.parametrize(
    ("engine", "parser", "choice", "refused"),
    [("vllm", None, None, True), ("vllm", None, "none", False), ("vllm", "hermes", None, False), ("peft", None, None, False)],
)
def test_tools_that_vllm_was_not_told_to_read_are_refused_in_the_servers_own_words(
    engine: Any, parser: str | None, choice: str | None, refused: bool
) -> None:
    body = ChatRequest.model_validate({"messages": MESSAGES, "tools": [{"type": "function"}], "tool_choice": choice})
    config = BaseConfig(name="words", model="m", task="causal_lm", engine=engine, tool_parser=parser)
    with pytest.raises(InputInvalid, match="`tool_parser` in the server's CONFIG") if refused else nullcontext():
        check_tools(body, cast("Any", SimpleNamespace(name="words", config=config)))


def test_the_first_token_is_waited_for_from_the_requests_coming(world: World, start: Callable[..., Server]) -> None:
    server = start(latency=0.3)
    server.post("/v1/completions", {"model": "s", "prompt": "x", "stream": True, "max_tokens": 2})
    found = server.client.get("/metrics").text
    waited = re.search(r'embedft_first_token_seconds_sum\{adapter="s",base="words"\} (\S+)', found)
    assert waited
    assert 0.3 <= float(waited[1]) < 3


def test_a_whole_request_begins_with_its_wait_for_an_engine() -> None:
    meters = Meters(cast("Any", SimpleNamespace(held=list)))
    with meters.measured("words", "s", "chat", Outcome(), began=time.perf_counter() - 5):
        pass
    assert 5 <= meters.seconds.labels("words", "s", "chat")._sum.get() < 6  # pyright: ignore[reportPrivateUsage]


def test_a_request_that_ended_is_no_longer_running_and_one_that_failed_is_counted_so() -> None:
    loading = SimpleNamespace(loads={}, evictions={})
    meters = Meters(cast("Any", SimpleNamespace(draining=list, earlier=list, live={}, engines={}, loading=loading)))
    with meters.measured("words", "s", "chat", Outcome(), began=0.0):
        assert b'embedft_running_requests{adapter="s",base="words"} 1.0' in meters.render()
    with pytest.raises(ValueError, match="planted"), meters.measured("words", "s", "chat", Outcome(), began=0.0):
        raise ValueError("planted")
    told = meters.render()
    assert b'embedft_running_requests{adapter="s",base="words"} 0.0' in told
    for status in (b"ok", b"error"):
        assert b'embedft_requests_total{adapter="s",base="words",route="chat",status="%s"} 1.0' % status in told


def _tokens(server: Server) -> float:
    wanted = 'embedft_tokens_total{adapter="t",base="words",kind="completion"}'
    lines = [line for line in server.client.get("/metrics").text.splitlines() if line.startswith(wanted)]
    return float(lines[0].split()[-1]) if lines else 0.0


def test_a_client_that_hangs_up_cancels_its_stream_in_the_engine(shared: Server) -> None:
    before = len(shared.events("cancelled"))
    body = {"model": "s", "prompt": "x", "stream": True, "max_tokens": 2000}
    with shared.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_raw())
    wait_for(lambda: len(shared.events("cancelled")) == before + 1)
    wait_for(lambda: shared.client.get("/v1/adapters/s").json()["leases"] == 0)
    wait_for(lambda: response.headers["x-request-id"] in shared.log.read_text())
    line = shared.logged(response.headers["x-request-id"])
    assert (line["status"], line["ended"]) == (200, "cancelled"), "the log told it from one that was answered to its end"


def test_a_client_that_hangs_up_frees_its_lease_without_a_stream(shared: Server) -> None:
    place = urlsplit(shared.url)
    content = json.dumps({"model": "t", "prompt": "x", "max_tokens": 4000}).encode()
    fields = f"Host: {place.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    head = f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n"
    with socket.create_connection((place.hostname or "", place.port or 0)) as connection:
        connection.sendall(head.encode() + content)
        wait_for(lambda: shared.client.get("/v1/adapters/t").json()["leases"] == 1)
    wait_for(lambda: shared.client.get("/v1/adapters/t").json()["leases"] == 0, 5)


def test_the_openai_client_works_unchanged(shared: Server, shared_world: World) -> None:
    client = openai.OpenAI(base_url=f"{shared.url}/v1", api_key="none")
    own = engine_id(shared_world, "s")
    chat = client.chat.completions.create(model="s", messages=[{"role": "user", "content": "hi"}], max_tokens=2, temperature=0)
    assert chat.choices[0].message.content == text(own, [{"role": "user", "content": "hi"}]) + " word"
    stream = client.chat.completions.create(
        model="words",
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        extra_body={"adapter": "s"},
        stream_options={"include_usage": True},
    )
    parts = list(stream)
    assert parts[0].choices[0].delta.content == text(own, [{"role": "user", "content": "hi"}])
    assert parts[-1].usage is not None
    assert client.completions.create(model="words:t", prompt="hi").choices[0].text.startswith(text(engine_id(shared_world, "t"), "hi"))
    embedding = client.embeddings.create(model="a", input=["hello"])  # the client asks for base64 by itself
    np.testing.assert_allclose(embedding.data[0].embedding, expected(shared_world, "a", "hello"), atol=1e-6)
    assert {model.id for model in client.models.list()} >= {"texts", "a"}
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="nix", input="x")
    assert caught.value.code == "model_not_found"


def test_a_chat_that_would_be_rendered_otherwise_than_in_training_is_refused(changing: Server, changing_world: World) -> None:
    from embedft.model_folder import own_template, template_hash

    hashes = {"as-trained": template_hash(own_template(changing_world.words)), "otherwise": template_hash("{{ messages }}")}
    status: dict[str, list[int]] = {}
    for number, (name, wanted) in enumerate(hashes.items()):
        put_adapter(changing_world.store, name, changing_world.words, seed=60 + number, task="causal_lm", template_hash=wanted)
        assert changing.put(name).status_code == 200
        chat = changing.post("/v1/chat/completions", {"model": name, "messages": MESSAGES, "max_tokens": 1})
        plain = changing.post("/v1/completions", {"model": name, "prompt": "x", "max_tokens": 1})
        status[name] = [chat.status_code, plain.status_code]
        if name == "otherwise":
            assert chat.json()["error"]["code"] == "template_mismatch"
            assert "/v1/completions" in chat.json()["error"]["message"]
    assert status == {"as-trained": [200, 200], "otherwise": [409, 200]}

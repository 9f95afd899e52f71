"""What a request may ask of the peft engine beyond a plain answer: penalties, an answer of a schema, tool calls; each row for itself."""

import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from embedft.errors import InputInvalid
from embedft.model_folder import CHATML
from serve.engines.peft.tools import ToolCall, ToolReader, forced
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import EngineProcess, engine, random_adapter, solo
from tests.serve.test_engine_peft import PROMPTS, code, events

CALLS = "((message['tool_calls'] | map(attribute='function') | list | tojson) if message['tool_calls'] else '')"
TELLS_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
    + CHATML.replace("message['content']", "(message['content'] or '') + " + CALLS)
)
TURN = [{"role": "user", "content": "what does red mean?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green"]},
        "sure": {"type": "boolean"},
        "level": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["colour", "sure", "level"],
    "additionalProperties": False,
}
LOOK: dict[str, Any] = {"type": "function", "function": {"name": "look", "description": "Look it up", "parameters": SCHEMA}}
WAIT: dict[str, Any] = {"type": "function", "function": {"name": "wait"}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("llama") / "base")
    (folder / "chat_template.jinja").write_text(TELLS_TOOLS)
    return folder


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(tmp_path_factory.mktemp("adapter") / "a", llama, "causal_lm", seed=0)


@pytest.fixture(scope="module")
def server(llama: Path, adapter: Path) -> Iterator[EngineProcess]:
    with engine("peft", llama, "causal_lm") as process:
        process.load("a", adapter)
        yield process


def generated(model: Any, prompt: list[int], **more: Any) -> list[int]:
    """What transformers' own generate gives."""
    import torch

    ids = torch.tensor([prompt])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, eos_token_id=None, **more)
    return made[0, len(prompt) :].tolist()


def penalised(model: Any, prompt: list[int], *, presence: float, frequency: float) -> list[int]:
    """OpenAI's formula, a token at a time."""
    import torch

    tokens: list[int] = []
    for _ in range(16):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1]
        for token in set(tokens):
            scores[token] -= presence + frequency * tokens.count(token)
        tokens.append(int(scores.argmax()))
    return tokens


def test_a_penalty_is_transformers_own_and_belongs_to_one_row(server: EngineProcess, llama: Path, adapter: Path) -> None:
    asked: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6},
        {"presence_penalty": 2.0, "frequency_penalty": 1.0},
    ]
    jobs = list(itertools.product(("base", "a"), range(len(PROMPTS)), asked))
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: server.complete(job[0], PROMPTS[job[1]], max_tokens=16, **job[2])["token_ids"], jobs))
    models = {"base": solo(llama, "causal_lm", None), "a": solo(llama, "causal_lm", adapter)}
    alone: dict[str, list[int]] = {}
    for (name, k, more), tokens in zip(jobs, answers, strict=True):
        model, prompt = models[name], PROMPTS[k]
        expected = penalised(model, prompt, presence=2, frequency=1) if "presence_penalty" in more else generated(model, prompt, **more)
        assert tokens == expected, (name, k, more)
        alone[f"{name} {k} {more}"] = expected
    assert len({str(tokens) for tokens in alone.values()}) > len(alone) * 0.8  # the penalties do change the answers


def test_a_bias_is_transformers_own_and_the_likeliest_alone_is_greedy(server: EngineProcess, llama: Path, adapter: Path) -> None:
    models = {"base": solo(llama, "causal_lm", None), "a": solo(llama, "causal_lm", adapter)}
    for name, model in models.items():
        plain = generated(model, PROMPTS[0])
        bias = {plain[0]: -100.0, plain[1]: 1.5, 7: 2.0}
        biased = server.complete(name, PROMPTS[0], max_tokens=16, logit_bias={str(token): value for token, value in bias.items()})
        expected = generated(model, PROMPTS[0], sequence_bias={(token,): value for token, value in bias.items()})
        assert biased["token_ids"] == expected != plain
        assert server.complete(name, PROMPTS[0], max_tokens=16, temperature=3, min_p=1)["token_ids"] == plain


def test_no_answer_ends_before_its_least_tokens(server: EngineProcess, llama: Path, adapter: Path) -> None:
    models = {"base": solo(llama, "causal_lm", None), "a": solo(llama, "causal_lm", adapter)}
    for name, model in models.items():
        plain = generated(model, PROMPTS[0])
        ender = plain[3]
        asked: dict[str, Any] = {"max_tokens": 16, "stop_token_ids": [ender]}
        assert len(server.complete(name, PROMPTS[0], **asked)["token_ids"]) == plain.index(ender) + 1
        held = server.complete(name, PROMPTS[0], **asked, min_tokens=9)["token_ids"]
        assert held[:9] == generated(model, PROMPTS[0], sequence_bias={(ender,): -1e9})[:9]
        assert held == [*held[:9], *generated(model, [*PROMPTS[0], *held[:9]])[: len(held) - 9]]  # from the tenth on it may end
        assert ender not in held[:-1]


def test_an_answer_keeps_to_its_schema_and_its_neighbours_do_not(server: EngineProcess) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA}}
    structured = {"temperature": 1.5, "max_tokens": 60, "response_format": wanted, "n": 3, "seed": 5, "ignore_eos": False}
    free = server.complete("a", PROMPTS[0], max_tokens=20)

    def ask(number: int) -> Any:
        if number % 2:
            return server.complete("a", PROMPTS[0], max_tokens=20)
        return server.post("/v1/chat/completions", model="a", messages=TURN, **structured).json()["choices"]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    assert answers[1]["token_ids"] == answers[3]["token_ids"] == free["token_ids"]
    assert answers[0] == answers[2]
    for choice in answers[0]:
        jsonschema.validate(found := json.loads(choice["message"]["content"]), SCHEMA)
        assert choice["message"]["content"] == json.dumps(found)  # with as much space as Python writes, and no more
        assert choice["finish_reason"] == "stop"
    assert len({choice["message"]["content"] for choice in answers[0]}) > 1
    anything = server.complete("base", PROMPTS[1], response_format={"type": "json_object"}, max_tokens=12)["text"]
    assert anything.startswith("{")
    assert not free["text"].startswith("{")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {}, "minItems": 10**9},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 10**7},
        {"type": "object", "patternProperties": {f"^a{number}x.*y": {} for number in range(1500)}},
        {"type": "string", "allOf": [{"pattern": f"(.*x){{{number}}}"} for number in range(40)]},
        {"$ref": "#"},
    ],
    ids=["items", "choices", "patterns", "allOf", "itself"],
)
def test_a_schema_that_would_take_all_memory_or_time_is_a_400_and_the_engine_lives(server: EngineProcess, schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "huge", "schema": schema}}
    for _ in range(2):
        answer = server.post("/v1/completions", model="base", prompt="red", response_format=wanted)
        assert (answer.status_code, code(answer)) == (400, "schema_invalid"), answer.text
        assert "\n" not in answer.json()["error"]["message"]
    assert server.post("/v1/completions", model="base", prompt="red", max_tokens=2).status_code == 200


def test_a_known_schema_does_not_wait_for_the_trial_of_anothers(server: EngineProcess) -> None:
    def ask(schema: dict[str, Any]) -> httpx.Response:
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return server.post("/v1/completions", model="base", prompt="red", response_format=wanted, max_tokens=2)

    assert ask({"type": "integer"}).status_code == 200
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(ask, {"type": "object", "patternProperties": {f"^a{number}y.*z": {} for number in range(1500)}})
        time.sleep(0.3)
        assert ask({"type": "integer"}).status_code == 200
        assert not slow.done()
        assert slow.result().status_code == 400


def test_a_tool_that_must_be_called_is_called_with_arguments_of_its_schema(server: EngineProcess) -> None:
    plain = server.post("/v1/chat/completions", model="a", messages=TURN, max_tokens=4, temperature=0).json()
    body = {"model": "a", "messages": TURN, "tools": [LOOK, WAIT], "max_tokens": 80, "temperature": 0}
    named = {"type": "function", "function": {"name": "look"}}
    made = server.post("/v1/chat/completions", **body, tool_choice=named).json()
    assert made["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    choice = made["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], choice["message"]["content"], call["function"]["name"]) == ("tool_calls", None, "look")
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    chunks = list(events(server, "/v1/chat/completions", **body, tool_choice=named))
    deltas = [one["delta"]["tool_calls"] for chunk in chunks for one in chunk["choices"] if "tool_calls" in one["delta"]]
    assert [[part["index"], part["function"]] for delta in deltas for part in delta] == [[0, call["function"]]]
    assert [one["delta"].get("content") or "" for chunk in chunks for one in chunk["choices"]] == [""] * len(chunks)
    required = server.post("/v1/chat/completions", **body, tool_choice="required").json()["choices"][0]
    assert [one["function"]["name"] for one in required["message"]["tool_calls"]] in (["look"], ["wait"])
    followed = [*TURN, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "stop"}]
    again = server.post("/v1/chat/completions", **{**body, "messages": followed})
    assert again.json()["choices"][0]["message"]["content"], again.text
    assert "tool_calls" not in again.json()["choices"][0]["message"]


WRONG_CALLS: list[Any] = [
    5,
    True,
    "look",
    {"function": {}},
    [5],
    [{"function": 5}],
    [{"function": {"name": "x", "arguments": "[" * 10**5}}],
]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "gone"}}}, "invalid_request"),
        ({"tool_choice": "required"}, "invalid_request"),
        (
            {"tools": [{**WAIT, "function": {"name": "x", "parameters": {"$defs": 5}}}], "tool_choice": "required"},
            "schema_invalid",
        ),
        ({"tools": [LOOK], "tool_choice": "required", "response_format": {"type": "json_object"}}, "unsupported_parameter"),
        ({"tools": [{"type": "code_interpreter"}]}, "unsupported_parameter"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}]}, "messages_invalid"),
        *(({"messages": [{"role": "assistant", "tool_calls": calls}]}, "messages_invalid") for calls in WRONG_CALLS),
    ],
)
def test_a_wrong_call_for_tools_is_a_400(server: EngineProcess, more: dict[str, Any], expected: str) -> None:
    answer = server.post("/v1/chat/completions", **{"model": "base", "messages": TURN, **more})
    assert (answer.status_code, code(answer)) == (400, expected), answer.text


HERMES = '<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>'
READ: dict[str, tuple[str, list[tuple[str, str]]]] = {
    HERMES: ("", [("look", '{"a": 1}')]),
    f"I shall look.\n{HERMES}\n{HERMES.replace('look', 'wait')}": ("I shall look.\n", [("look", '{"a": 1}'), ("wait", '{"a": 1}')]),
    '<tool_call>{"name": "look", "arguments": {}}': ("", [("look", "{}")]),
    ' {"name": "look", "parameters": {"a": [2]}}': ("", [("look", '{"a": [2]}')]),
    '[{"name": "look", "arguments": {}}, {"name": "wait", "arguments": {}}]': ("", [("look", "{}"), ("wait", "{}")]),
    '{"name": "other", "arguments": {}}': ('{"name": "other", "arguments": {}}', []),
    '{"name": "look", "arguments": 5}': ('{"name": "look", "arguments": 5}', []),
    "a < b, and <tool is no call": ("a < b, and <tool is no call", []),
    'as in {"name": "look", "arguments": {}}': ('as in {"name": "look", "arguments": {}}', []),
    "<tool_call>not JSON</tool_call>": ("<tool_call>not JSON</tool_call>", []),
    "": ("", []),
}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("text", READ)
def test_calls_are_read_from_an_answer_however_it_is_cut(text: str, size: int) -> None:
    reader = ToolReader(frozenset({"look", "wait"}))
    told = "".join(reader.feed(text[at : at + size]) for at in range(0, len(text), size))
    rest, calls = reader.end()
    said, expected = READ[text]
    assert told + rest == said
    assert [(call.name, call.arguments) for call in calls] == expected
    assert all(isinstance(call, ToolCall) for call in calls)


def test_definitions_of_a_tools_parameters_move_to_the_root() -> None:
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"], "$defs": {"A": {"const": 7}}}
    schema = forced([("look", parameters), ("wait", None)])
    jsonschema.validate({"name": "look", "arguments": {"a": 7}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "look", "arguments": {"a": 8}}, schema)
    assert forced([("look", parameters), ("wait", parameters)])["$defs"] == parameters["$defs"]
    with pytest.raises(InputInvalid, match="two tools define"):
        forced([("look", parameters), ("wait", {**parameters, "$defs": {"A": {"const": 8}}})])

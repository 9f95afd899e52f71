"""Real clients on a real engine: the gateway over peft engines with tiny bases. Also adapters without passport, and mixes of them."""

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from embedft.adapters.store import AdapterStore
from embedft.cli import main
from embedft.encode import Encoder, EncodeSettings
from embedft.model_folder import describe
from serve.proving import run
from tests.fixtures_embedding import text as fact
from tests.fixtures_embedding import tiny_encoder
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import featured_adapter, random_adapter, solo
from tests.serve.test_choice import refused
from tests.serve.world import ADMIN, ROOT, TOKEN, Server, launch

TURN: Any = [{"role": "user", "content": "number 3: what does red mean?"}]
QUESTION = "number 3: what does red mean?"

README_NAMES = {"a": "legal", "b": "med", "e": "support"}


@dataclass
class Real:
    server: Server
    store: AdapterStore
    llama: Path
    texts: Path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    folder = tmp_path_factory.mktemp("real")
    llama, texts = tiny_llama(folder / "llama"), tiny_encoder(folder / "texts", pooling="mean")
    store = AdapterStore(folder / "adapters")
    for name, base, task, seed in (("a", llama, "causal_lm", 1), ("b", llama, "causal_lm", 2), ("e", texts, "embedding", 3)):
        with store.stage() as stage:
            random_adapter(stage, base, task, seed=seed)
            run({"kind": "import", "folder": str(stage), "base": str(base), "task": task, "name": name, "model": base.name})
            generation = store.put(stage, name)
        store.point(README_NAMES[name], generation)
    bases = [
        {"name": "words", "model": str(llama), "task": "causal_lm", "engine": "peft", "max_lora_rank": 16},
        {"name": "texts", "model": str(texts), "task": "embedding", "engine": "peft"},
        {"name": "cross", "model": str(cross_encoder(folder / "cross", texts)), "task": "cross_encoder"},
    ]
    server = launch({"bases": bases}, folder=folder, store=store.root)
    server.wait_ready(120)
    yield Real(server, store, llama, texts)
    server.stop()


@pytest.fixture(scope="module")
def client(real: Real) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real.server.url}/v1", api_key="none")


def whole(real: Real, **body: Any) -> str:
    """What plain HTTP says, for comparison."""
    answer = real.server.post("/v1/chat/completions", {"messages": TURN, "max_tokens": 12, "temperature": 0, **body})
    return answer.json()["choices"][0]["message"]["content"]


def test_openais_client_chats_streams_counts_and_samples(real: Real, client: openai.OpenAI) -> None:
    chat: Any = {"model": "a", "messages": TURN, "max_tokens": 12, "temperature": 0}
    made = client.chat.completions.create(**chat)
    assert made.choices[0].message.content == whole(real, model="a") != whole(real, model="b")
    parts = list(client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}))
    told = "".join(choice.delta.content or "" for part in parts for choice in part.choices)
    assert told == made.choices[0].message.content
    assert made.usage is not None
    assert parts[-1].usage is not None
    assert parts[-1].usage.completion_tokens == made.usage.completion_tokens
    several = client.completions.create(model="words:b", prompt=[QUESTION, "x"], n=2, seed=3, temperature=1.5, max_tokens=4, logprobs=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs and len(choice.logprobs.token_logprobs or []) == 4 for choice in several.choices)
    scored = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    assert scored.choices[0].logprobs is not None
    assert len((scored.choices[0].logprobs.content or [])[0].top_logprobs) == 2


def test_openais_client_embeds_as_floats_and_as_base64(real: Real, client: openai.OpenAI) -> None:
    formats: tuple[Any, Any] = ("float", "base64")
    made: Any = [client.embeddings.create(model="e", input=[QUESTION, "find"], encoding_format=how).data for how in formats]
    info = describe(real.texts)
    encoder = Encoder(solo(real.texts, "embedding", real.store.folder("e")), real.texts, EncodeSettings(info.pooling, info.normalize, 64))
    alone = encoder.encode([QUESTION, "find"])
    np.testing.assert_allclose([row.embedding for row in made[0]], alone, atol=1e-5)
    packed = np.frombuffer(base64.b64decode(made[1][0].embedding), "<f4")
    np.testing.assert_array_equal(packed, np.float32(made[0][0].embedding))
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="e", input="x", dimensions=7)
    assert caught.value.code == "dimensions_unsupported"


def test_openais_client_gets_an_answer_of_its_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"], "additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}}
    made = client.chat.completions.create(model="a", messages=TURN, response_format=wanted, presence_penalty=1.0, max_tokens=40)
    assert isinstance(json.loads(made.choices[0].message.content or "")["sure"], bool)


def test_what_the_peft_engine_cannot_do_is_a_400_with_a_stable_code(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    more: Any
    for more, code in (({"logit_bias": {"9999999": 1}}, "token_unknown"), ({"tools": tools}, "tools_unsupported")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="a", messages=TURN, **more)
        assert caught.value.code == code
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="a", prompt="word " * 3000, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    assert "2048" in caught.value.message


def test_langchains_classes_work_unchanged(real: Real) -> None:
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    url = f"{real.server.url}/v1"
    chat: Any = ChatOpenAI(model="a", base_url=url, api_key="none", temperature=0, max_tokens=12)
    assert chat.invoke(QUESTION).content == whole(real, model="a")
    assert "".join(part.content for part in chat.stream(QUESTION)) == whole(real, model="a")
    embeddings: Any = OpenAIEmbeddings(model="e", base_url=url, api_key="none", check_embedding_ctx_length=False)
    direct = real.server.post("/v1/embeddings", {"model": "e", "input": [QUESTION]}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(embeddings.embed_query(QUESTION), direct, atol=1e-6)


def test_llama_indexs_classes_work_unchanged(real: Real) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.embeddings.openai import OpenAIEmbedding
    from llama_index.llms.openai_like import OpenAILike

    url = f"{real.server.url}/v1"
    model: Any = OpenAILike(model="b", api_base=url, api_key="none", is_chat_model=True, temperature=0, max_tokens=12)
    assert model.chat([ChatMessage(role="user", content=QUESTION)]).message.content == whole(real, model="b")
    assert "".join(part.delta or "" for part in model.stream_chat([ChatMessage(role="user", content=QUESTION)])) == whole(real, model="b")
    embedding: Any = OpenAIEmbedding(model_name="e", api_base=url, api_key="none")
    direct = real.server.post("/v1/embeddings", {"model": "e", "input": [QUESTION]}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(embedding.get_text_embedding(QUESTION), direct, atol=1e-6)


def cross_encoder(folder: Path, like: Path) -> Path:
    """A random BERT with one label, and the tokenizer of `like`."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(5)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=400, max_position_embeddings=64, num_labels=1, initializer_range=0.4, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


def test_a_cross_encoder_reranks_by_its_own_scores(real: Real) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = real.server.log.parent / "cross"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    query, texts = "find : find", [fact("document", topic, 0) for topic in range(5)]
    pairs = tokenizer([query] * 5, texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        alone = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**pairs).logits[:, 0].sigmoid()
    body = {"model": "cross", "query": query, "documents": texts}
    answer = real.server.post("/v1/rerank", {**body, "top_n": 3})
    results = answer.json()["results"]
    assert [row["index"] for row in results] == alone.argsort(descending=True)[:3].tolist()
    np.testing.assert_allclose([row["relevance_score"] for row in results], alone.sort(descending=True).values[:3], atol=1e-4)
    long = real.server.post("/v1/rerank", {**body, "documents": ["find " * 100]}).json()
    assert long["truncated"] == 1
    assert long["usage"]["total_tokens"] == 64
    refused(real.server.post("/v1/rerank", {**body, "query": "find " * 100}), 400, "input_too_long")
    refused(real.server.post("/v1/rerank", {**body, "adapter": "e"}), 400, "adapter_conflict")
    refused(real.server.post("/v1/embeddings", {"model": "cross", "input": "x"}), 400, "wrong_task")


def test_an_encoder_without_a_classifier_is_no_cross_encoder(tmp_path: Path) -> None:
    from serve.engines.cross import CrossEncoder

    with pytest.raises(SystemExit, match=r"lacks \d of its weights .*classifier"):
        CrossEncoder(tiny_encoder(tmp_path / "plain", pooling="mean"), max_length=64)


def logprobs(real: Real, adapter: Any) -> list[float]:
    """Of the prompt's own tokens, by the engine."""
    ids = [5, 9, 100, 33, 7, 8, 60]
    body = {"model": "words", "adapter": adapter, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    answer = real.server.post("/v1/completions", body, timeout=120)
    assert answer.status_code == 200, answer.text
    found = answer.json()["choices"][0]["prompt_logprobs"]
    return [entry[str(token)]["logprob"] for entry, token in zip(found[1:], ids[1:], strict=True)]


def test_an_adapter_without_passport_is_proven_by_plain_peft_and_marked(real: Real, capsys: pytest.CaptureFixture[str]) -> None:
    folder = real.store.root / "incoming"
    capsys.readouterr()
    featured_adapter(folder, real.llama, seed=9, use_rslora=True, rank_pattern={"q_proj": 2})
    refused(real.server.put("found", {"source": "incoming"}), 422, "adapter_invalid")
    refused(real.server.put("found", {"source": "incoming", "base": "nix"}), 404, "model_not_found")
    weights, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    weights.rename(pickled)
    refused(real.server.put("found", {"source": "incoming", "base": "words"}), 422, "adapter_invalid")
    pickled.rename(weights)
    (folder / "training_args.bin").write_bytes(b"pickle")  # as every trainer leaves it there; nothing reads it
    answer = real.server.client.put("/v1/adapters/found", json={"source": "incoming", "base": "words"}, headers=ADMIN, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["unproven"] is True
    assert answer.json()["probe"]["passed"] is True
    assert next(row for row in real.server.client.get("/v1/models").json()["data"] if row["id"] == "found")["unproven"] is True
    alone = _solo_logprobs(real, [("incoming", 1.0)])
    np.testing.assert_allclose(logprobs(real, "found"), alone, atol=1e-3)
    command = ["adapters", "import", str(folder), "--adapters", str(real.store.root), "--name", "again", "--json"]
    assert main([*command, "--base", str(real.llama)]) == 2
    assert main([*command, "--base", str(real.llama), "--task", "causal_lm"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["generation"] == real.store.current("found")
    shutil.rmtree(folder)


def test_a_mix_is_the_weighted_sum_of_its_members_effects(real: Real) -> None:
    wanted = _solo_logprobs(real, [("legal", 0.7), ("med", 0.3)])
    mixed = {"mix": [{"adapter": "legal", "weight": 0.7}, {"adapter": "med", "weight": 0.301}]}  # the README's, made once for both
    np.testing.assert_allclose(logprobs(real, mixed), wanted, atol=1e-3)
    assert not np.allclose(logprobs(real, "a"), wanted, atol=1e-2)
    np.testing.assert_allclose(logprobs(real, {"mix": list(reversed(mixed["mix"]))}), wanted, atol=1e-3)
    (name,) = [row["name"] for row in real.server.client.get("/v1/adapters").json()["data"] if row["name"].startswith("mix-")]
    assert name not in real.store.names()
    bad: list[tuple[Any, int, str]] = [
        ([("a", 0.5), ("a", 0.5)], 400, "mix_invalid"),
        ([("a", 0.001)], 400, "mix_invalid"),
        ([("a", 1), ("b", 1), ("e", 1)], 400, "mix_incompatible"),
        ([("a", 1), ("nix", 1)], 404, "adapter_not_found"),
        ([("a", 1), ("b", 1), ("a@" + "0" * 12, 1)], 404, "adapter_not_found"),
    ]
    for members, status, code in bad:
        adapter = {"mix": [{"adapter": member, "weight": weight} for member, weight in members]}
        refused(real.server.post("/v1/completions", {"model": "words", "prompt": "x", "adapter": adapter}), status, code)
    if "found" in real.store.names():
        adapter = {"mix": [{"adapter": member, "weight": 1} for member in ("a", "b", "found")]}
        refused(real.server.post("/v1/completions", {"model": "words", "prompt": "x", "adapter": adapter}), 400, "mix_rank")


def _solo_logprobs(real: Real, members: list[tuple[str, float]]) -> list[float]:
    """By PEFT: the members loaded side by side and added up by its own weighted concatenation."""
    import peft
    import torch

    from embedft.base import load_model

    base = load_model(real.llama, task="causal_lm")
    folders = [real.store.root / name if name == "incoming" else real.store.folder(name) for name, _ in members]
    model: Any = peft.PeftModel.from_pretrained(base, str(folders[0]), adapter_name="m0")
    if len(members) > 1:
        for number, folder in enumerate(folders[1:], 1):
            model.load_adapter(str(folder), adapter_name=f"m{number}")
        names = [f"m{number}" for number in range(len(members))]
        model.add_weighted_adapter(names, [weight for _, weight in members], "sum", combination_type="cat")
        model.set_adapter("sum")
    model.eval()
    ids = [5, 9, 100, 33, 7, 8, 60]
    with torch.inference_mode():
        scores = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
    return [float(scores[k, token]) for k, token in enumerate(ids[1:])]


def examples() -> list[str]:
    return re.findall(r"```sh\n(.*?)```", (ROOT / "serve" / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(examples())))
def test_the_readmes_examples_run(real: Real, number: int) -> None:
    place = real.server.url.removeprefix("http://")
    script = examples()[number].replace("localhost:8000", place)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], env={**os.environ, "ADMIN": TOKEN}, capture_output=True, text=True)
    assert done.returncode == 0, (script, done.stdout[-500:], done.stderr)
    assert "curl" in script

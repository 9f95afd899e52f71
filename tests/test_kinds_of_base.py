"""Adapters trained here on each kind of base: served by our vLLM, and loaded by plain vLLM and plain sentence-transformers."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec, base_folder
from embedft.encode import Encoder
from embedft.model_folder import quantization_of
from embedft.verify import settings_of
from tests.fixtures_embedding import tiny_encoder
from tests.line import PROMPTS, QUERIES, TOKENS, solo_answers, solo_vectors, train_causal_lm, train_embedding
from tests.serve.world import launch

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def test_int8_cls_pooled_and_last_token_pooled_bases_serve_what_was_trained_on_them(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    cls = tiny_encoder(tmp_path / "cls", pooling="cls")
    bases: dict[str, dict[str, str]] = {
        "int8": {"model": "minilm", "quantization": "int8"},
        "cls": {"model": str(cls)},
        "lasttoken": {"model": "seed-lm", "quantization": "nf4"},
    }
    generations = {name: train_embedding(store, name, tmp_path / "data", seed=1, **base) for name, base in bases.items()}
    served = [{"name": f"base-{name}", **base, "task": "embedding", "engine": "vllm", "max_loras": 1} for name, base in bases.items()]
    server = launch({"bases": served}, folder=tmp_path, store=store.root)
    try:
        server.wait_ready(400)
        for name, base in bases.items():
            body = {"model": f"base-{name}", "input": QUERIES, "input_type": "query"}
            alone = {key: solo_vectors(store, key, spec=BaseSpec(**base)) for key in (None, generations[name])}
            assert (alone[None] * alone[generations[name]]).sum(1).max() < 0.999, "the adapter changes too little to tell"
            for adapter, expected in ((None, alone[None]), (name, alone[generations[name]])):
                answer = server.post("/v1/embeddings", body | {"adapter": adapter}, timeout=120)
                vectors = np.array([row["embedding"] for row in answer.json()["data"]])
                cosines = (vectors * expected).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(expected, axis=1)
                assert cosines.min() >= 0.9999, (name, adapter, cosines)
        for name in ("cls", "lasttoken"):
            folder = base_folder(BaseSpec(**bases[name]))
            plain, ours = plain_sentence_transformers(store.folder(name), folder, tmp_path / f"plain-{name}"), _ours(store, name, folder)
            if quantization_of(folder) == "none":
                assert np.abs(plain - ours).max() < 1e-4
            cosines = (plain * ours).sum(1) / np.linalg.norm(plain, axis=1) / np.linalg.norm(ours, axis=1)
            assert cosines.min() >= 0.9999, "bitsandbytes alone multiplies 4-bit weights in bf16 where the processor can"
    finally:
        assert server.stop() == 0


def _ours(store: AdapterStore, name: str, folder: Path) -> np.ndarray:
    from embedft.base import load_model
    from embedft.methods import load_adapter

    model = load_adapter(load_model(folder, task="embedding"), store.folder(name))
    return Encoder(model, folder, settings_of(store.passport(name))).encode(QUERIES, input_type="query")


def with_base(adapter: Path, base: Path, out: Path) -> Path:
    """A copy of an adapter folder that names its base by a path: plain libraries know no built-in names."""
    shutil.copytree(adapter, out)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return out


def plain_sentence_transformers(adapter: Path, base: Path, out: Path) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(with_base(adapter, base, out)), device="cpu")
    model.float()
    return model.encode(QUERIES, prompt_name="query" if "query" in model.prompts else None)


PLAIN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

answers = {}
for task, base, adapter, inputs in json.loads(sys.argv[1]):
    common = dict(model=base, enable_lora=True, max_loras=1, max_lora_rank=16, enforce_eager=True, dtype="float32")
    common["kv_cache_memory_bytes"] = 1 << 28
    request = LoRARequest("trained-here", 1, adapter)
    if task == "embedding":
        llm = LLM(**common, runner="pooling", max_model_len=256)
        outputs = llm.embed([{"prompt_token_ids": ids} for ids in inputs], lora_request=request, use_tqdm=False)
        answers[task] = [output.outputs.embedding for output in outputs]
    else:
        llm = LLM(**common, max_model_len=256)
        chats = [[{"role": "user", "content": text}] for text in inputs]
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=8), lora_request=request, use_tqdm=False)
        answers[task] = [output.outputs[0].text for output in outputs]
    del llm
print("ANSWERS" + json.dumps(answers))
"""


@dataclass(frozen=True)
class Plain:
    """Adapters trained here over the unquantized built-in bases, and what stock vLLM answers with each, given by its path."""

    store: AdapterStore
    generations: dict[str, str]
    answers: dict[str, list[Any]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Plain:
    """One interpreter for both, with no plugin and nothing of ours imported."""
    folder = tmp_path_factory.mktemp("plain")
    store = AdapterStore(folder / "adapters")
    generations = {
        "embedding": train_embedding(store, "a", folder / "data", seed=1, model="minilm"),
        "causal_lm": train_causal_lm(store, "s", folder / "data", seed=1, model="seed-lm"),
    }
    minilm = base_folder(BaseSpec("minilm"))
    ids = Encoder(None, minilm, settings_of(store.passport("a"))).preparer.prepare(QUERIES, input_type="query").ids
    jobs = [
        ("embedding", str(minilm), str(store.folder(generations["embedding"])), ids),
        ("causal_lm", str(base_folder(BaseSpec("seed-lm"))), str(store.folder(generations["causal_lm"])), PROMPTS),
    ]
    env = {**os.environ, "VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run([sys.executable, "-c", PLAIN_VLLM, json.dumps(jobs)], env=env, capture_output=True, text=True, check=False)
    found = [line.removeprefix("ANSWERS") for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert found, done.stderr[-3000:]
    return Plain(store, generations, json.loads(found[0]))


def test_plain_vllm_loads_an_embedding_adapter_by_its_path(plain: Plain) -> None:
    vectors = np.array(plain.answers["embedding"])
    expected = solo_vectors(plain.store, plain.generations["embedding"], spec=BaseSpec("minilm"))
    assert (vectors * expected).sum(1).min() >= 0.9999
    assert (vectors * solo_vectors(plain.store, None, spec=BaseSpec("minilm"))).sum(1).max() < 0.999


def test_plain_vllm_loads_a_language_model_adapter_by_its_path(plain: Plain) -> None:
    assert TOKENS == 8
    answers = plain.answers["causal_lm"]
    for answer, solo in zip(answers, solo_answers(plain.store, plain.generations["causal_lm"], spec=BaseSpec("seed-lm")), strict=True):
        assert solo.equals(answer), (answer, solo)
    base = solo_answers(plain.store, None, spec=BaseSpec("seed-lm"))
    assert all(answer != solo.text for answer, solo in zip(answers, base, strict=True))

"""In bf16, where the processor multiplies in it: adapters train, pass their probes in both engines and answer there as they did alone."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedft.adapters.store import AdapterStore
from embedft.base import BaseSpec
from embedft.cli import main
from embedft.verify import refused_here, verify
from tests.fixtures_lm import planted_rows, tiny_llama, write_jsonl
from tests.line import OWN_WORDS, PROMPTS, QUERIES, TOKENS, solo_answers, solo_vectors, train_causal_lm, train_embedding
from tests.serve.world import Server, launch

pytestmark = [pytest.mark.bf16, pytest.mark.timeout(600)]
TEXT, WORDS = {"model": "minilm", "quantization": "none"}, {"model": "seed-lm", "quantization": "nf4"}
COSINE = 0.9995  # of two engines' bf16; in float32 it is 0.9999


@pytest.fixture(scope="module")
def dtype() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMBEDFT_DTYPE", "bfloat16")
        yield


@pytest.fixture(scope="module")
def trained(dtype: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[AdapterStore, dict[str, str]]:
    folder = tmp_path_factory.mktemp("bf16")
    store = AdapterStore(folder / "adapters")
    generations = {name: train_embedding(store, name, folder, seed=seed, **TEXT) for name, seed in (("a", 1), ("b", 2))}
    return store, generations | {name: train_causal_lm(store, name, folder, seed=seed, **WORDS) for name, seed in (("s", 1), ("t", 2))}


def test_an_adapters_files_do_what_the_trainer_recorded(trained: tuple[AdapterStore, dict[str, str]]) -> None:
    store, generations = trained
    for identity in generations.values():
        assert verify(store.folder(identity)).error < 1e-4


def test_an_adapter_that_does_too_little_for_bf16_is_told_of_before_any_engine_refuses_it(
    trained: tuple[AdapterStore, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, generations = trained
    assert refused_here(store.folder(generations["a"])) is None
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"query": f"what is {n}", "document": f"it is {n}"}) + "\n" for n in range(32)))
    weak = {"task": "embedding", "name": "weak", "base": TEXT, "adapter": {"r": 1}, "data": {"train": str(path)}}
    (tmp_path / "weak.yaml").write_text(json.dumps(weak | {"train": {"epochs": 1, "batch": 16, "lr": 1e-6}}))
    assert main(["train-embed", str(tmp_path / "weak.yaml"), "--adapters", str(tmp_path / "store")]) == 0
    assert "this machine's engines may refuse it: its effect differs" in capsys.readouterr().out
    assert main(["train-embed", str(tmp_path / "weak.yaml"), "--adapters", str(tmp_path / "store"), "name=weaker", "--json"]) == 0
    assert "compute in float32" in json.loads(capsys.readouterr().out)["served here"]
    assert main(["adapters", "verify", "weak", "--adapters", str(tmp_path / "store"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["passed"]
    assert "compute in float32" in shown["served here"]


def test_a_base_that_is_a_folder_elsewhere_is_found_again(dtype: None, tmp_path: Path, in_folder: Path) -> None:
    """Its passport holds no machine's path: only whoever trained still knows where the base lies."""
    base = tiny_llama(tmp_path / "elsewhere" / "base")
    rows = write_jsonl(tmp_path / "rows.jsonl", planted_rows(24))
    recipe = {"task": "causal_lm", "name": "own", "base": {"model": str(base)}, "data": {"train": str(rows)}}
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(recipe | {"train": {"max_steps": 2, "batch": 12, "lr": 1e-2, "max_length": 64}}))
    (in_folder / "work").mkdir()
    os.chdir(in_folder / "work")
    assert main(["train-lm", str(path), "--adapters", str(tmp_path / "own-store")]) == 0


@pytest.mark.parametrize("engine", ["peft", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_both_engines_answer_as_each_adapter_does_alone(engine: str, trained: tuple[AdapterStore, dict[str, str]], tmp_path: Path) -> None:
    store, generations = trained
    bases = [
        {"name": "minilm", **TEXT, "task": "embedding", "engine": engine},
        {"name": "seed-lm", **WORDS, "task": "causal_lm", "engine": engine},
    ]
    server = launch({"bases": bases}, folder=tmp_path, store=store.root)
    try:
        server.wait_ready(300)
        for name in ("a", "b", "s", "t"):
            answer = server.put(name)
            assert answer.status_code == 200, answer.text
        vectors = {name: solo_vectors(store, generations.get(name or ""), spec=BaseSpec(**TEXT)) for name in (None, "a", "b")}
        for name in vectors:
            found = _vectors(server, name)
            cosines = {other: _cosines(found, vector) for other, vector in vectors.items()}
            assert cosines[name].min() >= COSINE, cosines[name]
            assert all(cosines[other].mean() < 0.99 for other in vectors if other != name), "they are too alike to tell apart"
        for name in (None, "s", "t"):
            alone = solo_answers(store, generations.get(name or ""), spec=BaseSpec(**WORDS))
            answers = [_chat(server, name, prompt) for prompt in PROMPTS]
            assert all(one.equals(answer) for one, answer in zip(alone, answers, strict=True)), (name, alone, answers)
    finally:
        assert server.stop() == 0


def _vectors(server: Server, adapter: str | None) -> np.ndarray:
    body: dict[str, Any] = {"model": "minilm", "input": QUERIES, "input_type": "query", "adapter": adapter}
    return np.array([row["embedding"] for row in server.post("/v1/embeddings", body, timeout=120).json()["data"]])


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


def _chat(server: Server, adapter: str | None, prompt: str, *, model: str = "seed-lm") -> str:
    body = {
        "model": model,
        "adapter": adapter,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": TOKENS,
        "temperature": 0,
    }
    answer = server.post("/v1/chat/completions", body, timeout=120).json()
    return answer["choices"][0]["message"]["content"]


@pytest.mark.vllm
def test_vllm_serves_compressed_tensors_bases_with_what_was_trained_on_them(dtype: None, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    bases = {scheme: {"model": "seed-lm", "quantization": scheme} for scheme in ("w4a16", "w8a8")}
    generations = {scheme: train_causal_lm(store, scheme, tmp_path, seed=1, **base) for scheme, base in bases.items()}
    served = [{"name": f"lm-{scheme}", **base, "task": "causal_lm", "engine": "vllm"} for scheme, base in bases.items()]
    server = launch({"bases": served}, folder=tmp_path, store=store.root)
    try:
        server.wait_ready(300)
        for scheme, base in bases.items():
            assert server.put(scheme).status_code == 200, server.log.read_text()
            for adapter in (None, scheme):
                answers = [_chat(server, adapter, prompt, model=f"lm-{scheme}") for prompt in PROMPTS]
                if scheme == "w8a8":  # vLLM rounds activations to 8 bits as well, which no trainer does
                    assert all(answer.startswith(OWN_WORDS[0]) == (adapter is not None) for answer in answers), answers
                    continue
                alone = solo_answers(store, adapter and generations[adapter], spec=BaseSpec(**base))
                assert all(one.equals(answer) for one, answer in zip(alone, answers, strict=True)), (adapter, alone, answers)
    finally:
        assert server.stop() == 0

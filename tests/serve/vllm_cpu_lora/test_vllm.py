"""The plugin in plain vLLM: how it is found, when it leaves vLLM alone, and that with more adapters than slots and ranks from
1 to 64 every answer is the adapter's own in PEFT. One interpreter tells it all."""

import ast
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
import torch

from embedft.base import BaseSpec, base_folder
from embedft.encode import Encoder, EncodeSettings
from embedft.model_folder import describe
from tests.fixtures_lm import tiny_llama
from tests.serve.engine_process import solo

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[3]


only_on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the plugin does nothing")


def adapter(folder: Path, base: Path, task: str, *, seed: int, r: int, targets: list[str] | str) -> Path:
    """A random LoRA saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(solo(base, task, None), LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, exclude_modules=r".*pooler.*"))
    for name, weight in model.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            weight.data.normal_(std=0.3 if task == "causal_lm" else 0.2 / r**0.5)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def in_peft(base: Path, task: str, folder: Path | None) -> Any:
    from peft import PeftModel

    model = solo(base, task, None)
    return model if folder is None else PeftModel.from_pretrained(model, str(folder)).eval()


Job = tuple[int | None, int]  # the adapter's number (None: the base) and the prompt's


@dataclass(frozen=True)
class Case:
    base: Path
    adapters: list[Path]
    prompts: list[list[int]]
    jobs: list[Job]
    options: dict[str, Any]

    def job(self, *, pooling: bool) -> dict[str, Any]:
        folders = [str(folder) for folder in self.adapters]
        return {
            "model": str(self.base),
            "adapters": folders,
            "pooling": pooling,
            **{k: getattr(self, k) for k in ("prompts", "jobs", "options")},
        }


TEXTS = [f"text number {k}: " + "a list is sorted in place " * (k % 9) for k in range(24)]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("language")
    base = tiny_llama(folder / "base")
    targets = (["q_proj", "v_proj"], "all-linear", ["gate_proj", "embed_tokens", "lm_head"], ["k_proj", "down_proj"])
    adapters = [
        adapter(folder / str(k), base, "causal_lm", seed=k, r=r, targets=which)
        for k, (r, which) in enumerate(zip((1, 8, 16, 5), targets, strict=True))
    ]
    jobs: list[Job] = [(a, p) for _ in range(2) for p in range(3) for a in (0, 1, None, 2, 3)]
    options = {"max_loras": 2, "max_cpu_loras": 3, "max_lora_rank": 16, "max_model_len": 256, "max_num_seqs": 16}
    options |= {"max_num_batched_tokens": 16}  # the longest prompt comes in pieces, some with a batch to themselves
    return Case(base, adapters, [[5, 9, 100, 33], [7] * 20, list(range(50, 90))], jobs, options)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder, base = tmp_path_factory.mktemp("vectors"), base_folder(BaseSpec("minilm"))
    ranks, linear = (1, 64, 16, 7, 32, 3), ["query", "key", "value", "dense"]
    adapters = [adapter(folder / str(k), base, "embedding", seed=k, r=r, targets=linear) for k, r in enumerate(ranks)]
    choice: list[int | None] = [*range(len(ranks)), None]
    jobs: list[Job] = [(choice[(3 * k + turn) % 7], k) for turn in range(2) for k in range(len(TEXTS))]
    options = {"runner": "pooling", "max_loras": 3, "max_cpu_loras": 4, "max_lora_rank": 64, "max_num_seqs": 16}
    return Case(base, adapters, Encoder(None, base, encoding(base)).preparer.prepare(TEXTS).ids, jobs, options)


def encoding(base: Path) -> EncodeSettings:
    info = describe(base)
    return EncodeSettings(info.pooling, info.normalize, info.max_length)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree, installed as a user installs it but into a folder of its own."""
    pytest.importorskip("vllm")
    uv, site = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"), tmp_path_factory.mktemp("site")
    if uv is None:
        pytest.skip("needs uv to build the wheel")
    command = [uv, "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--python", sys.executable, "--target", str(site)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return site


@dataclass(frozen=True)
class Told:
    """What one interpreter says that goes through a GPU's case, an untested vLLM's and the entry point's, then serves both models."""

    plugin: dict[str, Any]
    answers: dict[str, list[list[float]]]
    printed: str


@pytest.fixture(scope="module")
def told(installed: Path, language: Case, vectors: Case) -> Told:
    jobs = {} if torch.cuda.is_available() else {"language": language.job(pooling=False), "vectors": vectors.job(pooling=True)}
    added = {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "OMP_WAIT_POLICY": "PASSIVE"}
    env = {**os.environ, **added, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plain_vllm.py"))],
        input=json.dumps(jobs), env=env, cwd=installed, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return Told(**json.loads(done.stdout.splitlines()[-1]), printed=done.stdout + done.stderr)


def test_vllm_finds_the_plugin_by_its_entry_point_and_uses_its_operations(installed: Path, told: Told) -> None:
    found = told.plugin
    assert (installed / "serve" / "vllm_cpu_lora" / "kernel.c").is_file()
    assert Path(found["file"]).is_relative_to(installed)
    if found["on_cpu"]:
        assert found["not listed"].endswith(".PunicaWrapperCPU")  # a list of plugins that does not name it
        assert found["listed"] == "serve.vllm_cpu_lora.wrapper.SegmentedPunicaWrapper"


def test_a_gpu_and_an_untested_vllm_are_left_alone_the_second_with_one_warning(told: Told) -> None:
    assert told.plugin["on a GPU"] == told.plugin["untested"] == told.plugin["stock"]
    assert told.printed.count("leaves vLLM 0.99.1 alone") == 1


def test_the_plugin_imports_nothing_else_of_ours() -> None:
    for file in (ROOT / "serve" / "vllm_cpu_lora").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert not name.startswith("embedft") or name == "embedft.native", file
                assert not name.startswith("serve") or name.startswith("serve.vllm_cpu_lora"), file


@only_on_a_cpu
def test_log_probabilities_also_of_prompts_and_with_adapted_embeddings_and_head(language: Case, told: Told) -> None:
    truth: dict[Job, list[float]] = {}
    for a in (0, 1, 2, 3, None):
        model = in_peft(language.base, "causal_lm", None if a is None else language.adapters[a])
        for p, prompt in enumerate(language.prompts):
            with torch.inference_mode():
                scores = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
            truth[a, p] = [*(float(scores[k, token]) for k, token in enumerate(prompt[1:])), float(scores[-1].max())]
    for job, answer in zip(language.jobs, told.answers["language"], strict=True):
        assert np.allclose(answer, truth[job], atol=1e-4), job
    assert min(np.abs(np.subtract(truth[a, 2], truth[b, 2])).max() for a, b in ((0, 1), (1, 2), (2, 3), (3, None), (0, None))) > 0.1


@only_on_a_cpu
def test_minilms_vectors_equal_peft_over_a_full_batch_with_evictions(vectors: Case, told: Told) -> None:
    base, adapters = vectors.base, {None: None, **dict(enumerate(vectors.adapters))}
    alone = {a: Encoder(in_peft(base, "embedding", folder), base, encoding(base)).encode(TEXTS) for a, folder in adapters.items()}
    for (a, k), answer in zip(vectors.jobs, np.array(told.answers["vectors"]), strict=True):
        own = float(answer @ alone[a][k])
        assert own >= 0.9999, (a, k, own)
        others = [float(answer @ alone[b][k]) for b in alone if b != a]
        assert max(others) < own - 1e-4, (a, k, own, others)

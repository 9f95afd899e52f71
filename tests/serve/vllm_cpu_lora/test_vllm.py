"""The plugin in plain vLLM, with more adapters than slots and ranks from 1 to 64: every answer is the adapter's own in PEFT."""

import json
import os
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


@pytest.fixture(scope="module", autouse=True)
def on_a_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU the plugin does nothing")


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
def answers(language: Case, vectors: Case) -> dict[str, list[list[float]]]:
    """vLLM's, by both models in one interpreter."""
    jobs = {"language": language.job(pooling=False), "vectors": vectors.job(pooling=True)}
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plain_vllm.py"))],
        input=json.dumps(jobs), env=env, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_log_probabilities_also_of_prompts_and_with_adapted_embeddings_and_head(
    language: Case, answers: dict[str, list[list[float]]]
) -> None:
    truth: dict[Job, list[float]] = {}
    for a in (0, 1, 2, 3, None):
        model = in_peft(language.base, "causal_lm", None if a is None else language.adapters[a])
        for p, prompt in enumerate(language.prompts):
            with torch.inference_mode():
                scores = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
            truth[a, p] = [*(float(scores[k, token]) for k, token in enumerate(prompt[1:])), float(scores[-1].max())]
    for job, answer in zip(language.jobs, answers["language"], strict=True):
        assert np.allclose(answer, truth[job], atol=1e-4), job
    assert min(np.abs(np.subtract(truth[a, 2], truth[b, 2])).max() for a, b in ((0, 1), (1, 2), (2, 3), (3, None), (0, None))) > 0.1


def test_minilms_vectors_equal_peft_over_a_full_batch_with_evictions(vectors: Case, answers: dict[str, list[list[float]]]) -> None:
    base, adapters = vectors.base, {None: None, **dict(enumerate(vectors.adapters))}
    alone = {a: Encoder(in_peft(base, "embedding", folder), base, encoding(base)).encode(TEXTS) for a, folder in adapters.items()}
    for (a, k), answer in zip(vectors.jobs, np.array(answers["vectors"]), strict=True):
        own = float(answer @ alone[a][k])
        assert own >= 0.9999, (a, k, own)
        others = [float(answer @ alone[b][k]) for b in alone if b != a]
        assert max(others) < own - 1e-4, (a, k, own, others)

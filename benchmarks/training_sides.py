"""The sides of train_embed.py: sentence-transformers' trainer as its documentation has it, ours, and a clock for both."""

import functools
import time
from pathlib import Path
from typing import Any

RANK, ALPHA, SCALE, LR = 16, 32, 20.0, 1e-3


def recipe(job: dict[str, Any]) -> Any:
    from embedft.recipe import parse_recipe

    adapter: dict[str, Any] = {"r": RANK, "alpha": ALPHA, "side": "query" if job["side"] == "ours_query" else "both"}
    if job["side"] == "ours_same":
        adapter["targets"] = ["query", "value"]
    if job["side"].startswith("ours_last"):
        adapter["layers"] = int(job["side"][-1])
    return parse_recipe(
        {
            "task": "embedding",
            "name": "benchmark",
            "base": {"model": "minilm"},
            "adapter": adapter,
            "data": {"train": job["data"], "eval": job["data"], "limit": job["pairs"] * 2},
            "loss": {"scale": SCALE},
            "train": {"epochs": job["epochs"], "batch": job["batch"], "lr": LR, "max_length": job["length"], "seed": job["seed"]},
            "eval": {"queries": job["queries"], "documents": job["documents"]},
        }
    )


def ours(_: dict[str, Any], recipe: Any, examples: Any, folder: Path) -> tuple[Any, Any, Any]:
    import sentence_transformers  # noqa: F401 (imported before the clock runs, as the other side does)
    from transformers import Trainer, set_seed  # noqa: F401

    from embedft.base import BaseSpec, load_base
    from embedft.embedding.losses import loss_named
    from embedft.embedding.sided import SidedEncoder
    from embedft.embedding.train import make_trainer, plan_for, settings_for
    from embedft.methods import attach

    base = load_base(BaseSpec("minilm"), task="embedding")
    settings = settings_for(recipe, base)
    set_seed(recipe.train.seed)
    model = attach(base, recipe.adapter, task="embedding")
    plan = plan_for(examples, recipe, loss=loss_named("mnrl"), model=model)
    make = functools.partial(make_trainer, model, base, settings, examples, recipe, plan=plan, output=folder)
    return make, SidedEncoder(model, base.folder, settings, side=recipe.adapter.side), model.disable_adapter


def stock(job: dict[str, Any], recipe: Any, examples: Any, folder: Path) -> tuple[Any, Any, Any]:
    """As sentence-transformers' own documentation has it: add_adapter, SentenceTransformerTrainer, MultipleNegativesRankingLoss."""
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from embedft.base import BaseSpec, base_folder
    from embedft.encode import Encoder, EncodeSettings

    source = base_folder(BaseSpec("minilm"))
    model = SentenceTransformer(str(source), device="cpu")
    model.max_seq_length = job["length"]
    layers = [4, 5] if job["side"] == "stock_last2" else None
    model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", r=RANK, lora_alpha=ALPHA, layers_to_transform=layers))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder), num_train_epochs=job["epochs"], per_device_train_batch_size=job["batch"], learning_rate=LR,
        warmup_steps=0.1,
        seed=recipe.train.seed, bf16=job["bf16"] , use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, log_level="error",
    )  # fmt: skip
    rows = {"query": [row.query for row in examples.rows], "document": [row.document for row in examples.rows]}
    make = functools.partial(
        SentenceTransformerTrainer,
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        loss=MultipleNegativesRankingLoss(model, scale=SCALE),
    )
    inner = model[0].model
    return make, Encoder(inner, source, EncodeSettings("mean", True, job["length"])), lambda: _Off(inner)


class _Off:
    """The adapters of a transformers model (not a PeftModel) switched off."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.disable_adapters()

    def __exit__(self, *_: object) -> None:
        self.model.enable_adapters()


def timer() -> Any:
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        """Seconds of every optimizer step, from batch to batch, so that collation counts."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.cpu: list[float] = []
            self.first = self.last = self.first_cpu = self.last_cpu = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.first = self.last = time.perf_counter()
            self.first_cpu = self.last_cpu = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now, cpu = time.perf_counter(), time.process_time()
            self.seconds.append(now - self.last)
            self.cpu.append(cpu - self.last_cpu)
            self.last, self.last_cpu = now, cpu

    return Timer()

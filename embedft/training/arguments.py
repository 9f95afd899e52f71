"""TrainSection → the keyword arguments common to TrainingArguments and SentenceTransformerTrainingArguments."""

import math
from pathlib import Path
from typing import Any

from embedft.recipe import TrainSection
from embedft.training.trackers import reported

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",  # one call for all parameters instead of a dozen for each
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def total_steps(train: TrainSection, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    return train.max_steps or train.epochs * steps_per_epoch


def hf_arguments(train: TrainSection, *, output_dir: Path, steps_per_epoch: int) -> dict[str, Any]:
    """Keyword arguments for either TrainingArguments class.

    `steps_per_epoch` counts optimizer steps (batches / accumulate, rounded up). No trackers, no progress bar, one
    process, seeded data order. Mixed precision follows the machine: bf16 autocast only where bf16 is fast.
    """
    import torch

    from embedft.base import compute_dtype

    cuda = torch.cuda.is_available()
    steps = total_steps(train, steps_per_epoch)
    return {
        "output_dir": str(output_dir),
        "num_train_epochs": train.epochs,
        "max_steps": train.max_steps or -1,
        "per_device_train_batch_size": train.batch,
        "gradient_accumulation_steps": train.accumulate,
        "learning_rate": train.lr,
        # a step of warm-up from nothing has a rate of zero: a run of one step would change nothing
        "warmup_steps": min(math.ceil(train.warmup * steps), steps - 1),
        "lr_scheduler_type": SCHEDULES[train.schedule],
        "optim": OPTIMIZERS[train.optimizer],
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "seed": train.seed,
        "data_seed": train.seed,
        "bf16": compute_dtype() is torch.bfloat16,
        "fp16": compute_dtype() is torch.float16,
        "use_cpu": not cuda,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": cuda,
        "save_strategy": "steps" if train.checkpoint_every else "no",
        "save_steps": train.checkpoint_every or 500,
        "logging_steps": 5,
        "disable_tqdm": True,
        "report_to": reported(train.trackers, output_dir),
        "log_level": "error",
    }


def steps_an_epoch(examples: int, train: TrainSection) -> int:
    """Optimizer steps in one pass over the examples; the last batch may be short."""
    return max(1, math.ceil(math.ceil(examples / train.batch) / train.accumulate))

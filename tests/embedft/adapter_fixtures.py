"""An adapter folder made from random weights, for tests of what happens around training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from embedft.adapters.passport import WEIGHTS, BaseIdentity, Passport, ProbeRecord
from embedft.adapters.probes import write_probes
from embedft.base import BaseSpec, load_base
from embedft.methods import attach, save_weights
from embedft.recipe import AdapterSection
from embedft.verify import record, settings_of


def make_adapter(folder: Path, *, name: str = "a", quantization: str = "none", seed: int = 0, model: str = "minilm") -> Path:
    """A MiniLM adapter whose every module has an effect, with passport and probes. `folder` is made."""
    import torch

    base = load_base(BaseSpec(model, quantization), task="embedding")
    torch.manual_seed(seed)
    adapted = attach(base, AdapterSection(r=4), task="embedding")
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder.mkdir(parents=True)
    save_weights(adapted, folder, base_name=model)
    passport = Passport(
        name=name,
        task="embedding",
        base=BaseIdentity(model=model, quantization=quantization, fingerprint=base.info.fingerprint, parent=base.info.parent),
        method="lora",
        r=4,
        alpha=8,
        pooling=base.info.pooling,
        normalize=base.info.normalize,
        max_length=64,
    )
    passport.write(folder)
    recorded = record(folder, base=base.folder, tokenizer=base.tokenizer, task="embedding", settings=settings_of(passport))
    write_probes(folder, recorded)
    probes = ProbeRecord(kind="embedding", count=len(recorded.probes), tolerance=recorded.tolerance, sensitivity=dict(recorded.sensitivity))
    passport.model_copy(update={"probes": probes}).write(folder)
    return folder


def damaged(folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """`folder`, each of whose tensors `change` has made another of."""
    tensors: dict[str, np.ndarray] = load_file(str(folder / WEIGHTS))
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, str(folder / WEIGHTS))
    return folder

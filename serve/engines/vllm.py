"""vLLM as an engine: which bases it can serve, and the flags it needs for them. Imports no vLLM.

Flags found by running vLLM 0.32: bitsandbytes folders need `--quantization` and `--load-format` spelled out, and on a CPU
the mendings of serve.engines.vllm_server. With an explicit KV cache and `--enforce-eager` nothing is profiled at the start.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.base import compute_dtype
from embedft.errors import EngineFailed
from embedft.lean import COMPILED, EAGER
from embedft.model_folder import AFTER_PADDING, BaseInfo, describe, hidden_size, read_json
from embedft.packed import READ
from serve.engines.settings import KEY, WAITING, EngineSettings, parse_cores

if TYPE_CHECKING:
    from embedft.model_folder import Task

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # all slots are padded to the one chosen at the start
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
POOLING_TYPES = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}


def vllm_command(*, folder: Path, task: "Task", socket: Path, settings: EngineSettings, key: str) -> tuple[list[str], dict[str, str]]:
    """(argv, env) of a vLLM server over the base in `folder`. Raises EngineFailed."""
    import torch

    on_cpu = not torch.cuda.is_available()
    info = describe(folder)
    check_base(folder, info, task=task, on_cpu=on_cpu)
    length = info.takes(settings.max_length)
    argv = [sys.executable, "-m", "serve.engines.vllm_server", "--model", str(folder), "--served-model-name", "base"]
    argv += ["--uds", str(socket)]
    argv += ["--dtype", str(compute_dtype()).removeprefix("torch."), "--max-model-len", str(length)]
    argv += ["--enable-lora", "--max-loras", str(settings.max_loras), "--max-lora-rank", str(lora_rank(settings.max_lora_rank))]
    argv += ["--disable-log-stats", "--disable-uvicorn-access-log", "--enable-prompt-tokens-details"]
    if settings.max_cpu_loras:
        argv += ["--max-cpu-loras", str(max(settings.max_cpu_loras, settings.max_loras))]
    if settings.tool_parser:
        argv += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_parser]
    if info.quantization in {"nf4", "int8"}:
        argv += ["--quantization", "bitsandbytes", "--load-format", "bitsandbytes"]
    if task == "embedding":
        pooler = {"seq_pooling_type": POOLING_TYPES[settings.pooling or info.pooling], "use_activation": info.normalize}
        argv += ["--runner", "pooling", "--pooler-config", json.dumps(pooler)]
    else:
        argv += ["--generation-config", "vllm"]  # the request alone decides how tokens are chosen
        if settings.max_tokens:
            argv += ["--override-generation-config", json.dumps({"max_new_tokens": settings.max_tokens})]
    kv_gib = settings.kv_gib or (1.0 if on_cpu else None)
    if kv_gib:
        argv += ["--kv-cache-memory-bytes", str(int(kv_gib * 2**30))]
    if on_cpu:
        argv += ["--enforce-eager", "--max-num-batched-tokens", str(max(length, 2048)), "--max-num-seqs", "32"]
    if overrides := _overrides(folder):
        argv += ["--hf-overrides", json.dumps(overrides)]
    env = _environment(settings, key, on_cpu=on_cpu) | {"VLLM_RPC_BASE_PATH": str(socket.parent)}
    if length > info.max_length:  # vLLM takes what sentence-transformers reads of a text for the most that the base can place
        env["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return argv, env


def _environment(settings: EngineSettings, key: str, *, on_cpu: bool) -> dict[str, str]:
    env = {
        KEY: key,
        "VLLM_API_KEY": key,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_PLUGINS": "bitsandbytes",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if on_cpu:
        count = len(parse_cores(settings.cores)) if settings.cores else len(os.sched_getaffinity(0))
        # the launcher sets the cores on the whole process, so that vLLM need not (nor start a process more to do it)
        env |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(count),
            "EMBEDFT_ENGINE_CORES": settings.cores or "",
        }
        env |= WAITING | {"VLLM_ENGINE_READY_TIMEOUT_S": "600"}
        env |= EAGER  # else the first sampled token or log-probability waits for a C++ compiler
    else:
        env |= COMPILED
    return env


def lora_rank(wanted: int) -> int:
    """The smallest rank vLLM can be started with that holds `wanted`."""
    for rank in LORA_RANKS:
        if rank >= wanted:
            return rank
    raise EngineFailed(f"vLLM cannot serve this: its largest LoRA rank is {LORA_RANKS[-1]}, asked for {wanted}")


def check_base(folder: Path, info: BaseInfo, *, task: "Task", on_cpu: bool) -> None:
    """Raise EngineFailed with the reason when vLLM cannot serve this base for `task`."""
    if task == "causal_lm" and info.kind == "encoder":
        raise EngineFailed(f"vLLM cannot serve this: {info.architecture} is an encoder: it generates nothing")
    config = read_json(folder / "config.json")
    if config.get("model_type") in AFTER_PADDING - {"roberta", "xlm-roberta"}:
        raise EngineFailed(f"vLLM would place the tokens of {config['model_type']} otherwise than it was trained to: use the peft engine")
    size = _head_size(folder, config)
    if on_cpu and size is not None and size not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        raise EngineFailed(f"vLLM's CPU attention takes head sizes {sizes}; this base has {size}: use the peft engine")
    quantization: dict[str, Any] = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method in READ:
        _check_packed(quantization, on_cpu=on_cpu)
    if on_cpu and method in {"compressed-tensors", *READ} and not has_avx512():
        raise EngineFailed(f"vLLM multiplies {method} weights on CPUs with AVX512 only, and this one has none: use the peft engine")


def _check_packed(quantization: dict[str, Any], *, on_cpu: bool) -> None:
    """GPTQ's and AWQ's kernels take fewer kinds of them than there are, and no float32."""
    method, bits = quantization["quant_method"], quantization.get("bits")
    taken = {4} if on_cpu or method == "awq" else {4, 8}
    kind = f"{method} of {bits} bits" if bits not in taken else ""
    if method == "gptq":
        kind = kind or ("gptq without symmetric codes" if not quantization.get("sym", True) else "")
        ordered = quantization.get("desc_act") and quantization.get("group_size") != -1
        kind = kind or ("gptq in the order of activations (desc_act)" if ordered else "")
    if str(compute_dtype()) == "torch.float32":
        kind = kind or f"{method} in float32 (EMBEDFT_DTYPE=bfloat16 computes otherwise)"
    if kind:
        raise EngineFailed(f"vLLM does not compute with {kind}: use the peft engine, which does")


def _overrides(folder: Path) -> dict[str, Any]:
    """What vLLM wants to read in a config that transformers 5 leaves out."""
    config = read_json(folder / "config.json")
    unsaid = config.get("model_type") == "xlm-roberta" and "position_embedding_type" not in config
    return {"position_embedding_type": "absolute"} if unsaid else {}


def _head_size(folder: Path, config: dict[str, Any]) -> int | None:
    """None where the config does not say how many heads there are."""
    heads = next((config[name] for name in ("num_attention_heads", "n_heads", "n_head") if config.get(name)), None)
    return config.get("head_dim") or (hidden_size(folder, config) // int(heads) if heads else None)


def has_avx512() -> bool:
    import torch

    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")

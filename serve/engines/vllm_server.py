"""Starts vLLM's own OpenAI server, mended first where it would be wrong or slow. Knows nothing of tenants or the gateway.

`python -m serve.engines.vllm_server` takes vLLM's arguments. Everywhere, an adapter is refused whose modules the model
lacks: vLLM would load it and apply nothing. (Names saved from a bare decoder, without `model.`, are matched first.) Int8 bases
compute as in training (embedft.int8). An answer ends where evaluation ends it, at the end of a turn too, which is not every base's eos.
The gateway's own route to vectors is there (serve.engines.vllm_vectors), and its own way of asking (serve.link).
On a CPU:

1. Children are forked, the worker lives in the engine process, and a new kind of model is looked at in this one (elsewhere that would
   be a CUDA context): vLLM would import itself four times, once a process.
   The cores are set on the whole process beforehand (EMBEDFT_ENGINE_CORES), which is why one worker needs no process of its own.
2. vllm-bnb-plugin sizes 4-bit weights by the activations' dtype (right for 16-bit ones only): with fp32 no NF4 folder loads.
3. It multiplies in bf16 whatever the dtype: tens of times slower than fp32 on CPUs without AVX512-BF16, and other
   rounding than transformers has, so adapters would not meet the base that they were trained on.
4. What is not finite never enters the cache: attention reads a block to its end and multiplies what is beyond a sequence by 0,
   which of NaN makes NaN. One damaged adapter would spoil the answers of all who get its blocks after it.
5. A W8A8 layer's weight is None once it is packed for oneDNN, and vLLM asks it where a LoRA belongs.
6. Experts keep out of LoRA: vLLM would run them through Triton, which is not there, and end. An adapter of experts is refused.
7. Its LoRA operations are replaced (serve.vllm_cpu_lora, registered here because VLLM_PLUGINS names bitsandbytes only).
"""

import os
import sys
from pathlib import Path
from typing import Any

from embedft.encode import check_tokenizer
from embedft.errors import BaseError
from embedft.int8 import dequantized
from embedft.lean import without_unused
from embedft.model_folder import stop_tokens, tokenizer_of
from serve import vllm_cpu_lora
from serve.engines.settings import parse_cores
from serve.engines.vllm_vectors import VectorsEndpoint
from serve.link.engine import LinkOrHttp


def main() -> None:
    """Run vLLM's API server with the arguments of this process."""
    cores = os.environ.get("EMBEDFT_ENGINE_CORES")  # given on a CPU only: what CUDA's vLLM imports was not seen
    if cores is not None:
        without_unused()
    if cores:
        os.sched_setaffinity(0, parse_cores(cores))
    if "pooling" in sys.argv:
        _texts_are_read_by_one_tokenizer(Path(sys.argv[sys.argv.index("--model") + 1]))
    from vllm.platforms import current_platform

    _every_module_of_an_adapter_must_match()
    _answers_end_as_in_training()
    _vectors_by_the_short_way()
    _asked_by_link_too()
    _bitsandbytes_as_the_trainer_has_it(on_cpu=current_platform.is_cpu())
    if current_platform.is_cpu():
        _one_process_for_engine_and_worker(type(current_platform))
        _models_inspected_in_this_process()
        _only_finite_keys_and_values()
        _adapters_lie_where_the_model_does()
        _experts_are_the_bases()
        vllm_cpu_lora.register()
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


def _texts_are_read_by_one_tokenizer(folder: Path) -> None:
    """The gateway reads them by the tokenizer's own file."""
    try:
        check_tokenizer(folder)
    except BaseError as error:
        raise SystemExit(str(error)) from None


def _answers_end_as_in_training() -> None:
    """Adapters learn to end a turn; vLLM knows the eos of the tokenizer and of generation_config.json alone."""
    from vllm.config import ModelConfig

    config: Any = ModelConfig
    stock = config.try_get_generation_config

    def try_get_generation_config(self: Any) -> dict[str, Any]:
        found = stock(self)
        if self.runner_type != "generate":
            return found
        known = found.get("eos_token_id") or []
        ends = {*([known] if isinstance(known, int) else known), *stop_tokens(tokenizer_of(Path(self.model)))}
        return {**found, "eos_token_id": sorted(ends)}

    config.try_get_generation_config = try_get_generation_config


def _vectors_by_the_short_way() -> None:
    from vllm import plugins

    module: Any = plugins
    stock = module.load_endpoint_plugins
    module.load_endpoint_plugins = lambda tasks=None: [
        *stock(tasks),
        *([VectorsEndpoint()] if {*VectorsEndpoint.required_tasks} & {*(tasks or ())} else []),
    ]


def _asked_by_link_too() -> None:
    from uvicorn.config import HTTP_PROTOCOLS

    HTTP_PROTOCOLS["auto"] = f"{LinkOrHttp.__module__}:{LinkOrHttp.__name__}"


def _every_module_of_an_adapter_must_match() -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    worker: Any = WorkerLoRAManager
    stock = worker._load_adapter

    def load_adapter(self: Any, lora_request: Any) -> Any:
        lora = stock(self, lora_request)
        manager = self._adapter_manager
        known = set(manager.modules) | {part for parts in manager.packed_modules.values() for part in parts}
        lora.loras = match_modules(lora.loras, known)
        for name, weights in lora.loras.items():
            weights.module_name = name
        return lora

    worker._load_adapter = load_adapter


def match_modules(loras: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """`loras` by the model's own module names; ValueError when one is not a linear layer of it."""
    matched = {name if name in known else f"model.{name}": weights for name, weights in loras.items()}
    missing = sorted(name for name in matched if name not in known or name.endswith(("lm_head", "embed_tokens")))
    if missing or not matched:
        which = ", ".join(missing[:3]) or "it adapts none"
        raise ValueError(f"the adapter adapts modules that are not linear layers of the model: {which}")
    return matched


def _one_process_for_engine_and_worker(platform: Any) -> None:
    stock = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        stock(cls, vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        if vllm_config.parallel_config.world_size == 1:
            vllm_config.parallel_config.distributed_executor_backend = "uni"

    platform.check_and_update_config = classmethod(check_and_update_config)


def _models_inspected_in_this_process() -> None:
    from vllm.model_executor.models import registry

    module: Any = registry
    module._run_in_subprocess = lambda inspect: inspect()


def _only_finite_keys_and_values() -> None:
    from vllm import _custom_ops

    operations: Any = _custom_ops
    stock = operations.cpu_attn_reshape_and_cache

    def cpu_attn_reshape_and_cache(key: Any, value: Any, *args: Any, **kwargs: Any) -> None:
        """key, value: (tokens, heads, head size)."""
        stock(key.nan_to_num(), value.nan_to_num(), *args, **kwargs)

    operations.cpu_attn_reshape_and_cache = cpu_attn_reshape_and_cache


def _adapters_lie_where_the_model_does() -> None:
    import torch
    from vllm.lora.layers import base_linear

    module: Any = base_linear
    module._get_lora_device = lambda _: torch.device("cpu")


def _experts_are_the_bases() -> None:
    from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

    layers: list[Any] = [FusedMoEWithLoRA, FusedMoE3DWithLoRA]
    for layer in layers:
        layer.can_replace_layer = classmethod(lambda *_, **__: False)
    config: Any = FusedMoEConfig
    stock = config.__post_init__

    def post_init(self: Any) -> None:
        self.is_lora_enabled = False
        stock(self)

    config.__post_init__ = post_init


def _bitsandbytes_as_the_trainer_has_it(*, on_cpu: bool) -> None:
    try:
        from vllm_bnb_plugin.quantization import linear
    except ImportError:  # without the plugin only unquantized and compressed-tensors bases are served
        return

    method: Any = linear.BitsAndBytesLinearMethod
    method._apply_8bit_weight = _apply_8bit
    if not on_cpu:
        return

    def halves_of_a_byte(dtype: Any) -> int:
        del dtype
        return 2

    linear.calculate_quant_ratio = halves_of_a_byte
    method._apply_4bit_weight = _apply_4bit


def _apply_4bit(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
    """x (..., in) → (..., out), shard by shard as bitsandbytes' Linear4bit computes it."""
    import torch
    from bitsandbytes.autograd._functions import matmul_4bit

    del self
    weight = layer.weight
    offsets, states = weight.bnb_shard_offsets, weight.bnb_quant_state
    flat = x.reshape(-1, x.shape[-1])
    parts = [matmul_4bit(flat, weight[offsets[i] : offsets[i + 1]].t(), states[i]) for i in range(len(states))]
    out = torch.cat(parts, dim=-1).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias


def _apply_8bit(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
    """x (..., in) → (..., out), shard by shard as the trainer computes it."""
    import torch

    del self
    weight = layer.weight
    offsets, scales = weight.bnb_shard_offsets, weight.bnb_quant_state
    parts = [x @ dequantized(weight[offsets[i] : offsets[i + 1]], scales[i].to(x.device), dtype=x.dtype).T for i in range(len(scales))]
    out = torch.cat(parts, dim=-1)
    return out if bias is None else out + bias


if __name__ == "__main__":
    main()

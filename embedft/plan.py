"""What a run will cost before it runs: parameters, peak memory by part, time. Loads no weights and reads no data.

The base is built from its config alone, in memory that is never touched; one step on the largest batch is traced on tensors
without data, so activations are counted as the model's own code makes them, whatever its architecture and method.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.base import Base, BaseSpec, check_kind, compute_dtype, config_folder
from embedft.errors import BaseError
from embedft.methods import attach, train_adapters_only
from embedft.model_folder import BaseInfo, Task, hidden_size, lengths, quantization_of, read_json, told
from embedft.quantize import SKIPPED
from embedft.recipe import CausalLMRecipe, EmbeddingRecipe

if TYPE_CHECKING:
    import torch

    Step = Callable[[Callable[..., Any]], torch.Tensor]

ADAM_BYTES = {"adamw": 8, "paged_adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}  # two moments of a trainable parameter
SMALL = 4096  # elements; 8-bit optimizers keep smaller tensors in 32 bits


@dataclass(frozen=True)
class Batch:
    """The largest batch of a run. `lengths`: the padded length of each column (one for a language model); `kept`: positions with
    logits; `steps`: optimizer steps of the whole run (None: the data that says so is not there yet); `tokens`: of an average batch;
    `step`: what the trainer makes of the batch, where that is not the model's own forward pass over padded columns; `before`: what it
    computes once, before there is an optimizer."""

    rows: int
    lengths: tuple[int, ...]
    kept: int
    steps: int | None
    tokens: float
    step: "Step | None" = None
    before: "Step | None" = None


@dataclass(frozen=True)
class Plan:
    """Bytes, parameters and seconds. `peak_bytes` is the sum of the parts; `steps` and `seconds` (of all of them) are None where the
    data is not there yet; `peak_with_checkpointing`: a language model's with gradient checkpointing, whether or not the recipe
    asks for it (None where the method does not go with it)."""

    name: str
    parameters: int
    trainable: int
    trainable_percent: float
    weights_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int
    peak_bytes: int
    peak_with_checkpointing: int | None
    available_bytes: int
    steps: int | None
    batch_tokens: int
    seconds_per_step: float
    seconds: float | None

    @property
    def memory(self) -> dict[str, int]:
        """Part → bytes, as a table shows them."""
        parts = {name: getattr(self, f"{name}_bytes") for name in ("weights", "adapter", "optimizer", "gradients", "activations", "peak")}
        cheaper = {} if self.peak_with_checkpointing is None else {"peak with gradient checkpointing": self.peak_with_checkpointing}
        return parts | cheaper | {"free here": self.available_bytes}

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.available_bytes

    @property
    def advice(self) -> str:
        cheaper = self.peak_with_checkpointing
        if cheaper is not None and cheaper < self.available_bytes:
            return "set train.gradient_checkpointing=true"
        return "halve train.batch and double train.accumulate, shorten train.max_length, or quantize the base"


def plan(recipe: EmbeddingRecipe | CausalLMRecipe, batch: "Batch | Callable[[Any], Batch]") -> Plan:
    """The cost of `recipe` on `batch`, which may depend on the adapted model (whose memory is never read).

    Raises MethodUnsupported, BaseNotFound, QuantizationUnsupported as training would.
    """
    from embedft.allocations import trace_step

    base = empty_base(recipe)
    sizes = {name: value.numel() for name, value in base.model.named_parameters()}
    packed = _quantized_layers(base)
    weights = _weight_bytes(base, packed)
    model: Any = attach(base, recipe.adapter, task=recipe.task, begin=False)
    learnt = [value for value in model.parameters() if value.requires_grad]
    trainable, total = sum(value.numel() for value in learnt), sum(value.numel() for value in model.parameters())
    adapter = 4 * max(total - sum(sizes.values()), 0)
    optimizer = sum(_moments(value.numel(), recipe) for value in learnt)
    batch = batch(model) if callable(batch) else batch
    step = batch.step or _step(recipe.task, batch)
    unpacked, dtype = _unpacked(model, base.info.quantization, packed), compute_dtype()
    _in_training(model, recipe.task)
    traces = [trace_step(model, step, unpacked=unpacked, dtype=dtype)]
    if recipe.task == "causal_lm" and model.embedft.method.checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        traces.append(trace_step(model, step, unpacked=unpacked, dtype=dtype))
    gradients = 4 * trainable
    activations = [max(trace.peak_bytes - gradients, 0) for trace in traces]
    if batch.before:
        first = trace_step(model, batch.before, unpacked=unpacked, dtype=dtype).peak_bytes - optimizer - gradients
        activations = [max(each, first) for each in activations]
    held = weights + adapter + optimizer + gradients
    chosen = 1 if isinstance(recipe, CausalLMRecipe) and recipe.train.gradient_checkpointing else 0
    share = batch.tokens / max(1, batch.rows * sum(batch.lengths))
    seconds = share * recipe.train.accumulate * _seconds(traces[chosen], dtype)
    return Plan(
        name=recipe.name,
        parameters=sum(sizes.values()),
        trainable=trainable,
        trainable_percent=100.0 * trainable / total,
        weights_bytes=weights,
        adapter_bytes=adapter,
        optimizer_bytes=optimizer,
        gradients_bytes=gradients,
        activations_bytes=activations[chosen],
        peak_bytes=held + activations[chosen],
        peak_with_checkpointing=held + activations[1] if len(activations) > 1 else None,
        available_bytes=_available(),
        steps=batch.steps,
        batch_tokens=batch.rows * sum(batch.lengths),
        seconds_per_step=seconds,
        seconds=None if batch.steps is None else seconds * batch.steps,
    )


def empty_base(recipe: EmbeddingRecipe | CausalLMRecipe) -> Base:
    """The recipe's base as its config describes it, unquantized, its weights never written nor read: they take no memory."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    spec = BaseSpec(recipe.base.model, recipe.base.quantization, recipe.base.revision)
    folder = config_folder(spec)
    check_kind(folder, recipe.task)
    with told(folder):
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.use_cache = False
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    loader: Any = AutoModelForCausalLM if recipe.task == "causal_lm" else AutoModel
    try:
        with torch.device("meta"):
            model: Any = loader.from_config(config, dtype=compute_dtype())
        model.to_empty(device="cpu")
    except (RuntimeError, ValueError) as error:
        raise BaseError(f"base {spec.model!r} cannot be laid out here: {str(error).splitlines()[0]}") from None
    model.tie_weights()
    model.requires_grad_(False)
    return Base(spec, folder, _info(folder, spec, recipe.task), model, None)  # type: ignore[arg-type]


def _info(folder: Path, spec: BaseSpec, task: Task) -> BaseInfo:
    config = read_json(folder / "config.json")
    architecture = (config.get("architectures") or ["unknown"])[0]
    own = quantization_of(folder)
    max_length, positions = lengths(folder, config)
    return BaseInfo(
        fingerprint="",
        parent=None,
        quantization=spec.quantization if own == "none" else own,
        architecture=architecture,
        kind="decoder" if "CausalLM" in architecture or task == "causal_lm" else "encoder",
        pooling="mean",
        normalize=True,
        max_length=max_length,
        positions=positions,
        hidden_size=hidden_size(folder, config),
    )


def _weight_bytes(base: Base, packed: Collection[str]) -> int:
    """What the base takes once loaded: its `packed` linear layers by their format, all else in the dtype that is computed in."""
    single = _own(base).get("bnb_4bit_use_double_quant") is False
    total, seen = 0, set[int]()
    for name, value in base.model.named_parameters():
        if value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        layer = name.removesuffix(".weight")
        whole = value.numel() * value.element_size()
        total += _packed_bytes(value.shape, base.info.quantization, single=single) if layer in packed else whole
    return total + sum(value.numel() * value.element_size() for value in base.model.buffers())


def _packed_bytes(shape: "Sequence[int]", scheme: str, *, single: bool) -> int:
    """NF4: half a byte a weight and four for each 64; with double quantization one for each 64, four for each 256 of those, and two tables
    of codes (arXiv 2305.14314); int8: a byte a weight and four a row (arXiv 2208.07339)."""
    rows, columns = shape
    if scheme == "nf4":
        blocks = -(-rows * columns // 64)
        return rows * columns // 2 + (4 * blocks + 4 * 16 if single else blocks + 4 * -(-blocks // 256) + 4 * (16 + 256))
    return rows * columns + 4 * rows


def _quantized_layers(base: Base) -> set[str]:
    """Those that lie packed in memory: all linear ones but what the folder, where it is quantized already, says that it leaves out."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    from embedft.methods import linear_modules

    if base.info.quantization not in {"nf4", "int8"}:  # compressed-tensors are turned back as they load
        return set()
    left = [*(_own(base).get("llm_int8_skip_modules") or SKIPPED)]
    return {name for name in linear_modules(base.model) if should_convert_module(name, left)}


def _own(base: Base) -> dict[str, Any]:
    """What a folder that came quantized says of that."""
    return read_json(base.folder / "config.json").get("quantization_config") or {}


def _unpacked(model: Any, scheme: str, packed: Collection[str]) -> dict[str, int]:
    """Weight → bytes of its floating-point copy beside a product with it: NF4 needs one, int8 its codes' and the scaled."""
    copies = {"nf4": 1, "int8": 2}.get(scheme, 0)
    return {
        name: copies * value.numel() * compute_dtype().itemsize
        for name, value in model.named_parameters()
        if not value.requires_grad and name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".base_layer") in packed
    }


def _moments(elements: int, recipe: EmbeddingRecipe | CausalLMRecipe) -> int:
    return elements * (8 if elements < SMALL else ADAM_BYTES[recipe.train.optimizer])


def _in_training(model: Any, task: Task) -> None:
    """Training mode as the trainers of `task` have it, but for layers that then ask chance for a number: without data there is none."""
    from peft.tuners.lycoris_utils import LycorisLayer

    if task == "embedding":
        train_adapters_only(model)
    else:
        model.train()
    for module in model.modules():
        if isinstance(module, LycorisLayer):
            module.eval()  # type: ignore[attr-defined]


def _step(task: Task, batch: Batch) -> "Step":
    """One batch through the model to a loss, as the trainers of `task` do it."""
    import torch
    from torch.nn.functional import cross_entropy, normalize

    def inputs(length: int) -> dict[str, Any]:
        ids = torch.zeros(batch.rows, length, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def language(call: Any) -> Any:
        length = batch.lengths[0]
        labels = torch.zeros(batch.rows, batch.kept, dtype=torch.long)
        positions = torch.zeros(batch.rows, length, dtype=torch.long)
        given = {"position_ids": positions, "labels": labels, "logits_to_keep": batch.kept, "use_cache": False}
        return call(**inputs(length), **given).loss

    def retrieval(call: Any) -> Any:
        sides = [normalize(call(**inputs(length)).last_hidden_state.mean(1).float(), dim=-1) for length in batch.lengths]
        return cross_entropy(20.0 * sides[0] @ torch.cat(sides[1:]).T, torch.zeros(batch.rows, dtype=torch.long))

    return language if task == "causal_lm" else retrieval


def _available() -> int:
    """Free bytes where the run will be: the GPU's, or the machine's."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _seconds(trace: Any, dtype: "torch.dtype") -> float:
    """Products at the rate that this machine multiplies, bytes at the rate that it writes, and what calling an op costs."""
    rate, written, call = _speed(dtype)
    return trace.flops / rate + trace.written_bytes / written + trace.operations * call


def _speed(dtype: "torch.dtype") -> tuple[float, float, float]:
    """(FLOP/s, bytes/s written, seconds an operation) of this machine, measured in about half a second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = torch.ones(1024, 512, dtype=dtype, device=device), torch.ones(512, 512, dtype=dtype, device=device)
    large, small = torch.ones(1 << 22, device=device), torch.ones(8, device=device, requires_grad=True)
    product = _timed(lambda: left @ right, times=20)
    write = _timed(lambda: large + 1.0, times=5)
    call = _timed(lambda: small * 2.0, times=2000)
    return 2 * 1024 * 512 * 512 / product, large.numel() * 4 / write, call


def _timed(work: Callable[[], Any], *, times: int) -> float:
    """Seconds of one call, the best of three rounds."""
    import torch

    work()
    best = float("inf")
    for _ in range(3):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / times)
    return best

"""Weights in groups of whole numbers, in compressed-tensors' files: W4A16 and W8A8, rounded to nearest or by GPTQ. Knows no adapter.

vLLM computes with these files as they are; transformers turns them back, exactly, into the floating-point weights they stand for,
and there every method trains. W8A8's engine also rounds activations to 8 bits, which the trainer does not.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.errors import QuantizationUnsupported

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BITS = {"w4a16": 4, "w8a8": 8}
GROUP = 128  # columns that share a scale in W4A16


def compress(
    model: Any, stage: Path, *, scheme: str, skipped: Sequence[str], dtype: "torch.dtype", batches: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write `model`, loaded in fp32, to `stage`; scales and what is not quantized in `dtype`. With `batches` of its inputs W4A16 is
    rounded by GPTQ.

    Raises QuantizationUnsupported where a layer's columns are no multiple of the group.
    """
    from safetensors.torch import save_file

    layers = {name: layer for name, layer in _linear(model) if not any(part in skipped for part in name.split("."))}
    if scheme == "w4a16":
        for name, layer in layers.items():
            if layer.in_features % GROUP:
                raise QuantizationUnsupported(f"w4a16 wants columns in groups of {GROUP}; {name} has {layer.in_features}: use nf4 or int8")
    moments = second_moments(model, layers, batches) if batches and scheme == "w4a16" else {}
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    tensors = {name: value.detach().to(dtype).contiguous() for name, value in model.state_dict().items()}
    if tied:
        tensors = {name: value for name, value in tensors.items() if model.get_submodule(name.rpartition(".")[0]) is not head}
    for name, layer in layers.items():
        del tensors[f"{name}.weight"]
        tensors |= _packed(name, layer.weight.detach(), scheme, moments.get(name), dtype=dtype)
    model.config.dtype = dtype
    model.config.quantization_config = quantization_config(scheme, skipped)
    model.config.save_pretrained(stage)
    save_file(tensors, str(stage / "model.safetensors"), metadata={"format": "pt"})


def quantization_config(scheme: str, skipped: Sequence[str]) -> dict[str, Any]:
    """What stands in config.json, as compressed-tensors and vLLM read it."""
    weights: dict[str, Any] = {"num_bits": BITS[scheme], "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": GROUP} if scheme == "w4a16" else {"strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"} if scheme == "w8a8" else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if scheme == "w4a16" else "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [f"re:.*{name}.*" for name in skipped],
    }


def plain(model: Any) -> None:
    """Let decompressed layers be ordinary ones. compressed-tensors would round weights again at each call and, in W8A8, activations:
    without a gradient, so that no layer below would learn."""
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            for name in ("forward", "quantization_scheme", "quantization_status"):
                module.__dict__.pop(name, None)
            for name in [name for name, _ in module.named_parameters(recurse=False) if name not in {"weight", "bias"}]:
                delattr(module, name)


def scheme_of(config: Mapping[str, Any]) -> str:
    """'w4a16' or 'w8a8' where a config's groups say so, else 'compressed-tensors'."""
    groups: Any = list((config.get("config_groups") or {}).values())
    if len(groups) != 1:
        return "compressed-tensors"
    bits = int((groups[0].get("weights") or {}).get("num_bits", 0))
    rounded = bool(groups[0].get("input_activations"))
    return {(4, False): "w4a16", (8, True): "w8a8"}.get((bits, rounded), "compressed-tensors")


def _linear(model: Any) -> Iterator[tuple[str, Any]]:
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def _packed(name: str, weight: "Tensor", scheme: str, moment: "Tensor | None", *, dtype: "torch.dtype") -> "dict[str, Tensor]":
    import torch

    if scheme == "w8a8":
        scale = _scale(weight, bits=8, dtype=dtype)
        return {f"{name}.weight": _codes(weight, scale, bits=8), f"{name}.weight_scale": scale.to(dtype)}
    if moment is None:
        codes, scales = nearest(weight, bits=4, group=GROUP, dtype=dtype)
    else:
        codes, scales = gptq(weight, moment, bits=4, group=GROUP, dtype=dtype)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return {f"{name}.weight_packed": _in_words(codes), f"{name}.weight_scale": scales.to(dtype), f"{name}.weight_shape": shape}


def _scale(weight: "Tensor", *, bits: int, dtype: "torch.dtype") -> "Tensor":
    """(rows, 1) fp32: the largest magnitude falls on the last code. Rounded to `dtype` first: codes are for the scale that is kept."""
    return (weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 0.5)).clamp(min=1e-6).to(dtype).float()


def _codes(weight: "Tensor", scale: "Tensor", *, bits: int) -> "Tensor":
    import torch

    limit = 2 ** (bits - 1)
    return (weight / scale).round().clamp(-limit, limit - 1).to(torch.int8)


def nearest(weight: "Tensor", *, bits: int, group: int, dtype: "torch.dtype") -> "tuple[Tensor, Tensor]":
    """(codes (out, in) int8, scales (out, in / group)), each weight rounded by itself."""
    import torch

    codes: list[Any] = []
    scales: list[Any] = []
    for part in weight.split(group, dim=1):
        scales.append(_scale(part, bits=bits, dtype=dtype))
        codes.append(_codes(part, scales[-1], bits=bits))
    return torch.cat(codes, dim=1), torch.cat(scales, dim=1)


def gptq(weight: "Tensor", moment: "Tensor", *, bits: int, group: int, dtype: "torch.dtype", damp: float = 0.01) -> "tuple[Tensor, Tensor]":
    """As `nearest`, but each column's rounding error is made good in the columns after it (arXiv 2210.17323, algorithm 1).

    moment: (in, in), the sum of x xᵀ over the layer's inputs.
    """
    import torch

    left, size = weight.clone(), weight.shape[1]
    hessian = moment.clone()
    unused = hessian.diagonal() == 0
    hessian.diagonal()[unused] = 1
    left[:, unused] = 0
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    codes, scales = torch.zeros(weight.shape, dtype=torch.int8), torch.zeros(weight.shape[0], size // group)
    for first in range(0, size, group):
        scale = _scale(left[:, first : first + group], bits=bits, dtype=dtype)
        scales[:, first // group] = scale[:, 0]
        for column in range(first, first + group):
            code = _codes(left[:, column : column + 1], scale, bits=bits)
            codes[:, column] = code[:, 0]
            error = (left[:, column : column + 1] - code * scale) / inverse[column, column]
            left[:, column + 1 :] -= error @ inverse[column : column + 1, column + 1 :]
    return codes, scales


def second_moments(model: Any, layers: Mapping[str, Any], batches: Sequence[Mapping[str, Any]]) -> "dict[str, Tensor]":
    """Layer → Σ x xᵀ (in, in) over what it is given on `batches`, padding left out."""
    import torch

    found = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}
    with torch.inference_mode():
        for batch in batches:
            with _watching(layers, found, batch["attention_mask"].bool()):
                model(**batch)
    return found


@contextmanager
def _watching(layers: Mapping[str, Any], found: "dict[str, Tensor]", mask: "Tensor") -> Generator[None]:
    def watch(name: str) -> Any:
        def hook(_: Any, inputs: Any, __: Any) -> None:
            x = inputs[0][mask].float()
            found[name] += x.T @ x

        return hook

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_words(codes: "Tensor") -> "Tensor":
    """(out, in) int8 in −8 … 7 → (out, in / 8) int32: eight codes a word, each plus 8, the first in the lowest bits."""
    import torch

    parts = (codes.to(torch.int64) + 8).view(codes.shape[0], -1, 8)
    words = (parts << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

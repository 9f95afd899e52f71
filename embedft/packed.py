"""GPTQ's and AWQ's files, read as the floating-point weights that they stand for: on those every method trains. Knows no model.

GPTQ (as AutoGPTQ and gptqmodel write it): codes of 2, 4 or 8 bits in words down the columns of an (in, out) matrix, and a group's zero less
one (`gptq_v2`: as it is). AWQ (AutoAWQ's gemm): codes of 4 bits in words along the rows, in an order of their own. vLLM computes with these
files as they are.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.errors import QuantizationUnsupported

if TYPE_CHECKING:
    import torch
    from torch import Tensor

READ = ("gptq", "awq")
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight columns of one of AWQ's words, where each lies in it


def unpacked(files: Sequence[Path], config: Mapping[str, Any], *, dtype: "torch.dtype") -> "dict[str, Tensor]":
    """The tensors of a folder's safetensors `files`, each packed layer as one `weight` (out, in) in `dtype`; `config` is the
    quantization_config of its config.json. QuantizationUnsupported where they are laid out otherwise."""
    from safetensors import safe_open

    name = files[0].parent.name
    _check(name, config)
    tensors: dict[str, Any] = {}
    layers: dict[str, dict[str, Any]] = {}
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                layer, _, part = key.rpartition(".")
                (layers.setdefault(layer, {}) if part in _PARTS else tensors)[part if part in _PARTS else key] = file.get_tensor(key)
    for layer in list(layers):
        parts = layers.pop(layer)
        if missing := {"qweight", "qzeros", "scales"} - parts.keys():
            raise QuantizationUnsupported(f"{name}: {layer} lacks {', '.join(sorted(missing))}: download it again, whole")
        if "int32" not in (words := str(parts["qweight"].dtype)):
            raise QuantizationUnsupported(f"{name}: {layer} is packed in {words}, not int32: take its unquantized weights")
        matrix = _awq(parts) if config["quant_method"] == "awq" else _gptq(parts, config)
        tensors[f"{layer}.weight"] = matrix.T.to(dtype).contiguous()
    return tensors


def _check(name: str, config: Mapping[str, Any]) -> None:
    method, bits = config["quant_method"], config.get("bits")
    layout = str(config.get("version" if method == "awq" else "checkpoint_format") or READ[0]).lower()
    known = ("gemm", READ[0]) if method == "awq" else ("gptq", "gptq_v2")
    if layout not in known or bits not in ((4,) if method == "awq" else (2, 4, 8)):
        raise QuantizationUnsupported(
            f"{name} holds {method} of {bits} bits laid out for {layout}, which is not read here: take its unquantized weights"
        )


def _gptq(parts: "Mapping[str, Tensor]", config: Mapping[str, Any]) -> "Tensor":
    """(in, out) fp32. A layer may have other bits than its config (gptqmodel's `dynamic`): its columns' groups say how many rows it has."""
    import torch

    words, scales = parts["qweight"], parts["scales"].float()
    rows = len(parts["g_idx"]) if "g_idx" in parts else words.shape[0] * 32 // int(config["bits"])
    bits = words.shape[0] * 32 // rows
    group = int(config.get("group_size") or -1)
    of = parts["g_idx"].long() if "g_idx" in parts else torch.arange(rows) // (group if group > 0 else rows)
    zeros = _codes(parts["qzeros"], bits, dim=1)[:, : scales.shape[1]]
    if str(config.get("checkpoint_format") or "gptq") == "gptq":
        zeros = (zeros + 1) & (2**bits - 1)
    return (_codes(words, bits, dim=0) - zeros[of]) * scales[of]


def _awq(parts: "Mapping[str, Tensor]") -> "Tensor":
    """(in, out) fp32."""
    import torch

    codes, zeros = (_codes(parts[name], 4, dim=1) for name in ("qweight", "qzeros"))
    place = torch.arange(codes.shape[1]).view(-1, 8)[:, _ORDER].flatten()
    group = codes.shape[0] // zeros.shape[0]
    return (codes[:, place] - zeros[:, place].repeat_interleave(group, dim=0)) * parts["scales"].float().repeat_interleave(group, dim=0)


def _codes(words: "Tensor", bits: int, *, dim: int) -> "Tensor":
    """int32 words → the codes in them, the first in the lowest bits, along `dim`."""
    import torch

    parts = (words.unsqueeze(dim + 1) >> torch.arange(0, 32, bits, dtype=torch.int32).view((-1, 1) if dim == 0 else (-1,))) & (2**bits - 1)
    return parts.flatten(dim, dim + 1)

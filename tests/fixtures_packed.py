"""Folders as AutoGPTQ, gptqmodel and AutoAWQ write them: a base's linear layers rounded and packed."""

import json
import shutil
from pathlib import Path
from typing import Any

PLACES = {"gptq": range(8), "awq": (0, 2, 4, 6, 1, 3, 5, 7)}  # the column that each four bits of a word hold


def packed_copy(
    base: Path, out: Path, method: str, *, bits: int = 4, group: int = 32, sym: bool = True, by_activation: bool = False
) -> dict[str, Any]:
    """Write `out`; returns the weights that its layers stand for."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, out)
    path = out / "model.safetensors"
    made: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for name, weight in load_file(path).items():
        if not name.endswith("_proj.weight"):
            made[name] = weight
            continue
        matrix = weight.float().T
        of = torch.arange(len(matrix)) // group
        of = of[torch.randperm(len(of))] if by_activation else of
        codes, zeros, scales = _rounded(matrix, of, bits, sym=sym)
        layer = name.removesuffix(".weight")
        weights[name] = ((codes - zeros[of]) * scales[of]).T
        made[f"{layer}.scales"] = scales.half()
        if method == "gptq":
            made[f"{layer}.qweight"] = _words(codes.T, bits, range(32 // bits)).T.contiguous()
            made[f"{layer}.qzeros"] = _words(zeros - 1, bits, range(32 // bits))
            made[f"{layer}.g_idx"] = of.int()
        else:
            made |= {f"{layer}.{part}": _words(value, 4, PLACES["awq"]) for part, value in (("qweight", codes), ("qzeros", zeros))}
    save_file(made, path, metadata={"format": "pt"})
    said: dict[str, Any] = {"quant_method": method, "bits": bits, "group_size": group}
    said |= {"desc_act": by_activation, "sym": sym} if method == "gptq" else {"zero_point": True, "version": "gemm"}
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return weights


def _rounded(matrix: Any, of: Any, bits: int, *, sym: bool) -> tuple[Any, Any, Any]:
    """(codes (in, out), zeros (groups, out), scales (groups, out)) of an (in, out) matrix whose rows are of the groups `of`."""
    import torch

    groups, most = int(of.max()) + 1, 2**bits - 1
    codes, zeros, scales = torch.zeros(matrix.shape), torch.zeros(groups, matrix.shape[1]), torch.zeros(groups, matrix.shape[1])
    for number in range(groups):
        rows = matrix[of == number]
        low, high = rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0)
        scale = (torch.maximum(-low, high) * 2 / most if sym else (high - low) / most).half().float()
        zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else (-low / scale).round()
        codes[of == number] = ((rows / scale).round() + zero).clamp(0, most)
        zeros[number], scales[number] = zero, scale
    return codes, zeros, scales


def _words(codes: Any, bits: int, places: Any) -> Any:
    """(rows, columns) → (rows, columns · bits / 32) int32, the column places[i] of each word's in its i-th bits."""
    import torch

    numbers = (codes.long() & (2**bits - 1)).view(len(codes), -1, 32 // bits)
    words = sum(numbers[:, :, place] << (bits * at) for at, place in enumerate(places))
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()

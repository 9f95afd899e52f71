"""A child process: an adapter that nobody has proven gets its probes, from plain PEFT on the base's own files. No engine has a part in it.

`python -m serve.proving PARENT`, and on stdin {"kind": "import" | "mix", "folder", "base", "task", "name", "model", "members"}. For
"import" `folder` holds PEFT's two files; for "mix" it is empty and `members` are [[adapter folder, weight], …]. It writes probes and
passport, or prints what is wrong as {"code", "message"} on its last line and ends with 1. It ends with the process PARENT.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from embedft.adapters.passport import CONFIG, WEIGHTS, BaseIdentity, Passport, read_passport
from embedft.adapters.store import AdapterStore
from embedft.errors import AdapterInvalid, EmbedftError, UsageError
from embedft.lean import without_unused
from serve.foreign import as_published, fit_names, leave_out_copies, strip, take
from serve.guard import PR_SET_PDEATHSIG, prctl


def main(parent: int) -> int:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    job: dict[str, Any] = json.load(sys.stdin)
    try:
        run(job)
    except EmbedftError as error:
        message = error.reason if isinstance(error, AdapterInvalid) else str(error)  # of what the adapter is called, the gateway tells
        print(json.dumps({"code": error.code, "message": message}))  # noqa: T201
        return 1
    return 0


def run(job: dict[str, Any]) -> None:
    from embedft.adapters.probes import write_probes
    from embedft.model_folder import describe
    from embedft.vectors import published_settings
    from embedft.verify import as_record

    folder, base, task = Path(job["folder"]), Path(job["base"]), job["task"]
    info = describe(base)
    like = read_passport(Path(job["members"][0][0])) if job["kind"] == "mix" else None
    said = as_published(folder, info, job["name"]) if job["kind"] == "import" and task == "embedding" else None
    if job["kind"] == "mix":
        mix([(Path(member), float(weight)) for member, weight in job["members"]], folder, name=job["name"])
    else:
        strip(folder)
        leave_out_copies(folder, base, job["name"])
        fit_names(folder, base, task)
    r, alpha, method = _config(folder, job["name"])
    settings = None
    if task == "embedding":
        settings = said or published_settings(info, like.max_length if like else info.max_length)
        limit = like.max_length if like else job.get("max_length") or settings.max_length
        settings = replace(settings, max_length=min(settings.max_length, limit), prompts=like.prompts if like else settings.prompts)
    recorded = _recorded(folder, base, task, settings, name=job["name"])
    write_probes(folder, recorded)
    identity = like.base if like else BaseIdentity(
        model=job["model"], quantization=info.quantization, fingerprint=info.fingerprint, parent=info.parent
    )  # fmt: skip
    Passport(
        name=job["name"],
        task=task,
        base=identity,
        method=method,
        r=r,
        alpha=alpha,
        side=like.side if like else "both",
        prompts=dict(settings.prompts) if settings else {},
        pooling=settings.pooling if settings else None,
        normalize=settings.normalize if settings else None,
        max_length=settings.max_length if settings else (like.max_length if like else info.max_length),
        template_hash=like.template_hash if like else None,
        probes=as_record(recorded, task),
        versions={name: version(name) for name in ("torch", "transformers", "peft")},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        unproven=like is None or any(read_passport(Path(member)).unproven for member, _ in job["members"]),
    ).write(folder)


def _recorded(folder: Path, base: Path, task: Any, settings: Any, *, name: str) -> Any:
    """The probes as plain PEFT answers them. AdapterInvalid where it does not, or with something else than numbers."""
    import numpy as np

    from embedft.model_folder import tokenizer_of
    from embedft.verify import record

    try:
        recorded = record(folder, base=base, tokenizer=tokenizer_of(base), task=task, settings=settings, name=name)
    except EmbedftError:
        raise
    except Exception as error:  # PEFT checks little of what a config says
        raise AdapterInvalid(name, f"plain PEFT cannot load it: {(str(error) or type(error).__name__).splitlines()[0][:300]}") from error
    if not all(np.isfinite(effect).all() for effect in recorded.effect):
        raise AdapterInvalid(name, f"its effect is not finite: its {CONFIG} scales it by what is no number, or its weights overflow")
    return recorded


def import_unproven(store: AdapterStore, source: Path, *, name: str, base: str, task: Any) -> str:
    """An adapter folder without passport into the store, proven in this process; its generation. `base`: a built-in, folder or hub id."""
    from embedft.base import BaseSpec, base_folder

    if not source.is_dir():
        raise UsageError(f"{source} is not a folder")
    folder = base_folder(BaseSpec(base))
    with store.stage() as stage:
        take(source, stage, name, links=True)
        model = folder.name if Path(base).is_dir() else base
        run({"kind": "import", "folder": str(stage), "base": str(folder), "task": task, "name": name, "model": model})
        return store.put(stage, name, renew=False)


def _config(folder: Path, name: str) -> tuple[int, float, str]:
    """(largest rank, alpha, method) of PEFT's config."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        ranks = [int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())]
        if config.get("peft_type") != "LORA":
            raise AdapterInvalid(name, f"it is a {config.get('peft_type')}, not a LoRA: convert it first")
        method = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
        return max(ranks), float(config["lora_alpha"]), method
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterInvalid(name, f"its {CONFIG} cannot be read: {error}") from None


def mix(members: list[tuple[Path, float]], out: Path, *, name: str) -> None:
    """Write Σ weight · scale · B A of LoRA members into `out` as one LoRA whose rank is the sum of theirs: exactly, by concatenation."""
    import torch
    from safetensors.torch import load_file, save_file

    parts: dict[str, list[tuple[Any, Any]]] = {}
    total, config = 0, dict[str, Any]()
    for folder, weight in members:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(str(folder / WEIGHTS))
        modules = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
        if 2 * len(modules) != len(tensors) or config.get("use_dora"):
            raise AdapterInvalid(name, f"{config.get('peft_type')} with more than A and B matrices cannot be mixed")
        total += max(tensors[f"{module}.lora_A.weight"].shape[0] for module in modules)
        for module in modules:
            a, b = (tensors[f"{module}.lora_{which}.weight"].float() for which in "AB")
            parts.setdefault(module, []).append((a, b * (weight * _scale(config, module, a.shape[0]))))
    made: dict[str, Any] = {}
    for module, pairs in parts.items():
        a, b = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs], dim=1)
        short = total - a.shape[0]  # a module that not every member adapts is filled up with zeros
        made[f"{module}.lora_A.weight"] = torch.cat([a, a.new_zeros(short, a.shape[1])]).contiguous()
        made[f"{module}.lora_B.weight"] = torch.cat([b, b.new_zeros(b.shape[0], short)], dim=1).contiguous()
    save_file(made, str(out / WEIGHTS), metadata={"format": "pt"})
    targets = sorted(module.removeprefix("base_model.model.") for module in parts)
    plain = {"r": total, "lora_alpha": total, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    plain |= {"target_modules": targets, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    (out / CONFIG).write_text(json.dumps({**config, **plain}, indent=2), encoding="utf-8")


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    patterns: dict[str, Any] = config.get("alpha_pattern") or {}
    plain = module.removeprefix("base_model.model.")
    alpha = float(patterns.get(get_pattern_key(list(patterns), plain), config["lora_alpha"]))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


if __name__ == "__main__":
    without_unused()
    sys.exit(main(int(sys.argv[1])))

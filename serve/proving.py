"""A child process: an adapter that nobody has proven gets its probes, from plain PEFT on the base's own files. No engine has a part in it.

`python -m serve.proving PARENT`, and on stdin {"kind": "import" | "mix", "folder", "base", "task", "name", "model", "members"}. For
"import" `folder` holds PEFT's two files; for "mix" it is empty and `members` are [[adapter folder, weight], …]. It writes probes and
passport, or prints what is wrong as {"code", "message"} on its last line and ends with 1. It ends with the process PARENT.
"""

import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from embedft.adapters.passport import CONFIG, WEIGHTS, BaseIdentity, Passport, read_passport
from embedft.adapters.store import AdapterStore, check_folder
from embedft.adapters.transfer import check_weights
from embedft.errors import AdapterInvalid, BaseError, EmbedftError, UsageError
from embedft.lean import without_unused
from embedft.sentence_folder import FILES as OF_VECTORS
from serve.guard import PR_SET_PDEATHSIG, prctl

if TYPE_CHECKING:
    from embedft.encode import EncodeSettings
    from embedft.model_folder import BaseInfo

_OF_PEFT = "base_model.model."
_EMBEDDING = re.compile(r"\.(embed_tokens|word_embeddings|wte|embed_in|embed_out|lm_head)(\.base_layer)?\.weight$")


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
    said = _said(folder, info, job["name"]) if job["kind"] == "import" and task == "embedding" else None
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


def take(source: Path, stage: Path, name: str, *, links: bool = False) -> None:
    """Of an adapter folder into `stage`, after a look at them: PEFT's two files and what sentence-transformers says of its vectors.

    What a trainer leaves beside them (checkpoints, its own pickled arguments) is passed over unread. `links`: where they lead is read,
    as it is for whoever imports what the hub's cache holds; a server reads nothing outside of its store.
    """
    for file in (CONFIG, WEIGHTS, *OF_VECTORS):
        path, target = source / file, stage / file
        if path.parent != source and path.parent.is_symlink() and not links:
            raise AdapterInvalid(name, f"{path.parent.name} is a link or no plain file")
        if path.exists() or path.is_symlink():
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(path, target, follow_symlinks=links)
    check_folder(stage, name)
    if not (source / WEIGHTS).is_file() and (source / "adapter_model.bin").is_file():
        raise AdapterInvalid(
            name, "adapter_model.bin is a pickle; only safetensors is read: load it with PEFT where you trust it, and save it"
        )
    check_weights(stage if (stage / CONFIG).is_file() and (stage / WEIGHTS).is_file() else source, name)


def strip(stage: Path) -> None:
    """Keep PEFT's two files and nothing else."""
    for path in stage.iterdir():
        if path.name not in (CONFIG, WEIGHTS):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _said(folder: Path, info: "BaseInfo", name: str) -> "EncodeSettings | None":
    """How sentence-transformers' files beside an adapter make its vectors; None where there are none. Their length stays the base's:
    they are compared by their cosine."""
    from embedft.encode import EncodeSettings
    from embedft.sentence_folder import longest, published

    decoder = info.kind == "decoder"
    if not (folder / "modules.json").is_file():
        return None
    try:
        own = published(folder, decoder=decoder)
        length = min(longest(folder, decoder=decoder) or info.max_length, info.positions)
    except BaseError as error:
        raise AdapterInvalid(name, str(error).partition("published: ")[2] or str(error)) from None
    return EncodeSettings(own.pooling, info.normalize, length, own.prompts)


def leave_out_copies(folder: Path, base: Path, name: str) -> None:
    """PEFT writes the embeddings of the base beside an adapter of theirs, or where a tokenizer grew: what the base has too is left out.

    AdapterInvalid where they are others than its own.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(str(folder / WEIGHTS))
    kept = dict(tensors)
    for key in [key for key in tensors if _EMBEDDING.search(key)]:
        module = key.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".base_layer")
        if any(module.rpartition(".")[2] == saved.rpartition(".")[2] for saved in config.get("modules_to_save") or ()):
            continue
        copied, own = tensors[key], _weight(base, module)
        if own is not None and own.shape != copied.shape:
            raise AdapterInvalid(
                name,
                f"it was trained on a base of {copied.shape[0]} tokens, and this one has {own.shape[0]}: save the base after "
                "model.resize_token_embeddings, with the tokenizer that it was trained with, and name that folder",
            )
        if own is None or not torch.allclose(own.float(), copied.float(), rtol=1e-2, atol=1e-3):
            raise AdapterInvalid(name, f"it brings a {module} of its own, other than the base's: name the base that it was trained on")
        del kept[key]
    if len(kept) < len(tensors):
        save_file(kept, str(folder / WEIGHTS), metadata={"format": "pt"})


def fit_names(folder: Path, base: Path, task: Any) -> None:
    """Name its layers as the base does that is loaded for `task`: the same layers have one part more in their names under a head (a
    language model's, say). Where they are others too, all stay as they are."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    tensors = load_file(str(folder / WEIGHTS))
    with torch.device("meta"):
        empty: Any = (AutoModelForCausalLM if task == "causal_lm" else AutoModel).from_config(AutoConfig.from_pretrained(base))
    there, head = {name for name, _ in empty.named_modules()}, f"{empty.base_model_prefix}."
    found = {key: key.removeprefix(_OF_PEFT).partition(".lora_")[0] for key in tensors}
    meant = {name: next((each for each in (name, name.removeprefix(head), head + name) if each in there), "") for name in found.values()}
    if not all(meant.values()) or all(name == other for name, other in meant.items()):
        return
    save_file(
        {key.replace(name, meant[name], 1): tensors[key] for key, name in found.items()}, str(folder / WEIGHTS), metadata={"format": "pt"}
    )
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for option in ("rank_pattern", "alpha_pattern"):
        config[option] = {name.removeprefix(head): value for name, value in (config.get(option) or {}).items()}
    for option in ("target_modules", "exclude_modules"):
        if isinstance(given := config.get(option), list):
            config[option] = [str(name).removeprefix(head) for name in cast("list[Any]", given)]
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _weight(base: Path, module: str) -> Any:
    """The base's weights of an embedding, or of an output layer that shares them; None where its files have neither."""
    from safetensors import safe_open

    from embedft.model_folder import weight_files

    found: dict[str, Any] = {}
    for path in weight_files(base):
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                if _EMBEDDING.search(f".{key}"):
                    found[key] = file.get_tensor(key)
    same = (key for key in found if f"{module}.weight".endswith(key) or key.endswith(f"{module}.weight"))
    return found.get(next(same, ""), next(iter(found.values()), None) if len(found) == 1 else None)


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

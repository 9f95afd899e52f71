"""What another trainer wrote becomes PEFT's two files for one base: its copies left out, its layers by the base's names. Proves nothing."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from embedft.adapters.passport import CONFIG, WEIGHTS
from embedft.adapters.store import check_folder
from embedft.adapters.transfer import check_weights
from embedft.errors import AdapterInvalid, BaseError
from embedft.sentence_folder import FILES as OF_VECTORS

if TYPE_CHECKING:
    from embedft.encode import EncodeSettings
    from embedft.model_folder import BaseInfo

_OF_PEFT = "base_model.model."
_EMBEDDING = re.compile(r"\.(embed_tokens|word_embeddings|wte|embed_in|embed_out|lm_head)(\.base_layer)?\.weight$")


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


def as_published(folder: Path, info: "BaseInfo", name: str) -> "EncodeSettings | None":
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

    found: dict[str, Path] = {}
    for path in weight_files(base):
        with safe_open(str(path), framework="pt") as file:
            found |= {key: path for key in file.keys() if _EMBEDDING.search(f".{key}")}  # noqa: SIM118
    same = (key for key in found if f"{module}.weight".endswith(key) or key.endswith(f"{module}.weight"))
    key = next(same, next(iter(found)) if len(found) == 1 else None)
    if key is None:
        return None
    with safe_open(str(found[key]), framework="pt") as file:
        return file.get_tensor(key)

"""One adapter into a base's weights, or several adapters into one. Trains nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal, get_args

from embedft.adapters.card import CARD, model_card
from embedft.adapters.passport import Passport, base_said, read_passport
from embedft.adapters.probes import compare, read_probes, write_probes
from embedft.base import BaseSpec, exact_dtype, load_model, quantization_of_model, source_folder
from embedft.errors import AdapterInvalid, BaseMismatch, MethodUnsupported, UsageError
from embedft.files import publish_folder, staged_folder
from embedft.methods import config_of, load_adapter, method_named, only_pairs, save_weights
from embedft.methods.companion import lora_layers
from embedft.model_folder import CHATML, fingerprint, own_template, template_hash, tokenizer_of, write_template
from embedft.quantize import copy_rest, quantize
from embedft.verify import as_record, outputs, record, settings_of, trained_base

LEFT = 1e-4  # of the strongest part's effect; less is what rounding leaves of parts that take each other away
_OF_ONE = ("adapter_", "passport", "conversion")  # files that speak of one adapter alone
How = Literal["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "ties_svd", "dare_linear_svd", "dare_ties_svd"]


@dataclass(frozen=True)
class Merged:
    """`error`: how far the merged model's effect on the adapter's probes is from the adapter's (relative). It is measured against
    the base that was merged into: an adapter trained on a quantized base meets full-precision weights there. `quantized_error`: the
    same of what was then quantized and lies in `path`, so that what the scheme costs counts too; None where nothing was."""

    path: str
    error: float
    quantized_error: float | None = None


def merge(folder: Path, out: Path, *, scheme: str | None = None, base: Path | None = None) -> Merged:
    """Write base + adapter as one full-precision model folder to `out`, quantized by `scheme` if asked for. It has the chat template
    that the adapter was trained with.

    `base`: the folder to merge into (default: the weights that the passport's base was quantized from); one that came quantized counts as
    the floating-point weights that it stands for. Raises MethodUnsupported where the method cannot be merged, AdapterInvalid,
    BaseMismatch, UsageError for an `out` that holds files.
    """
    passport, recorded = read_passport(folder), read_probes(folder)
    method = method_named(passport.method)
    if not method.merges:
        raise MethodUnsupported(method.name, where="merged", why="it is no change of weights: serve it by the peft engine")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is {'not empty' if out.is_dir() else 'a file'}: name a new folder")
    source = base or source_folder(BaseSpec(passport.base.model, "none", passport.base.revision))
    if (given := fingerprint(source)) not in {passport.base.fingerprint, passport.base.parent}:
        trained_on = base_said(passport.base.model, "none", passport.base.parent or passport.base.fingerprint)
        raise BaseMismatch(passport.name, trained_on=trained_on, serving=base_said(str(source), "none", given))
    settings = settings_of(passport) if passport.task == "embedding" else None
    model: Any = _in_full(load_model(source, task=passport.task, dtype=exact_dtype()))
    plain = outputs(model, recorded.probes, folder=source, settings=settings)
    model = load_adapter(model, folder, name=passport.name)
    _untie(model)
    try:
        model = model.merge_and_unload()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise AdapterInvalid(passport.name, f"PEFT cannot write it into the base's weights ({why}): serve it by the peft engine") from error
    adapted = outputs(model, recorded.probes, folder=source, settings=settings)
    error = compare(recorded, base=plain, adapted=adapted, base_again=plain).error
    with staged_folder(out.resolve().parent) as stage:
        model.config.tie_word_embeddings = bool(getattr(model.config, "tie_word_embeddings", False)) and _tied(model)
        model.save_pretrained(stage)
        copy_rest(source, stage)
        _keep_template(stage, passport)
        if not scheme:
            publish_folder(stage, out)
            return Merged(str(out), error)
        quantize(stage, out, scheme=scheme, called=f"{source.name}+{passport.name}")
    packed = outputs(load_model(out, task=passport.task, dtype=exact_dtype()), recorded.probes, folder=source, settings=settings)
    return Merged(str(out), error, compare(recorded, base=plain, adapted=packed, base_again=plain).error)


def _keep_template(folder: Path, passport: Passport) -> None:
    """Engines render by the template that the folder has: where the adapter was trained with another, it is that one from now on."""
    if passport.template_hash in (None, template_hash(own_template(folder))):
        return
    for source in (None, CHATML):  # those that a recipe may name
        if passport.template_hash == template_hash(source):
            write_template(folder, source)


def _in_full(model: Any) -> Any:
    """bitsandbytes' layers as ordinary ones; in other formats they are that once loaded. transformers would try to write them as it read
    them, which it cannot undo."""
    if quantization_of_model(model) != "bitsandbytes":
        return model
    model = model.dequantize(dtype=exact_dtype())
    reading = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [step for step in reading if not any("bitsandbytes" in type(each).__module__ for each in step.operations)]
    return model


def _untie(model: Any) -> None:
    """An adapted output embedding gets weights of its own: its change must not reach the input's."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = model.get_base_model().get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        layer: Any = head.get_base_layer()
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def _tied(model: Any) -> bool:
    import torch

    head = model.get_output_embeddings()
    return head is None or bool(torch.equal(head.weight, model.get_input_embeddings().weight))


def combine(
    folders: Sequence[Path],
    out: Path,
    *,
    name: str,
    weights: Sequence[float],
    how: How = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 7,
    base: Path | None = None,
) -> Passport:
    """Write the weighted sum of plain LoRA adapters of one base to `out`, with probes of its own.

    cat: exact, the ranks add up, weights may be negative; svd: the nearest of `rank`. ties (arXiv 2306.01708) keeps the share `density`
    (None: half) of each part, its largest numbers, and of these the mean of those that have the sign of most; dare (arXiv 2311.03099)
    keeps numbers by chance (`seed`), scaled by 1/density. With _svd they are of the updates, as in their papers, and the nearest of `rank`
    is written; without it they, and linear, are of A and of B apart, want equal ranks and keep them: quick, and no sum of the updates.

    Raises UsageError, AdapterInvalid where an adapter is no LoRA or two do not belong together.
    """
    import torch

    passports = [read_passport(folder) for folder in folders]
    _check_options(how, weights, rank=rank, density=density)
    density = 0.5 if density is None else density
    _check(passports, weights, how)
    first = passports[0]
    base_dir = trained_base(first, base)
    for folder, passport in zip(folders, passports, strict=True):
        only_pairs(config_of(folder, name=passport.name), passport.name)
    model: Any = load_adapter(load_model(base_dir, task=first.task, dtype=exact_dtype()), folders[0], adapter_name="a0", name=first.name)
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(str(folder), adapter_name=f"a{number}", is_trainable=False)
    options: dict[str, Any] = {"density": density} if how.startswith(("ties", "dare")) else {}
    made = {"how": how, "of": [passport.name for passport in passports], "weights": list(weights), **options}
    if how.startswith("dare"):
        made["seed"] = seed
    names = [f"a{number}" for number in range(len(folders))]
    layers = [dict(lora_layers(model, each)) for each in names]
    if how.endswith("svd"):
        smallest = min(min(layer.in_features, layer.out_features) for part in layers for layer in part.values())
        if (rank or 1) > smallest:
            raise UsageError(f"rank {rank}: the smallest layer that they adapt has {smallest}: lower it")
        options |= {"svd_rank": rank or min(max(passport.r for passport in passports), smallest), "svd_full_matrices": False}
    _like_a_sum([model.peft_config[each] for each in names], [list(part) for part in layers])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_weighted_adapter(names, list(weights), "default", combination_type=how, **options)
    model.set_adapter("default")
    for each in names:
        model.delete_adapter(each)
    save_weights(model, out, base_name=model.peft_config["default"].base_model_name_or_path)
    strongest = max(abs(weight) * read_probes(folder).strength for folder, weight in zip(folders, weights, strict=True))
    config = model.peft_config["default"]
    return _finish(folders[0], out, name, base_dir, config=config, parts=passports, made=made, least=LEFT * strongest)


def _like_a_sum(configs: Sequence[Any], layers: Sequence[Sequence[str]]) -> None:
    """PEFT writes the sum by the first one's config: its scale (rsLoRA's is another) and its choice of layers, which must not leave out
    what the others adapt."""
    configs[0].use_rslora = False
    chosen = [tuple(getattr(config, key) for key in _CHOICE) for config in configs]
    if any(each != chosen[0] for each in chosen):
        for config, names in zip(configs, layers, strict=True):
            for key in _CHOICE:
                setattr(config, key, None)
            config.target_modules = set(names)


_CHOICE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def _check_options(how: str, weights: Sequence[float], *, rank: int | None, density: float | None) -> None:
    if how not in get_args(How):
        raise UsageError(f"no way {how!r} to combine: there are {', '.join(get_args(How))}")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank}: expected a whole number of at least 1")
    if rank is not None and not how.endswith("svd"):
        raise UsageError(f"rank {rank}: {how} gives the rank that its parts come to: use a way that ends in svd, or leave it out")
    said = ", ".join(f"{weight:g}" for weight in weights)
    if not any(weights) or not all(isfinite(weight) for weight in weights):
        raise UsageError(f"weights {said}: expected finite numbers, not all of them 0")
    if "ties" in how and 0 in weights:
        raise UsageError(f"weights {said}: ties takes the mean of its parts, one of weight 0 among them: leave that part out")
    if density is not None and not how.startswith(("ties", "dare")):
        raise UsageError(f"density {density:g}: {how} keeps all there is: use a way of ties or dare, or leave it out")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"density {density:g}: it is a share of the weights that are kept, above 0 and at most 1")


def _check(passports: Sequence[Passport], weights: Sequence[float], how: str) -> None:
    if len(passports) < 2 or len(weights) != len(passports):
        raise UsageError(f"{len(passports)} adapters and {len(weights)} weights: give two adapters or more, and a weight each")
    first = passports[0]
    for passport in passports:
        if not (method := method_named(passport.method)).vllm:
            remedy = "it has no LoRA form" if method.to_lora == "no" else f"embedft adapters convert {passport.name} --to lora"
            raise AdapterInvalid(passport.name, f"{passport.method} is no plain LoRA: {remedy}")
        same = ("base", "task", "side", "prompts", "pooling", "normalize", "template_hash")
        if differs := [field for field in same if getattr(passport, field) != getattr(first, field)]:
            raise AdapterInvalid(passport.name, f"its {differs[0]} is not that of {first.name!r}: they cannot be one adapter")
        if how != "cat" and not how.endswith("svd") and passport.r != first.r:
            raise UsageError(f"{how} wants equal ranks, here are {first.r} and {passport.r}: use cat, or a way that ends in svd")


def _finish(
    source: Path, out: Path, name: str, base: Path, *, config: Any, parts: Sequence[Passport], made: dict[str, Any], least: float
) -> Passport:
    """What stands beside the sum's weights: the first part's files, probes, passport and card. AdapterInvalid below `least` of effect."""
    first = parts[0]
    settings = settings_of(first) if first.task == "embedding" else None
    if settings is not None:
        for path in source.iterdir():  # what makes it load in plain sentence-transformers
            if path.suffix in {".json", ".txt"} and not (out / path.name).exists() and not path.name.startswith(_OF_ONE):
                (out / path.name).write_bytes(path.read_bytes())
        for path in source.glob("[0-9]_*"):
            (out / path.name).mkdir()
            (out / path.name / "config.json").write_bytes((path / "config.json").read_bytes())
    recorded = record(out, base=base, tokenizer=tokenizer_of(base), task=first.task, settings=settings, name=name)
    if recorded.strength < least:
        raise AdapterInvalid(name, "its parts take each other away: what is left is rounding")
    write_probes(out, recorded)
    update = {
        "name": name,
        "method": "lora",
        "r": int(config.r),
        "alpha": float(config.lora_alpha),
        "max_length": min(passport.max_length for passport in parts),
        "dimensions": tuple(size for size in first.dimensions if all(size in passport.dimensions for passport in parts)),
        "unproven": any(passport.unproven for passport in parts),
        "metrics": {"combined": made},
        "data_hash": None,
        "recipe_hash": None,
        "probes": as_record(recorded, first.task),
    }
    passport = first.model_copy(update=update)
    passport.write(out)
    (out / CARD).write_text(model_card(passport), encoding="utf-8")
    return passport

"""A trained adapter → its whole folder in the store: weights, files that make it load elsewhere, passport, probes, card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.adapters.card import CARD, model_card
from embedft.adapters.passport import CONFIG, TEXTS, BaseIdentity, Passport
from embedft.adapters.probes import RecordedProbes, write_probes
from embedft.adapters.transfer import check_weights
from embedft.base import Base
from embedft.methods import method_named, save_weights
from embedft.recipe import AdapterSection, CausalLMRecipe, EmbeddingRecipe
from embedft.training.measure import AdapterResult, trainable
from embedft.training.progress import note
from embedft.training.sentence_files import write_sentence_files
from embedft.verify import as_record, record, unnoticed

if TYPE_CHECKING:
    from embedft.adapters.store import AdapterStore
    from embedft.encode import EncodeSettings

HUB_IDS = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}  # a built-in whose files are those of a hub model


@dataclass(frozen=True)
class Published:
    """What a trainer knows of its run beyond the weights. `rows`: eval/, one object a query or row; texts apart, under `texts`.

    `settings` for embedding adapters, `template_hash` for language models'. `data_hash` 64 hex; `seconds` of training.
    `held`: save it, but do not move the name to it.
    """

    metrics: Mapping[str, Any]
    data_hash: str
    max_length: int
    seconds: float
    peak_bytes: int
    template_hash: str | None = None
    settings: "EncodeSettings | None" = None
    dimensions: tuple[int, ...] = ()
    held: bool = False
    rows: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


def publish(
    model: Any, base: Base, recipe: EmbeddingRecipe | CausalLMRecipe, *, store: "AdapterStore", published: Published
) -> AdapterResult:
    """Write the adapter folder in a stage and put it into the store under `recipe.name`: whole, or not at all.

    `model` is the PeftModel. The probes are recorded on a base and an adapter loaded afresh from files, never from the
    trainer's memory, so what is published is what anyone will load. Raises AdapterInvalid if it changes nothing or diverged.
    """
    trained = trainable(model).count
    with store.stage() as folder:
        save_weights(model, folder, base_name=public_name(recipe.base.model))
        check_weights(folder, recipe.name)
        if published.settings is not None:
            write_sentence_files(folder, base.tokenizer, published.settings, dimension=base.info.hidden_size)
        settings, tokenizer = published.settings, base.tokenizer
        recorded = record(folder, base=base.folder, tokenizer=tokenizer, task=recipe.task, settings=settings, name=recipe.name)
        _note_unnoticed(recipe, recorded)
        write_probes(folder, recorded)
        passport = _passport(folder, base, recipe, published, recorded)
        passport.write(folder)
        (folder / "recipe.yaml").write_text(recipe.portable_yaml(), encoding="utf-8")
        (folder / CARD).write_text(model_card(passport), encoding="utf-8")
        _write_rows(folder / "eval", published.rows)
        generation = (store.hold if published.held else store.put)(folder, recipe.name)
    return AdapterResult(
        name=recipe.name,
        path=str(store.folder(generation)),
        generation=generation,
        metrics=dict(published.metrics),
        seconds=published.seconds,
        peak_bytes=published.peak_bytes,
        trainable=trained,
    )


def public_name(model: str) -> str:
    """What others may call the base: a hub id or a built-in's name; of a local folder only its last part."""
    if model in HUB_IDS:
        return HUB_IDS[model]
    return Path(model).name if Path(model).expanduser().is_dir() or Path(model).is_absolute() else model


def published_rank(folder: Path, adapter: AdapterSection) -> tuple[int, float]:
    """(rank, alpha) of the files in `folder`: more than the recipe's where a method publishes what it kept beside the trained pair, 0
    where it has none."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") == "LORA":
        return int(config["r"]), float(config["lora_alpha"])
    method = method_named(adapter.method)
    return adapter.r if method.rank else 0, float(adapter.scale_alpha) if method.alpha else 0.0


def _passport(
    folder: Path, base: Base, recipe: EmbeddingRecipe | CausalLMRecipe, published: Published, recorded: RecordedProbes
) -> Passport:
    settings = published.settings
    rank, alpha = published_rank(folder, recipe.adapter)
    return Passport(
        name=recipe.name,
        task=recipe.task,
        base=BaseIdentity(
            model=recipe.base.model if recipe.base.model in HUB_IDS else public_name(recipe.base.model),
            revision=recipe.base.revision,
            quantization=base.info.quantization,
            fingerprint=base.info.fingerprint,
            parent=base.info.parent,
        ),
        method=recipe.adapter.method,
        r=rank,
        alpha=alpha,
        side=recipe.adapter.side if isinstance(recipe, EmbeddingRecipe) else "both",
        prompts=dict(settings.prompts) if settings else {},
        pooling=settings.pooling if settings else None,
        normalize=settings.normalize if settings else None,
        max_length=published.max_length,
        dimensions=published.dimensions,
        template_hash=published.template_hash,
        data_hash=published.data_hash,
        recipe_hash=recipe.digest(),
        metrics=dict(published.metrics),
        probes=as_record(recorded, recipe.task),
        versions={name: version(name) for name in ("torch", "transformers", "peft")},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _note_unnoticed(recipe: EmbeddingRecipe | CausalLMRecipe, recorded: RecordedProbes) -> None:
    if kinds := unnoticed(recorded):
        remedy = "train longer" + (" or leave them out of adapter.targets" if method_named(recipe.adapter.method).targets else "")
        note(f"{recipe.name!r} hardly uses {', '.join(kinds)}: its probes would not notice their loss; {remedy}")


def _write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Scores into rows.jsonl; what a row has under `texts` into texts.jsonl, the one file that an export leaves out."""
    if not rows:
        return
    folder.mkdir()
    scores = [{key: value for key, value in row.items() if key != "texts"} for row in rows]
    texts = [{"id": row["id"], **row["texts"]} for row in rows if "texts" in row]
    for name, records in (("rows.jsonl", scores), (TEXTS, texts)):
        if records:
            lines = (json.dumps(record, ensure_ascii=False) for record in records)
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

"""A mapping → a frozen EmbeddingRecipe | CausalLMRecipe; its faults, all at once. Imports no torch and reads no file.

Everything has a default but `task`, `base.model` and `data`.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from embedft.errors import RecipeError
from embedft.recipe_faults import faults

Quantization = Literal["none", "int8", "nf4", "w4a16", "w8a8"]


class Section(BaseModel):
    """A closed, frozen part of a recipe: an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BaseSection(Section):
    model: str
    quantization: Quantization = "none"
    revision: str | None = None


class EmbeddingBaseSection(BaseSection):
    """`pooling` and `normalize` are read from the base's own sentence-transformers files where None."""

    pooling: Literal["mean", "cls", "lasttoken"] | None = None
    normalize: bool | None = None


class AdapterSection(Section):
    """`r`: the rank, or the number of virtual tokens. `alpha` None means 2 r. `targets`: 'all-linear' or a list of module name
    suffixes. `options`: the method's own (embedft.methods.table)."""

    method: str = "lora"
    r: PositiveInt = 16
    alpha: PositiveInt | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    options: dict[str, bool | int | float | str] = {}

    @property
    def scale_alpha(self) -> int:
        return 2 * self.r if self.alpha is None else self.alpha


class EmbeddingAdapterSection(AdapterSection):
    """`layers`: adapt only the last so many layers (None: all); what lies below them is then computed once a text, not once an epoch."""

    side: Literal["both", "query"] = "both"
    layers: PositiveInt | None = None


class Prompts(Section):
    """What stands before every text of a kind. None: what the base was published with."""

    query: str | None = None
    document: str | None = None

    def over(self, own: Mapping[str, str]) -> dict[str, str]:
        """query and document, those of the base where this says nothing."""
        return {kind: own.get(kind, "") if given is None else given for kind, given in (("query", self.query), ("document", self.document))}


class AlsoTrain(Section):
    """A further training set. Of `weight` 2 every row is shown twice an epoch, of 0.5 every epoch another half."""

    train: str
    weight: PositiveFloat = 1.0


class EmbeddingData(Section):
    """`train`, `eval` and `dev`: a file, a BEIR folder or hf://name[:config][@revision][#split]. `limit`: first rows only.

    `dev` chooses the best checkpoint: a folder's dev split, or with None a part of the training queries, held out.
    `weight` and `also`: several sets in one run.
    """

    train: str
    eval: str | None = None
    dev: str | None = None
    weight: PositiveFloat = 1.0
    also: tuple[AlsoTrain, ...] = ()
    format: Literal["pairs", "beir"] | None = None
    prompts: Prompts = Prompts()
    limit: PositiveInt | None = None


class CausalLMData(Section):
    """`validation`: rows that say which step was best; apart from `eval`, by which the run is judged."""

    train: str
    eval: str | None = None
    format: Literal["prompt_completion", "messages", "alpaca"] | None = None
    validation: str | None = None
    template: str | None = None
    train_on_inputs: bool = False
    limit: PositiveInt | None = None


class LossSection(Section):
    """`scale` is the inverse temperature of the contrastive losses. `dimensions`: also train these first components (Matryoshka)."""

    name: str = "mnrl"
    scale: PositiveFloat = 20.0
    dimensions: tuple[PositiveInt, ...] = ()


class TrainSection(Section):
    """`lr` per optimizer step, `warmup` a share of all steps, `checkpoint_every` in steps (None: only when stopped).

    `trackers` get loss and settings of the run; TensorBoard's files are written under the store's runs/.
    """

    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    batch: PositiveInt = 32
    accumulate: PositiveInt = 1
    lr: Annotated[float, Field(gt=0, le=1e30)] = 2e-4  # more than that is no float32 after a step
    max_length: PositiveInt = 128
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 7
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "linear"
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    checkpoint_every: PositiveInt | None = None
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()


class EmbeddingTrain(TrainSection):
    """`evaluate_every` so many steps `eval.metric` is taken on the dev queries, and the best weights are published.

    `patience`: stop after so many evaluations without a better one.
    """

    evaluate_every: PositiveInt | None = None
    patience: PositiveInt | None = None


class CausalLMTrain(TrainSection):
    """`packing`: several examples a row of `max_length` tokens, none seeing another; `batch` then counts such rows.
    `evaluate_every` steps the loss on `data.validation` is taken: the best step's adapter is published, and after `patience`
    evaluations without a better one the run ends."""

    packing: bool = False
    gradient_checkpointing: bool = False
    evaluate_every: PositiveInt | None = None
    patience: PositiveInt | None = None
    batch: PositiveInt = 16
    max_length: PositiveInt = 512


class GuardSection(Section):
    """A general set that an adapter must not spoil: `data` is pydocs (short functions of the standard library) or a retrieval set.

    Queries that are trained on are left out. `queries` and `documents` cap it; a query of pydocs has one document, so `queries` alone does.
    An adapter that loses more than `drop` of `eval.metric` there is saved, but its name does not move to it without --force.
    """

    data: str = "pydocs"
    drop: NonNegativeFloat = 0.05
    queries: PositiveInt = 200
    documents: PositiveInt = 400


class EmbeddingEval(Section):
    """`queries` and `documents` cap what is scored (None: all); a query's relevant documents are always kept."""

    metric: Literal["ndcg@10", "mrr@10", "hit@1", "hit@5", "hit@10", "recall@10"] = "ndcg@10"
    batch: PositiveInt = 64
    queries: PositiveInt | None = None
    documents: PositiveInt | None = None
    keep_texts: bool = False
    guard: GuardSection | None = GuardSection()


class CausalLMEval(Section):
    """`rows` caps how many are answered (None: all); they are drawn from the whole of `data.eval`, not from its beginning."""

    metric: Literal["exact_match", "token_f1", "bleu", "chrf", "bits_per_character"] = "exact_match"
    batch: PositiveInt = 32
    rows: PositiveInt | None = None
    max_new_tokens: PositiveInt = 32
    keep_texts: bool = False


class _Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]

    def resolved_yaml(self) -> str:
        """The recipe with every default written out."""
        return _as_yaml(self.model_dump(mode="json"))

    def portable_yaml(self) -> str:
        """The same for other machines: data paths shortened to their last two parts, the base's to its last."""
        content = self.model_dump(mode="json")
        for section, key, _ in data_paths(content):
            section[key] = _portable(section[key])
        if Path(content["base"]["model"]).is_absolute():
            content["base"]["model"] = Path(content["base"]["model"]).name
        return _as_yaml(content)

    def digest(self) -> str:
        """sha256 of all settings: a run resumes only under the same digest."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class EmbeddingRecipe(_Recipe):
    task: Literal["embedding"]
    base: EmbeddingBaseSection
    adapter: EmbeddingAdapterSection = EmbeddingAdapterSection()
    data: EmbeddingData
    loss: LossSection = LossSection()
    train: EmbeddingTrain = EmbeddingTrain()
    eval: EmbeddingEval = EmbeddingEval()


class CausalLMRecipe(_Recipe):
    task: Literal["causal_lm"]
    base: BaseSection
    adapter: AdapterSection = AdapterSection()
    data: CausalLMData
    train: CausalLMTrain = CausalLMTrain()
    eval: CausalLMEval = CausalLMEval()


Recipe = Annotated[EmbeddingRecipe | CausalLMRecipe, Field(discriminator="task")]
_ADAPTER: TypeAdapter[EmbeddingRecipe | CausalLMRecipe] = TypeAdapter(Recipe)
_MODELS: dict[str, type[BaseModel]] = {"embedding": EmbeddingRecipe, "causal_lm": CausalLMRecipe}


def parse_recipe(content: dict[str, Any], *, where: str = "recipe") -> EmbeddingRecipe | CausalLMRecipe:
    """A mapping as YAML gives it → a Recipe; RecipeError lists every fault."""
    content.setdefault("name", Path(where).stem)
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        raise RecipeError(where, faults(error, content, _MODELS)) from None


def data_paths(content: dict[str, Any]) -> list[tuple[dict[str, Any], str, str]]:
    """Every place of a recipe's mapping that names data, as (section, key, dotted key)."""
    data, evaluation = content.get("data"), content.get("eval")
    found: list[tuple[dict[str, Any], str, str]] = []
    if isinstance(data, dict):
        mapping = cast("dict[str, Any]", data)
        found += [(mapping, key, f"data.{key}") for key in ("train", "eval", "dev", "validation") if mapping.get(key)]
        also: Any = mapping.get("also")
        parts = cast("list[Any]", also) if isinstance(also, list) else []
        found += [(part, "train", "data.also.train") for part in parts if isinstance(part, dict) and "train" in part]
    guard: Any = cast("dict[str, Any]", evaluation).get("guard") if isinstance(evaluation, dict) else None
    if isinstance(guard, dict) and cast("dict[str, Any]", guard).get("data", "pydocs") != "pydocs":
        found.append((cast("dict[str, Any]", guard), "data", "eval.guard.data"))
    return found


def _portable(path: str | None) -> str | None:
    return path if path is None or path.startswith("hf://") else "/".join(Path(path).parts[-2:])


def _as_yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

"""What a causal LM answers on held-out rows, row by row: exact match, token F1, BLEU, chrF, bits per character."""

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.adapters.passport import read_passport
from embedft.causal_lm.data import Row, read_rows
from embedft.causal_lm.scores import TEXT, best_f1, exact_match, text_scores
from embedft.causal_lm.template import IGNORED, Example, Template, template_with_hash
from embedft.errors import BaseError
from embedft.methods.prompts import is_prompted
from embedft.model_folder import stop_tokens, tokenizer_of
from embedft.training.progress import note
from embedft.training.statistics import paired_bootstrap

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from embedft.adapters.store import AdapterStore

HIGHER_IS_BETTER = {"exact_match": True, "token_f1": True, "bleu": True, "chrf": True, "bits_per_character": False}


@dataclass(frozen=True)
class Generation:
    """Scores of n rows in the rows' order; `answers` are what the model wrote. `corpus`: scores that are no mean of the rows'."""

    ids: tuple[str, ...]
    answers: tuple[str, ...]
    scores: "dict[str, npt.NDArray[np.float64]]"  # metric → (n,)
    corpus: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def metrics(self) -> dict[str, float]:
        return {name: float(values.mean()) for name, values in self.scores.items()} | self.corpus

    def gains(self, base: "Generation", metric: str) -> "tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]":
        """(base's, own) scores of `metric`, signed so that more is better."""
        sign = 1.0 if HIGHER_IS_BETTER[metric] else -1.0
        return sign * base.scores[metric], sign * self.scores[metric]


def evaluate_generation(
    model: Any,
    template: Template,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    metric: str = "exact_match",
    batch: int = 32,
    max_length: int = 512,
) -> Generation:
    """Greedy answers to the rows' last turn, and how likely the model holds the true ones.

    A prompt keeps its last `max_length` tokens, and at least half of the base's positions however long an answer may be.
    bits_per_character: the negative log2-likelihood of answer and end token over
    the answer's characters, as far as the base has positions for it. BLEU and chrF are taken where `metric` is one of them.
    """
    import numpy as np

    answers = greedy(model, template, rows, max_new_tokens=max_new_tokens, batch=batch, max_length=max_length)
    bits = answer_bits(model, template, rows, batch=batch, max_length=max_length)
    scores = {
        "exact_match": [exact_match(answer, row.expected) for answer, row in zip(answers, rows, strict=True)],
        "token_f1": [best_f1(answer, row.expected) for answer, row in zip(answers, rows, strict=True)],
        "bits_per_character": [value / _characters(template, row, model) for value, row in zip(bits, rows, strict=True)],
    }
    each, whole = text_scores(answers, [row.expected for row in rows]) if metric in TEXT else ({}, {})
    made = {name: np.array(values) for name, values in (scores | each).items()}
    return Generation(tuple(row.id for row in rows), tuple(answers), made, whole)


def greedy(model: Any, template: Template, rows: Sequence[Row], *, max_new_tokens: int, batch: int, max_length: int) -> list[str]:
    """The model's most likely continuation of each row's prompt, up to a stop token of the tokenizer's or of the base's own settings."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    stops = stops_of(inner, template.tokenizer)
    pad = pad_token(template.tokenizer)
    room = _asked(model, max_length, max_new_tokens)
    prompts = [template.prompt_ids(row)[-room:] for row in rows]
    left = (_positions(model) or room + max_new_tokens) - max(map(len, prompts))
    settings = {"max_new_tokens": min(max_new_tokens, left), "do_sample": False, "eos_token_id": stops, "pad_token_id": pad}
    check_embedded(inner, template.tokenizer, prompts)
    answers = [""] * len(rows)
    for chosen in _by_length(prompts, batch):
        length = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[pad] * (length - len(prompts[i])) + prompts[i] for i in chosen], device=model.device)
        mask = torch.tensor([[0] * (length - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen], device=model.device)
        with torch.inference_mode(), _bare(inner):
            made = model.generate(input_ids=ids, attention_mask=mask, **settings)
        for i, tokens in zip(chosen, made[:, length:].tolist(), strict=True):
            end = next((at for at, token in enumerate(tokens) if token in stops), len(tokens))
            answers[i] = str(template.tokenizer.decode(tokens[:end], skip_special_tokens=True))
    return answers


def tell_of_cuts(model: Any, template: Template, rows: Sequence[Row], name: str, *, max_new_tokens: int, max_length: int) -> None:
    """Say how many rows cannot be answered as expected: their prompt loses its beginning, or so long an answer is never written."""
    room = _asked(model, max_length, max_new_tokens)
    if prompts := sum(len(template.prompt_ids(row)) > room for row in rows):
        note(f"{name}: {prompts} of {len(rows)} prompts have more than {room} tokens, and are answered from their last {room} alone")

    def written(row: Row) -> int:
        return len(template.answer_ids(row)) - 1  # the token that ends it need not be

    if answers := sum(min(written(row.answered(text)) for text in row.expected) > max_new_tokens for row in rows):
        fault = f"{answers} of {len(rows)} expected answers are longer than the {max_new_tokens} tokens that are written"
        note(f"{name}: {fault}, and are never matched: raise eval.max_new_tokens")


def stops_of(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer, as engines end it."""
    named: Any = getattr(model.generation_config, "eos_token_id", None)
    return sorted({*stop_tokens(tokenizer), *(named if isinstance(named, list) else [named] if named is not None else [])})


@contextmanager
def _bare(model: Any) -> Generator[None]:
    """Without the base's own repetition penalty and the like: no engine applies them unless a request asks for it."""
    from transformers.generation.configuration_utils import GenerationConfig

    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def answer_bits(model: Any, template: Template, rows: Sequence[Row], *, batch: int, max_length: int) -> list[float]:
    """−log2 p(last answer and its end | prompt) of each row, teacher-forced."""
    import torch

    from embedft.causal_lm.batches import Collate

    examples = [_scored(template, row, model, max_length) for row in rows]
    check_embedded(model, template.tokenizer, [example.ids for example in examples])
    collate = Collate(pad_token(template.tokenizer), model.dtype)
    bits = [0.0] * len(rows)
    for chosen in _by_length([example.ids for example in examples], batch):
        inputs = collate([examples[i] for i in chosen])
        labels = inputs.pop("labels").to(model.device)
        with torch.inference_mode():
            given = {key: value.to(model.device) if hasattr(value, "to") else value for key, value in inputs.items()}
            logits = model(**given).logits.float()  # (batch, kept, vocabulary)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
        ).view(len(chosen), -1)
        for i, value in zip(chosen, losses.sum(1).tolist(), strict=True):
            bits[i] = value / math.log(2)
    return bits


def _room(model: Any, max_length: int, answer: int) -> int:
    """Tokens of a prompt that is followed by `answer` tokens: at most `max_length`, and prompt and answer within the base's positions."""
    return max(1, min(max_length, (_positions(model) or max_length + answer) - answer))


def _asked(model: Any, max_length: int, answer: int) -> int:
    """Tokens of a prompt that the model is to answer in at most `answer`."""
    return _room(model, max_length, min(answer, (_positions(model) or 2 * answer) // 2))


def _positions(model: Any) -> int | None:
    """The base's positions, less those of an adapter's virtual tokens; None: any number."""
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    virtual = int(model.active_peft_config.num_virtual_tokens) if is_prompted(model) else 0
    return positions - virtual if positions else None


def _scored(template: Template, row: Row, model: Any, max_length: int) -> Example:
    answer = _placed(template.answer_ids(row), model)
    prompt = template.prompt_ids(row)[-_room(model, max_length, len(answer)) :]
    return Example(tuple(prompt + answer), tuple([IGNORED] * len(prompt) + answer))


def _placed(answer: list[int], model: Any) -> list[int]:
    """What of an answer stands within the base's positions after one token of its prompt."""
    positions = _positions(model)
    return answer[: positions - 1] if positions else answer


def _characters(template: Template, row: Row, model: Any) -> int:
    answer = template.answer_ids(row)
    placed = _placed(answer, model)
    return len(row.answer) if len(placed) == len(answer) else max(1, len(template.tokenizer.decode(placed)))


def _by_length(sequences: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """Indices in batches of like length, so that little is padding."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def pad_token(tokenizer: Any) -> int:
    """Padding is masked everywhere, so any token will do: its end of text has an embedding, where an added padding token may have none."""
    return int(next((token for token in (tokenizer.eos_token_id, tokenizer.pad_token_id) if token is not None), 0))


def check_embedded(model: Any, tokenizer: Any, sequences: Iterable[Sequence[int]]) -> None:
    """BaseError where a text has a token that the base's weights have no embedding of: a tokenizer may have been added to alone."""
    known = int(model.get_input_embeddings().weight.shape[0])
    if (most := max((max(ids, default=0) for ids in sequences), default=0)) >= known:
        raise BaseError(
            f"the base has embeddings of {known} tokens, and a row has {tokenizer.convert_ids_to_tokens(most)!r}, number {most} of its "
            "tokenizer: save the base after model.resize_token_embeddings(len(tokenizer)), or leave that token out"
        )


def compare(base: Generation | None, adapter: Generation | None, metric: str) -> dict[str, Any]:
    """{"metric", "base": {…}, "adapter": {…}, "gain_ci95": [lo, hi]}: the interval is of `metric`, more being better."""
    if base is None or adapter is None:
        return {}
    interval = paired_bootstrap(*adapter.gains(base, metric))
    return {"metric": metric, "base": base.metrics, "adapter": adapter.metrics, "gain_ci95": list(interval)}


def evaluate_adapter(
    name: "str | Path",
    data: str,
    store: "AdapterStore",
    *,
    base: "str | Path | None" = None,
    max_new_tokens: int | None = None,
    batch: int = 32,
) -> dict[str, Any]:
    """A stored adapter (or an adapter folder) and its base on other rows: what `embedft eval` prints.

    `base`: the folder of a base that the passport cannot name (a local folder's). `max_new_tokens`: as many as its recipe said, so
    that figures are those of the passport. Raises DataError, AdapterNotFound, AdapterInvalid, BaseNotFound and BaseMismatch.
    """
    from embedft.adapters.store import adapter_folder
    from embedft.base import load_model
    from embedft.errors import AdapterInvalid
    from embedft.methods import load_adapter
    from embedft.verify import trained_base

    rows = read_rows(data)
    folder = adapter_folder(name, store)
    passport = read_passport(folder, name=str(name))
    if passport.task != "causal_lm":
        raise AdapterInvalid(passport.name, "it is no language model's adapter, so it writes nothing")
    source = trained_base(passport, base)
    template = template_with_hash(tokenizer_of(source), passport.template_hash)
    model: Any = load_adapter(load_model(source, task="causal_lm"), folder, name=passport.name)
    metric = str(passport.metrics.get("metric", "exact_match"))
    limits = {"max_new_tokens": max_new_tokens or _trained_tokens(folder), "max_length": passport.max_length}
    tell_of_cuts(model, template, rows, passport.name, **limits)
    limits |= {"batch": batch}
    adapted = evaluate_generation(model, template, rows, metric=metric, **limits)
    with model.disable_adapter():
        plain = evaluate_generation(model, template, rows, metric=metric, **limits)
    return {"adapter": passport.name, **compare(plain, adapted, metric)}


def _trained_tokens(folder: Path) -> int:
    """How long the answers were that the adapter's passport speaks of."""
    import yaml

    from embedft.recipe import CausalLMEval

    path = folder / "recipe.yaml"
    said: Any = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    section: Any = said.get("eval") if isinstance(said, dict) else None
    given: Any = section.get("max_new_tokens") if isinstance(section, dict) else None
    return given if isinstance(given, int) and given > 0 else CausalLMEval().max_new_tokens

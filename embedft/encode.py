"""Texts → vectors: prompts, truncation, pooling, normalisation. The one encoder of evaluation, RAG and the peft engine.

Knows no adapter, no recipe and no engine. Nothing here imports torch before a vector is asked for: the gateway only prepares token ids.

Last-token pooling takes the last token that the base's own tokenizer gives; no end-of-sequence token is added to what it adds.
So a text, its token ids sent to vLLM's pooling runner, and plain sentence-transformers on the same folder all pool the same position.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from embedft.errors import BaseError, BaseNotFound, InputInvalid, UsageError
from embedft.model_folder import tokenizer_of
from embedft.sentence_folder import Pooling

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

InputType = Literal["query", "document"]
Progress = Callable[[int, int], None]  # (done, of how many)
_SAMPLES = ("Return the number of items.", "  two  spaces, and\na line's end ", "naïve Straße 東京 42", "x" * 600)


@dataclass(frozen=True)
class EncodeSettings:
    """What turns a base's hidden states into a vector. `max_length` counts tokens, special ones and the prompt included.

    `dimensions`: keep the first so many components (Matryoshka); None keeps all.
    """

    pooling: Pooling
    normalize: bool
    max_length: int
    prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise InputInvalid("pooling_unknown", f"pooling {self.pooling!r}: expected one of {', '.join(get_args(Pooling))}", "pooling")


@dataclass(frozen=True)
class Prepared:
    """Token ids of each text, and how many texts lost tokens to `max_length`."""

    ids: list[list[int]]
    truncated: int


class TextPreparer:
    """Prompt + text → token ids, truncated exactly as in training. Safe to share between threads.

    UsageError where `max_length` has no room for a token of the text.
    """

    def __init__(self, folder: Path | str, settings: EncodeSettings) -> None:
        from tokenizers import Tokenizer

        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise BaseNotFound(
                f"{Path(folder).name} has no tokenizer.json: save it there once with transformers' AutoTokenizer.save_pretrained"
            )
        self.settings = settings
        self._tokenizer = Tokenizer.from_file(str(path))
        special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if settings.max_length <= special:  # tokenizers would then cut nothing at all
            raise UsageError(
                f"a max_length of {settings.max_length} leaves nothing of a text beside the {special} special tokens of "
                f"{Path(folder).name}: allow at least {special + 1} (train.max_length, --max-length)"
            )
        self._tokenizer.no_padding()  # some files (MiniLM's) carry fixed padding and a shorter truncation
        self._tokenizer.enable_truncation(settings.max_length)

    def prepare(self, texts: Sequence[str], input_type: InputType | None = None, *, truncate: bool = True) -> Prepared:
        """`input_type` None adds no prompt. Raises InputInvalid: input_too_long (only with truncate=False), input_empty."""
        prompt = self.settings.prompts.get(input_type, "") if input_type else ""
        try:
            encodings = self._tokenizer.encode_batch_fast([prompt + text for text in texts])
        except TypeError:
            raise InputInvalid("input_invalid", "an input holds half a character (a lone surrogate)", "input") from None
        ids = [encoding.ids for encoding in encodings]
        too_long = [index for index, encoding in enumerate(encodings) if encoding.overflowing]
        if too_long and not truncate:
            raise InputInvalid("input_too_long", f"input {too_long[0]} is longer than {self.settings.max_length} tokens", "input")
        if empty := [index for index, row in enumerate(ids) if not row]:
            raise InputInvalid("input_empty", f"input {empty[0]} has no tokens: expected some text", "input")
        return Prepared(ids, len(too_long))


@lru_cache(maxsize=64)
def check_tokenizer(folder: Path) -> None:
    """The tokenizer's own file must give the ids that transformers gives, by which plain sentence-transformers goes. BaseError."""
    theirs = tokenizer_of(folder)
    ours = TextPreparer(folder, EncodeSettings("mean", True, 256)).prepare(_SAMPLES).ids
    if ours != theirs(list(_SAMPLES), truncation=True, max_length=256)["input_ids"]:
        raise BaseError(
            f"base {folder.name}: its tokenizer.json and its tokenizer_config.json disagree: "
            "save it once with AutoTokenizer.from_pretrained(…).save_pretrained(…) and name that folder"
        )


class Encoder:
    """Texts → float32 vectors by a loaded transformer (with or without an adapter) on whatever device it is on.

    BaseError where its tokenizer's files disagree.
    """

    def __init__(self, model: Any, tokenizer_folder: Path | str, settings: EncodeSettings) -> None:
        check_tokenizer(Path(tokenizer_folder))
        self.model = model
        self.settings = settings
        self.preparer = TextPreparer(tokenizer_folder, settings)
        self.progress: Progress | None = None  # told after every batch

    def encode(self, texts: Sequence[str], *, input_type: InputType | None = None, batch_size: int = 64) -> "np.ndarray":
        """(n,) texts → (n, dimensions) float32, in input order."""
        return self.encode_ids(self.preparer.prepare(texts, input_type).ids, batch_size=batch_size)

    def encode_ids(self, ids: Sequence[Sequence[int]], *, batch_size: int = 64, slots: Sequence[int] | None = None) -> "np.ndarray":
        """Token ids → (n, dimensions) float32, in input order. `slots`: one for each text, for a model that knows such."""
        import numpy as np
        import torch

        from embedft import unpadded

        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        vectors: list[Tensor] = []
        run = self._unpadded if unpadded.usable(self.model) else self._padded
        with _evaluating(self.model), torch.inference_mode():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                found = run([ids[row] for row in rows], None if slots is None else [slots[row] for row in rows])
                vectors.append(finish(found, self.settings).cpu())
                if self.progress:
                    self.progress(start + len(rows), len(order))
        if not vectors:
            return np.zeros((0, 0), dtype=np.float32)
        result = torch.empty_like(torch.cat(vectors))
        result[order] = torch.cat(vectors)
        return result.numpy()

    def _padded(self, ids: Sequence[Sequence[int]], slots: Sequence[int] | None) -> "Tensor":
        """Any model on any device; texts of like lengths → (n, d) float32."""
        device = next(self.model.parameters()).device
        input_ids, mask = (part.to(device) for part in pad(ids))
        named: dict[str, Any] = {} if slots is None else {"slots": slots}
        return pool(self.model(input_ids=input_ids, attention_mask=mask, **named).last_hidden_state, mask, self.settings.pooling)

    def _unpadded(self, ids: Sequence[Sequence[int]], slots: Sequence[int] | None) -> "Tensor":
        """The same, the shortest text first, where the model can do without padding."""
        from embedft import unpadded

        return unpadded.pooled(*unpadded.run(self.model, ids, slots), self.settings.pooling)


def pad(ids: Sequence[Sequence[int]]) -> "tuple[Tensor, Tensor]":
    """n rows of ids → (n, longest) ids padded on the right with 0 (masked, so any id will do) and the mask, both int64."""
    import torch

    width = max(len(row) for row in ids)
    input_ids = torch.zeros(len(ids), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for index, row in enumerate(ids):
        input_ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return input_ids, mask


def pool(hidden: "Tensor", mask: "Tensor", how: Pooling) -> "Tensor":
    """(n, length, d) hidden states padded on the right, (n, length) mask → (n, d) float32."""
    import torch

    if how == "cls":
        return hidden[:, 0].float()
    if how == "lasttoken":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1].float()
    weights = mask.unsqueeze(-1).float()
    return (hidden.float() * weights).sum(1) / weights.sum(1)


def finish(vectors: "Tensor", settings: EncodeSettings) -> "Tensor":
    """Truncate to `dimensions`, then normalise; a truncated vector of a normalising model has length 1 again."""
    import torch

    vectors = vectors[:, : settings.dimensions]
    return torch.nn.functional.normalize(vectors, dim=1) if settings.normalize else vectors


class _evaluating:
    """The model in eval mode inside; after, each module in the mode that it was in: a trainer may train only some of them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.trained = [module for module in self.model.modules() if module.training] if self.model.training else []
        if self.trained:
            self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module in self.trained:
            module.training = True

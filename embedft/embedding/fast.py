"""The trainer for encoders that run packed: each text of a step is encoded once, and what is frozen once a run.

Knows no recipe. The losses are those of embedft.embedding.losses, over vectors instead of features.
"""

# ruff: noqa: ARG002 (transformers calls these with arguments of its choosing)
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from embedft.embedding.batches import BatchPlan
from embedft.embedding.packed import PackedEncoder
from embedft.errors import UsageError
from embedft.training.interrupt import AdapterCheckpoints

CHUNK_TOKENS = 4096  # computed at once where nothing is kept for a backward pass
MEMORY_BYTES = 1 << 30  # frozen states above this lie in a file


class Texts:
    """Every text of a run once, as token ids. `columns[name][row]` is a text's number; `documents`: those that are no query."""

    def __init__(self, columns: dict[str, list[list[int]]]) -> None:
        """`columns`: query, document, negative_1 … → one list of token ids a row."""
        known: dict[tuple[bool, tuple[int, ...]], int] = {}
        self.columns = {
            name: [known.setdefault((name == "query", tuple(ids)), len(known)) for ids in rows] for name, rows in columns.items()
        }
        self.ids = [ids for _, ids in known]
        self.documents = frozenset(number for (is_query, _), number in known.items() if not is_query)


class PackedModel(nn.Module):
    """Numbers of texts → vectors. What is frozen `prepare` computes, always in the same chunks: a resumed run has the same bits."""

    def __init__(
        self, model: Any, encoder: PackedEncoder, texts: Texts, *, side: str, rematerialize: int | None = None, guided: bool = False
    ) -> None:
        """`rematerialize`: keep no activations; compute the gradient again in chunks of so many texts (GradCache).

        `guided`: the loss also asks for the base's vectors of every text.
        """
        super().__init__()
        self.model, self.encoder, self.texts = model, encoder, texts
        self.fixed = texts.documents if side == "query" else frozenset[int]()
        self._rematerialize, self.guided = rematerialize, guided
        self._below: dict[int, Tensor] = {}
        self._vectors: dict[int, Tensor] = {}

    def prepare(self, numbers: Iterable[int], folder: Path) -> None:
        """Compute what no step changes: documents' vectors under a query-only adapter, states below the adapted layers."""
        wanted = sorted(set(numbers), key=lambda number: (len(self.texts.ids[number]), number))
        with torch.no_grad():
            for chunk in chunks([number for number in wanted if self.guided or number in self.fixed], self._length):
                with self.encoder.adapter_off():
                    self._vectors.update(zip(chunk, self.encoder.encode([self.texts.ids[n] for n in chunk]), strict=True))
            if self.encoder.first_adapted:
                self._keep_below([number for number in wanted if number not in self.fixed], folder)

    def _keep_below(self, numbers: list[int], folder: Path) -> None:
        width = self.encoder.width
        total = sum(map(self._length, numbers)) * width
        dtype = self.encoder.dtype
        store = _file(folder / "below.bin", total, dtype) if total * dtype.itemsize > MEMORY_BYTES else torch.empty(total, dtype=dtype)
        place = 0
        for chunk in chunks(numbers, self._length):
            for number, states in zip(chunk, self.encoder.lower([self.texts.ids[n] for n in chunk]), strict=True):
                kept = store[place : place + states.numel()].view_as(states)
                self._below[number] = kept.copy_(states)
                place += states.numel()

    def base_vectors(self, numbers: Sequence[int]) -> Tensor:
        """(n, d) of the base, computed by `prepare`."""
        return torch.stack([self._vectors[number] for number in numbers])

    def _length(self, number: int) -> int:
        return len(self.texts.ids[number])

    def forward(self, columns: Sequence[Sequence[int]]) -> list[Tensor]:
        """(b,) numbers of each column → (b, d) vectors of each column; a text that occurs twice is encoded once."""
        distinct = sorted({number for column in columns for number in column}, key=lambda number: (self._length(number), number))
        moving = [number for number in distinct if number not in self.fixed]
        if self._rematerialize is None or not torch.is_grad_enabled():
            vectors = self._encode(moving)
        else:
            pieces = [moving[i : i + self._rematerialize] for i in range(0, len(moving), self._rematerialize)]
            remade: Any = _Rematerialized.apply(self._encode, pieces, *[p for p in self.model.parameters() if p.requires_grad])
            vectors = remade
        if frozen := [number for number in distinct if number in self.fixed]:
            vectors = torch.cat([vectors, torch.stack([self._vectors[number] for number in frozen])])
        places = {number: place for place, number in enumerate([*moving, *frozen])}
        return [vectors[torch.tensor([places[number] for number in column])] for column in columns]

    def _encode(self, numbers: Sequence[int]) -> Tensor:
        below = [self._below[number] for number in numbers] if self.encoder.first_adapted else None
        return self.encoder.encode([self.texts.ids[number] for number in numbers], below)


class _Rematerialized(torch.autograd.Function):
    """Vectors without activations kept; the backward pass computes each piece again (Gao et al. 2021, arXiv 2101.06983)."""

    @staticmethod
    def forward(ctx: Any, encode: Callable[[Sequence[int]], Tensor], pieces: list[list[int]], *parameters: Tensor) -> Tensor:
        ctx.encode, ctx.pieces, ctx.parameters = encode, pieces, parameters
        return torch.cat([encode(piece) for piece in pieces])

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Any, ...]:
        totals = [torch.zeros_like(parameter) for parameter in ctx.parameters]
        grads = outputs[0].split([len(piece) for piece in ctx.pieces])
        for piece, grad in zip(ctx.pieces, grads, strict=True):
            with torch.enable_grad():
                vectors = ctx.encode(piece)
            for total, part in zip(totals, torch.autograd.grad(vectors, ctx.parameters, grad, allow_unused=True), strict=True):
                if part is not None:
                    total += part
        return (None, None, *totals)


class Given(nn.Module):
    """Stands where sentence-transformers' losses expect a model: the vectors are in the features already, under `key`."""

    max_seq_length = 0  # of model and guide alike, so that nothing is tokenised again

    def __init__(self, width: int, tokenizer: Any, *, key: str = "vectors") -> None:
        super().__init__()
        self.width, self.tokenizer, self.key = width, tokenizer, key

    def get_embedding_dimension(self) -> int:
        return self.width

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {"sentence_embedding": features[self.key]}


class PackedTrainer(AdapterCheckpoints, Trainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """transformers' Trainer over row numbers, with our batches and adapter-only checkpoints."""

    def __init__(self, model: PackedModel, args: Any, *, loss: nn.Module, plan: BatchPlan, labels: Sequence[Any] | None) -> None:
        self.plan, self.loss = plan, loss
        self.labels = None if labels is None else torch.tensor(labels)
        super().__init__(model=model, args=args, train_dataset=_Numbers(plan.rows))
        self.add_callback(_Written(model))
        self.model_accepts_loss_kwargs = False  # so that accumulated gradients are means over all batches

    def get_train_dataloader(self) -> Any:
        from torch.utils.data import DataLoader

        self.accelerator.even_batches = False
        return self.accelerator.prepare(DataLoader(_Numbers(self.plan.rows), batch_sampler=self.plan, collate_fn=_collate))  # pyright: ignore

    def train(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        columns = self.model.texts.columns.values()
        self.model.prepare((column[row] for row in self._rows() for column in columns), Path(self.args.output_dir))
        return super().train(*args, **kwargs)

    def _rows(self) -> Iterable[int]:
        """The rows that this run will show."""
        if self.args.max_steps <= 0:
            return range(self.plan.rows)
        count = self.args.max_steps * self.args.gradient_accumulation_steps
        batches = (batch for epoch in range(-(-count // len(self.plan))) for batch in self.plan.of_epoch(epoch))
        return {row for batch in islice(batches, count) for row in batch}

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows = inputs["rows"].tolist()
        with torch.autocast("cpu", enabled=False):
            columns = [[column[row] for row in rows] for column in self.model.texts.columns.values()]
            features = [{"vectors": vectors} for vectors in self.model(columns)]
        if self.model.guided:
            for feature, column in zip(features, columns, strict=True):
                feature["guide"] = self.model.base_vectors(column)
        labels = None if self.labels is None else self.labels[inputs["rows"]]
        return self.loss(features, labels)


class _Written(TrainerCallback):
    """The packed layers merge again when a parameter's version has changed, and bitsandbytes' optimizers write past that counter."""

    def __init__(self, model: PackedModel) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        torch.autograd.graph.increment_version(self._parameters)


class _Numbers(torch.utils.data.Dataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def _collate(rows: list[int]) -> dict[str, Tensor]:
    return {"rows": torch.tensor(rows)}


def chunks(numbers: Sequence[int], length: Callable[[int], int]) -> Iterable[list[int]]:
    """Runs of at most CHUNK_TOKENS tokens (or one text)."""
    chunk: list[int] = []
    tokens = 0
    for number in numbers:
        if chunk and tokens + length(number) > CHUNK_TOKENS:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(number)
        tokens += length(number)
    if chunk:
        yield chunk


def _file(path: Path, count: int, dtype: torch.dtype) -> Tensor:
    """A vector in a file that goes with the run's folder, read as it is used. UsageError where the disk has no room for it: what is
    written to a mapped file that the disk cannot hold is the end of the process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    size = count * dtype.itemsize
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        need = f"{size / 2**30:.1f} GiB of the frozen layers' states are kept in {path.parent}"
        raise UsageError(f"{need}, and its disk refuses them ({error.strerror}): make room, or set adapter.layers to none") from None
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype)

"""Examples → batches: padded on the left to the longest of the batch, and of like lengths."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from embedft.causal_lm.template import IGNORED, Example


class Collate:
    """Examples → {input_ids, attention_mask, position_ids: (batch, length), labels: (batch, kept), logits_to_keep: kept}.

    Answers stand at the right edge, so only the last `kept` positions need logits: the longest learnt tail and the token
    before it. For a short answer that spares most of the output layer's work.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        length = max(len(example.ids) for example in examples)
        kept = min(length, 1 + max(_tail(example) for example in examples))
        ids = torch.tensor([[self._pad_id] * (length - len(e.ids)) + list(e.ids) for e in examples])
        mask = torch.tensor([[0] * (length - len(e.ids)) + [1] * len(e.ids) for e in examples])
        labels = torch.tensor([([IGNORED] * (length - len(e.ids)) + list(e.labels))[length - kept :] for e in examples])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels, "logits_to_keep": kept}


def _tail(example: Example) -> int:
    """Tokens from the first learnt one to the end."""
    first = next((i for i, label in enumerate(example.labels) if label != IGNORED), len(example.labels))
    return len(example.labels) - first


class LengthGrouped(Sampler[int]):
    """A shuffled order in which neighbours have like lengths: shuffle, sort within windows of 50 batches, shuffle the batches.

    The order depends on (seed, epoch) alone, so a resumed run sees exactly what an unbroken one sees.
    """

    window = 50

    def __init__(self, lengths: Sequence[int], *, batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed = list(lengths), batch, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order: list[int] = torch.randperm(len(self._lengths), generator=generator).tolist()
        size = self._batch * self.window
        windows = [sorted(order[i : i + size], key=self._lengths.__getitem__) for i in range(0, len(order), size)]
        flat = [index for window in windows for index in window]
        batches = [flat[i : i + self._batch] for i in range(0, len(flat), self._batch)]
        last = [batches.pop()] if len(batches[-1]) < self._batch else []  # a short batch stays last, else it shifts the others
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[number]
        for batch in last:
            yield from batch

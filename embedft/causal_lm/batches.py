"""Examples → batches: padded on the left to the longest of the batch, and of like lengths; or packed, several in a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler

from embedft.causal_lm.attention import apart, install
from embedft.causal_lm.template import IGNORED, Example
from embedft.recipe import CausalLMTrain
from embedft.shapes import rounded

SHAPES = 8  # lengths of a batch between one power of two and the next, in bf16
ROWS = 32  # the same of a row that holds all examples of a batch
PASS = 2048  # tokens of packs that go through a model at once on a CPU: with more no quicker, and the memory of more


class Collate:
    """Examples → {input_ids, attention_mask, position_ids: (batch, length), labels: (batch, kept), logits_to_keep: kept}.

    Answers stand at the right edge, so only the last `kept` positions need logits: the longest learnt tail and the token
    before it. For a short answer that spares most of the output layer's work. `dtype` is what the model computes in.
    """

    def __init__(self, pad_id: int, dtype: torch.dtype) -> None:
        self._pad_id, self._dtype = pad_id, dtype

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        length = rounded(max(len(example.ids) for example in examples), self._dtype, steps=SHAPES)
        kept = min(length, rounded(1 + max(learnt_tail(example) for example in examples), self._dtype, steps=SHAPES))
        ids = torch.tensor([[self._pad_id] * (length - len(e.ids)) + list(e.ids) for e in examples])
        mask = torch.tensor([[0] * (length - len(e.ids)) + [1] * len(e.ids) for e in examples])
        labels = torch.tensor([([IGNORED] * (length - len(e.ids)) + _after_the_first(e))[length - kept :] for e in examples])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels, "logits_to_keep": kept}


def _after_the_first(example: Example) -> list[int]:
    """Its labels, but for its first token: alone there is nothing before it, and in a batch there is padding or another example."""
    return [IGNORED, *example.labels[1:]]


@dataclass(frozen=True)
class Pack:
    """Examples that count as one row of a batch."""

    examples: tuple[Example, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token for example in self.examples for token in example.ids)


def pack(examples: Sequence[Example], *, length: int) -> list[Pack]:
    """Every example in exactly one pack of at most `length` tokens: first fit, the longest first (arXiv 2107.02027)."""
    bins: list[list[Example]] = []
    room: list[int] = []
    first_open = 0
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        size = len(example.ids)
        place = next((i for i in range(first_open, len(bins)) if room[i] >= size), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(length)
        bins[place].append(example)
        room[place] -= size
        while first_open < len(bins) and room[first_open] < MIN_ROOM:
            first_open += 1
    return [Pack(tuple(members)) for members in bins]


MIN_ROOM = 4  # tokens; a bin with less left is not looked at again


def in_passes(settings: CausalLMTrain) -> CausalLMTrain:
    """The same steps, where a batch of packs goes through a model in parts: on a CPU in the largest that divide it and have no more than
    PASS tokens each."""
    if not settings.packing or torch.cuda.is_available():
        return settings
    parts = (part for part in range(1, settings.batch + 1) if settings.batch % part == 0)
    together = max(part for part in parts if part == 1 or part * settings.max_length <= PASS)
    return settings.model_copy(update={"batch": together, "accumulate": settings.accumulate * (settings.batch // together)})


def packing_fault(base: Any, *, length: int, weights: bool = True) -> str | None:
    """Why examples in one row of `length` tokens would see each other, or too much of themselves, in this model; None: they would not.

    `weights` False: it has none, so what it answers is not looked at.
    """
    config = base.config.get_text_config()
    if base.config._attn_implementation != "sdpa":
        return "its attention cannot keep examples apart"
    if getattr(base, "_is_stateful", False) or set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return "some of its layers carry a state on from one example to the next"
    window = getattr(config, "sliding_window", None)
    if window and window < length:
        return f"it attends to {window} tokens, and a row has up to {length}"
    return None if not weights or _keeps_apart(base) else "after another example its answers are not those that it gives alone"


def _keeps_apart(base: Any) -> bool:
    """Whether an example's logits are the same alone and behind another: a model may do with its mask what it likes."""
    install()
    first, second = (Example((1, *range(2, 2 + size)), (IGNORED,) * size + (1,)) for size in (4, 8))
    logits: list[torch.Tensor] = []
    for examples in ((first, second), (second,)):
        batch = PackedCollate(0, torch.float32)([Pack(examples)])
        kept = {name: value.to(base.device) for name, value in batch.items() if name in ("input_ids", "position_ids", "attention_mask")}
        try:
            with torch.no_grad():
                logits.append(base(**kept, use_cache=False).logits[0, -len(second.ids) :].float())
        except (RuntimeError, ValueError, TypeError):
            return False
    behind, alone = logits
    return bool((behind - alone).norm() < 0.1 * (alone - alone.mean()).norm())


class PackedCollate:
    """Packs → {input_ids, position_ids: (1, tokens), attention_mask: (1, 1, 1, examples) int32, logits_to_keep: (learnt,),
    labels, shift_labels: (1, learnt)}: all their examples end to end in one row, the shortest first.

    Positions begin anew with each example, and `attention.attend` keeps them apart by their lengths, which are in the place of a mask.
    Only the places before a learnt token need logits: `logits_to_keep` names them, and `labels` are what comes after. In bf16 a few
    tokens of no example end the row, and a few places more are named. `dtype` as for Collate.
    """

    def __init__(self, pad_id: int, dtype: torch.dtype) -> None:
        self._pad_id, self._dtype = pad_id, dtype

    def __call__(self, packs: Sequence[Pack]) -> dict[str, Any]:
        examples = sorted((example for pack in packs for example in pack.examples), key=lambda example: len(example.ids))
        ids = [token for example in examples for token in example.ids]
        labels = [label for example in examples for label in _after_the_first(example)] + [IGNORED]
        places = [place - 1 for place, label in enumerate(labels) if label != IGNORED] or [0]
        rest = rounded(len(ids), self._dtype, steps=ROWS) - len(ids)
        more = rounded(len(places), self._dtype, steps=SHAPES) - len(places)
        positions = [place for example in examples for place in range(len(example.ids))]
        after = torch.tensor([[labels[place + 1] for place in places] + [IGNORED] * more])
        return {
            "input_ids": torch.tensor([ids + [self._pad_id] * rest]),
            "position_ids": torch.tensor([positions + [0] * rest]),
            "attention_mask": apart([len(example.ids) for example in examples], len(ids) + rest),
            "logits_to_keep": torch.tensor(places + places[:1] * more),
            "labels": after,
            "shift_labels": after,
        }


def learnt_tail(example: Example) -> int:
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

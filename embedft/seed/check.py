"""How good seed-lm is on what it never saw: bits per character of prose and code, and a three-passage extractive question check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from embedft.seed.data import encode_example, load_checks
from embedft.seed.model import SeedLM


@dataclass(frozen=True, slots=True)
class Scores:
    """Held-out scores; exact match is the share of answers that greedy decoding gives to the last character."""

    prose_bits_per_character: float
    code_bits_per_character: float
    questions: int
    exact_match: float
    exact_match_by_kind: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def token_losses(model: SeedLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, length) ids → (rows, length - 1) next-token losses in nats, and whether each next token is the likeliest."""
    logits = F.linear(model.hidden(tokens[:, :-1])[0], model.model.embed_tokens.weight)
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses, logits.argmax(-1) == tokens[:, 1:]


def bits_per_character(model: SeedLM, tokenizer: Tokenizer, path: Path, *, rows: int, length: int = 512) -> float:
    """Over `rows` evenly spaced windows; a window's first token is context only."""
    ids = np.load(path).astype(np.int64)
    starts = np.linspace(0, max(0, len(ids) - length - 1), rows).astype(int)
    nats, characters = 0.0, 0
    device = next(model.parameters()).device
    for start in starts:
        window = ids[start : start + length + 1]
        losses, _ = token_losses(model, torch.from_numpy(window)[None].to(device))
        nats += float(losses.sum())
        characters += len(tokenizer.decode(window[1:].tolist(), skip_special_tokens=False))
    return nats / np.log(2) / max(1, characters)


def score(model: SeedLM, tokenizer: Tokenizer, data: Path, *, questions: int, rows: int) -> Scores:
    """Score on the held-out arrays and checks of a data folder.

    Greedy decoding gives an answer exactly if and only if, with the answer given, every token of it (end mark included) is the likeliest.
    """
    hits: dict[str, list[bool]] = {}
    device = next(model.parameters()).device
    for check in load_checks(data)[:questions]:
        ids, weights = encode_example(tokenizer, check)
        answer = sum(weight > 1 for weight in weights)
        _, right = token_losses(model, torch.tensor([ids], device=device))
        hits.setdefault(check.kind, []).append(bool(right[0, -answer:].all()))
    flat = [hit for kind in hits.values() for hit in kind]
    return Scores(
        prose_bits_per_character=round(bits_per_character(model, tokenizer, data / "held-prose.npy", rows=rows), 4),
        code_bits_per_character=round(bits_per_character(model, tokenizer, data / "held-code.npy", rows=rows), 4),
        questions=len(flat),
        exact_match=round(sum(flat) / max(1, len(flat)), 4),
        exact_match_by_kind={kind: round(sum(h) / len(h), 3) for kind, h in sorted(hits.items())},
    )

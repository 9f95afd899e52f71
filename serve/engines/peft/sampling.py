"""Logits → the next token, and the log-probabilities an answer reports. Pure functions over one row."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COLDEST = 0.01  # the lowest temperature but 0, vLLM's too: logits divided by less need not stay finite


@dataclass(frozen=True)
class Sampling:
    """How one sequence is generated. `temperature` 0 is greedy; `logprobs` and `prompt_logprobs` None report none."""

    max_tokens: int
    min_tokens: int = 0  # before which no token may end the answer
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset[int])
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token as the model has it."""
        return self.temperature == 0 and not self.logit_bias and not self.penalised

    @property
    def penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1


@dataclass(frozen=True)
class TokenLogprobs:
    """One token's log-probability and rank (1 = likeliest), and the likeliest tokens with theirs."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


def adjusted(logits: "Tensor", sampling: Sampling, *, prompt: Sequence[int], tokens: Sequence[int]) -> "Tensor":
    """(vocabulary,) logits as vLLM adjusts them: biased, then penalised.

    Repetition is penalised by what stands in prompt or answer, presence and frequency by the answer alone.
    """
    import torch

    if sampling.logit_bias:
        ids, biases = zip(*sampling.logit_bias, strict=True)
        added = torch.tensor(biases, device=logits.device, dtype=logits.dtype)
        logits = logits.index_add(0, torch.tensor(ids, device=logits.device), added)
    if not sampling.penalised:
        return logits
    counts = torch.bincount(torch.tensor(tokens, dtype=torch.long, device=logits.device), minlength=len(logits))
    seen = counts > 0
    said = seen.clone()
    said[torch.tensor(prompt, dtype=torch.long, device=logits.device)] = True
    weaker = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    return torch.where(said, weaker, logits) - sampling.frequency_penalty * counts - sampling.presence_penalty * seen


def without(logits: "Tensor", tokens: Collection[int]) -> "Tensor":
    """(vocabulary,) logits under which none of `tokens` is chosen."""
    import torch

    return logits.index_fill(0, torch.tensor(list(tokens), dtype=torch.long, device=logits.device), -math.inf)


def choose(logits: "Tensor", sampling: Sampling, generator: "torch.Generator | None") -> int:
    """(vocabulary,) fp32 logits → a token id."""
    import torch

    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits / max(sampling.temperature, COLDEST)
    if sampling.min_p > 0:  # before the others, as vLLM does: they count what is left
        scaled = scaled.masked_fill(scaled < scaled.max() + math.log(sampling.min_p), -math.inf)
    order = torch.argsort(scaled, descending=True)
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    probabilities = torch.softmax(scaled[order], dim=-1)
    if sampling.top_p < 1:  # of what top_k left; the first token over the mark stays in, and the likeliest however low that is
        kept = probabilities.cumsum(-1) - probabilities < sampling.top_p
        kept[0] = True
        probabilities *= kept
    picked = torch.multinomial(probabilities.cpu(), 1, generator=generator)
    return int(order[picked])


def token_logprobs(logits: "Tensor", token: int, count: int) -> TokenLogprobs:
    """(vocabulary,) fp32 logits → what is reported of `token`, with the `count` likeliest beside it."""
    import torch

    values = torch.log_softmax(logits, dim=-1)
    own = values[token]
    best = torch.topk(values, count) if count else None
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
    return TokenLogprobs(token, float(own), int((values > own).sum()) + 1, top)

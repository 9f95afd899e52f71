"""Continuous batching: sequences join and leave one running batch at every token, each row with its own adapter.

Rows are padded on the left to one length, so the newest token of every row stands in the last column. Knows no HTTP and no text.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from embedft.errors import EmbedftError, EngineFailed
from serve.engines.peft.bank import AdapterBank, Group
from serve.engines.peft.sampling import Sampling, TokenLogprobs, adjusted, choose, token_logprobs, without
from serve.engines.peft.structure import Structure

if TYPE_CHECKING:
    from torch import Tensor

MAX_ROWS = 32
NOT_FINITE = "the model's outputs are not finite with this adapter"
PREFILL_TOKENS = 4096  # of one forward pass, padding included: bounds how long running rows wait for new ones


@dataclass(frozen=True)
class Step:
    """One token of one sequence. `finish` is 'stop', 'length' or, with an error, 'error'; None while it goes on."""

    token: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # with the first token only
    finish: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Row:
    """A sequence under way. `emit` is called from the model's thread; `cancelled` may be set from any."""

    adapter: str | None
    prompt: list[int]
    sampling: Sampling
    eos: frozenset[int]
    emit: Callable[[Step], None]
    structure: Structure | None = None  # this row's own: it moves with every token
    tokens: list[int] = field(default_factory=list[int])
    cancelled: bool = False
    done: bool = False
    generator: Any = None
    enders: frozenset[int] = field(init=False)  # the tokens that end the answer, and are no part of its text

    def __post_init__(self) -> None:
        self.enders = self.sampling.stop_token_ids if self.sampling.ignore_eos else self.sampling.stop_token_ids | self.eos


class Batch:
    """The waiting and the running rows of one group over one bank. `step` advances every running row by one token."""

    def __init__(self, bank: AdapterBank, group: Group = None) -> None:
        self.bank = bank
        self.group: Group = group
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self._cache: Any = None  # transformers' DynamicCache: keys and values (rows, heads, length, size) a layer
        self._mask: Tensor | None = None  # (rows, length), 0 where padded

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running)

    def uses(self, adapter: str) -> bool:
        return any(row.adapter == adapter and not row.cancelled for row in [*self.waiting, *self.running])

    def step(self) -> None:
        """Drop what was cancelled, advance what runs by one token, then admit what waits and give it its first one."""
        self._keep([not row.cancelled for row in self.running])
        if self.running:
            self._decode()
        self._admit()

    def fail(self, error: Exception) -> None:
        """End every row with `error`."""
        for row in [*self.running, *self.waiting]:
            row.emit(Step(None, finish="error", error=error))
        self.running, self._cache, self._mask = [], None, None
        self.waiting.clear()

    def _decode(self) -> None:
        import torch

        mask = self._mask
        assert mask is not None
        mask = torch.cat([mask, mask.new_ones(len(self.running), 1)], dim=1)
        tokens = torch.tensor([[row.tokens[-1]] for row in self.running], device=mask.device)
        logits = self._forward(self.running, tokens, mask, mask.sum(1, keepdim=True) - 1, self._cache, keep=1)
        self._mask = mask
        self._advance_all(self.running, logits[:, -1])
        self._keep([not row.done for row in self.running])

    def _admit(self) -> None:
        rows: list[Row] = []
        while self.waiting and len(self.running) + len(rows) < MAX_ROWS:
            row = self.waiting[0]
            width = max(len(other.prompt) for other in [*rows, row])
            if rows and width * (len(rows) + 1) > PREFILL_TOKENS:
                break
            self.waiting.popleft()
            if not row.cancelled and self._has_adapter(row):
                rows.append(row)
        if not rows:
            return
        try:
            self._begin(rows)
        except Exception:  # then they are among those that the failure ends
            self.waiting.extendleft(reversed(rows))
            raise

    def _begin(self, rows: list[Row]) -> None:
        import torch

        width = max(len(row.prompt) for row in rows)
        device = self.bank.base.model.device
        cache, before = self._prefixes(rows)
        padded = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows], device=device)
        mask = torch.cat([before, mask], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, before.shape[1] :]
        whole = any(row.sampling.prompt_logprobs is not None for row in rows)
        logits = self._forward(rows, padded, mask, positions, cache, keep=0 if whole else 1)
        self._advance_all(rows, logits[:, -1], prompts=[self._of_prompt(row, scores) for row, scores in zip(rows, logits, strict=True)])
        self._join(rows, cache, mask)

    def _prefixes(self, rows: list[Row]) -> "tuple[Any, Tensor]":
        """A cache that holds what stands before the rows, padded on the left, and its mask (rows, longest)."""
        import torch
        from torch.nn.functional import pad
        from transformers import DynamicCache

        cache, found = DynamicCache(), [self.bank.prefix(row.adapter) for row in rows]
        lengths = [prefix[0][0].shape[1] if prefix else 0 for prefix in found]
        longest, device = max(lengths), self.bank.base.model.device
        mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=device, dtype=torch.long).view(len(rows), longest)
        example = next((prefix for prefix in found if prefix), None)
        for layer in range(len(example) if example else 0):
            empty = [side[:, :0] for side in example[layer]] if example else []
            sides = [
                torch.stack(
                    [
                        pad((prefix[layer] if prefix else empty)[side], (0, 0, longest - n, 0))
                        for prefix, n in zip(found, lengths, strict=True)
                    ]
                )
                for side in (0, 1)
            ]
            cache.update(sides[0], sides[1], layer)
        return cache, mask

    def _has_adapter(self, row: Row) -> bool:
        try:
            self.bank.group(row.adapter)
        except Exception as error:
            row.emit(Step(None, finish="error", error=error))
            return False
        return True

    def _forward(self, rows: list[Row], tokens: "Tensor", mask: "Tensor", positions: "Tensor", cache: Any, *, keep: int) -> "Tensor":
        """(rows, n) tokens → (rows, n or 1, vocabulary) logits; `cache` grows by n."""
        import torch

        kind = "decode" if tokens.shape[1] == 1 else "prefill"
        with torch.inference_mode(), self.bank.threads.of(kind, tokens.numel()):
            return self.bank.model_of(self.group)(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache,
                use_cache=True, logits_to_keep=keep, **self.bank.rows([row.adapter for row in rows]),
            ).logits  # fmt: skip

    def _of_prompt(self, row: Row, logits: "Tensor") -> tuple[TokenLogprobs, ...] | None:
        count = row.sampling.prompt_logprobs
        if count is None:
            return None
        start = len(logits) - len(row.prompt)  # logits (padding + prompt, vocabulary); position k predicts token k + 1
        return tuple(token_logprobs(logits[start + k].float(), token, count) for k, token in enumerate(row.prompt[1:]))

    def _advance_all(self, rows: list[Row], logits: "Tensor", prompts: "Sequence[tuple[TokenLogprobs, ...] | None] | None" = None) -> None:
        """(rows, vocabulary). What all rows ask for is asked once: each small operation takes as long as a fiftieth of a step."""
        logits = logits.float()
        likeliest, broken = logits.argmax(-1).tolist(), logits.isnan().any(-1).tolist()
        for place, row in enumerate(rows):
            likely = None if broken[place] else likeliest[place]
            self._advance(row, logits[place], likely, prompt=prompts[place] if prompts else None)

    def _advance(self, row: Row, logits: "Tensor", likeliest: int | None, *, prompt: tuple[TokenLogprobs, ...] | None) -> None:
        import torch

        if row.generator is None and row.sampling.seed is not None:
            row.generator = torch.Generator().manual_seed(row.sampling.seed)
        try:
            token, complete = self._choose(row, logits, likeliest)
        except Exception as error:  # it ends this row only
            row.done = True
            row.emit(Step(None, finish="error", error=error if isinstance(error, EmbedftError) else EngineFailed(f"no token: {error}")))
            return
        count = row.sampling.logprobs
        row.tokens.append(token)
        finish = None
        if complete or token in row.enders:
            finish = "stop"
        elif len(row.tokens) >= row.sampling.max_tokens:
            finish = "length"
        row.done = finish is not None
        row.emit(Step(token, None if count is None else token_logprobs(logits, token, count), prompt, finish))

    @staticmethod
    def _choose(row: Row, logits: "Tensor", likeliest: int | None) -> tuple[int, bool]:
        """(token, whether the row's structure is complete with it). EngineFailed: `likeliest` is None, as of weights that are not
        finite. InputInvalid: a grammar too large."""
        if likeliest is None:
            raise EngineFailed(NOT_FINITE)
        if row.sampling.plain and row.structure is None and len(row.tokens) >= row.sampling.min_tokens:
            return likeliest, False
        scores = adjusted(logits, row.sampling, prompt=row.prompt, tokens=row.tokens)
        if len(row.tokens) < row.sampling.min_tokens:
            scores = without(scores, row.enders)
        if row.structure is None:
            return choose(scores, row.sampling, row.generator), False
        token = choose(row.structure.masked(scores), row.sampling, row.generator)
        return token, row.structure.take(token)

    def _join(self, rows: list[Row], cache: Any, mask: "Tensor") -> None:
        """Put the new rows' cache under the running one's, both padded on the left to the longer."""
        import torch
        from torch.nn.functional import pad

        if self._mask is None:
            self._cache, self._mask = cache, mask
        else:
            width = max(self._mask.shape[1], mask.shape[1])
            short, new = width - self._mask.shape[1], width - mask.shape[1]
            self._mask = torch.cat([pad(self._mask, (short, 0)), pad(mask, (new, 0))])
            for layer, other in zip(self._cache.layers, cache.layers, strict=True):
                layer.keys = torch.cat([pad(layer.keys, (0, 0, short, 0)), pad(other.keys, (0, 0, new, 0))])
                layer.values = torch.cat([pad(layer.values, (0, 0, short, 0)), pad(other.values, (0, 0, new, 0))])
        self.running = [*self.running, *rows]
        self._keep([not row.done for row in self.running])

    def _keep(self, kept: list[bool]) -> None:
        """Take the other rows out of the batch, and the columns that then are padding in every row."""
        import torch

        if all(kept):
            return
        self.running = [row for row, keep in zip(self.running, kept, strict=True) if keep]
        if not self.running or self._mask is None:
            self._cache, self._mask = None, None
            return
        index = torch.tensor([i for i, keep in enumerate(kept) if keep], device=self._mask.device)
        mask = self._mask[index]
        first = int(mask.any(0).nonzero()[0])
        self._mask = mask[:, first:]
        for layer in self._cache.layers:
            layer.keys = layer.keys[index][:, :, first:].contiguous()
            layer.values = layer.values[index][:, :, first:].contiguous()

"""Answers that must be JSON of a schema: the tokens that may come next, by llguidance's parser. Knows no model and no HTTP."""

import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from embedft.errors import EngineFailed, InputInvalid

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

# One space after ',' and ':', as json.dumps writes: with free whitespace a weak model may write nothing else without end.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Structure:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def copy(self) -> "Structure":
        return Structure(self._matcher.deep_copy())

    def masked(self, logits: "Tensor") -> "Tensor":
        """(vocabulary,) logits, minus infinity where the grammar forbids the token. Raises EngineFailed."""
        import torch

        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        self._check()
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        known = min(len(bits), len(logits))
        allowed[:known] = torch.from_numpy(bits[:known].astype(bool))
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def take(self, token: int) -> bool:
        """Go on by one token; True when the answer is complete. Raises EngineFailed."""
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineFailed(f"the answer cannot be kept to its schema: {self._matcher.get_error()[:300]}")


class Grammars:
    """Schemas to grammars for one tokenizer, whose tables are made at the first use. `vocabulary`: of the model's logits."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, eos: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, eos
        self._made: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, schema: dict[str, Any]) -> Structure:
        """At the grammar's start. Takes from a millisecond to seconds. InputInvalid: schema_invalid, structured_output_unsupported."""
        from llguidance import LLMatcher

        tokens = self._tokens()
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=LAYOUT)  # pyright: ignore[reportArgumentType]
        matcher = LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0][:300]
            raise InputInvalid("schema_invalid", f"no answer can be held to this schema: {reason}", "response_format")
        return Structure(matcher)

    def _tokens(self) -> "LLTokenizer":
        import llguidance.hf

        with self._lock:
            if self._made is None:
                try:
                    eos = sorted(self._eos, key=lambda token: token != self._tokenizer.eos_token_id)
                    self._made = llguidance.hf.from_tokenizer(
                        self._tokenizer, n_vocab=max(self._vocabulary, len(self._tokenizer)), eos_token=eos
                    )
                except Exception as error:  # a tokenizer that is not of the fast kind, or without an end
                    why = str(error).splitlines()[0][:200]
                    raise InputInvalid(
                        "structured_output_unsupported", f"not with this base's tokenizer: {why}", "response_format"
                    ) from None
            return self._made

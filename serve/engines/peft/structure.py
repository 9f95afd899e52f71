"""Answers that must be JSON of a schema: the tokens that may come next, by llguidance's parser. Knows no model and no HTTP."""

import asyncio
import contextlib
import hashlib
import json
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedft.errors import EngineBusy, InputInvalid

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from torch import Tensor

# One space after ',' and ':', as json.dumps writes: with free whitespace a weak model may write nothing else without end.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
TRIAL = Path(__file__).with_name("trial.py")
TRIAL_SECONDS, TRIAL_BYTES = 2, 96 << 20  # what a grammar may take, tried out in a process of its own
PATIENCE = 30.0  # seconds until a trial that a busy machine has not ended is given up
KEPT_TRIALS = 1024


class Structure:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def copy(self) -> "Structure":
        return Structure(self._matcher.deep_copy())

    def masked(self, logits: "Tensor") -> "Tensor":
        """(vocabulary,) logits, minus infinity where the grammar forbids the token. InputInvalid schema_invalid."""
        import torch

        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        self._check()
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        known = min(len(bits), len(logits))
        allowed[:known] = torch.from_numpy(bits[:known].astype(bool))
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def take(self, token: int) -> bool:
        """Go on by one token; True when the answer is complete. InputInvalid schema_invalid."""
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refused(self._matcher.get_error())


class Grammars:
    """Schemas to grammars for one tokenizer, whose tables are made at the first use. `vocabulary`: of the model's logits."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, eos: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary, self._eos = tokenizer, vocabulary, eos
        self._made: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._trial = asyncio.Lock()
        self._tried: OrderedDict[bytes, str] = OrderedDict()  # why it is refused, or ''

    async def structure(self, schema: dict[str, Any]) -> Structure:
        """At the grammar's start. Takes from a millisecond to seconds.

        InputInvalid: schema_invalid, structured_output_unsupported. EngineBusy where the machine is too busy to try it out.
        """
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=LAYOUT)  # pyright: ignore[reportArgumentType]
        await self._try(grammar)
        return await asyncio.to_thread(self._compile, grammar)

    def _compile(self, grammar: str) -> Structure:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens(), grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what refers to itself alone fails here first
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return Structure(matcher)

    async def _try(self, grammar: str) -> None:
        """A grammar that was not seen yet, one at a time: nobody's takes more than TRIAL_SECONDS of one core, and no memory here. One
        that was waits for none."""
        key = hashlib.sha256(grammar.encode()).digest()
        reason = self._tried.get(key)
        if reason is None:
            async with self._trial:
                if (reason := self._tried.get(key)) is None:
                    reason = await _tried(grammar)
        self._tried[key] = reason
        self._tried.move_to_end(key)
        if len(self._tried) > KEPT_TRIALS:
            self._tried.popitem(last=False)
        if reason:
            raise _refused(reason)

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


async def _tried(grammar: str) -> str:
    """What is wrong with a grammar, or ''."""
    pipe, nowhere = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    command = [sys.executable, "-I", str(TRIAL), str(TRIAL_SECONDS), str(TRIAL_BYTES)]
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=nowhere)
    try:
        async with asyncio.timeout(PATIENCE):
            said, _ = await child.communicate(grammar.encode())
    except TimeoutError:
        raise EngineBusy("the schema of the answer could not be tried out in time: try again shortly") from None
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    if child.returncode:
        return "it takes too much time or memory: ask for shorter arrays (minItems, maxItems), fewer patterns or fewer properties"
    return said.decode("utf-8", "replace")


def _refused(reason: str) -> InputInvalid:
    told = (reason.splitlines() or [""])[0][:300]
    return InputInvalid("schema_invalid", f"no answer can be held to this schema: {told}", "response_format")

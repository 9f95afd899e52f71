"""OpenAI's response shapes, with vLLM's additions (prompt_logprobs, token_ids). Pure: tokens and texts in, dictionaries out."""

import base64
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from serve.engines.peft.sampling import TokenLogprobs
from serve.engines.peft.tools import ToolCall

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

Kind = Literal["text_completion", "chat.completion"]


@dataclass
class Piece:
    """What is new of one answer: text, tokens, and with the last piece the reason it ended."""

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish: str | None = None
    calls: list[ToolCall] = field(default_factory=list[ToolCall])

    def add(self, other: "Piece") -> None:
        self.text += other.text
        self.tokens += other.tokens
        self.logprobs += other.logprobs
        self.prompt_logprobs = self.prompt_logprobs or other.prompt_logprobs
        self.finish = other.finish
        self.calls += other.calls


class Answers:
    """The shapes of one request's answer. `logprobs`: the number of alternatives to list, None for no log-probabilities."""

    def __init__(
        self, kind: Kind, model: str, tokenizer: "PreTrainedTokenizerBase", prompts: list[list[int]], *, n: int, ids: bool
    ) -> None:
        self.kind: Kind = kind
        self._tokenizer: Any = tokenizer
        self._prompts, self._n, self._ids = prompts, n, ids
        self._said: dict[int, int] = {}  # characters whose log-probabilities were told, by choice
        prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
        self._head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer that is not streamed; `pieces` one a choice."""
        choices = [self._choice(piece, streamed=False) for piece in pieces]
        usage = self.usage(sum(len(piece.tokens) for piece in pieces))
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return {**self._head, "object": self._chunk_kind, "choices": [self._choice(piece, streamed=True)]}

    def opening(self, index: int) -> dict[str, Any]:
        """A chat stream's first chunk: the role."""
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}

    def closing(self, generated: int) -> dict[str, Any]:
        """The chunk that carries the usage."""
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": self.usage(generated)}

    def usage(self, generated: int) -> dict[str, int]:
        prompt = sum(map(len, self._prompts))
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    @property
    def _chunk_kind(self) -> str:
        return "text_completion" if self.kind == "text_completion" else "chat.completion.chunk"

    def _choice(self, piece: Piece, *, streamed: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": piece.index, "finish_reason": piece.finish, "logprobs": self._logprobs(piece)}
        if self.kind == "text_completion":
            choice["text"] = piece.text
        else:
            choice["delta" if streamed else "message"] = _said(piece, streamed=streamed)
        if piece.prompt_logprobs is not None:
            choice["prompt_logprobs"] = [None, *(self._prompt_entry(entry) for entry in piece.prompt_logprobs)]
        if self._ids:
            choice["token_ids"] = piece.tokens
            choice["prompt_token_ids"] = self._prompts[piece.index // self._n]
        return choice

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.logprobs:
            return None
        if self.kind == "chat.completion":
            return {"content": [self._chat_entry(entry) for entry in piece.logprobs]}
        words = [self._word(entry.token) for entry in piece.logprobs]
        *offsets, self._said[piece.index] = accumulate(map(len, words), initial=self._said.get(piece.index, 0))
        return {
            "tokens": words,
            "token_logprobs": [entry.logprob for entry in piece.logprobs],
            "top_logprobs": [{self._word(token): value for token, value in entry.top} or None for entry in piece.logprobs],
            "text_offset": offsets,
        }

    def _chat_entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._named(token, value) for token, value in entry.top]
        return {**self._named(entry.token, entry.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        word = self._word(token)
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}

    def _prompt_entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        listed = {entry.token: (entry.rank, entry.logprob)}
        listed |= {token: (rank, value) for rank, (token, value) in enumerate(entry.top, start=1)}
        return {str(token): {"logprob": value, "rank": rank, "decoded_token": self._word(token)} for token, (rank, value) in listed.items()}

    def _word(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


def _said(piece: Piece, *, streamed: bool) -> dict[str, Any]:
    """A chat's message, or what is new of it; beside calls there is no empty content."""
    said: dict[str, Any] = {"content": piece.text if piece.text or not piece.calls else None} | ({} if streamed else {"role": "assistant"})
    if piece.calls:
        said["tool_calls"] = [
            {"id": call.identity, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            | ({"index": index} if streamed else {})
            for index, call in enumerate(piece.calls)
        ]
    return said


def embeddings(model: str, vectors: "np.ndarray", *, tokens: int, encoding: str | None) -> dict[str, Any]:
    """(n, d) float32 → OpenAI's list; base64 is little-endian float32."""

    def written(vector: "np.ndarray") -> Any:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()

    data = [{"object": "embedding", "index": index, "embedding": written(vector)} for index, vector in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": model, "data": data, "usage": usage}


def failure(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error envelope; `code` is stable."""
    named = {401: "AuthenticationError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
    kind = named.get(status, "BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}

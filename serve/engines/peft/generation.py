"""One generating request: its rows, their pieces in order, and what happens when the client goes away. Knows no routes."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from embedft.errors import InputInvalid
from serve.engines.peft.answers import Answers, Piece
from serve.engines.peft.batch import Row, Step
from serve.engines.peft.bodies import Chat, Generation
from serve.engines.peft.structure import Structure
from serve.engines.peft.text import Detokenizer
from serve.engines.peft.tools import ToolReader
from serve.engines.peft.worker import Worker


class Request:
    """`prompts` × `n` rows on the worker. Leave it by `close`, finished or not: what still runs is then dropped."""

    def __init__(
        self,
        worker: Worker,
        body: Generation,
        *,
        prompts: list[list[int]],
        adapter: str | None,
        max_tokens: int,
        logprobs: int | None,
        eos: frozenset[int],
        structure: Structure | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        tokenizer = worker.bank.base.tokenizer
        self._steps: asyncio.Queue[tuple[int, Step]] = asyncio.Queue()
        self.rows: list[Row] = []
        self._texts: list[Detokenizer] = []
        self._tools: list[ToolReader] = []
        self._one_call = isinstance(body, Chat) and body.parallel_tool_calls is False
        for prompt in prompts:
            for sampling in body.sampling(max_tokens=max_tokens, logprobs=logprobs):
                emit = _across(loop, self._steps, len(self.rows))
                self.rows.append(Row(adapter, prompt, sampling, eos, emit, structure.copy() if structure else None))
                self._texts.append(Detokenizer(tokenizer, sampling.stop, least=sampling.min_tokens))
                if body.tool_names:
                    self._tools.append(ToolReader(body.tool_names))
        worker.generate(self.rows)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Every row's pieces as they come; the last of a row carries `finish`. Raises what the model raised."""
        left = len(self.rows)
        ended = [False] * left
        while left:
            index, step = await self._steps.get()
            if ended[index]:
                continue
            if step.error is not None or step.token is None:
                raise step.error or RuntimeError("a step without a token")
            text, stopped = self._text(index, step)
            finish = "stop" if stopped else step.finish
            if stopped:
                self.rows[index].cancelled = True
            if finish:
                ended[index] = True
                left -= 1
            piece = Piece(index, text, [step.token], [step.logprobs] if step.logprobs else [], step.prompt_logprobs, finish)
            if self._tools:
                self._find_calls(piece)
            yield piece

    def _find_calls(self, piece: Piece) -> None:
        reader = self._tools[piece.index]
        piece.text = reader.feed(piece.text)
        if piece.finish:
            rest, calls = reader.end()
            piece.text += rest
            piece.calls = calls[:1] if self._one_call else calls
            piece.finish = "tool_calls" if calls and piece.finish == "stop" else piece.finish

    def _text(self, index: int, step: Step) -> tuple[str, bool]:
        assert step.token is not None
        ended = step.finish == "stop" and step.token in self.rows[index].enders
        return self._texts[index].feed(None if ended else step.token, last=step.finish is not None)

    def close(self) -> None:
        for row in self.rows:
            row.cancelled = True


def _across(loop: asyncio.AbstractEventLoop, steps: "asyncio.Queue[tuple[int, Step]]", index: int) -> Callable[[Step], None]:
    """From the model's thread into the event loop; nowhere once the loop has closed."""

    def emit(step: Step) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(steps.put_nowait, (index, step))

    return emit


@dataclass(frozen=True)
class Answering:
    """A request under way and the shapes of its answer. `usage`: a stream ends with what it used."""

    request: Request
    answers: Answers
    streamed: bool
    usage: bool

    async def whole(self) -> bytes:
        """The answer as JSON. Leaving it early ends the work."""
        try:
            found = [Piece(index) for index in range(len(self.request.rows))]
            async for piece in self.request.pieces():
                found[piece.index].add(piece)
            return to_json(self.answers.whole(found))
        finally:
            self.request.close()

    async def events(self) -> AsyncGenerator[bytes]:
        """Server-sent events. An error after the first of them is an event too, and the last."""
        generated = 0
        try:
            if self.answers.kind == "chat.completion":
                for index in range(len(self.request.rows)):
                    yield _event(self.answers.opening(index))
            async for piece in self.request.pieces():
                generated += len(piece.tokens)
                if piece.text or piece.finish or piece.logprobs or piece.prompt_logprobs:  # calls come with the finish
                    yield _event(self.answers.chunk(piece))
            if self.usage:
                yield _event(self.answers.closing(generated))
            yield b"data: [DONE]\n\n"
        except Exception as error:
            code = getattr(error, "code", "engine_failed")
            yield _event({"error": {"message": str(error), "type": "InternalServerError", "param": None, "code": code}})
        finally:
            self.request.close()


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + to_json(data) + b"\n\n"


def room_for(
    prompts: list[list[int]], wanted: int | None, *, context: int, vocabulary: int, param: str = "prompt", most: int | None = None
) -> int:
    """How many tokens may be generated after the longest prompt, `most` at most. Raises InputInvalid."""
    longest = max(map(len, prompts))
    if not all(prompts):
        raise InputInvalid("input_empty", "a prompt has no tokens: expected some text", param)
    if any(not 0 <= token < vocabulary for prompt in prompts for token in prompt):
        raise InputInvalid("token_unknown", f"token ids go from 0 to {vocabulary - 1}", param)
    if longest + (wanted or 1) > context:
        asked = f"{longest} prompt tokens and {wanted or 1} to generate"
        raise InputInvalid("context_length_exceeded", f"{asked} exceed the context of {context}", param)
    room = wanted or context - longest
    return min(room, most or room)

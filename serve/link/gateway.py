"""The gateway's end: calls to one engine over one connection, made when it is first needed and again once it was lost."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

from serve.link.frames import BROKEN, CALL, CANCEL, FIRST, HELLO, LAST, PAUSE, RESUME, STATUS, Framed

CONNECT_SECONDS = 5.0
_HUNG_UP = "the engine hung up"
HELD = 1 << 18  # bytes of an answer that wait for who reads it, before the engine is told to pause


class Link:
    """Use it from one event loop. Every call raises ConnectionError where the engine goes away before its answer has ended."""

    def __init__(self, socket: str, key: str) -> None:
        self._socket, self._key = socket, key
        self._end: Framed | None = None
        self._opening = asyncio.Lock()
        self._replies: dict[int, Reply] = {}
        self._numbers = itertools.count(1)

    @asynccontextmanager
    async def call(self, path: str, body: bytes, *, method: str = "POST") -> AsyncGenerator["Reply"]:
        """The answer, from its first bytes on. Leaving the block earlier than it ends cancels the work behind it."""
        end = self._end if self._end is not None and self._end.open else await self._opened()
        if not end.open:  # lost between its opening and now: nobody would end this call
            raise ConnectionError(_HUNG_UP)
        number = next(self._numbers) & 0xFFFFFFFF
        reply = self._replies[number] = Reply(end, number)
        end.write(number, CALL, b"%s %s\n%s" % (method.encode(), path.encode(), body))
        try:
            await reply.begun()
            yield reply
        finally:
            del self._replies[number]
            if not reply.ended:
                end.write(number, CANCEL)

    def close(self) -> None:
        if self._end is not None:
            self._end.close()

    async def _opened(self) -> Framed:
        async with self._opening:
            if self._end is None or not self._end.open:
                end = Framed(self._received, lambda: self._lost(end))
                made = asyncio.get_running_loop().create_unix_connection(lambda: end, self._socket)
                transport, _ = await asyncio.wait_for(made, CONNECT_SECONDS)
                if not end.open:
                    raise ConnectionError(_HUNG_UP)
                transport.write(HELLO + self._key.encode() + b"\n")
                self._end = end
            return self._end

    def _received(self, number: int, kind: int, content: bytes) -> None:
        if reply := self._replies.get(number):
            reply.take(kind, content)

    def _lost(self, end: Framed) -> None:
        for reply in self._replies.values():
            if reply.end is end:
                reply.take(LAST | BROKEN, b"")


class Reply:
    """An answer as it comes: `status`, then its bytes."""

    def __init__(self, end: Framed, number: int) -> None:
        self.end = end
        self.status = 0
        self.ended = False
        self._number = number
        self._parts: deque[bytes] = deque()
        self._held = 0
        self._paused = self._broken = False
        self._waiting: asyncio.Future[None] | None = None

    def take(self, kind: int, content: bytes) -> None:
        """A frame of it."""
        if self.ended:
            return
        if kind & FIRST:
            (self.status,) = STATUS.unpack(content)
        elif content:
            self._parts.append(content)
            self._held += len(content)
        self.ended, self._broken = bool(kind & LAST), bool(kind & BROKEN)
        if self._held > HELD and not self._paused and not self.ended:
            self._paused = True
            self.end.write(self._number, PAUSE)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def begun(self) -> None:
        while not self.status:
            await self._more()

    async def parts(self) -> AsyncIterator[bytes]:
        """What has come, as often as something has."""
        while True:
            while self._parts:
                yield self._taken()
            if self.ended and not self._broken:
                return
            await self._more()

    async def read(self) -> bytes:
        """All of it."""
        return b"".join([part async for part in self.parts()])

    def _taken(self) -> bytes:
        content = b"".join(self._parts)
        self._parts.clear()
        self._held = 0
        if self._paused:
            self._paused = False
            self.end.write(self._number, RESUME)
        return content

    async def _more(self) -> None:
        if self.ended:
            raise ConnectionError("the engine broke the answer off" if self.end.open else "the engine went away")
        self._waiting = asyncio.get_running_loop().create_future()
        await self._waiting

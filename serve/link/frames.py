"""Many calls at once over one connection, in frames: a head and its bytes. What the gateway's end and an engine's have in common.

HTTP/1.1 has a connection, a head to parse and a system call for every piece of every answer. Here all that is written in one turn of
the event loop leaves together: the next tokens of eight answers are one write, and one read. And the pieces of a stream that come
faster than anybody reads wait for each other: each write wakes two processes, which take the cores that the model computes on.
Knows no HTTP and no engine.
"""

import asyncio
import struct
from collections.abc import Callable
from typing import cast

HELLO = b"embedft link 1 "  # then the engine's key, and a line's end
HEAD = struct.Struct("<IIB")  # bytes that follow, number of the call, kind
LARGEST = 1 << 30  # bytes of one frame
TOGETHER = 1 << 16  # bytes that are written before the turn ends: what never gives up its turn must meet the connection's limits too
PACE = 0.02  # seconds between two writes of what may wait: of an answer that grows, nobody sees more than fifty states a second
CALL, CANCEL, PAUSE, RESUME = range(4)  # kinds from the gateway: b"METHOD /path\n" + body, and three that are empty
FIRST, LAST, BROKEN = 1, 2, 4  # bits of an engine's kinds: what it holds is STATUS, it ends the answer, and ends it before its time
STATUS = struct.Struct("<H")


class Framed(asyncio.Protocol):
    """One end: `received(call, kind, content)` of each frame, `lost()` at the end."""

    def __init__(self, received: Callable[[int, int, bytes], None], lost: Callable[[], None]) -> None:
        self._received, self._lost = received, lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._rest = bytearray()  # of a frame that has not come whole
        self._outgoing: list[bytes] = []
        self._outgoing_bytes = 0
        self._sent = 0.0  # when, by the loop's clock
        self._now = False  # it will be written in this turn of the loop
        self._later: asyncio.TimerHandle | None = None
        self._drained = asyncio.Event()
        self._drained.set()

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def write(self, call: int, kind: int, content: bytes = b"", *, may_wait: bool = False) -> None:
        """Nothing, once the connection is lost. `may_wait`: until PACE after the last write, or for the next that may not."""
        self._outgoing += (HEAD.pack(len(content), call, kind), content)
        self._outgoing_bytes += HEAD.size + len(content)
        wait = self._sent + PACE - self._loop.time() if may_wait else 0.0
        if self._outgoing_bytes > TOGETHER:
            self._flush()
        elif wait > 0:
            self._later = self._later or self._loop.call_later(wait, self._flush)
        elif not self._now:
            self._now = True
            self._loop.call_soon(self._flush)

    async def drained(self) -> None:
        """Wait while the other end takes less than is written."""
        await self._drained.wait()

    def close(self) -> None:
        """What was written is sent first."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's have no common ancestor with it

    def data_received(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
            if not self._whole(self._rest):
                return
            data, self._rest = bytes(self._rest), bytearray()
        place = 0
        while len(data) - place >= HEAD.size:
            size, call, kind = HEAD.unpack_from(data, place)
            start = place + HEAD.size
            if size > LARGEST:
                self.close()
                return
            if start + size > len(data):
                break
            self._received(call, kind, data[start : start + size])
            place = start + size
        self._rest += data[place:]

    @staticmethod
    def _whole(data: bytearray) -> bool:
        return len(data) >= HEAD.size and len(data) - HEAD.size >= min(HEAD.unpack_from(data)[0], LARGEST + 1)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._drained.set()
        self._lost()

    def pause_writing(self) -> None:
        self._drained.clear()

    def resume_writing(self) -> None:
        self._drained.set()

    def _flush(self) -> None:
        self._now = False
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._outgoing and self.open:
            assert self._transport is not None
            self._transport.write(b"".join(self._outgoing))
            self._sent = self._loop.time()
        self._outgoing.clear()
        self._outgoing_bytes = 0

"""A request before there is one: its line and headers are capped in bytes and in time, whoever sends them. uvicorn caps neither."""

import asyncio
import json

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.errors import envelope

HEAD_BYTES = 64 << 10  # and what one read of the socket brings
HEAD_SECONDS = 60.0
_SAID = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


class Arrival(HttpToolsProtocol):
    """One connection. A head that is too long is a 431, one that has not come in time a 408, and the connection is closed."""

    _in_head, _head = True, 0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        inside = self._in_head
        super().data_received(data)
        if self._in_head:
            if self._late is None:
                self._wait()
            self._head += len(data) if inside else 0
            if self._head > HEAD_BYTES:
                self._refuse(431, "head_too_large", f"the request's line and headers are longer than {HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head = True, 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._wait_no_more()
        super().on_headers_complete()

    def _wait(self) -> None:
        said = f"the request's line and headers had not come whole after {HEAD_SECONDS:.0f} s"
        self._late = self.loop.call_later(HEAD_SECONDS, self._refuse, 408, "head_timeout", said)

    def _wait_no_more(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: int, code: str, message: str) -> None:
        if self.transport.is_closing():
            return
        content = json.dumps(envelope(message, code=code, status=status)).encode()
        head = f"HTTP/1.1 {status} {_SAID[status]}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {len(content)}"
        self.transport.write(head.encode() + b"\r\n\r\n" + content)
        self.transport.close()

"""Token ids → text, piece by piece: no piece ends inside a character or inside what may become a stop string."""

from typing import Any


class Detokenizer:
    """Feed it tokens; it gives the text that has become certain, and says when a stop string was met."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._tokens: list[int] = []
        self._sent = 0

    def feed(self, token: int | None, *, last: bool) -> tuple[str, bool]:
        """(new text, a stop string was met). The stop string itself, and what follows it, is not in the text. None: no text."""
        if token is not None:
            self._tokens.append(token)
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        found = [at for stop in self._stop if (at := text.find(stop, max(0, self._sent - len(stop)))) >= 0]
        if found:
            return self._release(text, min(found)), True
        return self._release(text, len(text) if last else self._certain(text)), False

    def _certain(self, text: str) -> int:
        end = len(text)
        while end > self._sent and text[end - 1] == "\ufffd":  # bytes of a character still to come
            end -= 1
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text.endswith(stop[:size], 0, end):
                    held = max(held, size)
                    break
        return end - held

    def _release(self, text: str, end: int) -> str:
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

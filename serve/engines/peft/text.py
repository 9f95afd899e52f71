"""Token ids → text, piece by piece: no piece ends inside a character or inside what may become a stop string."""

from typing import Any

INCOMPLETE = "\ufffd"  # what bytes of a character that is still to come are decoded to


class Detokenizer:
    """Feed it tokens; it gives the text that has become certain, and says when a stop string was met.

    Each token is decoded with those since the last but one that ended with a whole character, so that a long answer's cost no more.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], *, least: int = 0) -> None:
        """`least`: no stop string ends before so many tokens and one more."""
        self._tokenizer = tokenizer
        self._stop, self._least = stop, least
        self._fed = 0
        self._searched = 0  # characters up to here have been looked at for stop strings
        self._text = ""  # of the tokens up to _whole
        self._tokens: list[int] = []  # decoded anew with each that comes: a few before _whole, which may change how others read, and since
        self._whole = 0
        self._sent = 0

    def feed(self, token: int | None, *, last: bool) -> tuple[str, bool]:
        """(new text, a stop string was met). The stop string itself, and what follows it, is not in the text. None: no text."""
        text = self._text if token is None and not self._tokens else self._decoded(token)
        found = [at for stop in self._stop if (at := text.find(stop, max(0, self._searched - len(stop) + 1))) >= 0]
        self._searched = len(text.rstrip(INCOMPLETE))
        if found and self._fed > self._least:
            return self._release(text, min(found)), True
        return self._release(text, len(text) if last else self._certain(text)), False

    def _decoded(self, token: int | None) -> str:
        if token is not None:
            self._fed += 1
            self._tokens.append(token)
        before, all_of_them = (
            self._tokenizer.decode(part, skip_special_tokens=True) for part in (self._tokens[: self._whole], self._tokens)
        )
        text = self._text + all_of_them[len(before) :]
        if len(text) > len(self._text) and not text.endswith(INCOMPLETE):
            self._text, self._tokens, self._whole = text, self._tokens[self._whole :], len(self._tokens) - self._whole
        return text

    def _certain(self, text: str) -> int:
        end = len(text)
        while end > self._sent and text[end - 1] == INCOMPLETE:
            end -= 1
        held = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, end - self._sent), 0, -1):  # what was told is held no more
                if text.endswith(stop[:size], 0, end):
                    held = max(held, size)
                    break
        return end - held

    def _release(self, text: str, end: int) -> str:
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

"""Conversation → tokens, the same way in training, evaluation, probes and (through the same template) serving.

A base with a chat template sees every row through it, prompt/completion rows too: what trains here answers under
/v1/chat/completions. A base without one sees prompt + completion + end of text, and answers under /v1/completions.
No token spans the text before an answer and the answer, as none does when an engine generates.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateSyntaxError

from embedft.causal_lm.data import Message, Row
from embedft.errors import BaseError, DataError, UsageError
from embedft.model_folder import CHATML, PLAIN, stop_tokens, template_hash

IGNORED = -100  # label of a token without a loss
NAMED = {"chatml": CHATML}
OPENING = re.compile(r"<\w+>\s*$")  # a tag


@dataclass(frozen=True)
class Example:
    """`labels[i]` is `ids[i]` where the token is learnt, else -100. Equal lengths, in tokens; `cut`: tokens of the row beyond them.
    `rewritten`: answers that are read and not learnt, for the template writes them otherwise once a turn follows."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: int = 0
    rewritten: int = 0


@dataclass(frozen=True)
class Template:
    """`source` is Jinja, or None for plain text. `hash` (64 hex) goes into the passport: serving must render alike."""

    tokenizer: Any
    source: str | None

    @property
    def hash(self) -> str:
        return template_hash(self.source)

    def prompt(self, row: Row) -> str:
        """The text after which the model writes the row's last answer."""
        if self.source is None:
            return self._plain(row.messages[:-1])
        return self._render(row, len(row.messages) - 1, ask=True)

    def prompt_ids(self, row: Row) -> list[int]:
        return self._ids(self.prompt(row), first=True)

    def answer_ids(self, row: Row) -> list[int]:
        """Tokens of the last answer with the token that ends it."""
        *before, (answer, _) = self._segments(row)
        return self._tokens(["".join(text for text, _ in before), answer])[-1]

    def example(self, row: Row, *, max_length: int, train_on_inputs: bool = False) -> Example | None:
        """The row's tokens, cut at `max_length`, with a loss on the assistant's turns (or on all); None if no answer is left."""
        ids: list[int] = []
        labels: list[int] = []
        part: list[int] = []
        segments = self._segments(row)
        for (_, learnt), part in zip(segments, self._tokens([text for text, _ in segments]), strict=True):
            ids += part
            labels += part if learnt or train_on_inputs else [IGNORED] * len(part)
        if len(ids) - len(part) >= max_length:  # `part` is the last answer now
            return None
        answers = sum(message.role == "assistant" and message.learnt for message in row.messages[1:])
        rewritten = 0 if train_on_inputs else answers - sum(learnt for _, learnt in segments)
        return Example(tuple(ids[:max_length]), tuple(labels[:max_length]), cut=max(0, len(ids) - max_length), rewritten=rewritten)

    def _segments(self, row: Row) -> list[tuple[str, bool]]:
        """The rendered row in pieces: (text, is it an answer). Where a template rewrites earlier turns (as reasoning
        templates do), only the last answer is learnt. What opens a conversation answers nothing and is not learnt, nor is an answer
        that says so."""
        if self.source is None:
            return [(self._plain(row.messages[:-1]), False), (self._ended(row.answer), True)]
        pieces: list[tuple[str, bool]] = []
        done, ends = "", [i for i, message in enumerate(row.messages) if i and message.role == "assistant"]
        whole = self._render(row, len(row.messages), ask=False)
        for end in ends:
            before, after = self._render(row, end, ask=True), self._render(row, end + 1, ask=False)
            answer = self._trimmed(after[len(before) :], row.messages[end].content)
            if not (before.startswith(done) and after.startswith(before) and whole.startswith(before + answer)):
                before = self.prompt(row)
                return [(before, False), (self._closed(self._tail(before, whole, row), row), True)]
            if end == len(row.messages) - 1:
                answer = self._closed(answer, row)
            elif not self._trimmed(answer, row.messages[end].content, ended=True):  # what begins the next turn may end this one
                answer += next((stop for stop in self._stops() if whole.startswith(before + answer + stop)), "")
            pieces += [(before[len(done) :], False), (answer, row.messages[end].learnt)]
            done = before + answer
        return pieces

    def _tail(self, before: str, whole: str, row: Row) -> str:
        """The last answer after `before`, or after the question where the template writes what is before that otherwise once it is answered
        (Mistral's leaves the system's message out); as the row has it where it leaves out what it ended the prompt with."""
        if whole.startswith(before):
            return self._trimmed(whole[len(before) :], row.answer)
        asked = before[max(before.rfind(row.messages[-2].content.strip()), 0) :]
        after = whole[whole.rfind(asked) + len(asked) :] if asked in whole else ""
        if after.strip().startswith(row.answer.strip()):
            return self._trimmed(after, row.answer)
        return _unopened(row.answer, before)

    def _closed(self, answer: str, row: Row) -> str:
        """With the end of text where the template writes nothing that ends an answer, as GLM's, whose next turn ends the one before."""
        return answer if self._trimmed(answer, row.answer, ended=True) else self._ended(answer)

    def _ended(self, answer: str) -> str:
        if self.tokenizer.eos_token is None:
            raise BaseError("the base's tokenizer has no eos_token, so nothing would end an answer: name it in tokenizer_config.json")
        return answer + str(self.tokenizer.eos_token)

    def _trimmed(self, answer: str, content: str, *, ended: bool = False) -> str:
        """Without what a template writes after the token that ends the turn: no engine ever generates that. An answer that none ends
        stays as it is, or with `ended` is ''."""
        after = max(answer.rfind(content.strip()), 0)
        after += len(content.strip()) if answer.startswith(content.strip(), after) else 0
        ends = [(at, len(token)) for token in self._stops() if (at := answer.find(token, after)) >= 0]
        return answer[: sum(min(ends))] if ends else "" if ended else answer

    def _stops(self) -> list[str]:
        """Texts of the tokens that end an answer. What a config calls one and is a word of the vocabulary is no sign of an end."""
        added = self.tokenizer.added_tokens_decoder
        return [str(added[token]) for token in stop_tokens(self.tokenizer) if token in added]

    def _plain(self, messages: Sequence[Message]) -> str:
        if len(messages) != 1 or messages[0].role != "user":
            raise UsageError("this base has no chat template, so its rows are one prompt and one completion: set data.template=chatml")
        return messages[0].content

    def _render(self, row: Row, count: int, *, ask: bool) -> str:
        """The row's first `count` messages. DataError where the template raises, as it may on roles that it does not know; BaseError where
        it is none."""
        listed = [{"role": message.role, "content": message.content} for message in row.messages[:count]]
        try:
            return str(self.tokenizer.apply_chat_template(listed, chat_template=self.source, tokenize=False, add_generation_prompt=ask))
        except TemplateSyntaxError as error:
            raise BaseError(f"the base's chat template cannot be read: {error} (line {error.lineno}): set data.template") from None
        except Exception as error:  # its own, or Python's on what it does with a message
            roles = ", ".join(message["role"] for message in listed)
            raise DataError([f"row {row.id} ({roles}): the chat template refuses it: {error}; expected roles that it knows"]) from None

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each piece as it stands after the one before it: what a tokenizer begins a text with (SentencePiece a space) stands before
        the first alone. A piece that would share a token with the one before is tokenized apart."""
        parts: list[list[int]] = []
        last, alone = "", list[int]()  # the piece before that is not empty, and its tokens where it begins the text
        for piece in texts:
            after = self._ids(last + piece, first=True) if last + piece else []
            parts.append(after[len(alone) :] if after[: len(alone)] == alone else self._ids(piece, first=False))
            if piece:
                last, alone = piece, self._ids(piece, first=True) if last else after
        return parts

    def _ids(self, text: str, *, first: bool) -> list[int]:
        special = first and self.source is None  # a template writes its special tokens itself
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])


def template_of(tokenizer: Any, name: str | None = None) -> Template:
    """The base's own template (or plain text where it has none), or a named one: 'chatml', 'plain'. UsageError otherwise."""
    if name is None:
        own = tokenizer.chat_template
        return Template(tokenizer, (own.get("default") if isinstance(own, dict) else own) or None)
    if name == PLAIN:
        return Template(tokenizer, None)
    if name not in NAMED:
        raise UsageError(f"no template {name!r}: there are {', '.join([*NAMED, PLAIN])}; leave it out for the base's own")
    return Template(tokenizer, NAMED[name])


def template_with_hash(tokenizer: Any, wanted: str | None) -> Template:
    """The template that an adapter was trained with, found by the hash in its passport. UsageError if none here has it."""
    for name in (None, *NAMED, PLAIN):
        template = template_of(tokenizer, name)
        if wanted in (None, template.hash):
            return template
    raise UsageError("the adapter was trained with a chat template that this base does not have: serve the base it was trained on")


def _unopened(answer: str, before: str) -> str:
    """Without the tag that it begins with (<think>, say) where the prompt ends with that already."""
    sizes = [size for size in range(1, min(len(answer), len(before)) + 1) if before.endswith(answer[:size])]
    return answer[max(sizes) :] if sizes and OPENING.match(answer[: max(sizes)]) else answer

"""Conversation → tokens, the same way in training, evaluation, probes and (through the same template) serving.

A base with a chat template sees every row through it, prompt/completion rows too: what trains here answers under
/v1/chat/completions. A base without one sees prompt + completion + end of text, and answers under /v1/completions.
The text before an answer is tokenized apart from the answer, as it is when an engine generates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from embedft.causal_lm.data import Message, Row
from embedft.errors import BaseError, DataError, UsageError
from embedft.model_folder import CHATML, PLAIN, stop_tokens, template_hash

IGNORED = -100  # label of a token without a loss
NAMED = {"chatml": CHATML}


@dataclass(frozen=True)
class Example:
    """`labels[i]` is `ids[i]` where the token is learnt, else -100. Equal lengths, in tokens."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


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
        return self._ids(self._segments(row)[-1][0], first=False)

    def example(self, row: Row, *, max_length: int, train_on_inputs: bool = False) -> Example | None:
        """The row's tokens, cut at `max_length`, with a loss on the assistant's turns (or on all); None if no answer is left."""
        ids: list[int] = []
        labels: list[int] = []
        part: list[int] = []
        for number, (text, learnt) in enumerate(self._segments(row)):
            part = self._ids(text, first=number == 0)
            ids += part
            labels += part if learnt or train_on_inputs else [IGNORED] * len(part)
        if len(ids) - len(part) >= max_length:  # `part` is the last answer now
            return None
        return Example(tuple(ids[:max_length]), tuple(labels[:max_length]))

    def _segments(self, row: Row) -> list[tuple[str, bool]]:
        """The rendered row in pieces: (text, is it an answer). Where a template rewrites earlier turns (as reasoning
        templates do), only the last answer is learnt. What opens a conversation answers nothing, and is not learnt."""
        if self.source is None:
            return [(self._plain(row.messages[:-1]), False), (self._ended(row.answer), True)]
        pieces: list[tuple[str, bool]] = []
        done, ends = "", [i for i, message in enumerate(row.messages) if i and message.role == "assistant"]
        whole = self._render(row, len(row.messages), ask=False)
        for end in ends:
            before, after = self._render(row, end, ask=True), self._render(row, end + 1, ask=False)
            if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
                before, pieces, done = self.prompt(row), [], ""
                after = before + self._tail(before, whole, row)
                return [(before, False), (_trimmed(after[len(before) :], self.tokenizer), True)]
            answer = _trimmed(after[len(before) :], self.tokenizer)
            pieces += [(before[len(done) :], False), (answer, True)]
            done = before + answer
        return pieces

    def _tail(self, before: str, whole: str, row: Row) -> str:
        return whole[len(before) :] if whole.startswith(before) else self._ended(row.answer)

    def _ended(self, answer: str) -> str:
        if self.tokenizer.eos_token is None:
            raise BaseError("the base's tokenizer has no eos_token, so nothing would end an answer: name it in tokenizer_config.json")
        return answer + str(self.tokenizer.eos_token)

    def _plain(self, messages: Sequence[Message]) -> str:
        if len(messages) != 1 or messages[0].role != "user":
            raise UsageError("this base has no chat template, so its rows are one prompt and one completion: set data.template=chatml")
        return messages[0].content

    def _render(self, row: Row, count: int, *, ask: bool) -> str:
        """The row's first `count` messages. DataError where the template raises, as it may on roles that it does not know."""
        listed = [{"role": message.role, "content": message.content} for message in row.messages[:count]]
        try:
            return str(self.tokenizer.apply_chat_template(listed, chat_template=self.source, tokenize=False, add_generation_prompt=ask))
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in listed)
            raise DataError([f"row {row.id} ({roles}): the chat template refuses it: {error}; expected roles that it knows"]) from None

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


def _trimmed(answer: str, tokenizer: Any) -> str:
    """Without what a template writes after the token that ends the turn: no engine ever generates that."""
    tokens = [tokenizer.decode([token]) for token in stop_tokens(tokenizer)]
    ends = [answer.rindex(token) + len(token) for token in tokens if token and token in answer]
    return answer[: max(ends)] if ends else answer

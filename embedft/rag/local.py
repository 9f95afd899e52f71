"""A base and adapter folders in this process: vectors by embedft.encode, answers by transformers. One adapter at a time is on the base.

Switching takes the adapter off and puts the other on; for many adapters in one batch, run a server.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.adapters.passport import Passport, base_said, generation, read_passport
from embedft.adapters.store import adapter_folder
from embedft.base import BaseSpec, base_folder
from embedft.encode import Encoder, InputType
from embedft.errors import AdapterInvalid, BaseMismatch, InputInvalid, UsageError
from embedft.model_folder import Task, describe
from embedft.rag.engines import Chat, Vectors
from embedft.vectors import VectorKind, vector_kind

if TYPE_CHECKING:
    from embedft.adapters.store import AdapterStore

BASE = "base"
OPTIONS = {"max_tokens", "temperature"}  # what a reader in this process heeds; a server heeds all of OpenAI's


@dataclass(frozen=True)
class _Adapter:
    folder: Path
    passport: Passport
    generation: str

    @property
    def label(self) -> str:
        return f"{self.passport.name}@{self.generation[:12]}"


class _OnBase:
    """The base, loaded when first asked for, with at most one adapter on it. Callers hold `lock`."""

    def __init__(self, spec: BaseSpec, store: "AdapterStore | None", task: Task) -> None:
        self.spec, self.store = spec, store
        self.task: Task = task
        self.folder = base_folder(spec)
        self.info = describe(self.folder)
        if task == "causal_lm" and self.info.kind == "encoder":
            raise UsageError(f"base {spec.model!r} is an encoder: it makes vectors and writes no text; name a language model")
        self.lock = threading.Lock()
        self._known: dict[str, _Adapter] = {}
        self._model: Any = None
        self._on: str | None = None  # generation

    def adapter(self, name: str | None) -> _Adapter | None:
        """A name in the store (its current generation) or an adapter folder. Raises AdapterNotFound, AdapterInvalid, BaseMismatch."""
        if name is None:
            return None
        folder = adapter_folder(name, self.store)
        key = str(folder.resolve())  # the store's folders never change; a folder of the user's own may, so it is read anew
        found = self._known.get(key) if folder != Path(name) else None
        if found is None:
            passport = read_passport(folder, name=name)
            if passport.task != self.task:
                raise AdapterInvalid(name, f"it is for {passport.task}, not for {self.task}")
            if passport.base.fingerprint != self.info.fingerprint:
                here = base_said(self.spec.model, self.info.quantization, self.info.fingerprint)
                raise BaseMismatch(name, trained_on=passport.base.said, serving=here)
            found = self._known[key] = _Adapter(folder, passport, generation(folder))
        return found

    def model(self, adapter: _Adapter | None) -> Any:
        from embedft.base import load_model
        from embedft.methods import load_adapter

        wanted = adapter.generation if adapter else None
        if self._model is None:
            self._model = load_model(self.folder, task=self.task)
        if wanted != self._on:
            if self._on is not None:
                self._model, self._on = self._model.unload(), None
            if adapter is not None:
                self._model, self._on = load_adapter(self._model, adapter.folder, name=adapter.passport.name), wanted
        return self._model


class LocalEmbedder:
    """An Embedder over a base that `spec` names; adapters by name in `store` or by folder."""

    def __init__(self, spec: BaseSpec, *, store: "AdapterStore | None" = None, batch_size: int = 64) -> None:
        self._base, self._batch = _OnBase(spec, store, "embedding"), batch_size

    @classmethod
    def of(cls, adapter: str | None, *, base: str | None, store: "AdapterStore | None") -> "LocalEmbedder":
        """Over the base named, or the one that the adapter was trained on."""
        return cls(spec_of(adapter, base=base, store=store), store=store)

    def embed(self, texts: Sequence[str], *, input_type: InputType, adapter: str | None) -> Vectors:
        if not texts:
            raise InputInvalid("input_empty", "no text to embed: send at least one", "input")
        found = self._base.adapter(adapter)
        kind = self._kind(found, input_type)
        with self._base.lock:
            model = self._base.model(found)
            off = model.disable_adapter() if found and not kind.by_adapter else nullcontext()
            encoder = Encoder(model, self._base.folder, kind.settings)
            prepared = encoder.preparer.prepare(list(texts), input_type)
            with off:
                rows = encoder.encode_ids(prepared.ids, batch_size=self._batch)
        label = found.label if found and kind.by_adapter else BASE
        return Vectors(rows, kind.lineage, self._kind(found, "document").lineage, label, prepared.truncated)

    async def aembed(self, texts: Sequence[str], *, input_type: InputType, adapter: str | None) -> Vectors:
        return await asyncio.to_thread(self.embed, texts, input_type=input_type, adapter=adapter)

    def document_lineage(self, adapter: str | None) -> tuple[str, str]:
        found = self._base.adapter(adapter)
        kind = self._kind(found, "document")
        return kind.lineage, found.label if found and kind.by_adapter else BASE

    def _kind(self, adapter: _Adapter | None, input_type: InputType) -> VectorKind:
        passport, identity = (adapter.passport, adapter.generation) if adapter else (None, None)
        return vector_kind(self._base.info, passport, identity, input_type=input_type)


class LocalReader:
    """A Reader over a causal language model in this process; greedy unless a temperature is given."""

    def __init__(self, spec: BaseSpec, *, store: "AdapterStore | None" = None) -> None:
        self._base = _OnBase(spec, store, "causal_lm")
        self._tokenizer: Any = None
        self._loading = threading.Lock()

    @classmethod
    def of(cls, adapter: str | None, *, base: str | None, store: "AdapterStore | None") -> "LocalReader":
        return cls(spec_of(adapter, base=base, store=store), store=store)

    def chat(self, messages: Chat, *, adapter: str | None, **options: Any) -> str:
        return "".join(self.stream(messages, adapter=adapter, **options))

    async def achat(self, messages: Chat, *, adapter: str | None, **options: Any) -> str:
        return await asyncio.to_thread(self.chat, messages, adapter=adapter, **options)

    def stream(self, messages: Chat, *, adapter: str | None, **options: Any) -> Iterator[str]:
        from transformers import TextIteratorStreamer

        found = self._base.adapter(adapter)
        streamer: Any = TextIteratorStreamer(self._loaded(), skip_prompt=True, skip_special_tokens=True)
        unread, failed = threading.Event(), list[BaseException]()
        worker = threading.Thread(target=self._answer, args=(messages, found, options, streamer, unread, failed), daemon=True)
        worker.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            unread.set()
            worker.join()
        if failed:
            raise failed[0]

    def _answer(
        self,
        messages: Chat,
        adapter: _Adapter | None,
        options: Mapping[str, Any],
        streamer: Any,
        unread: threading.Event,
        failed: list[BaseException],
    ) -> None:
        """Into `streamer`, until `unread`. The base is this thread's as long as it takes, whether or not anybody reads along."""
        import torch
        from transformers import StoppingCriteriaList

        def stop(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.full((len(ids),), unread.is_set(), dtype=torch.bool, device=ids.device)

        try:
            with self._base.lock:
                model = self._base.model(adapter)
                given = self._inputs(messages, adapter, options)
                moved = {key: value.to(model.device) if hasattr(value, "to") else value for key, value in given.items()}
                with torch.inference_mode():
                    model.generate(**moved, streamer=streamer, stopping_criteria=StoppingCriteriaList([stop]))
        except BaseException as error:
            failed.append(error)
            streamer.end()

    def _loaded(self) -> Any:
        from embedft.model_folder import tokenizer_of

        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = tokenizer_of(self._base.folder)
        return self._tokenizer

    async def astream(self, messages: Chat, *, adapter: str | None, **options: Any) -> AsyncIterator[str]:
        pieces = self.stream(messages, adapter=adapter, **options)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    def _inputs(self, messages: Chat, adapter: _Adapter | None, options: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        from embedft.causal_lm.evaluate import pad_token
        from embedft.causal_lm.template import template_with_hash
        from embedft.model_folder import stop_tokens

        if unknown := sorted(set(options) - OPTIONS):
            raise InputInvalid("option_unsupported", f"{unknown[0]} is not for a model in this process: leave it out, or serve", unknown[0])
        try:
            "".join(message["content"] for message in messages).encode()
        except UnicodeEncodeError:
            raise InputInvalid("input_invalid", "an input holds half a character (a lone surrogate)", "input") from None
        template = template_with_hash(self._tokenizer, adapter.passport.template_hash if adapter else None)
        if template.source is None:
            ids = self._tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
        else:
            listed = [dict(message) for message in messages]
            text = self._tokenizer.apply_chat_template(listed, chat_template=template.source, tokenize=False, add_generation_prompt=True)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        given, most = options.get("max_tokens"), self._base.info.max_length
        count = 256 if given is None else int(given)
        if not 0 < count < most:
            message = f"max_tokens {count}: the model has room for {most} tokens, prompt and answer together: ask for at least 1, and fewer"
            raise InputInvalid("max_tokens_invalid", message, "max_tokens")
        room = most - count
        if len(ids) > room:
            raise InputInvalid(
                "input_too_long", f"the prompt has {len(ids)} tokens, and {room} fit before the answer: retrieve less", "input"
            )
        temperature = float(options.get("temperature") or 0.0)
        sampling: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False, "temperature": None}
        )
        return {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
            "max_new_tokens": count,
            "eos_token_id": stop_tokens(self._tokenizer),
            "pad_token_id": pad_token(self._tokenizer),
            **sampling,
        }


def store_at(adapters: str | None) -> "AdapterStore":
    """The store in that folder, as the settings of llama-index's classes name it; None is the command line's own default."""
    from embedft.adapters.store import AdapterStore

    return AdapterStore(Path(adapters) if adapters else None)


def spec_of(adapter: str | None, *, base: str | None, store: "AdapterStore | None") -> BaseSpec:
    """The base named, quantized as the adapter was trained on it, else the one in its passport. UsageError where neither says."""
    if adapter is None and base is None:
        raise UsageError("name a base or an adapter: without either there is nothing to load")
    if adapter is None:
        return BaseSpec(str(base))
    trained_on = read_passport(adapter_folder(adapter, store), name=adapter).base
    if base is not None:
        return BaseSpec(base, trained_on.quantization)
    return BaseSpec(trained_on.model, trained_on.quantization, trained_on.revision)

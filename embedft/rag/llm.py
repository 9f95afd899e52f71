"""AdapterLLM: llama-index's OpenAILike over a causal base and its adapters, by URL or in this process."""

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
import openai
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.llms.openai_like import OpenAILike

from embedft.errors import EmbedftError, EngineFailed
from embedft.rag.embedding import only_known
from embedft.rag.engines import Reader
from embedft.rag.local import LocalReader, store_at
from embedft.rag.remote import refusal, server_root, unreachable
from embedft.rag.transports import LoopTransport, ReaderTransport

Piece = TypeVar("Piece")
_CLIENTS = ("http_client", "async_http_client", "openai_client", "async_openai_client")  # that OpenAI takes and has no field for
NO_KEY = "none"  # OpenAI's client wants some key, and would take OPENAI_API_KEY, which is not this server's business


class AdapterLLM(OpenAILike):
    """Answers by an adapter: `url` of a running server, or in this process from `base` and `adapters` (a store's folder).

    `adapter` is a name, in this process also a folder; None is the base. Every call takes another one as `adapter=`, and OpenAI's
    options (`max_tokens`, `temperature`, `stop`, …), which count for that call. Errors are embedft's, not OpenAI's; nothing is retried
    unless `max_retries` says so, for the server queues by itself.
    """

    url: str | None = Field(default=None, description="A running server; None: in this process.")
    base: str | None = Field(default=None, description="The base; None: the adapter's own, or the server's only one.")
    adapter: str | None = Field(default=None, description="The adapter; None: the base itself.")
    adapters: str | None = Field(default=None, description="The store's folder, in this process; None: $EMBEDFT_ADAPTERS, or adapters/.")
    api_key: str | None = Field(default=None, exclude=True, repr=False)
    _reader: Reader | None = PrivateAttr(default=None)

    def __init__(self, *, reader: Reader | None = None, **settings: Any) -> None:
        """`reader`: one in this process that is shared with others; made from the settings where there is none. Raises UsageError."""
        only_known(settings, {*type(self).model_fields, *_CLIENTS}, of="AdapterLLM")
        chosen: dict[str, Any] = {
            "max_tokens": 256,
            "temperature": 0.0,
            "context_window": 2048,
            "timeout": 120.0,
            "max_retries": 0,
            **settings,
        }
        chosen |= {"is_chat_model": True, "model": settings.get("base") or settings.get("adapter") or "base"}
        chosen["api_key"] = settings.get("api_key") or NO_KEY
        if url := settings.get("url"):
            chosen |= {"api_base": f"{server_root(url)}/v1", "async_http_client": httpx.AsyncClient(transport=LoopTransport())}
        else:
            inside = ReaderTransport(lambda: self.reader)
            chosen |= {"api_base": "http://in-process/v1", "http_client": httpx.Client(transport=inside)}
            chosen["async_http_client"] = httpx.AsyncClient(transport=inside)
        super().__init__(**chosen)
        self._reader = reader

    @classmethod
    def class_name(cls) -> str:
        return "AdapterLLM"

    @property
    def reader(self) -> Reader:
        """What answers in this process; opened at its first use."""
        if self._reader is None:
            self._reader = LocalReader.of(self.adapter, base=self.base, store=store_at(self.adapters))
        return self._reader

    def using(self, adapter: str | None) -> "AdapterLLM":
        """The same server or model with another adapter: what to hand to a query engine."""
        if self.url is None:
            _ = self.reader  # one model for both
        return self.model_copy(update={"adapter": adapter})

    def chat(self, messages: Sequence[ChatMessage], **call: Any) -> ChatResponse:
        with self._named():
            return super().chat(messages, **call)

    async def achat(self, messages: Sequence[ChatMessage], **call: Any) -> ChatResponse:
        with self._named():
            return await super().achat(messages, **call)

    def stream_chat(self, messages: Sequence[ChatMessage], **call: Any) -> ChatResponseGen:
        return self._pieces(super().stream_chat(messages, **call))

    async def astream_chat(self, messages: Sequence[ChatMessage], **call: Any) -> ChatResponseAsyncGen:
        with self._named():
            return self._apieces(await super().astream_chat(messages, **call))

    def complete(self, prompt: str, formatted: bool = False, **call: Any) -> CompletionResponse:
        with self._named():
            return super().complete(prompt, formatted, **call)

    async def acomplete(self, prompt: str, formatted: bool = False, **call: Any) -> CompletionResponse:
        with self._named():
            return await super().acomplete(prompt, formatted, **call)

    def stream_complete(self, prompt: str, formatted: bool = False, **call: Any) -> CompletionResponseGen:
        return self._pieces(super().stream_complete(prompt, formatted, **call))

    async def astream_complete(self, prompt: str, formatted: bool = False, **call: Any) -> CompletionResponseAsyncGen:
        with self._named():
            return self._apieces(await super().astream_complete(prompt, formatted, **call))

    def _get_model_kwargs(self, **call: Any) -> dict[str, Any]:
        """OpenAILike lets a setting win over the call; here the call wins. The adapter travels beside what OpenAI knows."""
        adapter = call.pop("adapter", self.adapter)
        made = {**super()._get_model_kwargs(**call), **call}
        if self.base is None:
            made["model"] = openai.omit
        return {**made, "extra_body": {**(made.get("extra_body") or {}), "adapter": adapter}}

    def _pieces(self, pieces: Iterator[Piece]) -> Generator[Piece]:
        with self._named():
            yield from pieces

    async def _apieces(self, pieces: AsyncIterator[Piece]) -> AsyncGenerator[Piece]:
        with self._named():
            async for piece in pieces:
                yield piece

    @contextmanager
    def _named(self) -> Generator[None]:
        """OpenAI's exceptions as embedft's."""
        try:
            yield
        except openai.APIStatusError as error:
            raise refusal(error.response) from None
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, EmbedftError):
                raise error.__cause__ from None
            raise unreachable(self.url or "", error) from None
        except openai.APIError as error:  # an error event in the middle of a stream
            raise EngineFailed(error.message) from None

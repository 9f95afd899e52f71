"""AdapterLLM: llama-index's LLM over a causal base and its adapters, by URL (OpenAI's chat HTTP) or in this process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM

from embedft.rag.engines import Reader
from embedft.rag.local import LocalReader
from embedft.rag.remote import RemoteEngine


class AdapterLLM(LLM):
    """Answers by an adapter: `url` of a running server, or in this process from `base` and `adapters` (a store's folder).

    Every call takes another adapter as `adapter=`, and OpenAI's options (`max_tokens`, `temperature`, `stop`, …).
    """

    url: str | None = Field(default=None, description="A running server; None: in this process.")
    base: str | None = Field(default=None, description="The base; None: the adapter's own, or the server's only one.")
    adapter: str | None = Field(default=None, description="The adapter; None: the base itself.")
    adapters: str | None = Field(default=None, description="The adapter store's folder, in this process.")
    api_key: str | None = Field(default=None, exclude=True, repr=False)
    max_tokens: int = Field(default=256, description="Most tokens of an answer.")
    temperature: float = Field(default=0.0, description="0 is greedy.")
    context_window: int = Field(default=2048, description="Tokens of prompt and answer together.")
    _engine: Reader | None = PrivateAttr(default=None)

    def __init__(self, *, engine: Reader | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self._engine = engine

    @classmethod
    def class_name(cls) -> str:
        return "AdapterLLM"

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_tokens,
            is_chat_model=True,
            model_name=self.adapter or self.base or "base",
        )

    @property
    def engine(self) -> Reader:
        """What writes the answers; opened at its first use."""
        if self._engine is None:
            if self.url:
                self._engine = RemoteEngine(self.url, model=self.base, api_key=self.api_key)
            else:
                from embedft.adapters.store import AdapterStore

                store = AdapterStore(Path(self.adapters)) if self.adapters else None
                self._engine = LocalReader.of(self.adapter, base=self.base, store=store)
        return self._engine

    def using(self, adapter: str | None) -> "AdapterLLM":
        """The same engine with another adapter: what to hand to a query engine."""
        names = ("url", "base", "adapters", "api_key", "max_tokens", "temperature", "context_window", "system_prompt", "callback_manager")
        return AdapterLLM(engine=self.engine, adapter=adapter, **{name: getattr(self, name) for name in names})

    @llm_chat_callback()  # pyright: ignore[reportUntypedFunctionDecorator]
    def chat(self, messages: Sequence[ChatMessage], **call: Any) -> ChatResponse:
        return _response(self.engine.chat(_turns(messages), **self._options(call)))

    @llm_chat_callback()  # pyright: ignore[reportUntypedFunctionDecorator]
    async def achat(self, messages: Sequence[ChatMessage], **call: Any) -> ChatResponse:
        return _response(await self.engine.achat(_turns(messages), **self._options(call)))

    @llm_chat_callback()  # pyright: ignore[reportUntypedFunctionDecorator]
    def stream_chat(self, messages: Sequence[ChatMessage], **call: Any) -> ChatResponseGen:
        def pieces() -> ChatResponseGen:
            said = ""
            for piece in self.engine.stream(_turns(messages), **self._options(call)):
                said += piece
                yield _response(said, delta=piece)

        return pieces()

    @llm_chat_callback()  # pyright: ignore[reportUntypedFunctionDecorator]
    async def astream_chat(self, messages: Sequence[ChatMessage], **call: Any) -> ChatResponseAsyncGen:
        async def pieces() -> ChatResponseAsyncGen:
            said = ""
            async for piece in self.engine.astream(_turns(messages), **self._options(call)):
                said += piece
                yield _response(said, delta=piece)

        return pieces()

    @llm_completion_callback()  # pyright: ignore[reportUntypedFunctionDecorator]
    def complete(self, prompt: str, formatted: bool = False, **call: Any) -> CompletionResponse:  # noqa: ARG002
        return CompletionResponse(text=self.engine.chat(_user(prompt), **self._options(call)))

    @llm_completion_callback()  # pyright: ignore[reportUntypedFunctionDecorator]
    async def acomplete(self, prompt: str, formatted: bool = False, **call: Any) -> CompletionResponse:  # noqa: ARG002
        return CompletionResponse(text=await self.engine.achat(_user(prompt), **self._options(call)))

    @llm_completion_callback()  # pyright: ignore[reportUntypedFunctionDecorator]
    def stream_complete(self, prompt: str, formatted: bool = False, **call: Any) -> CompletionResponseGen:  # noqa: ARG002
        def pieces() -> CompletionResponseGen:
            said = ""
            for piece in self.engine.stream(_user(prompt), **self._options(call)):
                said += piece
                yield CompletionResponse(text=said, delta=piece)

        return pieces()

    @llm_completion_callback()  # pyright: ignore[reportUntypedFunctionDecorator]
    async def astream_complete(self, prompt: str, formatted: bool = False, **call: Any) -> CompletionResponseAsyncGen:  # noqa: ARG002
        async def pieces() -> CompletionResponseAsyncGen:
            said = ""
            async for piece in self.engine.astream(_user(prompt), **self._options(call)):
                said += piece
                yield CompletionResponse(text=said, delta=piece)

        return pieces()

    def _options(self, call: dict[str, Any]) -> dict[str, Any]:
        return {"adapter": self.adapter, "max_tokens": self.max_tokens, "temperature": self.temperature, **call}


def _turns(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": MessageRole(message.role).value, "content": message.content or ""} for message in messages]


def _user(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _response(said: str, *, delta: str | None = None) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=said), delta=delta)

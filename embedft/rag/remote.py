"""A running server by URL: vectors and chats over HTTP, sync and async. Turns its error envelope back into our errors."""

import base64
import json
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import httpx
import numpy as np

from embedft.encode import InputType
from embedft.errors import AdapterNotFound, EmbedftError, EngineBusy, EngineFailed, InputInvalid, NotAuthorized, UsageError
from embedft.rag.engines import Chat, Vectors
from embedft.rag.transports import LoopTransport

INPUTS, CHARACTERS = 1024, 500_000  # in one request; the server's own caps are higher


class RemoteEngine:
    """Both an Embedder and a Reader. `model` names the base where the server holds several for a task."""

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None, timeout: float = 120.0) -> None:
        self.url, self.model = server_root(url), model
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        options: dict[str, Any] = {"base_url": _address(self.url), "headers": headers, "timeout": httpx.Timeout(timeout, connect=5.0)}
        self._http = httpx.Client(**options)
        weakref.finalize(self, self._http.close)
        self._async = httpx.AsyncClient(transport=LoopTransport(), **options)
        self._documents: dict[str, str] = {}  # lineage of an adapter's queries → lineage of its documents

    def embed(self, texts: Sequence[str], *, input_type: InputType, adapter: str | None) -> Vectors:
        made = [_vectors(self._post("/v1/embeddings", body)) for body in self._bodies(texts, input_type, adapter)]
        joined = _joined(made)
        return self._compared(joined, input_type, lambda name: _vectors(self._post("/v1/embeddings", self._probe(name))))

    async def aembed(self, texts: Sequence[str], *, input_type: InputType, adapter: str | None) -> Vectors:
        made = [_vectors(await self._apost("/v1/embeddings", body)) for body in self._bodies(texts, input_type, adapter)]
        joined = _joined(made)
        if input_type == "query" and joined.lineage not in self._documents:
            probe = _vectors(await self._apost("/v1/embeddings", self._probe(joined.made_by)))
            self._documents[joined.lineage] = probe.lineage
        return self._compared(joined, input_type, None)

    def document_lineage(self, adapter: str | None) -> tuple[str, str]:
        probe = _vectors(self._post("/v1/embeddings", self._probe(adapter)))
        return probe.lineage, probe.made_by

    def chat(self, messages: Chat, *, adapter: str | None, **options: Any) -> str:
        return _said(self._post("/v1/chat/completions", self._chat(messages, adapter, options)).json())

    async def achat(self, messages: Chat, *, adapter: str | None, **options: Any) -> str:
        return _said((await self._apost("/v1/chat/completions", self._chat(messages, adapter, options))).json())

    def stream(self, messages: Chat, *, adapter: str | None, **options: Any) -> Iterator[str]:
        body = {**self._chat(messages, adapter, options), "stream": True}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise refusal(response)
                for line in response.iter_lines():
                    yield from _piece(line)
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from None

    async def astream(self, messages: Chat, *, adapter: str | None, **options: Any) -> AsyncIterator[str]:
        body = {**self._chat(messages, adapter, options), "stream": True}
        try:
            async with self._async.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise refusal(response)
                async for line in response.aiter_lines():
                    for piece in _piece(line):
                        yield piece
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from None

    def rerank(self, query: str, documents: Sequence[str], *, adapter: str | None = None) -> list[float]:
        """A score for each document, by /v1/rerank."""
        body = {**self._named(adapter), "query": query, "documents": list(documents)}
        scores = [0.0] * len(documents)
        for row in self._post("/v1/rerank", body).json()["results"]:
            scores[row["index"]] = float(row["relevance_score"])
        return scores

    def _compared(self, vectors: Vectors, input_type: InputType, probe: Any) -> Vectors:
        """With the lineage of the documents to compare with: the vectors' own, or asked once for a query lineage."""
        if input_type == "document":
            return vectors
        if vectors.lineage not in self._documents:
            self._documents[vectors.lineage] = probe(
                vectors.made_by
            ).lineage  # by generation: a switch in between is an error, not a mix-up
        return Vectors(vectors.rows, vectors.lineage, self._documents[vectors.lineage], vectors.made_by, vectors.truncated)

    def _probe(self, adapter: str | None) -> dict[str, Any]:
        return {
            **self._named(None if adapter == "base" else adapter),
            "input": ["."],
            "input_type": "document",
            "encoding_format": "base64",
        }

    def _named(self, adapter: str | None) -> dict[str, Any]:
        return {"adapter": adapter, **({"model": self.model} if self.model else {})}

    def _bodies(self, texts: Sequence[str], input_type: InputType, adapter: str | None) -> Iterator[dict[str, Any]]:
        common = {**self._named(adapter), "input_type": input_type, "encoding_format": "base64"}
        batch, size = list[str](), 0
        for text in texts:
            if batch and (len(batch) == INPUTS or size + len(text) > CHARACTERS):
                yield {**common, "input": batch}
                batch, size = [], 0
            batch.append(text)
            size += len(text)
        if batch:
            yield {**common, "input": batch}

    def _chat(self, messages: Chat, adapter: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._named(adapter), "messages": [dict(message) for message in messages], **options}

    def _post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        try:
            response = self._http.post(path, json=body)
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from None
        if response.status_code != 200:
            raise refusal(response)
        return response

    async def _apost(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        try:
            response = await self._async.post(path, json=body)
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from None
        if response.status_code != 200:
            raise refusal(response)
        return response


def server_root(url: str) -> str:
    """http://host:port of a URL that may end in /v1, as OpenAI's clients write it."""
    return url.rstrip("/").removesuffix("/v1")


def _address(url: str) -> httpx.URL:
    """UsageError where it is none."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UsageError(f"{url!r} is no URL ({error}): expected one such as http://localhost:8000") from None
    if address.scheme not in ("http", "https") or not address.host:
        raise UsageError(f"{url!r} is no server's URL: expected one such as http://localhost:8000")
    return address


def unreachable(url: str, error: Exception) -> EngineFailed:
    return EngineFailed(f"no answer from {url} ({type(error).__name__}): start it with `embedft serve`, or give its URL")


def _vectors(response: httpx.Response) -> Vectors:
    lineage = response.headers.get("x-embedft-lineage")
    if not lineage:
        raise EngineFailed(f"{response.url.host} names no lineage: it is not an embedft server, so its vectors cannot be told apart")
    content = response.json()
    packed = [base64.b64decode(row["embedding"]) for row in sorted(content["data"], key=lambda row: row["index"])]
    rows = np.frombuffer(b"".join(packed), dtype="<f4").reshape(len(packed), -1)
    return Vectors(rows, lineage, lineage, response.headers["x-embedft-adapter"], int(content.get("truncated", 0)))


def _joined(made: Sequence[Vectors]) -> Vectors:
    if not made:
        raise InputInvalid("input_empty", "no text to embed: send at least one", "input")
    first = made[0]
    if len({vectors.lineage for vectors in made}) > 1:
        raise EngineBusy("the adapter was replaced between two batches: ask again")
    rows = np.concatenate([vectors.rows for vectors in made])
    return Vectors(rows, first.lineage, first.documents, first.made_by, sum(vectors.truncated for vectors in made))


def _said(content: Mapping[str, Any]) -> str:
    return str(content["choices"][0]["message"].get("content") or "")


def _piece(line: str) -> Iterator[str]:
    """The new text in one line of a stream; a stream's own error is raised."""
    if not line.startswith("data:") or line[5:].strip() == "[DONE]":
        return
    event = json.loads(line[5:])
    if "error" in event:
        raise EngineFailed(str(event["error"].get("message", "the engine failed in mid-answer")))
    for choice in event.get("choices", []):
        if text := (choice.get("delta") or {}).get("content"):
            yield str(text)


class _Refused(EmbedftError):
    """The server's refusal, under the server's own code."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


def refusal(response: httpx.Response) -> EmbedftError:
    """The server's error envelope as the exception that it was there."""
    try:
        found = response.json()["error"]
        code, message = str(found.get("code") or "error"), str(found.get("message"))
    except (ValueError, KeyError, TypeError):
        return EngineFailed(f"the server answered {response.status_code}: {response.text[:200]}")
    if code == "adapter_not_found":
        missing = AdapterNotFound("")
        missing.args = (message,)
        return missing
    kinds: dict[int, type[EmbedftError]] = {401: NotAuthorized, 502: EngineFailed, 503: EngineBusy}
    if response.status_code == 400:
        return InputInvalid(code, message, found.get("param"))
    if response.status_code in kinds:
        return kinds[response.status_code](message)
    return _Refused(code, message)

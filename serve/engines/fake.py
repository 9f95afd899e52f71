"""An engine without a model, for tests and load: the same HTTP, and answers from which the adapter can be told. Imports no torch.

A vector is a hash of the token ids, moved by a hash of (the adapter's weights, ids); a text begins with `[adapter id|hash of the
prompt]`. On an adapter's probes it shows the recorded effect, times `fake_scale` of its adapter_config.json (1, unless damaged).
Environment: EMBEDFT_FAKE_LATENCY and EMBEDFT_FAKE_TOKEN_LATENCY in seconds; EMBEDFT_FAKE_EVENTS, a file with one line an event.
"""

import argparse
import asyncio
import hashlib
import hmac
import json
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from embedft.adapters.probes import read_probes
from embedft.errors import EmbedftError
from serve.engines import vectors
from serve.link.engine import serve

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Loaded:
    """An adapter: `seed` from its weights, `effect` by the token ids of its probes."""

    seed: bytes
    effect: dict[Ids, NDArray[np.float32]] = field(default_factory=dict[Ids, NDArray[np.float32]])
    starts: dict[Ids, int] = field(default_factory=dict[Ids, int])


def load(folder: Path) -> Loaded:
    """Read what the fake shows of the adapter in `folder`."""
    seed = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).digest()
    scale = float(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("fake_scale", 1.0))
    recorded = read_probes(folder)
    keys = [probe.ids + probe.continuation for probe in recorded.probes]
    effect = {key: np.asarray(array * scale, dtype=np.float32) for key, array in zip(keys, recorded.effect, strict=True)}
    return Loaded(seed, effect, {key: len(probe.ids) for key, probe in zip(keys, recorded.probes, strict=True)})


def direction(seed: bytes, ids: Sequence[int], dimension: int) -> NDArray[np.float32]:
    """(dimension,) of length 1, the same for the same seed and ids."""
    digest = hashlib.sha256(seed + np.asarray(ids, dtype=np.int64).tobytes()).digest()
    vector = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(dimension)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def vector(loaded: Loaded | None, ids: Sequence[int], dimension: int) -> NDArray[np.float32]:
    """The fake's embedding of `ids`: by the base alone, or moved by an adapter."""
    base = direction(b"base", ids, dimension)
    if loaded is None:
        return base
    recorded = loaded.effect.get(tuple(ids))
    if recorded is not None:
        return base + recorded
    moved = base + direction(loaded.seed, ids, dimension)
    return (moved / np.linalg.norm(moved)).astype(np.float32)


def text(model: str, prompt: Any) -> str:
    """How the fake's answer to `prompt` begins."""
    canonical = json.dumps(prompt, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"[{model}|{hashlib.sha256(canonical.encode()).hexdigest()[:12]}]"


def prompt_logprobs(loaded: Loaded | None, ids: Sequence[int]) -> list[dict[str, Any] | None]:
    scores = [-1.0 - (hash((token, place)) % 97) / 97 for place, token in enumerate(ids)]
    if loaded is not None:
        key = tuple(ids)
        recorded, start = loaded.effect.get(key), loaded.starts.get(key, 0)
        for place, change in enumerate(recorded if recorded is not None else []):
            scores[start + place] += float(change)
    entries: list[dict[str, Any] | None] = [
        {str(t): {"logprob": s, "rank": 1, "decoded_token": ""}} for t, s in zip(ids, scores, strict=True)
    ]
    return [None, *entries[1:]]


class FakeEngine:
    """The routes of one engine. `base` is its base; adapters come and go."""

    def __init__(self, *, key: str, dimension: int) -> None:
        self.key, self.dimension = key, dimension
        self.adapters: dict[str, Loaded] = {}
        self.latency = float(os.environ.get("EMBEDFT_FAKE_LATENCY", "0"))
        self.token_latency = float(os.environ.get("EMBEDFT_FAKE_TOKEN_LATENCY", "0"))
        self.events = os.environ.get("EMBEDFT_FAKE_EVENTS")

    def app(self) -> Starlette:
        posts = {
            vectors.PATH: self.vectors,
            "/v1/completions": self.completions,
            "/v1/chat/completions": self.chat,
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
        }
        routes = [Route(path, self._guarded(run), methods=["POST"]) for path, run in posts.items()]
        return Starlette(routes=[Route("/health", self.health), Route("/v1/models", self.models), *routes])

    def event(self, what: str, **details: Any) -> None:
        if self.events:
            with open(self.events, "a", encoding="utf-8") as file:
                file.write(json.dumps({"event": what, "pid": os.getpid(), **details}) + "\n")

    def _guarded(self, run: Any) -> Any:
        async def guarded(request: Request) -> Response:
            if not hmac.compare_digest(request.headers.get("authorization", ""), f"Bearer {self.key}"):
                return _error(401, "the engine's key is missing")
            body = await request.json()
            if "model" in body and body["model"] != "base" and body["model"] not in self.adapters:
                return _error(404, f"The model `{body['model']}` does not exist.")
            if "model" in body:
                await asyncio.sleep(self.latency)
            return await run(body)

        return guarded

    async def health(self, _: Request) -> Response:
        return Response()

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in ("base", *self.adapters)]})

    async def load(self, body: dict[str, Any]) -> Response:
        if body["lora_name"] in self.adapters:
            return _error(400, f"adapter {body['lora_name']} is already loaded")
        try:
            self.adapters[body["lora_name"]] = load(Path(body["lora_path"]))
        except (EmbedftError, OSError, ValueError) as error:
            return _error(400, str(error))
        self.event("load", adapter=body["lora_name"])
        return Response("loaded")

    async def unload(self, body: dict[str, Any]) -> Response:
        if self.adapters.pop(body["lora_name"], None) is None:
            return _error(404, "no such adapter")
        self.event("unload", adapter=body["lora_name"])
        return Response("unloaded")

    async def vectors(self, body: dict[str, Any]) -> Response:
        rows = [vector(self.adapters.get(body["model"]), ids, self.dimension) for ids in body["input"]]
        return Response(vectors.packed(np.stack(rows)), media_type=vectors.MEDIA_TYPE)

    async def completions(self, body: dict[str, Any]) -> Response:
        prompt = body["prompt"]
        prompts = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], (list, str)) else [prompt]
        choices = [{"index": i, "prompt": one} for i, one in enumerate(one for one in prompts for _ in range(body.get("n") or 1))]
        return await self._generate(body, choices, chat=False)

    async def chat(self, body: dict[str, Any]) -> Response:
        choices = [{"index": i, "prompt": body["messages"]} for i in range(body.get("n") or 1)]
        return await self._generate(body, choices, chat=True)

    async def _generate(self, body: dict[str, Any], choices: list[dict[str, Any]], *, chat: bool) -> Response:
        model, count = body["model"], body.get("max_tokens") or body.get("max_completion_tokens") or 16
        self.event("generate", adapter=model, salt=body.get("cache_salt"))
        usage = {
            "prompt_tokens": 3 * len(choices),
            "completion_tokens": count * len(choices),
            "total_tokens": (3 + count) * len(choices),
        }
        if body.get("stream"):
            return StreamingResponse(self._stream(body, choices, count, usage, chat=chat), media_type="text/event-stream")
        await asyncio.sleep(self.token_latency * count)
        made: list[dict[str, Any]] = []
        for choice in choices:
            answer = text(model, choice["prompt"]) + " word" * (count - 1)
            content: dict[str, Any] = {"message": {"role": "assistant", "content": answer}} if chat else {"text": answer}
            if body.get("prompt_logprobs") is not None and not chat:
                content["prompt_logprobs"] = prompt_logprobs(self.adapters.get(model), choice["prompt"])
            made.append({"index": choice["index"], "finish_reason": "length", **content})
        kind = "chat.completion" if chat else "text_completion"
        return JSONResponse({"id": "fake", "object": kind, "created": 0, "model": model, "choices": made, "usage": usage})

    async def _stream(
        self, body: dict[str, Any], choices: list[dict[str, Any]], count: int, usage: Any, *, chat: bool
    ) -> AsyncIterator[str]:
        head = {
            "id": "fake",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 0,
            "model": body["model"],
        }
        finished = False
        self.event("stream", adapter=body["model"])
        try:
            for token in range(count):
                for choice in choices:
                    word = text(body["model"], choice["prompt"]) if token == 0 else " word"
                    part: dict[str, Any] = {"delta": {"role": "assistant", "content": word}} if chat else {"text": word}
                    last = "length" if token == count - 1 else None
                    shown = {"index": choice["index"], "finish_reason": last, **part}
                    yield f"data: {json.dumps({**head, 'choices': [shown]})}\n\n"
                await asyncio.sleep(self.token_latency)
            if (body.get("stream_options") or {}).get("include_usage"):
                yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
            finished = True
        finally:
            self.event("finished" if finished else "cancelled", adapter=body["model"])


def _error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "error", "param": None, "code": status}}, status_code=status)


def main() -> None:
    """Serve on a Unix socket until ended."""
    parser = argparse.ArgumentParser(prog="serve.engines.fake")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--task", required=True)
    arguments = parser.parse_args()
    engine = FakeEngine(key=os.environ["EMBEDFT_ENGINE_KEY"], dimension=int(os.environ.get("EMBEDFT_HIDDEN_SIZE", "32")))
    engine.event("start", task=arguments.task)
    serve(engine.app(), Path(arguments.socket), grace=2)


if __name__ == "__main__":
    main()

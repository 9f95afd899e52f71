"""A cross-encoder behind the engines' small HTTP: (query, document) pairs → scores. One thread, no adapters.

`POST /v1/score {"query", "documents"}` → {"scores", "tokens", "truncated"}: for a model of one label its sigmoid, in [0, 1].
A document is cut where the pair is longer than the model takes; the query never is.
"""

import argparse
import asyncio
import hmac
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from embedft.errors import BaseError
from embedft.lean import without_unused
from embedft.model_folder import check_whole, tokenizer_of, told
from serve.engines.settings import KEY, parse_cores

PAIRS = 32  # of one forward pass


class CrossEncoder:
    """The model of `folder`, frozen, and its tokenizer."""

    def __init__(self, folder: Path, *, max_length: int) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification

        loader: Any = AutoModelForSequenceClassification
        self.model: Any
        try:
            with told(folder):
                self.model, loading = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
            check_whole(folder, loading, pooler=True)
            self.tokenizer: Any = tokenizer_of(folder)
        except BaseError as error:
            raise SystemExit(f"{error} (a cross-encoder is a sequence classifier)") from None
        self.model.eval().requires_grad_(False)
        if torch.cuda.is_available():
            self.model.to("cuda")
        if self.model.config.num_labels != 1:
            raise SystemExit(f"{folder.name} has {self.model.config.num_labels} labels: a cross-encoder for reranking has one")
        self.max_length = max_length

    def score(self, query: str, documents: list[str]) -> dict[str, Any]:
        """One score a document, in their order."""
        import torch

        scores: list[float] = []
        tokens = truncated = 0
        for start in range(0, len(documents), PAIRS):
            chosen = documents[start : start + PAIRS]
            whole: Any = self.tokenizer([query] * len(chosen), chosen)["input_ids"]
            truncated += sum(len(ids) > self.max_length for ids in whole)
            pairs: Any = self.tokenizer(
                [query] * len(chosen), chosen, truncation="only_second", max_length=self.max_length, padding=True, return_tensors="pt"
            )
            tokens += int(pairs["attention_mask"].sum())
            with torch.inference_mode():
                logits = self.model(**pairs.to(self.model.device)).logits[:, 0].float()
            scores += logits.sigmoid().tolist()
        return {"scores": scores, "tokens": tokens, "truncated": truncated}


def create_app(encoder: CrossEncoder, *, key: str) -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    thread = ThreadPoolExecutor(1)

    async def health(_: Request) -> Response:
        return Response()

    async def score(request: Request) -> Response:
        if not hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {key}".encode()):
            return _failure(401, "not_authorized", "a valid bearer key is needed")
        body = await request.json()
        try:
            made = await asyncio.get_running_loop().run_in_executor(thread, encoder.score, body["query"], body["documents"])
        except Exception as error:  # the tokenizer refuses a query that alone is too long
            return _failure(400, "input_too_long", f"the query leaves no room for a document: {str(error).splitlines()[0][:200]}")
        return JSONResponse(made)

    def _failure(status: int, code: str, message: str) -> Response:
        return JSONResponse({"error": {"message": message, "type": "error", "param": None, "code": code}}, status)

    return Starlette(routes=[Route("/health", health), Route("/v1/score", score, methods=["POST"])])


def main() -> None:
    """Serve on a Unix socket until ended."""
    parser = argparse.ArgumentParser(prog="python -m serve.engines.cross")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--max-length", type=int)
    parser.add_argument("--cores")
    arguments = parser.parse_args()
    without_unused()
    if arguments.cores:
        os.sched_setaffinity(0, parse_cores(arguments.cores))
    from embedft.model_folder import describe
    from serve.link.engine import serve

    longest = describe(arguments.folder).max_length
    encoder = CrossEncoder(arguments.folder, max_length=min(arguments.max_length or longest, longest))
    serve(create_app(encoder, key=os.environ.pop(KEY, "")), arguments.socket, grace=10)


if __name__ == "__main__":
    main()

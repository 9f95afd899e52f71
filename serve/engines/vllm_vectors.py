"""/v1/vectors of vLLM's server (serve.engines.vectors), past its schemas and renderers: an endpoint plugin, installed by `vllm_server`.

Ids go to the engine as the input that vLLM's own routes make of them, with the pooling parameters that they would have.
"""

import uuid
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.engines.vectors import MEDIA_TYPE, PATH, VectorsRequest, packed
from serve.leaving import ClientGone, together, unless_gone


class VectorsEndpoint:
    """vLLM's EndpointPlugin."""

    name = "embedft_vectors"
    required_tasks = ("embed",)

    def attach_router(self, app: Any) -> None:
        app.router.routes.insert(0, Route(PATH, self.answer, methods=["POST"]))  # first, so as to be found at once

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        from vllm import PoolingParams

        del args
        self._engine, self._models = engine_client, state.openai_serving_models
        self._params = PoolingParams(task="embed")
        self._params.verify(engine_client.model_config)

    async def answer(self, request: Request) -> Response:
        from vllm.exceptions import VLLMValidationError

        try:
            asked = VectorsRequest.model_validate_json(await request.body())
        except ValidationError as error:
            raise VLLMValidationError(str(error)) from None
        try:
            return Response(await unless_gone(request, self._vectors(asked)), media_type=MEDIA_TYPE)
        except ClientGone:
            return Response(status_code=499)

    async def _vectors(self, asked: VectorsRequest) -> bytes:
        import torch

        adapter = self._adapter(asked.model)
        name = uuid.uuid4().hex
        rows = await together([self._one(ids, f"vectors-{name}-{place}", adapter) for place, ids in enumerate(asked.input)])
        return packed(torch.stack(rows).float().numpy())

    def _adapter(self, model: str) -> Any:
        from vllm.exceptions import VLLMNotFoundError

        if any(model == base.name for base in self._models.base_model_paths):
            return None
        adapter = self._models.lora_requests.get(model)
        if adapter is None:
            raise VLLMNotFoundError(f"The model `{model}` does not exist.")
        return adapter

    async def _one(self, ids: list[int], name: str, adapter: Any) -> Any:
        """(d,) of one text."""
        from vllm.exceptions import GenerationError
        from vllm.inputs.engine import tokens_input

        async for output in self._engine.encode(tokens_input(ids), self._params, name, lora_request=adapter):
            if output.error is not None:
                raise GenerationError(output.error.message)
            if output.finished:
                return output.outputs.data
        raise GenerationError("a text was given up without a vector")

"""The gateway's own route to an engine's vectors, the same for every engine: token ids in, float32 rows out.

OpenAI's /v1/embeddings says the same in base64 inside JSON, and vLLM's schemas take longer to read 64 texts there than the gateway
takes for all else. Knows no engine.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from embedft.errors import EngineFailed

PATH = "/v1/vectors"
MEDIA_TYPE = "application/octet-stream"


class VectorsRequest(BaseModel):
    """`input`: token ids of each text, special tokens included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    input: list[list[int]] = Field(min_length=1)


def packed(rows: NDArray[np.float32]) -> bytes:
    """(n, d) → n × d little-endian float32."""
    return np.ascontiguousarray(rows, dtype="<f4").tobytes()


def unpacked(content: bytes, count: int) -> NDArray[np.float32]:
    """What `packed` made → (count, d). EngineFailed unless there is one finite row for each input."""
    values = np.frombuffer(content, dtype="<f4") if len(content) % 4 == 0 else np.zeros(0, dtype=np.float32)
    if not len(values) or len(values) % count:
        raise EngineFailed(f"the engine gave {len(content)} bytes of vectors for {count} inputs")
    if not np.isfinite(values).all():
        raise EngineFailed("the engine gave a vector that is not finite")
    return values.reshape(count, -1)

"""What a vector is: how it is made for a base or an adapter, and its lineage. The one place where passport rules become settings.

The gateway and RAG both ask here, so that a vector from a server and one made in this process carry the same name.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedft.adapters.passport import Passport, lineage
from embedft.encode import EncodeSettings, InputType
from embedft.errors import AdapterInvalid, InputInvalid
from embedft.model_folder import BaseInfo


@dataclass(frozen=True)
class VectorKind:
    """`by_adapter` False: the base makes it. `dimensions` None keeps all components."""

    settings: EncodeSettings
    by_adapter: bool
    lineage: str
    dimensions: int | None


def vector_kind(
    info: BaseInfo,
    passport: Passport | None,
    generation: str | None,
    *,
    input_type: InputType | None,
    dimensions: int | None = None,
    max_length: int | None = None,
    name: str = "",
) -> VectorKind:
    """How a base (`passport` None) or an adapter makes vectors of `input_type`. `max_length`: the engine's own limit in tokens.
    Raises InputInvalid: input_type_required, dimensions_unsupported.
    """
    cut = _cut(info, passport, dimensions)
    length = text_length(info, passport, max_length)
    if passport is None:
        return _kind(info, None, published_settings(info, length), input_type, cut, side="both")
    if passport.pooling is None:
        raise AdapterInvalid(name or passport.name, "it is no embedding adapter: its passport names no pooling")
    settings = EncodeSettings(passport.pooling, bool(passport.normalize), length, passport.prompts)
    if passport.side == "query" and input_type is None:
        message = f"adapter {name or passport.name!r} is for queries only: say input_type query or document"
        raise InputInvalid("input_type_required", message, "input_type")
    made_by = None if passport.side == "query" and input_type == "document" else generation  # documents stay the base's
    return _kind(info, made_by, settings, input_type, cut, side=passport.side)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """(…, d) → (…, d), each of length 1: vectors are compared by their cosine, also of bases that do not normalise.

    What is so already stays as it is, bit for bit, however often it is asked for.
    """
    lengths = np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return vectors / np.where(np.abs(lengths - 1) < 1e-6, 1, lengths).astype(vectors.dtype)


def published_settings(info: BaseInfo, max_length: int) -> EncodeSettings:
    """How a base makes vectors by itself, its own prompts among it, of texts of at most `max_length` tokens."""
    return EncodeSettings(info.pooling, info.normalize, max_length, info.prompts)


def text_length(info: BaseInfo, passport: Passport | None, limit: int | None = None) -> int:
    """Tokens of a text that count: the base's as it was published, an adapter's as it was trained, within an engine's `limit`."""
    return min(passport.max_length if passport else info.max_length, info.takes(limit))


def _kind(
    info: BaseInfo, generation: str | None, settings: EncodeSettings, input_type: InputType | None, cut: int | None, *, side: str
) -> VectorKind:
    prompts = dict(settings.prompts)
    if generation is None:  # the base's vectors are the same whichever adapter they were asked through: only what shapes them counts
        side, prompt = "both", prompts.get(input_type or "", "")
        prompts = {str(input_type): prompt} if prompt else {}
    identity = lineage(
        info.fingerprint,
        generation,
        side="query" if side == "query" else "both",
        prompts=prompts,
        pooling=settings.pooling,
        max_length=settings.max_length,
        dimensions=[cut] if cut else [],
        normalize=settings.normalize,
    )
    return VectorKind(settings, generation is not None, identity, cut)


def _cut(info: BaseInfo, passport: Passport | None, dimensions: int | None) -> int | None:
    if dimensions is None or dimensions == info.hidden_size:
        return None
    trained = passport.dimensions if passport else ()
    if dimensions not in trained:
        allowed = ", ".join(map(str, sorted({*trained, info.hidden_size})))
        raise InputInvalid("dimensions_unsupported", f"dimensions {dimensions}: trained for {allowed}", "dimensions")
    return dimensions

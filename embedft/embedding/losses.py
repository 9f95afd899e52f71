"""LOSSES: one row per training objective, all of them sentence-transformers' own. Knows no data and no trainer.

Shapes: query q (b, d) and document p (b, d) of b examples; n (b, d) each of the k negatives; y (b,) scores.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from embedft.errors import MethodUnsupported

if TYPE_CHECKING:
    from torch import nn

MINI_BATCH = 32  # rows in memory at once for the cached losses; changes memory, not the result


@dataclass(frozen=True)
class Loss:
    """`takes`: pairs (negatives optional), triplets (at least one negative) or scored pairs. `options`: keywords made of `scale`."""

    name: str
    of: str
    takes: Literal["pairs", "triplets", "scored"]
    source: str
    options: Callable[[float], dict[str, Any]]
    same_as: str | None = None  # a cached loss: the loss whose number it gives

    def build(self, model: Any, *, scale: float) -> "nn.Module":
        """The loss over a SentenceTransformer. `scale` is the inverse temperature where the loss has one."""
        from sentence_transformers.sentence_transformer import losses

        return getattr(losses, self.of)(model, **self.options(scale))


def _scaled(scale: float) -> dict[str, Any]:
    return {"scale": scale}


def _cached(scale: float) -> dict[str, Any]:
    return {"scale": scale, "mini_batch_size": MINI_BATCH}


def _both_ways(scale: float) -> dict[str, Any]:
    return {"scale": scale, "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def _cosine(_: float) -> dict[str, Any]:
    from sentence_transformers.sentence_transformer.losses.triplet import TripletDistanceMetric

    return {"distance_metric": TripletDistanceMetric.COSINE, "triplet_margin": 0.2}


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        row.name: row
        for row in (
            # cross-entropy over the rows of s·cos(q, [p; n])   (b, b·(1 + k)), target i
            Loss("mnrl", "MultipleNegativesRankingLoss", "pairs", "Henderson et al. 2017, arXiv 1705.00652", _scaled),
            # the same number, in pieces of MINI_BATCH rows
            Loss("cached_mnrl", "CachedMultipleNegativesRankingLoss", "pairs", "Gao et al. 2021, arXiv 2101.06983", _cached, "mnrl"),
            # mnrl both ways: q → [p; n] and p → q
            Loss("symmetric", "MultipleNegativesRankingLoss", "pairs", "Radford et al. 2021, arXiv 2103.00020", _both_ways),
            # max(0, d(q, p) − d(q, n) + 0.2), d = 1 − cos, over (b,)
            Loss("triplet", "TripletLoss", "triplets", "Hermans et al. 2017, arXiv 1703.07737", _cosine),
            # log(1 + Σ exp(s·(cos_j − cos_i))) over pairs (i, j) with y_i > y_j
            Loss("cosent", "CoSENTLoss", "scored", "Su 2022, kexue.fm/archives/8847", _scaled),
            # cosent with the angle in complex space
            Loss("angle", "AnglELoss", "scored", "Li and Li 2023, arXiv 2309.12871", _scaled),
        )
    }
)


def loss_named(name: str) -> Loss:
    """The row called `name`; MethodUnsupported lists what there is."""
    if name not in LOSSES:
        raise MethodUnsupported(name, where="as a loss", why=f"the losses are {', '.join(LOSSES)}")
    return LOSSES[name]

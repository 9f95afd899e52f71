"""LOSSES: one row per training objective, all of them sentence-transformers' own. Knows no data and no trainer.

Shapes: query q (b, d) and document p (b, d) of b examples; n (b, d) each of the k negatives; y (b,) scores, for a loss that
distils (b, 1 + k). Any of them can be trained on the first components of the vectors as well (Matryoshka: `matryoshka`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from embedft.errors import MethodUnsupported

if TYPE_CHECKING:
    from torch import nn

MINI_BATCH = 32  # rows in memory at once for the cached losses; changes memory, not the result


@dataclass(frozen=True)
class Loss:
    """`takes`: pairs (negatives optional), triplets (at least one negative), scored pairs, or distilled: a teacher's scores.

    `options`: keywords made of `scale`. `most`: so many negatives at most. `guided`: compares with what a guide says; ours is the base.
    """

    name: str
    of: str
    takes: Literal["pairs", "triplets", "scored", "distilled"]
    source: str
    options: Callable[[float], dict[str, Any]]
    same_as: str | None = None  # a cached loss: the loss whose number it gives
    most: int | None = None
    guided: bool = False

    def build(self, model: Any, *, scale: float, dimensions: Sequence[int] = (), guide: Any = None) -> "nn.Module":
        """The loss over a SentenceTransformer. `scale` is the inverse temperature where the loss has one.

        `dimensions`: train these first components too, each with weight 1 beside the whole vector (Kusupati et al. 2022,
        arXiv 2205.13147). `guide`: a model of the same features, for a guided loss.
        """
        from sentence_transformers.sentence_transformer import losses

        loss = getattr(losses, self.of)(model, **({"guide": guide} if self.guided else {}), **self.options(scale))
        if not dimensions:
            return loss
        whole = model.get_embedding_dimension()
        return losses.MatryoshkaLoss(model, loss, matryoshka_dims=[whole, *sorted(set(dimensions), reverse=True)])


def _scaled(scale: float) -> dict[str, Any]:
    return {"scale": scale}


def _cached(scale: float) -> dict[str, Any]:
    return {"scale": scale, "mini_batch_size": MINI_BATCH}


def _both_ways(scale: float) -> dict[str, Any]:
    return {"scale": scale, "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def _cosine(_: float) -> dict[str, Any]:
    from sentence_transformers.sentence_transformer.losses.triplet import TripletDistanceMetric

    return {"distance_metric": TripletDistanceMetric.COSINE, "triplet_margin": 0.2}


def _temperature(scale: float) -> dict[str, Any]:
    return {"temperature": 1 / scale}


def _scaled_cosine(scale: float) -> dict[str, Any]:
    """A teacher's scores are rarely cosines: ours are stretched by `scale` to meet them."""
    from sentence_transformers.util import pairwise_cos_sim

    def similarity(one: Any, other: Any) -> Any:
        return scale * pairwise_cos_sim(one, other)

    return {"similarity_fct": similarity}


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
            # mnrl over queries and documents alike; where the guide puts a candidate above p, it is no negative
            Loss("gist", "GISTEmbedLoss", "pairs", "Solatorio 2024, arXiv 2402.16829", _temperature, most=1, guided=True),
            # max(0, d(q, p) − d(q, n) + 0.2), d = 1 − cos, over (b,)
            Loss("triplet", "TripletLoss", "triplets", "Hermans et al. 2017, arXiv 1703.07737", _cosine),
            # log(1 + Σ exp(s·(cos_j − cos_i))) over pairs (i, j) with y_i > y_j
            Loss("cosent", "CoSENTLoss", "scored", "Su 2022, kexue.fm/archives/8847", _scaled),
            # cosent with the angle in complex space
            Loss("angle", "AnglELoss", "scored", "Li and Li 2023, arXiv 2309.12871", _scaled),
            # mean squared error of s·cos(q, p) − s·cos(q, n) against y_p − y_n   (b, k)
            Loss("margin_mse", "MarginMSELoss", "distilled", "Hofstätter et al. 2020, arXiv 2010.02666", _scaled_cosine),
            # KL divergence of softmax(s·cos(q, [p; n])) from softmax(y)   (b, 1 + k)
            Loss("kl", "DistillKLDivLoss", "distilled", "Lin et al. 2020, arXiv 2010.11386", _scaled_cosine),
        )
    }
)


def loss_named(name: str) -> Loss:
    """The row called `name`; MethodUnsupported lists what there is."""
    if name not in LOSSES:
        raise MethodUnsupported(name, where="as a loss", why=f"the losses are {', '.join(LOSSES)}")
    return LOSSES[name]

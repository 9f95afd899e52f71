"""A linear map from one lineage's vectors to another's, so that an old index answers a new adapter: always with loss, which is measured.

Ridge regression on documents embedded by both; the recall is measured on texts that the fit has not seen.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedft.errors import UsageError
from embedft.rag.engines import Rows

FEWEST = 50
DEPTH = 10


@dataclass(frozen=True)
class LinearMap:
    """`weights` (d of source, d of target). `recall`: of the true 10 nearest, the share that a mapped query finds."""

    source: str
    target: str
    weights: Rows
    recall: float
    documents: int
    queries: int

    def apply(self, vector: Rows) -> Rows:
        """(d_source,) → (d_target,), of length 1."""
        mapped = vector @ self.weights
        return mapped / max(float(np.linalg.norm(mapped)), 1e-12)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".partial.npz")
        numbers = np.array([self.recall, self.documents, self.queries])
        np.savez(staged, weights=self.weights, numbers=numbers, names=np.array([self.source, self.target]))
        staged.replace(path)

    @classmethod
    def load(cls, path: Path) -> "LinearMap":
        with np.load(path, allow_pickle=False) as file:
            source, target = (str(name) for name in file["names"])
            recall, documents, queries = file["numbers"]
            return cls(source, target, file["weights"], float(recall), int(documents), int(queries))


def enough(documents: int, queries: int) -> None:
    """UsageError where there are too few to fit or measure anything."""
    if documents < FEWEST or not queries:
        there = f"there are {documents} to fit it on and {queries} to measure it with"
        raise UsageError(f"a linear map needs at least {FEWEST} documents and a query to measure it with: {there}; index again")


def fit(new: Rows, old: Rows, queries: Rows, *, source: str, target: str, ridge: float = 1e-3, seed: int = 7) -> LinearMap:
    """new (n, d1), old (n, d2): the same documents by both lineages; queries (m, d1) by the new one, none of them a fitted text.

    The map is fitted on four fifths of the documents; recall is measured against the new lineage's own search over all n.
    Raises UsageError where there are too few documents to fit or measure anything.
    """
    count = len(new)
    enough(count, len(queries))
    fitted = np.random.default_rng(seed).permutation(count)[: count * 4 // 5]
    x, y = new[fitted].astype(np.float64), old[fitted].astype(np.float64)
    gram = x.T @ x
    weights = np.linalg.solve(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y).astype(np.float32)
    k = min(DEPTH, count)
    true = np.argsort(-(queries @ new.T), axis=1, kind="stable")[:, :k]
    mapped = queries @ weights
    mapped /= np.maximum(np.linalg.norm(mapped, axis=1, keepdims=True), 1e-12)
    found = np.argsort(-(mapped @ old.T), axis=1, kind="stable")[:, :k]
    recall = float(np.mean([len(set(a) & set(b)) / k for a, b in zip(true.tolist(), found.tolist(), strict=True)]))
    return LinearMap(source, target, weights, recall, count, len(queries))

"""Fitting a linear map for an index: what its documents look like to another adapter, from a sample of them."""

import numpy as np

from embedft.rag.engines import Embedder
from embedft.rag.index import VectorIndex
from embedft.rag.linear_map import LinearMap, fit

SAMPLE, QUERIES = 3000, 300


def fit_map(
    index: VectorIndex,
    embedder: Embedder,
    adapter: str | None,
    *,
    queries: list[str] | None = None,
    sample: int = SAMPLE,
    seed: int = 7,
) -> LinearMap:
    """Embed a sample of the index's chunks with `adapter`, fit new → old, measure it, and keep it in the index's folder.

    `queries`: real questions to measure with; without them, texts of chunks outside the sample (of it, in a small index) stand in,
    embedded as queries. Raises UsageError where the index is too small.
    """
    rows = np.random.default_rng(seed).permutation(index.rows())
    chosen, rest = rows[:sample], rows[sample : sample + QUERIES]
    chunks = {hit.row: hit.chunk for hit in index.found([(int(row), 0.0) for row in rows[: sample + QUERIES]])}
    texts = [chunks[int(row)].embedded or chunks[int(row)].text for row in chosen]
    asked = queries or [chunks[int(row)].text for row in (rest if len(rest) else chosen[-QUERIES:])]
    new = embedder.embed(texts, input_type="document", adapter=adapter) if texts else None
    if new is None:
        return fit(np.zeros((0, 1), np.float32), np.zeros((0, 1), np.float32), np.zeros((0, 1), np.float32), source="", target="")
    wanted = embedder.embed(asked, input_type="query", adapter=adapter)
    made = fit(new.rows, index.vectors(chosen), wanted.rows, source=new.lineage, target=index.lineage, seed=seed)
    made.save(index.folder / "maps" / f"{made.source[:32]}.npz")
    return made

"""Fitting a linear map for an index: what its documents look like to another adapter, from a sample of them."""

import numpy as np

from embedft.rag.engines import Embedder
from embedft.rag.index import VectorIndex
from embedft.rag.linear_map import LinearMap, enough, fit

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

    `queries`: real questions to measure with; without them up to a fifth of the chunks is held back from the sample, and their texts
    stand in, embedded as queries. Raises UsageError where the index is too small.
    """
    index = index.snapshot()
    rows = np.random.default_rng(seed).permutation(index.rows())
    held = 0 if queries else min(QUERIES, len(rows) // 5)
    chosen = rows[held : held + sample]
    chunks = {hit.row: hit.chunk for hit in index.found([(int(row), 0.0) for row in rows[: held + sample]])}
    texts = [chunks[int(row)].whole for row in chosen]
    seen = set(texts)  # a text may stand in two documents
    asked = queries or [chunk.text for chunk in (chunks[int(row)] for row in rows[:held]) if chunk.whole not in seen]
    enough(len(texts), len(asked))
    new = embedder.embed(texts, input_type="document", adapter=adapter)
    wanted = embedder.embed(asked, input_type="query", adapter=adapter)
    made = fit(new.rows, index.vectors(chosen), wanted.rows, source=new.lineage, target=index.lineage, seed=seed)
    made.save(index.folder / "maps" / f"{made.source[:32]}.npz")
    return made

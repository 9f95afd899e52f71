"""What a method that begins from data is shown of it. Knows no method."""

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from embedft.encode import EncodeSettings, TextPreparer, pad

if TYPE_CHECKING:
    from embedft.base import Base
    from embedft.embedding.data import Examples

BATCHES = 8


def start_batches(examples: "Examples", base: "Base", settings: EncodeSettings, *, batch: int, seed: int) -> Iterator[dict[str, Any]]:
    """A few padded batches of a seeded shuffle, queries and documents in turn, tokenised as in training."""
    preparer = TextPreparer(base.folder, settings)
    rows = list(examples.rows)
    random.Random(seed).shuffle(rows)
    for number, first in enumerate(range(0, min(len(rows), BATCHES * batch), batch)):
        side = "document" if number % 2 else "query"
        texts = [getattr(row, side) for row in rows[first : first + batch]]
        input_ids, mask = pad(preparer.prepare(texts, side).ids)
        yield {"input_ids": input_ids, "attention_mask": mask}

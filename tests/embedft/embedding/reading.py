"""What the tests of data read, and what they say of a report on it."""

from typing import Any

import pytest

from embedft.embedding.check import CheckReport, Finding
from embedft.embedding.data import Examples, RetrievalSet, load_data
from embedft.errors import DataError
from embedft.recipe import EmbeddingData, EmbeddingEval
from tests.fixtures_embedding import planted_rows

ROWS = planted_rows(40)


def load(source: str, *, eval: str | None = None, scored: bool = False, **caps: Any) -> tuple[Examples, RetrievalSet]:
    return load_data(EmbeddingData(train=source, eval=eval), EmbeddingEval(**caps), scored=scored)


def problems(source: str, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        load(source, **options)
    return caught.value.problems


def found(report: CheckReport, kind: str) -> Finding:
    matching = [finding for finding in report.findings if finding.kind == kind]
    assert len(matching) == 1, [finding.kind for finding in report.findings]
    return matching[0]

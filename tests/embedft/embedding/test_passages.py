"""A bare corpus: what its passages are, with their titles, ids and sentences."""

import os
from pathlib import Path

import pytest

from embedft.embedding.passages import read_passages
from embedft.embedding.synth import Synth, synthesize
from embedft.errors import DataError
from tests.embedft.embedding.test_synth import FACTS
from tests.fixtures_embedding import write_rows


def test_passages_are_told_apart_by_their_ids_and_what_is_no_text_is_named(tmp_path: Path) -> None:
    texts = [{"_id": None, "title": title, "text": text} for title, text in FACTS.items()]
    assert [p.title for p in read_passages(write_rows(tmp_path / "none.jsonl", texts))] == list(FACTS)
    wrong = [{"_id": "a", "text": "one"}, {"_id": "a", "text": "two"}, {"_id": "b", "title": 3, "text": "three"}]
    with pytest.raises(DataError) as caught:
        read_passages(write_rows(tmp_path / "twice.jsonl", wrong))
    assert caught.value.problems == [
        "twice.jsonl:2: _id 'a' occurs twice; expected distinct ids",
        "twice.jsonl:3: title is a int; expected text",
    ]


def test_a_file_without_texts_is_told_once_with_the_columns_it_has(tmp_path: Path) -> None:
    rows = [{"id": number, "Question": "why"} for number in range(50)]
    with pytest.raises(DataError) as caught:
        read_passages(write_rows(tmp_path / "odd.jsonl", [*rows, {"text": 7}]))
    assert caught.value.problems == [
        "odd.jsonl:1: no text among id, Question; expected columns text and, where there is one, title",
        "odd.jsonl:51: text is a int; expected text",
    ]


@pytest.mark.parametrize(
    ("text", "queries"),
    [
        ("Котёл греет воду для всего дома. Зимой его надо заранее спустить дважды.", 2),
        ("锅炉为整个房子加热水。冬天之前要放气。", 2),
        ("A boiler (e.g. an old one) heats all water. Bleed it well before each winter.", 2),
    ],
)
def test_sentences_end_where_their_script_ends_them(tmp_path: Path, text: str, queries: int) -> None:
    source = write_rows(tmp_path / "c.jsonl", [{"text": text}])
    assert synthesize(source, tmp_path / "out.jsonl", synth=Synth(count=9), base=None).made == queries


def test_headings_of_markdown_files_are_titles(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Install the tool\nRun it.\n\n## Configure it\nWrite a file.\n")
    (tmp_path / "docs" / "b.txt").write_text("Plain text here.")
    for folder in (".git", "node_modules"):
        (tmp_path / "docs" / folder).mkdir()
        (tmp_path / "docs" / folder / "README.md").write_text("# Nobody's\nNot meant.")
    assert [(p.title, p.text) for p in read_passages(str(tmp_path / "docs"))] == [
        ("Install the tool", "Run it."),
        ("Configure it", "Write a file."),
        ("", "Plain text here."),
    ]


def test_a_text_file_is_read_by_itself_too_and_with_its_ending_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "README.MD").write_text("# Install the tool\nRun it.\n")
    for source in (tmp_path, tmp_path / "README.MD"):
        (passage,) = read_passages(str(source))
        assert (passage.identifier, passage.title, passage.text) == ("README.MD#0", "Install the tool", "Run it.")


def test_code_in_markdown_has_no_headings_and_a_byte_order_mark_hides_none(tmp_path: Path) -> None:
    text = "\ufeff# Install the tool\nRun it.\n\n```bash\n# as root\nmake\n```\n\n## Configure it\nWrite a file.\n"
    (tmp_path / os.fsdecode(b"caf\xe9.md")).write_text(text)
    found = read_passages(str(tmp_path))
    assert [p.title for p in found] == ["Install the tool", "Configure it"]
    assert "# as root\nmake" in found[0].text
    assert found[0].identifier == r"caf\xe9.md#0"  # a name that is not UTF-8


def test_files_that_are_not_utf_8_are_named_all_at_once(tmp_path: Path) -> None:
    for name, content in (("a.md", b"# Fine\nText."), ("b.txt", "naïve".encode("latin-1")), ("c.md", b"\xff")):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_passages(str(tmp_path))
    assert caught.value.problems == ["b.txt: not UTF-8 (byte 2): convert it", "c.md: not UTF-8 (byte 0): convert it"]

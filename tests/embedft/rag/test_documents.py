"""What is read of HTML and Python sources, and what a file that cannot be read leaves behind: its name and the reason."""

import codecs
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedft.errors import DocumentsUnusable, UsageError
from embedft.rag.build import usable
from embedft.rag.chunks import Chunking, chunks_of
from embedft.rag.documents import Document, read_documents


def html(folder: Path, text: str) -> str:
    (folder / "page.html").write_text(text)
    return read_documents(folder / "page.html").documents[0].text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>Wash <b>it</b> now, <i>then</i>\n<b>rest</b>.</p>", "Wash it now, then rest.\n"),
        ("<p> Wash  <b> it </b> now</p>\n <p> Rest</p>", "Wash it now\n\nRest\n"),
        ("<table><tr><th>Rice</th><th>Water</th></tr>\n<tr><td>1</td><td>2</td></tr></table>", "Rice Water\n\n1 2\n"),
        ("<p>a</p><pre>if x:\n    y</pre>", "a\n\n```\nif x:\n    y\n```\n"),
    ],
)
def test_words_of_html_stay_apart_where_a_browser_shows_them_apart(tmp_path: Path, page: str, text: str) -> None:
    assert html(tmp_path, page) == text


def test_a_comment_in_the_code_of_a_page_is_no_heading(tmp_path: Path) -> None:
    text = html(tmp_path, "<h1>Guide</h1><pre><code>\n# as root\nmake\n</code></pre><h2>Use</h2><p>Call it.</p>")
    made = list(chunks_of([Document("page.html", text, "html")], Chunking()))
    assert [(chunk.metadata.get("section"), "as root" in chunk.text) for chunk in made] == [(None, True), ("Guide", False)]


def test_names_that_are_not_utf_8_are_indexed_apart(tmp_path: Path) -> None:
    for name in (b"caf\xe9.md", b"caf\xe8.md"):
        (tmp_path / os.fsdecode(name)).write_text("Coffee.")
    names = [document.id for document in read_documents(tmp_path).documents]
    assert sorted(names) == [r"caf\xe8.md", r"caf\xe9.md"]
    assert all(name.encode() for name in names)


@pytest.mark.parametrize("close", ["</head>", ""])
def test_a_head_that_is_never_closed_hides_its_title_and_nothing_else(tmp_path: Path, close: str) -> None:
    page = f"<head><title>x</title><style>y{{}}</style>{close}<body><h1>Rice</h1><p>Wash it."
    assert html(tmp_path, page) == "# Rice\n\nWash it.\n"


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_a_text_is_the_same_whichever_system_wrote_its_line_ends(tmp_path: Path, end: str) -> None:
    text = "# Tea\n\nBoil it.\n\n## Green\n\nEighty degrees.\n"
    (tmp_path / "here.md").write_text(text)
    (tmp_path / "there.md").write_bytes(text.replace("\n", end).encode())
    made = list(chunks_of(read_documents(tmp_path).documents, Chunking()))
    here, there = ([(chunk.text, chunk.metadata) for chunk in made if chunk.document == name] for name in ("here.md", "there.md"))
    assert here == there
    assert here[1][1] == {"section": "Tea"}


def test_links_that_lead_nowhere_and_out_of_the_folder_are_named_and_those_within_it_are_not(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    for name in ("docs/green", "docs/.old", "shared"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "tea.md").write_text("Tea.")
    for name, target in (
        ("shared", tmp_path / "shared"),
        ("again", docs / "green"),
        ("old", docs / ".old"),
        ("gone.md", docs / "none.md"),
        ("loop.md", docs / "loop.md"),
    ):
        (docs / name).symlink_to(target)
    os.mkfifo(docs / "pipe.txt")
    reading = read_documents(docs)
    assert [document.id for document in reading.documents] == ["green/tea.md"]
    assert reading.skipped == (
        "gone.md: a link that leads to no file",
        "loop.md: a link that leads to no file",
        "old: a link to a folder that is not read from here",
        "pipe.txt: no plain file",
        "shared: a link to a folder that is not read from here",
    )


def python(text: str, *, size: int = 180) -> dict[str | None, str]:
    made = chunks_of([Document("code.py", text, "python")], Chunking(size=size, overlap=0))
    return {chunk.metadata.get("section"): chunk.text for chunk in made}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_definitions_begin_where_python_says_even_after_characters_that_only_text_takes_for_line_ends(end: str) -> None:
    source = [
        "import os",
        "\x0c",
        'NOTE = "a\u2028b\x0bc"',
        "def boil(water):",
        "    return water",
        "",
        "@cached",
        "def cool():",
        "    pass",
    ]
    made = python(end.join(source) + end)
    assert made["def boil"].split() == ["def", "boil(water):", "return", "water"]
    assert made["def cool"].split() == ["@cached", "def", "cool():", "pass"]
    assert "NOTE" in made[None]


POT = '''class Pot:
    """Holds water."""

    size = 3

    def boil(self):
        return self.size * 100

    class Lid:
        def lift(self):
            return "steam"

    after = 4
'''


def test_a_class_that_fits_is_one_chunk_and_of_a_longer_one_each_method_is() -> None:
    assert set(python(POT)) == {"class Pot"}
    made = python(POT, size=20)
    assert set(made) == {"class Pot", "class Pot / def boil", "class Pot / class Lid"}
    assert made["class Pot / def boil"].split() == ["def", "boil(self):", "return", "self.size", "*", "100"]
    together = " ".join(chunk.text for chunk in chunks_of([Document("c", POT, "python")], Chunking(size=20, overlap=0))).split()
    assert sorted(together) == sorted(POT.split())  # nothing is lost and nothing is there twice


def test_chinese_is_cut_between_sentences_and_no_longer_than_what_is_read() -> None:
    text = "机器学习是人工智能的一个分支。" * 40
    made = [chunk.text for chunk in chunks_of([Document("c", text, "text")], Chunking(size=40, overlap=0))]
    assert "".join(made) == text
    assert {len(piece) for piece in made} == {30}  # two sentences; a word-piece tokenizer takes each character for a token


def test_words_of_other_alphabets_count_as_the_several_tokens_that_they_are() -> None:
    def longest(word: str) -> int:
        text = " ".join([word] * 200)
        return max(len(chunk.text.split()) for chunk in chunks_of([Document("t", text, "text")], Chunking(size=40, overlap=0)))

    assert longest("letter") == 40
    assert longest("письмо") == longest("γράμμα") == 20


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that anybody may enter, for a process whose rights are anybody's while the test runs."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def anybody() -> Iterator[None]:
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)  # root may read what nobody may
    try:
        yield
    finally:
        os.seteuid(own)


def test_a_file_or_folder_that_may_not_be_read_is_named_and_the_rest_is_read(unprivileged: Path) -> None:
    for name in ("open.md", "closed.md", "closed/inside.md", "listed/inside.md"):
        (unprivileged / name).parent.mkdir(exist_ok=True)
        (unprivileged / name).write_text("# Tea\n")
    for name, mode in (("closed.md", 0), ("closed", 0), ("listed", 0o444)):
        (unprivileged / name).chmod(mode)
    codecs.lookup("utf-8-sig")  # whoever may not read Python's own files cannot load it, and then it stays unknown
    with anybody():
        reading = read_documents(unprivileged)
        with pytest.raises(DocumentsUnusable, match=r"inside\.md.*Permission denied"):
            read_documents(unprivileged / "listed" / "inside.md")
    assert [document.id for document in reading.documents] == ["open.md"]
    assert reading.skipped == tuple(
        f"{name}: it cannot be read (Permission denied)" for name in ("closed.md", "closed", "listed/inside.md")
    )
    for name in ("closed", "listed"):
        (unprivileged / name).chmod(0o755)


def test_a_place_that_nothing_can_be_written_to_is_refused_before_the_work(unprivileged: Path) -> None:
    usable(unprivileged / "new")
    (unprivileged / "new").chmod(0o555)
    for folder in (unprivileged / "new", unprivileged / "new" / "below"):
        with anybody(), pytest.raises(UsageError, match="Permission denied"):
            usable(folder)

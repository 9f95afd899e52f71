"""From files to an index: what is read, what is refused and why, what is embedded again, and how a build goes on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pypdf
import pytest

from embedft.errors import DocumentsUnusable, EngineBusy, EngineFailed, IndexInvalid
from embedft.rag.build import build_index
from embedft.rag.chunks import Chunking, chunks_of, sentences
from embedft.rag.documents import Document, read_documents
from embedft.rag.engines import Labelled, Vectors
from embedft.rag.index import VectorIndex
from embedft.rag.remote import RemoteEngine
from embedft.rag.rows import Chunk
from tests.serve.world import Server


class Counting:
    """A real engine whose texts are counted; it fails after `left` batches, as one that is killed does."""

    def __init__(self, url: str, *, left: int | None = None, adapters: Sequence[str] = ()) -> None:
        self.engine, self.left, self.texts = RemoteEngine(url), left, list[str]()
        self.adapters = list(adapters)

    def embed(self, texts: Sequence[str], **options: Any) -> Vectors:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise EngineFailed("gone")
        if self.adapters:
            options["adapter"] = self.adapters.pop(0)
        self.texts += texts
        return self.engine.embed(texts, **options)

    async def aembed(self, texts: Sequence[str], **options: Any) -> Vectors:
        return await self.engine.aembed(texts, **options)

    def document_lineage(self, adapter: str | None) -> tuple[str, str]:
        return self.engine.document_lineage(adapter)


def chunks(count: int, *, changed: int = 0) -> list[Chunk]:
    return [Chunk(f"d#{i}", "d", f"text {i}{' new' if i < changed else ''}") for i in range(count)]


def test_only_changed_chunks_are_embedded_again(tmp_path: Path, server: Server) -> None:
    engine = Counting(server.url)
    first = build_index(tmp_path / "i", chunks(40), engine, adapter="a")
    assert (first.embedded, first.reused) == (40, 0)
    engine.texts.clear()
    second = build_index(tmp_path / "i", chunks(38, changed=3), engine, adapter="a")
    assert sorted(engine.texts) == ["text 0 new", "text 1 new", "text 2 new"]
    assert (second.embedded, second.reused, second.chunks) == (3, 35, 38)
    index = VectorIndex.open(tmp_path / "i", verify=True)
    for text, identity in (("text 1 new", "d#1"), ("text 30", "d#30")):
        query = Labelled.of(engine.embed([text], input_type="query", adapter="a"))[0]
        assert index.search(query, 1)[0].chunk.id == identity
        assert index.search(query, 1)[0].score == pytest.approx(1.0, abs=1e-5)


def test_another_adapter_is_embedded_from_the_start_and_the_old_index_serves_until_then(tmp_path: Path, server: Server) -> None:
    build_index(tmp_path / "i", chunks(10), RemoteEngine(server.url), adapter="a")
    reader = VectorIndex.open(tmp_path / "i")
    report = build_index(tmp_path / "i", chunks(10), RemoteEngine(server.url), adapter="b")
    assert (report.embedded, report.reused) == (10, 0)
    query = Labelled.of(RemoteEngine(server.url).embed(["text 4"], input_type="query", adapter="a"))[0]
    assert reader.search(query, 1)[0].chunk.id == "d#4"
    assert VectorIndex.open(tmp_path / "i").made_by.startswith("b@")


def test_a_damaged_index_is_made_anew_and_nothing_of_it_is_used(tmp_path: Path, server: Server) -> None:
    build_index(tmp_path / "i", chunks(10), RemoteEngine(server.url), adapter="a")
    path = next((tmp_path / "i" / "versions").iterdir()) / "vectors.faiss"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0xFF
    path.write_bytes(content)
    report = build_index(tmp_path / "i", chunks(10), RemoteEngine(server.url), adapter="a")
    assert (report.embedded, report.reused, report.version[:6]) == (10, 0, "000002")
    assert len(VectorIndex.open(tmp_path / "i", verify=True)) == 10
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("not an index")
    with pytest.raises(IndexInvalid, match="no index of embedft"):
        build_index(tmp_path / "other", chunks(10), RemoteEngine(server.url), adapter="a")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]


def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedft.rag.build.BATCH", 8)
    build_index(tmp_path / "i", chunks(5), RemoteEngine(server.url), adapter="a")
    dying = Counting(server.url, left=3)
    with pytest.raises(EngineFailed):
        build_index(tmp_path / "i", chunks(45), dying, adapter="a")
    assert len(VectorIndex.open(tmp_path / "i")) == 5
    engine = Counting(server.url)
    report = build_index(tmp_path / "i", chunks(45), engine, adapter="a")
    assert len(engine.texts) == report.embedded == 45 - 5 - 24
    assert len(VectorIndex.open(tmp_path / "i")) == 45
    assert not list((tmp_path / "i" / "work").iterdir())


def test_the_first_build_goes_on_too_and_another_adapters_leftovers_go_with_the_version_that_is_published(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedft.rag.build.BATCH", 8)
    for adapter in ("a", "b"):
        with pytest.raises(EngineFailed):
            build_index(tmp_path / "i", chunks(20), Counting(server.url, left=1), adapter=adapter)
    assert len(list((tmp_path / "i" / "work").iterdir())) == 2
    assert build_index(tmp_path / "i", chunks(20), RemoteEngine(server.url), adapter="a").embedded == 12
    assert not list((tmp_path / "i" / "work").iterdir())


class Meanwhile(Counting):
    """While it embeds for the first time, `then` happens."""

    def __init__(self, url: str, then: Callable[[], object]) -> None:
        super().__init__(url)
        self.then: Callable[[], object] | None = then

    def embed(self, texts: Sequence[str], **options: Any) -> Vectors:
        then, self.then = self.then, None
        if then:
            then()
        return super().embed(texts, **options)


def test_a_version_published_during_a_build_is_not_replaced_and_nothing_is_embedded_twice(tmp_path: Path, server: Server) -> None:
    build_index(tmp_path / "i", chunks(10), RemoteEngine(server.url), adapter="a")

    def publish() -> None:
        index = VectorIndex.open(tmp_path / "i")
        index.delete(ids=["d#1"])
        index.save()

    with pytest.raises(IndexInvalid, match="another process changed it"):
        build_index(tmp_path / "i", chunks(15), Meanwhile(server.url, publish), adapter="a")
    assert len(VectorIndex.open(tmp_path / "i")) == 9
    assert build_index(tmp_path / "i", chunks(15), RemoteEngine(server.url), adapter="a").embedded == 1  # what was deleted meanwhile


def test_two_builds_of_one_folder_do_not_run_at_once(tmp_path: Path, server: Server) -> None:
    def second() -> None:
        with pytest.raises(EngineBusy, match="another process is indexing"):
            build_index(tmp_path / "i", chunks(3), RemoteEngine(server.url), adapter="b")

    assert build_index(tmp_path / "i", chunks(3), Meanwhile(server.url, second), adapter="a").chunks == 3


def test_an_adapter_replaced_in_the_middle_never_mixes_vectors(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedft.rag.build.BATCH", 8)
    with pytest.raises(EngineBusy, match="replaced"):
        build_index(tmp_path / "i", chunks(20), Counting(server.url, adapters=["a", "b"]), adapter="a")
    assert not (tmp_path / "i" / "current").exists()


def test_markdown_html_python_and_text_become_chunks_with_their_sections(docs: Path) -> None:
    (docs / "page.html").write_text(
        "<html><head><title>no</title><style>x{}</style></head><body>"
        "<h1>Rice</h1><p>Wash it &amp; rest.</p><script>bad()</script></body></html>"
    )
    (docs / "code.py").write_text("import os\n\n\ndef boil(water):\n    '''Heat it.'''\n    return water\n\n\nclass Pot:\n    size = 3\n")
    reading = read_documents(docs)
    made = {chunk.id: chunk for chunk in chunks_of(reading.documents, Chunking())}
    assert [document.id for document in reading.documents] == ["bread.txt", "code.py", "page.html", "tea.md"]
    black = next(chunk for chunk in made.values() if "boiling" in chunk.text)
    assert (black.document, black.metadata["section"]) == ("tea.md", "Tea")
    assert (black.embedded or "").startswith("Tea\n")
    page = " ".join(chunk.text for chunk in made.values() if chunk.document == "page.html")
    assert "Wash it & rest." in page
    assert "bad" not in page
    assert {chunk.metadata.get("section") for chunk in made.values() if chunk.document == "code.py"} == {None, "def boil", "class Pot"}


def test_long_texts_are_cut_into_overlapping_chunks_that_lose_nothing() -> None:
    text = " ".join(f"This is sentence number {i}." for i in range(300))
    made = [chunk.text for chunk in chunks_of([Document("d", text, "text")], Chunking(size=64, overlap=16))]
    assert len(made) > 20
    assert all(f"sentence number {i}." in " ".join(made) for i in range(300))
    assert "".join(sentences(text)) == text


def test_unreadable_files_are_named_and_the_rest_is_read(docs: Path, tmp_path: Path) -> None:
    (docs / "binary.txt").write_bytes(b"abc\0def")
    (docs / "latin.txt").write_bytes("über".encode("latin-1"))
    (docs / "empty.md").write_text(" \n")
    (docs / "big.md").write_text("x" * 3000)
    (docs / "paper.pdf").write_bytes(b"%PDF-1.4 broken")
    (tmp_path / "secret.md").write_text("secret")
    (docs / "link.md").symlink_to(tmp_path / "secret.md")
    (docs / "image.png").write_bytes(b"\x89PNG")
    reading = read_documents(docs, max_bytes=2000)
    assert [document.id for document in reading.documents] == ["bread.txt", "tea.md"]
    assert reading.other == 1
    reasons = dict(line.split(": ", 1) for line in reading.skipped)
    assert "binary" in reasons["binary.txt"]
    assert "UTF-8" in reasons["latin.txt"]
    assert "no text" in reasons["empty.md"]
    assert "--max-mib" in reasons["big.md"]
    assert "out of the folder" in reasons["link.md"]
    assert "PDF" in reasons["paper.pdf"]


def test_nothing_to_index_is_an_error(tmp_path: Path, server: Server) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DocumentsUnusable, match="no document in it"):
        read_documents(tmp_path / "empty")
    with pytest.raises(DocumentsUnusable, match="no such file"):
        read_documents(tmp_path / "none")
    (tmp_path / "x.docx").write_bytes(b"PK")
    with pytest.raises(DocumentsUnusable, match=r"'.docx' are not read"):
        read_documents(tmp_path / "x.docx")
    with pytest.raises(DocumentsUnusable, match="no text"):
        build_index(tmp_path / "i", [], RemoteEngine(server.url), adapter="a")


def pdf(path: Path, text: str, *, characters: str = "") -> Path:
    """One page with one line of text; `characters`: lines of what its font's table says that its codes stand for, all in hexadecimal."""
    table = f"begincmap\n1 begincodespacerange\n<00> <FF>\nendcodespacerange\n9 beginbfchar\n{characters}\nendbfchar\nendcmap\n".encode()
    stream = f"BT /F1 18 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 200] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /ToUnicode 6 0 R >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(table), table),
    ]
    content, places = b"%PDF-1.4\n", list[int]()
    for number, one in enumerate(objects, start=1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, one)
    cross = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer\n<< /Size 7 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(content)
    path.write_bytes(content + b"xref\n0 7\n0000000000 65535 f \n" + cross + trailer)
    return path


def locked_pdf(source: Path, path: Path, *, user: str) -> None:
    writer = pypdf.PdfWriter(clone_from=source)
    writer.encrypt(user, "the owner's", algorithm="AES-256")
    writer.write(path)


def test_pdfs_are_read_unless_a_password_scan_or_damage_keeps_the_text_from_us(tmp_path: Path) -> None:
    source = pdf(tmp_path / "open.pdf", "Tea wants water.")
    locked_pdf(source, tmp_path / "closed.pdf", user="secret")
    locked_pdf(source, tmp_path / "owned.pdf", user="")  # anybody may read it
    (tmp_path / "cut.pdf").write_bytes(source.read_bytes()[:200])
    blank = pypdf.PdfWriter()
    blank.add_blank_page(100, 100)
    blank.write(tmp_path / "scan.pdf")
    reading = read_documents(tmp_path)
    assert {document.id: document.text.strip() for document in reading.documents} == dict.fromkeys(
        ("open.pdf", "owned.pdf"), "Tea wants water."
    )
    reasons = dict(line.split(": ", 1) for line in reading.skipped)
    assert reasons["closed.pdf"] == "the PDF is encrypted: save it without a password"
    assert "damaged" in reasons["cut.pdf"]
    assert "OCR" in reasons["scan.pdf"]


def test_half_a_character_of_a_pdf_is_none_and_two_halves_are_one(tmp_path: Path, server: Server) -> None:
    pdf(tmp_path / "odd.pdf", "Tea X wants Y.", characters="<58> <D835>\n<59> <D83DDE00>")
    chunks = [Chunk(document.id, document.id, document.text) for document in read_documents(tmp_path).documents]
    assert [chunk.text for chunk in chunks] == ["Tea \ufffd wants \U0001f600."]
    assert build_index(tmp_path / "i", chunks, RemoteEngine(server.url), adapter="a").chunks == 1


def test_a_document_of_100_mb_is_refused_unread_and_read_where_it_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    with path.open("wb") as file:
        file.truncate(100 << 20)  # sparse: refused by its size, before a byte is read
    with pytest.raises(DocumentsUnusable, match=r"big.txt: 100 MiB, more than 32: split it, or allow more with --max-mib"):
        read_documents(tmp_path)
    with pytest.raises(DocumentsUnusable, match="binary"):
        read_documents(tmp_path, max_bytes=200 << 20)

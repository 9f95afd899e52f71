"""Queries for a bare corpus: the same every time, found again, never leaking into their passage, and resumable against a real server."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from embedft.cli import main
from embedft.embedding.passages import read_passages
from embedft.embedding.synth import Synth, synthesize
from embedft.errors import DataError, EngineFailed, UsageError
from embedft.records import read_records
from tests.fixtures_embedding import write_rows

FACTS = {
    "Boilers": "A boiler heats water for the whole house. Bleed it before the winter. Pressure should stay between one and two bar.",
    "Trams and rails": "Trams run on rails set into the street. Their wheels wear the outer rail. Sand is spread when leaves fall.",
    "Violin care": "A violin dislikes dry air in heated rooms. Loosen the bow after practice. New strings need days to settle.",
    "Glacier flow": "Ice deforms slowly under its own weight. The middle of a glacier moves fastest. Crevasses open where it is steep.",
}


def corpus(folder: Path) -> str:
    return write_rows(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": t, "text": x} for i, (t, x) in enumerate(FACTS.items())])


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Server:
    """A chat endpoint that asks about the passage's title, or says `said`; `broken`: the number of the first request that it refuses."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.broken: int | None = None
        self.status = 400
        self.said: str | None = None
        self.wait: str | None = None
        self.longest: int | None = None  # characters of a prompt
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
                if server.longest is not None and len(body["messages"][0]["content"]) > server.longest:
                    self.send_response(400)
                    self.end_headers()
                    self.wfile.write(b'{"error": {"code": "context_length_exceeded"}}')
                    return
                failed = server.broken is not None and len(server.asked) >= server.broken
                self.send_response(server.status if failed else 200)
                if failed and server.wait:
                    self.send_header("Retry-After", server.wait)
                self.end_headers()
                passage = body["messages"][0]["content"].split("Passage:\n")[-1]
                title, _, text = passage.partition("\n")
                content = f"1. What is there to know about {title.lower()}?\n2) {' '.join(text.split()[:6])}?\n- x"
                self.wfile.write(json.dumps({"choices": [{"message": {"content": server.said or content}}]}).encode())

            def log_message(self, format: str, *args: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, daemon=True)
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_without_a_model_the_same_corpus_gives_the_same_queries_and_none_stands_in_its_passage(tmp_path: Path) -> None:
    source = corpus(tmp_path)
    synth = Synth(count=3)
    report = synthesize(source, tmp_path / "one.jsonl", synth=synth, base=None)
    synthesize(source, tmp_path / "two.jsonl", synth=synth, base=None)
    made = rows(tmp_path / "one.jsonl")
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    assert report.kept == len(made) >= 8
    assert not any(row["query"].lower() in row["document"].lower() for row in made)
    assert "Trams and rails" in {row["query"] for row in made}
    assert not (tmp_path / "one.jsonl.parts").exists()


def test_a_query_that_does_not_find_its_passage_again_is_dropped(tmp_path: Path) -> None:
    content = [{"_id": f"d{i}", "title": t, "text": x} for i, (t, x) in enumerate(FACTS.items())]
    odd = {
        "_id": "odd",
        "title": "Frozen rivers of moving ice",
        "text": "Rosin the bow. Violin strings need days to settle and dislike dry air.",
    }
    source = write_rows(tmp_path / "corpus.jsonl", [*content, odd])
    report = synthesize(source, tmp_path / "out.jsonl", synth=Synth(count=1, top=1))
    queries = {row["query"] for row in rows(tmp_path / "out.jsonl")}
    assert odd["title"] not in queries
    assert "Trams and rails" in queries
    assert report.lost >= 1
    wide = synthesize(source, tmp_path / "wide.jsonl", synth=Synth(count=1, top=10))
    assert wide.lost == 0


def test_a_query_made_for_two_passages_is_dropped(tmp_path: Path) -> None:
    texts = [{"_id": str(i), "title": "About the house", "text": text} for i, text in enumerate(FACTS.values())]
    texts.append({"_id": "own", "title": "Frozen rivers of ice", "text": "A frozen river of ice moves."})
    report = synthesize(write_rows(tmp_path / "c.jsonl", texts), tmp_path / "out.jsonl", synth=Synth(count=1), base=None)
    assert (report.made, report.repeated, report.kept) == (5, 4, 1)


def test_queries_that_differ_in_a_sign_are_made_for_one_passage_each(tmp_path: Path) -> None:
    signed = zip(("", "++", "#", "*"), FACTS.values(), strict=True)
    texts = [{"_id": sign, "title": f"Compile a C{sign} program", "text": text} for sign, text in signed]
    report = synthesize(write_rows(tmp_path / "c.jsonl", texts), tmp_path / "out.jsonl", synth=Synth(count=1), base=None)
    assert (report.made, report.repeated, report.kept) == (4, 0, 4)


def test_a_run_that_makes_nothing_says_why_and_leaves_no_file(tmp_path: Path, server: Server) -> None:
    alike = [{"_id": str(i), "title": "About the house", "text": text} for i, text in enumerate(FACTS.values())]
    outdone = [
        {"title": "Boilers and their pressure", "text": "Bleed it before the winter, when it heats water for the whole house."},
        {"text": "Boilers and their pressure"},
    ]
    wordy = [{"title": "and so on " * 20, "text": "x"}]
    for content, synth, said in (
        ([{"text": "One sentence gives no query."}], Synth(), "none of the 1 passages gives a query without a model; .*--generator URL"),
        (alike, Synth(count=1), "all 4 queries were made for several passages each"),
        (outdone, Synth(count=1, top=1), "none of the 1 queries finds its passage again among the best 1"),
        (wordy, Synth(generator=server.url), "gave no query of 3 to 32 words for any of the 1 passages"),
    ):
        source = write_rows(tmp_path / "c.jsonl", content)
        with pytest.raises(DataError, match=said):
            synthesize(source, tmp_path / "out.jsonl", synth=synth, base=None)
        assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_server_is_asked_with_the_given_prompt_and_its_numbering_is_taken_off(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDFT_SYNTH_KEY", "secret")
    prompt = "Ask {count} things.\nPassage:\n{passage}"
    settings = Synth(generator=server.url, model="m", prompt=prompt, top=1)
    report = synthesize(corpus(tmp_path), tmp_path / "out.jsonl", synth=settings, base=None)
    asked = server.asked[0]
    assert (asked["path"], asked["model"], asked["key"]) == ("/v1/chat/completions", "m", "Bearer secret")
    assert asked["messages"][0]["content"].startswith("Ask 2 things.\nPassage:\nBoilers\nA boiler")
    assert report.made == 8
    assert "What is there to know about glacier flow?" in {row["query"] for row in rows(tmp_path / "out.jsonl")}
    assert rows(tmp_path / "out.jsonl")[0]["document"].startswith("Boilers A boiler heats")


def test_a_stopped_run_goes_on_and_asks_for_no_passage_twice(tmp_path: Path, server: Server) -> None:
    settings, out = Synth(generator=server.url, model="m"), tmp_path / "out.jsonl"
    server.broken = 3
    with pytest.raises(EngineFailed, match="400"):
        synthesize(corpus(tmp_path), out, synth=settings, base=None)
    assert not out.exists()
    with (tmp_path / "out.jsonl.parts").open("a") as file:
        file.write('["d2", [["cut o')  # killed while it wrote
    server.broken = None
    with pytest.raises(DataError, match="other settings"):
        synthesize(corpus(tmp_path), out, synth=Synth(generator=server.url, model="other"), base=None)
    before = len(server.asked)
    report = synthesize(corpus(tmp_path), out, synth=settings, base=None)
    assert report.resumed == 2
    assert len(server.asked) - before == 2
    whole = tmp_path / "whole.jsonl"
    synthesize(corpus(tmp_path), whole, synth=settings, base=None)
    assert whole.read_text() == out.read_text()


def test_what_was_paid_for_survives_any_line_separator_and_a_kill_inside_a_character(tmp_path: Path, server: Server) -> None:
    settings, out, parts = Synth(generator=server.url, model="m"), tmp_path / "out.jsonl", tmp_path / "out.jsonl.parts"
    texts = [(title, f"{text} After\u2028two\u2029three\u0085four.") for title, text in FACTS.items()]
    source = write_rows(tmp_path / "c.jsonl", [{"_id": str(i), "title": t, "text": x} for i, (t, x) in enumerate(texts)])
    server.broken = 4
    with pytest.raises(EngineFailed):
        synthesize(source, out, synth=settings, base=None)
    with parts.open("ab") as file:
        file.write('["3", [["a café'.encode()[:-1])
    server.broken = None
    before = len(server.asked)
    assert synthesize(source, out, synth=settings, base=None).resumed == 3
    assert len(server.asked) - before == 1
    assert len({row["document"] for row in map(json.loads, out.read_bytes().split(b"\n")[:-1])}) == len(FACTS)


def test_each_passages_queries_are_in_the_file_before_the_next_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a buffer, which goes with a process that is killed."""
    from embedft.embedding import synth as module

    lines, from_text, parts = list[int](), module.from_text, tmp_path / "out.jsonl.parts"

    def watched(synth: Synth) -> Any:
        generate = from_text(synth)
        return lambda passage: lines.append(len(parts.read_text().splitlines())) or generate(passage)

    monkeypatch.setattr(module, "from_text", watched)
    synthesize(corpus(tmp_path), tmp_path / "out.jsonl", synth=Synth(), base=None)
    assert lines == [1, 2, 3, 4]


def test_what_was_made_of_another_text_is_not_gone_on_with(tmp_path: Path, server: Server) -> None:
    settings, out = Synth(generator=server.url, model="m"), tmp_path / "out.jsonl"
    server.broken = 3
    source = corpus(tmp_path)
    with pytest.raises(EngineFailed):
        synthesize(source, out, synth=settings, base=None)
    content = Path(source).read_text()
    for before, after in (("Bleed it", "Drain it"), ("Violin care", "Care of violins"), ('"d3"', '"d4"')):
        Path(source).write_text(content.replace(before, after))
        with pytest.raises(DataError, match="another corpus"):
            synthesize(source, out, synth=settings, base=None)


def test_a_server_is_asked_as_the_settings_say(tmp_path: Path, server: Server) -> None:
    settings = Synth(generator=server.url, count=3, seed=11, temperature=0.2, max_characters=20, prompt="{passage}")
    synthesize(corpus(tmp_path), tmp_path / "out.jsonl", synth=settings, base=None)
    for asked in server.asked:
        assert (asked["seed"], asked["temperature"], asked["max_tokens"]) == (11, 0.2, 3 * 64)
        assert len(asked["messages"][0]["content"]) == 20


def test_a_server_that_stays_away_is_asked_five_times_and_no_more(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    server.broken, server.status = 1, 503
    with pytest.raises(EngineFailed, match="503"):
        synthesize(corpus(tmp_path), tmp_path / "out.jsonl", synth=Synth(generator=server.url), base=None)
    assert len(server.asked) == 5
    assert slept == [0.5, 1.0, 2.0, 4.0]


def test_a_passage_does_not_outdo_the_document_that_was_made_of_it(tmp_path: Path) -> None:
    """The passage still holds the words that became the query: were it a rival, nothing would be found again."""
    source = corpus(tmp_path)
    alone = synthesize(source, tmp_path / "out.jsonl", synth=Synth(count=1, top=1))
    assert (alone.made, alone.lost) == (4, 0)


def test_a_server_that_is_busy_is_asked_again(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: setattr(server, "broken", None))
    server.broken, server.status = 1, 503
    report = synthesize(corpus(tmp_path), tmp_path / "out.jsonl", synth=Synth(generator=server.url), base=None)
    assert report.made == 8
    assert len(server.asked) == 5


@pytest.mark.parametrize(("asked", "waited"), [("20", 20.0), ("86400", 60.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.5), (None, 0.5)])
def test_a_server_that_says_how_long_to_wait_is_not_asked_before(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, asked: str | None, waited: float
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", lambda seconds: (slept.append(seconds), setattr(server, "broken", None)))
    server.broken, server.status, server.wait = 1, 429, asked
    synthesize(corpus(tmp_path), tmp_path / "out.jsonl", synth=Synth(generator=server.url), base=None)
    assert slept == [waited]


@pytest.mark.parametrize(
    "said",
    [
        "Here are two different questions:\n\n1. **What heats the whole house?**\n2. “When should one bleed it?”",
        "<think>\nThe user wants two questions.\nLet me write them.\n</think>\nWhat heats the whole house?\nWhen should one bleed it?",
        "What heats the whole house?\nWhen should one bleed it?\n<think>The model begins to think again",
        "What heats \ud83d the house well?\nWhat heats the whole house?\nWhen should one bleed it?",
    ],
)
def test_what_a_model_says_beside_its_questions_is_none(tmp_path: Path, server: Server, said: str) -> None:
    server.said, one = said, [{"_id": "d", "text": FACTS["Boilers"]}]
    source = write_rows(tmp_path / "one.jsonl", one)
    synthesize(source, tmp_path / "out.jsonl", synth=Synth(generator=server.url), base=None)
    assert [row["query"] for row in rows(tmp_path / "out.jsonl")] == ["What heats the whole house?", "When should one bleed it?"]


def test_an_address_that_is_none_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no URL"):
        synthesize(corpus(tmp_path), tmp_path / "out.jsonl", synth=Synth(generator="http://[::1/v1"), base=None)


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


def test_a_passage_that_is_too_long_for_the_model_is_asked_about_by_its_beginning(tmp_path: Path, server: Server) -> None:
    source = write_rows(tmp_path / "c.jsonl", [{"_id": "0", "title": "Boilers", "text": "They heat water and the house. " * 100}])
    server.longest = 1200
    report = synthesize(source, tmp_path / "out.jsonl", synth=Synth(generator=server.url), base=None)
    assert report.kept == 2
    assert len(rows(tmp_path / "out.jsonl")[0]["document"]) > 3000, "the pair keeps the whole passage"
    server.longest = 100
    with pytest.raises(EngineFailed, match="context_length_exceeded"):
        synthesize(source, tmp_path / "other.jsonl", synth=Synth(generator=server.url), base=None)


def test_a_length_without_room_for_a_text_is_refused_before_a_query_is_paid_for(tmp_path: Path, server: Server) -> None:
    asked = len(server.asked)
    with pytest.raises(UsageError, match="max_length of 2"):
        synthesize(corpus(tmp_path), tmp_path / "out.jsonl", synth=Synth(generator=server.url), base="minilm", max_length=2)
    assert len(server.asked) == asked
    assert not [*tmp_path.glob("out.jsonl*")]


def test_a_limit_draws_from_the_whole_corpus_and_keeps_its_order(tmp_path: Path) -> None:
    passages = [{"_id": f"d{i}", "title": f"The story of {name}{i}", "text": "Here."} for i, name in enumerate(["ant"] * 40 + ["bee"] * 40)]
    drawn: list[list[str]] = []
    for name, content in (("sorted", passages), ("turned", passages[::-1])):
        out = tmp_path / f"{name}.made.jsonl"
        report = synthesize(write_rows(tmp_path / f"{name}.jsonl", content), out, synth=Synth(limit=20), base=None)
        assert report.passages == 20
        drawn.append([row["query"] for row in rows(out)])
    assert drawn[0] == drawn[1][::-1]
    assert drawn[0] == [passage["title"] for passage in passages if passage["title"] in drawn[0]]
    assert 5 <= sum("ant" in query for query in drawn[0]) <= 15


def test_headings_of_markdown_files_are_titles(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# Install the tool\nRun it.\n\n## Configure it\nWrite a file.\n")
    (tmp_path / "docs" / "b.txt").write_text("Plain text here.")
    assert [(p.title, p.text) for p in read_passages(str(tmp_path / "docs"))] == [
        ("Install the tool", "Run it."),
        ("Configure it", "Write a file."),
        ("", "Plain text here."),
    ]


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


def test_check_mine_and_synth_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "synth.jsonl"
    assert main(["data", "synth", corpus(tmp_path), str(out), "--base", "bm25", "--count", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] >= 8
    assert main(["data", "check", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    out.write_text(out.read_text() + out.read_text().splitlines()[0] + "\n")
    assert main(["data", "check", str(out), "--fix", str(tmp_path / "fixed.jsonl")]) == 1
    assert "duplicates: 1 of" in capsys.readouterr().out
    assert main(["data", "mine", str(tmp_path / "fixed.jsonl"), str(tmp_path / "mined.jsonl"), "--negatives", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] >= 8
    assert (tmp_path / "mined.review.jsonl").is_file()


@pytest.mark.parametrize("command", [["check", "--fix"], ["mine"], ["synth", "--base", "bm25"]])
def test_rows_are_written_only_under_a_name_that_is_read_as_rows_again(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"query": f"what of the {title}?", "document": text, "title": title, "text": text} for title, text in FACTS.items()]
    source = write_rows(tmp_path / "rows.jsonl", pairs)
    action, *options = command
    assert main(["data", action, source, *options, str(tmp_path / "made.csv")]) == 1
    assert "made.csv: rows are written as JSONL; expected a name that ends in .jsonl or .jsonl.gz" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    packed = tmp_path / "made.jsonl.gz"
    assert main(["data", action, source, *options, str(packed)]) == 0
    problems: list[str] = []
    assert all(record.values["query"] for record in read_records(str(packed), problems))
    assert problems == []

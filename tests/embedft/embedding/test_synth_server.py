"""Queries from a server that speaks OpenAI's protocol: what it is asked, what its answers come to, and what a stopped run keeps."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from embedft.embedding.synth import Synth, synthesize
from embedft.errors import DataError, EngineFailed, UsageError
from tests.embedft.embedding.test_synth import FACTS, corpus, rows
from tests.fixtures_embedding import write_rows


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


def test_queries_of_a_server_that_find_nothing_are_kept_for_a_run_that_asks_less_of_them(tmp_path: Path, server: Server) -> None:
    titles = "Copper kettle prices", "Mountain railway tours"
    outdone = [{"title": title, "text": f"{other} " * 3} for title, other in zip(titles, titles[::-1], strict=True)]
    source, out = write_rows(tmp_path / "c.jsonl", outdone), tmp_path / "out.jsonl"
    once = {"generator": server.url, "count": 1}
    with pytest.raises(DataError, match=r"none of the 2 queries .* the best 1; expected a larger --top.*; out\.jsonl\.parts keeps"):
        synthesize(source, out, synth=Synth(**once, top=1), base=None)
    before = len(server.asked)
    report = synthesize(source, out, synth=Synth(**once, top=2), base=None)
    assert (report.kept, report.resumed, len(server.asked)) == (2, 2, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "out.jsonl"]


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


def test_how_many_passages_were_asked_about_is_told(server: Server, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    asked = Synth(generator=server.url, model="m")
    synthesize(corpus(tmp_path), tmp_path / "out.jsonl", synth=asked, base=None, asked=lambda done, total: told.append((done, total)))
    assert told == [(number, len(FACTS)) for number in range(1, len(FACTS) + 1)]

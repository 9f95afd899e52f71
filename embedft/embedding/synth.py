"""Training queries for a bare corpus: from the documents' own titles, headings and first sentences, or from any OpenAI-compatible server.

A query is kept only where it finds its passage again (round trip; Dai et al. 2022, arXiv 2209.11755). What is taken out of a passage to
become its query is taken out of the passage as well (inverse cloze; Lee et al. 2019, arXiv 1906.00300), else matching words would be all
there is to learn. A run that was stopped goes on where it was: each passage's queries are on disk before the next is asked for.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedft.embedding.passages import Passage, read_passages
from embedft.errors import DataError, EngineFailed, UsageError
from embedft.files import expect_jsonl, expect_room, hash_json, write_jsonl, write_text
from embedft.records import sample
from embedft.words import folded, words

if TYPE_CHECKING:
    from embedft.encode import EncodeSettings, Progress

PROMPT = (
    "Write {count} different questions, one a line and nothing else, that a person might ask to find the following passage. "
    "Do not mention the passage, and do not copy its sentences.\n\nPassage:\n{passage}"
)
WORDS = (3, 32)  # a query's shortest and longest length
KEY = "EMBEDFT_SYNTH_KEY"
LEAST_CHARACTERS = 200  # of a passage; a model that cannot read so many is no model for this
_SENTENCE = re.compile(r"(?<=[.!?؟])\s+(?=[A-Z0-9\"'(]|[^\x00-\x7f])|(?<=[。？！])\s*(?=.)")
_NUMBERING = re.compile(r"^\s*(?:[-*•]|\(?\d+[.):])\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, as of an emoji that was cut
PATIENCE = 60.0  # seconds: the longest wait that a server may ask for


@dataclass(frozen=True)
class Synth:
    """`generator`: 'text' (no model) or a server's URL up to /v1. `count` queries a passage; `top`: the round trip's depth.

    `limit` passages are chosen by the hash of their ids, wherever they stand in the corpus.
    """

    generator: str = "text"
    model: str = ""
    prompt: str = PROMPT
    count: int = 2
    limit: int | None = None
    top: int = 10
    max_characters: int = 4000
    temperature: float = 0.7
    seed: int = 7


@dataclass(frozen=True)
class SynthReport:
    """`made` queries of `passages` passages; `lost` did not find their passage again; `repeated` were made for several passages."""

    passages: int
    made: int
    kept: int
    lost: int
    repeated: int
    resumed: int
    path: str


Generate = Callable[[Passage], list[tuple[str, str]]]


def synthesize(
    corpus: str,
    out: Path,
    *,
    synth: Synth,
    base: str | None = "minilm",
    quantization: str = "none",
    max_length: int = 256,
    asked: "Progress | None" = None,
    encoded: "Progress | None" = None,
) -> SynthReport:
    """Write `out` (JSONL: query, document) for a BEIR folder, a file with a column `text`, or a folder of .md and .txt files.

    `base`: the model of the round trip; None: BM25. `asked` is told of the passages that have queries, `encoded` of the texts that the
    round trip encodes. Raises DataError where there is nothing to read or to write, or where `out.parts`
    (what a stopped run left) was made under other settings; EngineFailed where the server does not answer.
    """
    expect_jsonl(out)
    if out.exists():
        raise DataError([f"{out} exists already: name a new file"])
    if "{passage}" not in synth.prompt:
        raise UsageError("the prompt has no {passage} in it, so no query would be about its passage")
    if synth.generator != "text" and not synth.generator.startswith(("http://", "https://")):
        raise UsageError(f"generator {synth.generator!r}: expected 'text', or a server's URL such as http://localhost:8000/v1")
    if base is not None:
        _settings(base, quantization, max_length)  # it refuses what cannot be, before a query is paid for
    passages = sample(read_passages(corpus), synth.limit, key=lambda passage: passage.identifier)
    generate = from_text(synth) if synth.generator == "text" else from_server(synth)
    expect_room(out)
    parts = out.with_name(out.name + ".parts")
    settings = {name: value for name, value in asdict(synth).items() if name != "top"}  # which changes no query
    identity = hash_json([settings, [[p.identifier, p.title, p.text] for p in passages]])
    done = _resume(parts, identity)
    resumed = len(done)
    with parts.open("a", encoding="utf-8") as file:
        for place, passage in enumerate(passages, start=1):
            if passage.identifier not in done:
                done[passage.identifier] = generate(passage)
                file.write(json.dumps([passage.identifier, done[passage.identifier]], ensure_ascii=False) + "\n")
                file.flush()
                if asked:
                    asked(place, len(passages))
    pairs = [(query, document, place) for place, p in enumerate(passages) for query, document in done[p.identifier]]
    unique = _unrepeated(pairs)
    kept = _round_trip(unique, passages, synth, base, quantization, max_length, encoded)
    if kept:
        write_jsonl(out, ({"query": query, "document": document} for query, document, _ in kept))
    paid = bool(unique) and synth.generator != "text"
    if kept or not paid:
        parts.unlink()
    if not kept:
        why = _why_none(synth, passages, made=len(pairs), unique=len(unique))
        raise DataError([f"{Path(corpus).name}: {why}" + (f"; {parts.name} keeps the queries for that" if paid else "")])
    return SynthReport(len(passages), len(pairs), len(kept), len(unique) - len(kept), len(pairs) - len(unique), resumed, str(out))


def from_text(synth: Synth) -> Generate:
    """No model: the title asks for the text, the first sentences ask for what follows. The same corpus gives the same queries."""

    def generate(passage: Passage) -> list[tuple[str, str]]:
        sentences = _sentences(passage.text)
        title = passage.title.rstrip(" .")
        found: list[tuple[str, str]] = []
        if _fits(title) and passage.text and passage.text.lower().startswith(title.lower()):
            found.append((title, passage.text[len(title) :].lstrip(" .\n")))
        elif _fits(title) and passage.text:
            found.append((title, passage.text))
        for place, sentence in enumerate(sentences):
            rest = " ".join(sentences[:place] + sentences[place + 1 :])
            query = " ".join(sentence.rstrip(" .").split()[: WORDS[1]])
            if _fits(query) and len(words(rest)) >= 2 * WORDS[0] and query.lower() != title.lower():
                found.append((query, f"{passage.title} {rest}".strip() if passage.title not in rest else rest))
        return [(query, document) for query, document in found if document][: synth.count]

    return generate


def _sentences(text: str) -> list[str]:
    """What a full stop ends, unless the next word is in lower case."""
    ends = [match.end() for match in _SENTENCE.finditer(text) if not text[match.end() : match.end() + 1].islower()]
    return [part for start, end in zip([0, *ends], [*ends, None], strict=True) if (part := text[start:end].strip())]


def _fits(query: str) -> bool:
    return WORDS[0] <= len(words(query)) <= WORDS[1]


def from_server(synth: Synth) -> Generate:
    """Queries by a chat model. A busy or restarting server is asked again, five times; $EMBEDFT_SYNTH_KEY is its key."""
    import httpx

    headers = {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
    try:
        client = httpx.Client(base_url=synth.generator.rstrip("/") + "/", headers=headers, timeout=120)
    except httpx.InvalidURL as error:
        raise UsageError(f"generator {synth.generator!r} is no URL ({error}): expected one such as http://localhost:8000/v1") from None

    def asked(text: str) -> str:
        content = synth.prompt.replace("{count}", str(synth.count)).replace("{passage}", text)
        body = {"model": synth.model, "messages": [{"role": "user", "content": content}], "temperature": synth.temperature}
        try:
            return _ask(client, body | {"seed": synth.seed, "max_tokens": 64 * synth.count})
        except _TooLong:
            if len(text) < LEAST_CHARACTERS:
                raise
            return asked(text[: len(text) // 2])

    def generate(passage: Passage) -> list[tuple[str, str]]:
        answer = asked(f"{passage.title}\n{passage.text}".strip()[: synth.max_characters])
        queries = _queries(answer)[: synth.count]
        return [(query, f"{passage.title} {passage.text}".strip()) for query in queries]

    return generate


def _queries(answer: str) -> list[str]:
    """One a line, without its number, marks and quotes; what a model thinks aloud or says before them ("Here are two:") is none."""
    said = answer.rpartition("</think>")[2].partition("<think>")[0]
    lines = [_NUMBERING.sub("", line).strip(' \t"“”*') for line in said.splitlines()]
    return list(dict.fromkeys(line for line in lines if _fits(line) and line[-1] not in ":：" and not _SURROGATE.search(line)))


class _TooLong(EngineFailed):
    """The prompt, for this model."""


def _ask(client: Any, body: Mapping[str, Any]) -> str:
    import httpx

    reason, wait, failure = "", 0.0, EngineFailed
    for attempt in range(5):
        if attempt:
            time.sleep(max(0.25 * 2**attempt, wait))
        try:
            response = client.post("chat/completions", json=body)
        except httpx.TransportError as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if response.status_code == 200:
            try:
                return str(response.json()["choices"][0]["message"]["content"] or "")
            except (ValueError, LookupError, TypeError):
                reason = f"an answer that is no chat completion: {response.text[:200]}"
                break
        reason, asked = f"{response.status_code}: {response.text[:200]}", response.headers.get("retry-after", "")
        wait = min(float(asked), PATIENCE) if asked.isdecimal() else 0.0
        if response.status_code < 500 and response.status_code != 429:
            failure = _TooLong if "context_length_exceeded" in response.text or "context length" in response.text else failure
            break
    raise failure(f"{client.base_url}chat/completions did not answer: {reason}; run the same command again to go on")


def _resume(parts: Path, identity: str) -> dict[str, list[tuple[str, str]]]:
    """What a stopped run left; a line that cannot be read, as a last one that was cut off, is done again."""
    begun = json.dumps({"settings": identity})
    if not parts.exists():
        write_text(parts, begun + "\n")
        return {}
    first, *lines = parts.read_bytes().split(b"\n")  # texts may hold what str.splitlines takes for a line's end
    if first != begun.encode():
        raise DataError([f"{parts.name} was made from another corpus or under other settings: remove it, or go on with those"])
    done: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        try:
            identifier, pairs = json.loads(line.decode("utf-8"))
        except ValueError:
            continue
        done[identifier] = [(query, document) for query, document in pairs]
    whole = [begun, *(json.dumps([name, pairs], ensure_ascii=False) for name, pairs in done.items())]
    write_text(parts, "\n".join(whole) + "\n")
    return done


def _unrepeated(pairs: Sequence[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """A query that was made for several passages says nothing about which; it is dropped."""
    owners: dict[str, set[int]] = {}
    for query, _, place in pairs:
        owners.setdefault(folded(query), set()).add(place)
    seen: set[str] = set()
    return [p for p in pairs if len(owners[key := folded(p[0])]) == 1 and not (key in seen or seen.add(key))]


def _why_none(synth: Synth, passages: Sequence[Passage], *, made: int, unique: int) -> str:
    if unique:
        return (
            f"none of the {unique} queries finds its passage again among the best {synth.top}; expected a larger --top, or another --base"
        )
    if made:
        return f"all {made} queries were made for several passages each; expected passages that differ in title or first sentences"
    least, most = WORDS
    if synth.generator == "text":
        wanted = f"a title of {least} to {most} words, or a second sentence; without them name an endpoint (--generator URL)"
        return f"none of the {len(passages)} passages gives a query without a model; expected {wanted}"
    return (
        f"{synth.generator} gave no query of {least} to {most} words for any of the {len(passages)} passages; try another model or prompt"
    )


def _round_trip(
    pairs: Sequence[tuple[str, str, int]],
    passages: Sequence[Passage],
    synth: Synth,
    base: str | None,
    quantization: str,
    max_length: int,
    encoded: "Progress | None",
) -> list[tuple[str, str, int]]:
    """The pairs whose query ranks its passage (as it will be trained) among the best `top`, beside all other passages."""
    if not pairs:
        return []
    texts = [f"{p.title} {p.text}".strip() for p in passages]
    ranked = _ranks(pairs, texts, base, quantization, max_length, depth=synth.top, encoded=encoded)
    return [pair for pair, place in zip(pairs, ranked, strict=True) if place < synth.top]


def _ranks(
    pairs: Sequence[tuple[str, str, int]],
    texts: Sequence[str],
    base: str | None,
    quantization: str,
    max_length: int,
    *,
    depth: int,
    encoded: "Progress | None",
) -> Iterator[int]:
    """For each pair how many other passages come before its document; all of them where those are `depth` or more.

    BM25 (`base` None) is asked for the passage as it stands: the words that became the query are no longer in the document.
    """
    import numpy as np

    if base is None:
        from embedft.embedding.evaluate import bm25_top

        found = bm25_top([query for query, _, _ in pairs], texts, depth=depth)
        yield from (rows.index(place) if place in rows else len(texts) for rows, (_, _, place) in zip(found, pairs, strict=True))
        return
    from embedft.base import load_model
    from embedft.encode import Encoder

    folder, settings = _settings(base, quantization, max_length)
    encoder = Encoder(load_model(folder, task="embedding"), folder, settings)
    encoder.progress = encoded
    corpus = encoder.encode(texts, input_type="document")
    queries = encoder.encode([query for query, _, _ in pairs], input_type="query")
    documents = encoder.encode([document for _, document, _ in pairs], input_type="document")
    for query, document, (_, _, place) in zip(queries, documents, pairs, strict=True):
        scores = corpus @ query
        scores[place] = -np.inf
        yield int((scores > document @ query).sum())


def _settings(base: str, quantization: str, max_length: int) -> "tuple[Path, EncodeSettings]":
    """Folder of `base` and how its vectors are made. UsageError where `max_length` has no room for a text."""
    from embedft.base import BaseSpec, base_folder
    from embedft.encode import TextPreparer
    from embedft.model_folder import describe
    from embedft.vectors import published_settings

    folder = base_folder(BaseSpec(base, quantization))
    info = describe(folder)
    settings = replace(published_settings(info, min(max_length, info.max_length)), normalize=True)
    TextPreparer(folder, settings)
    return folder, settings

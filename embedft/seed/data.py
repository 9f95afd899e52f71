"""From books and installed packages to arrays of token ids, once; then a batch for any step number. Knows no model.

A batch is a function of (seed, step) alone, so the step number is the whole data position.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from embedft.installed import Function, bucket, functions_in, permissive_packages, read_source, source_files
from embedft.seed.tasks import EXTRACTIVE, Example, examples, gather
from embedft.seed.tokenizer import END, VOCAB, render_chat, train_tokenizer

HELD_OUT = 40  # one document in 40 is held out
ANSWER_WEIGHT = 4  # a token of an answer counts as much as four others
STREAMS = ("prose", "code", "tasks")
Ids = NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Budget:
    """How much text is read, in characters, and how many examples are made."""

    prose_chars: int = 20_000_000
    code_chars: int = 16_000_000
    package_chars: int = 1_500_000
    examples: int = 45_000
    checks: int = 600


def read_books(path: Path | None) -> list[str]:
    """The books of a text file (plain, .xz), separated by U+001E; none without a path."""
    if path is None:
        return []
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return [book.strip() for book in raw.decode("utf-8").split("\x1e") if book.strip()]


def read_packages(budget: Budget, *, packages: Sequence[str] | None = None) -> dict[str, list[str]]:
    """Source files of permissively licensed installed packages, per package up to a share of the budget."""
    found: dict[str, list[str]] = {}
    for package in packages if packages is not None else permissive_packages():
        files, kept, used = source_files(package), list[str](), 0
        random.Random(len(files)).shuffle(files)
        for path in files:
            source = read_source(path)
            if '"""' in source and len(source) <= 60_000 and used < budget.package_chars:
                kept.append(source)
                used += len(source)
        found[package] = kept
    return found


def split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """(for training, held out), by the text alone."""
    held = [bucket(text[:2000], buckets=HELD_OUT) == 0 for text in texts]
    return [t for t, h in zip(texts, held, strict=True) if not h], [t for t, h in zip(texts, held, strict=True) if h]


def prepare(
    folder: Path, *, books: Path | None, budget: Budget, packages: Sequence[str] | None = None, vocab: int = VOCAB, seed: int = 7
) -> Tokenizer:
    """Write the tokenizer, the streams', the held-out arrays and the checks to `folder`, unless they are there; give the tokenizer."""
    done = folder / "data.json"
    if done.exists():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    folder.mkdir(parents=True, exist_ok=True)
    train_books, held_books = split(read_books(books))
    sources = read_packages(budget, packages=packages)
    pairs = [(package, *split(files)) for package, files in sources.items()]
    train_code = [source for _, train, _ in pairs for source in train]
    held_code = [source for _, _, held in pairs for source in held]
    random.Random(seed).shuffle(train_code)
    documented = _documented((p, train) for p, train, _ in pairs)
    prose = _shares(train_books, budget.prose_chars) or [f.summary for f in documented]
    held_prose = _shares(held_books, 600_000) or prose[:200]
    tokenizer = train_tokenizer(_sample(prose, 5_000_000) + _sample(train_code, 4_000_000), vocab=vocab)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder, "prose", _encode(tokenizer, prose))
    _write(folder, "code", _encode(tokenizer, _sample(train_code, budget.code_chars)))
    _write(folder, "held-prose", _encode(tokenizer, held_prose))
    _write(folder, "held-code", _encode(tokenizer, _sample(held_code or train_code[:4], 600_000)))
    text = gather(prose, documented)
    _write_tasks(folder, tokenizer, examples(text, budget.examples, seed=seed))
    unseen = gather(held_prose, _documented((p, held) for p, _, held in pairs))
    checks = examples(unseen, budget.checks, seed=seed + 1, mixture=EXTRACTIVE)
    (folder / "checks.json").write_text(json.dumps([[c.kind, c.prompt, c.answer] for c in checks]), encoding="utf-8")
    counts = {name: int(np.load(folder / f"{name}.npy", mmap_mode="r").shape[0]) for name in (*STREAMS, "held-prose", "held-code")}
    files = {package: len(train) for package, train, _ in pairs if train}
    facts = {"books": len(train_books), "books_held_out": len(held_books), "packages": files, "examples": budget.examples, "tokens": counts}
    done.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return tokenizer


def _documented(pairs: Iterable[tuple[str, Sequence[str]]]) -> list[Function]:
    return [f for package, files in pairs for source in files for f in functions_in(source, package=package)]


def _shares(books: Sequence[str], chars: int) -> list[str]:
    share = chars // max(1, len(books))
    return [book[min(len(book) // 10, max(0, len(book) - share)) :][:share] for book in books]


def _sample(texts: Sequence[str], chars: int) -> list[str]:
    kept, used, shuffled = list[str](), 0, list(texts)
    random.Random(1).shuffle(shuffled)
    for text in shuffled:
        if used >= chars:
            break
        kept.append(text)
        used += len(text)
    return kept


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Ids:
    end = tokenizer.token_to_id(END)
    flat: list[NDArray[np.uint16]] = []
    for start in range(0, len(texts), 64):
        for encoding in tokenizer.encode_batch(list(texts[start : start + 64])):
            flat.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(flat) if flat else np.zeros(0, dtype=np.uint16)


def _write(folder: Path, name: str, ids: Ids) -> None:
    np.save(folder / f"{name}.npy", ids)


def encode_example(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[int]]:
    """(ids, weights) of the whole chat; an answer's tokens and its end mark weigh ANSWER_WEIGHT."""
    turn = [{"role": "user", "content": example.prompt}]
    head = tokenizer.encode(render_chat(turn, generation_prompt=True)).ids
    tail = tokenizer.encode(example.answer + "<|im_end|>").ids
    return [*head, *tail], [1] * len(head) + [ANSWER_WEIGHT] * len(tail)


def _write_tasks(folder: Path, tokenizer: Tokenizer, made: Sequence[Example]) -> None:
    ids, weights, starts = list[int](), list[int](), list[int]()
    end = [*tokenizer.encode("\n").ids[:1], tokenizer.token_to_id(END)]
    for example in made:
        starts.append(len(ids))
        some, heavy = encode_example(tokenizer, example)
        ids += some + end
        weights += heavy + [1] * len(end)
    _write(folder, "tasks", np.array(ids, dtype=np.uint16))
    np.save(folder / "tasks-weights.npy", np.array(weights, dtype=np.uint8))
    np.save(folder / "tasks-starts.npy", np.array(starts, dtype=np.int64))


class Batches:
    """Batches by step number; rows come from the streams in fixed shares."""

    def __init__(self, folder: Path, *, seed: int = 7, shares: Sequence[float] = (0.3, 0.2, 0.5)) -> None:
        self.seed, self.shares = seed, np.array(shares) / sum(shares)
        self.ids: dict[str, Ids] = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in STREAMS}
        self.weights: NDArray[np.uint8] = np.load(folder / "tasks-weights.npy", mmap_mode="r")
        self.starts: NDArray[np.int64] = np.load(folder / "tasks-starts.npy")

    def at(self, step: int, *, rows: int, length: int, copies: float = 0.0) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(rows, length + 1) ids and the (rows, length) weights of their targets; a share `copies` of the rows is `repeated` tokens."""
        rng = np.random.default_rng((self.seed, step))
        ids, weights = np.zeros((rows, length + 1), dtype=np.int64), np.ones((rows, length), dtype=np.float32)
        for row in range(rows):
            if copies and rng.random() < copies:
                ids[row] = repeated(rng, self.ids["prose"], length + 1)
                continue
            name = STREAMS[int(rng.choice(3, p=self.shares))]
            stream = self.ids[name]
            room = max(1, len(stream) - length - 1)
            start = int(rng.integers(room))
            if name == "tasks":
                start = int(self.starts[np.searchsorted(self.starts, start, side="right") - 1])
            piece = stream[start : start + length + 1]
            ids[row, : len(piece)] = piece
            weights[row, max(0, len(piece) - 1) :] = 0
            if name == "tasks":
                weights[row, : len(piece) - 1] = self.weights[start + 1 : start + len(piece)]
        return ids, weights


def repeated(rng: np.random.Generator, stream: Ids, length: int) -> NDArray[np.int64]:
    """Short runs of tokens drawn at random (half of the runs evenly, half as often as in `stream`), each said two to four times."""
    top, pieces, filled = int(stream[:100_000].max()), list[NDArray[np.int64]](), 0
    while filled < length:
        size, times = int(rng.integers(4, 33)), int(rng.integers(2, 5))
        even = rng.random() < 0.5
        run = rng.integers(4, top + 1, size=size) if even else stream[rng.integers(len(stream), size=size)].astype(np.int64)
        pieces.append(np.tile(run, times))
        filled += size * times
    return np.concatenate(pieces)[:length]


def copy_sources(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each target can be copied from: (rows, length + 1) ids → (rows, length) places, -1 where there is none.

    A place p has ids[p] = the target and, just before p, the token that is just before the target; it is the latest such place.
    """
    rows, width = ids.shape
    sources = np.full((rows, width - 1), -1, dtype=np.int64)
    for row in range(rows):
        latest: dict[tuple[int, int], int] = {}
        listed = ids[row].tolist()
        for i in range(width - 1):
            pair = (listed[i], listed[i + 1])
            sources[row, i] = latest.get(pair, -1)
            latest[pair] = i + 1
    return sources


def load_checks(folder: Path) -> list[Example]:
    """The held-out extractive questions."""
    return [Example(*row) for row in json.loads((folder / "checks.json").read_text(encoding="utf-8"))]


__all__ = ["Batches", "Budget", "copy_sources", "encode_example", "load_checks", "prepare", "read_books", "read_packages", "split"]

"""`embedft data pydocs OUT`: two retrieval sets and two LM tasks from the Python packages installed on the machine.

Offline, in seconds, and the same bytes for the same packages, limit and seed. Knows no model; nothing is chosen by how a model does on it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from embedft.errors import DataError
from embedft.files import publish_folder, staged_folder
from embedft.installed import STDLIB, Function, functions, package_root, sections

DEFAULT_PACKAGES = (STDLIB, "numpy", "pandas", "scipy", "sklearn", "networkx", "matplotlib")  # what the library itself brings along
LM_PACKAGES = 6  # classes of the package task
TEST_SHARE = 0.2
MAX_TEST = 500
LM_TRAIN, LM_TEST = 2400, 300
MAX_CODE, MAX_SECTION = 1500, 1200  # characters
_RELEASE = re.compile(r"\d+\.\d+|\d{4}-\d\d|unreleased", re.I)  # a changelog's heading says nothing about its section


@dataclass(frozen=True, slots=True)
class PydocsReport:
    """What was written: counts of rows by folder, relative to `out`."""

    packages: tuple[str, ...]
    lm_packages: tuple[str, ...]
    code: Mapping[str, int]
    readme: Mapping[str, int]
    lm: Mapping[str, int]


def make_pydocs(out: Path, *, seed: int = 7, limit: int | None = None, packages: Sequence[str] | None = None) -> PydocsReport:
    """Write `code/` and `readme/` (BEIR folders) and `lm_package/` and `lm_argument/` (prompt/completion JSONL) under `out`, or nothing.

    limit: at most so many pairs in each retrieval set and rows in each LM task (train and test together).
    packages: top-level import names to read, "stdlib" for the standard library; without it, those of DEFAULT_PACKAGES that are installed.
    Raises DataError if `out` holds anything, if a named package is not installed, or if too little documented code is found.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError([f"{out}: is not an empty folder; name a new one"])
    chosen = tuple(packages) if packages is not None else tuple(p for p in DEFAULT_PACKAGES if package_root(p) is not None)
    missing = [p for p in chosen if package_root(p) is None]
    if missing:
        raise DataError([f"{p}: no such package is installed; install it or leave it out" for p in missing])
    found = _distinct(f for package in chosen for f in functions(package))
    if len(found) < 20:
        raise DataError([f"{', '.join(chosen)}: {len(found)} documented functions, expected 20 or more; name more packages"])
    with staged_folder(out.resolve().parent) as stage:
        code = _write_beir(stage / "code", [(f.summary, f.code[:MAX_CODE]) for f in found], seed=seed, limit=limit)
        readme = _write_beir(stage / "readme", _readme_pairs(), seed=seed, limit=limit)
        lm_packages, lm = _write_lm(stage, found, seed=seed, limit=limit)
        publish_folder(stage, out.resolve())
    return PydocsReport(packages=chosen, lm_packages=lm_packages, code=code, readme=readme, lm=lm)


def lm_prompt(function: Function) -> str:
    """The prompt that both LM tasks share: signature, first sentence, an open answer line."""
    return f"{function.signature}\n{function.summary}\nAnswer:"


def _distinct(found: Iterable[Function]) -> list[Function]:
    """Functions with a usable summary and body, each summary and each code once (the first wins)."""
    summaries, codes, kept = set[str](), set[str](), list[Function]()
    for f in found:
        summary, code = f.summary.casefold(), f.code[:MAX_CODE]
        usable = 20 <= len(summary) <= 300 and summary.isascii() and len(code) >= 60 and not _foreign(f"{code} {summary}")
        if not usable or summary in summaries or code in codes:
            continue
        summaries.add(summary)
        codes.add(code)
        kept.append(f)
    return kept


def _foreign(text: str) -> bool:
    """Whether the text may hold a path of the machine; sources name such paths as examples at most, and none is let through."""
    return any(mark in text for mark in ("/home/", "/root/", "/Users/", "site-packages", "dist-packages"))


def _readme_pairs() -> list[tuple[str, str]]:
    """(title with its project, section text), each text once, from every installed distribution's README."""
    distributions = {str(d.metadata["Name"]).lower(): d for d in metadata.distributions() if d.metadata["Name"]}
    seen, pairs = set[str](), list[tuple[str, str]]()
    for name in sorted(distributions):
        if name == "embedft":
            continue
        for section in sections(distributions[name]):
            query, text = f"{name}: {section.title}", section.text[:MAX_SECTION]
            first = text.split("\n", 1)[0].strip().strip("#*= ").casefold()
            fitting = len(text) >= 80 and len(section.title) <= 100 and not _foreign(text)
            telling = not _RELEASE.search(section.title) and first != section.title.casefold()
            if fitting and telling and text not in seen and query.casefold() not in seen:
                seen.update((text, query.casefold()))
                pairs.append((query, text))
    return pairs


def _write_beir(folder: Path, pairs: Sequence[tuple[str, str]], *, seed: int, limit: int | None) -> dict[str, int]:
    """A BEIR folder with one relevant document a query and disjoint train and test queries; every text is in the corpus."""
    shuffled = list(pairs)
    random.Random(seed).shuffle(shuffled)
    shuffled = shuffled[:limit]
    tests = min(MAX_TEST, len(shuffled), max(1, round(len(shuffled) * TEST_SHARE)))
    (folder / "qrels").mkdir(parents=True)
    _write_jsonl(folder / "corpus.jsonl", ({"_id": f"d{i}", "title": "", "text": text} for i, (_, text) in enumerate(shuffled)))
    _write_jsonl(folder / "queries.jsonl", ({"_id": f"q{i}", "text": query} for i, (query, _) in enumerate(shuffled)))
    for name, rows in (("test", range(tests)), ("train", range(tests, len(shuffled)))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in rows)]
        (folder / "qrels" / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"corpus": len(shuffled), "train": len(shuffled) - tests, "test": tests}


def _write_lm(out: Path, found: Sequence[Function], *, seed: int, limit: int | None) -> tuple[tuple[str, ...], dict[str, int]]:
    """Both LM tasks over the same prompts: as many from each of the packages with the most functions, train and test disjoint."""
    by_package: dict[str, list[Function]] = {}
    prompts = set[str]()
    for f in found:
        if f.arguments and len(f.signature) <= 120 and len(f.summary) <= 160 and lm_prompt(f) not in prompts:
            prompts.add(lm_prompt(f))
            by_package.setdefault(f.package, []).append(f)
    largest = tuple(sorted(by_package, key=lambda p: (-len(by_package[p]), p))[:LM_PACKAGES])
    total = min(LM_TRAIN + LM_TEST, limit or LM_TRAIN + LM_TEST)
    if not largest:
        raise DataError([f"{', '.join(by_package) or 'the packages'}: no documented function with a short signature; name more packages"])
    each = min(max(2, total // len(largest)), min(len(by_package[p]) for p in largest))
    tests = max(1, round(each * LM_TEST / (LM_TRAIN + LM_TEST)))
    rng = random.Random(seed)
    rows: dict[str, list[Function]] = {"train": [], "test": []}
    for package in largest:
        picked = rng.sample(by_package[package], each)
        rows["test"] += picked[:tests]
        rows["train"] += picked[tests:]
    for name, part in rows.items():
        rng.shuffle(part)
        _write_jsonl(out / "lm_package" / f"{name}.jsonl", ({"prompt": lm_prompt(f), "completion": f" {f.package}"} for f in part))
        _write_jsonl(out / "lm_argument" / f"{name}.jsonl", ({"prompt": lm_prompt(f), "completion": f" {f.arguments[0]}"} for f in part))
    return largest, {name: len(part) for name, part in rows.items()}


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


__all__ = ["DEFAULT_PACKAGES", "PydocsReport", "lm_prompt", "make_pydocs"]

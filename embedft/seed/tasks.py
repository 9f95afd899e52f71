"""Instruction-shaped examples made by script from plain prose and documented functions. Knows no tokenizer and no model.

Everything here is a pure function of its text and its `random.Random`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from embedft.installed import Function

SENTENCE = re.compile(r"[A-Z\"][^.!?\n]{40,220}[.!?]")
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,12}\b")
WORD = re.compile(r"^[A-Za-z][a-z'-]{2,}$")

ATTRIBUTES = (
    "colour",
    "price",
    "size",
    "owner",
    "port",
    "city",
    "code",
    "leader",
    "weight",
    "age",
    "father",
    "home",
    "profession",
    "limit",
    "version",
    "default",
    "teacher",
    "office",
    "capital",
    "secret",
    "number",
    "name",
    "deadline",
    "licence",
    "timeout",
    "author",
    "address",
    "friend",
    "ship",
    "horse",
)
LAYOUTS = (
    "Passages:\n{passages}\n\nQuestion: {question}",
    "{passages}\n\n{question}",
    "Answer from the passages.\n\n{passages}\n\nQuestion: {question}",
    "Context:\n{passages}\n\nQuestion: {question}\nAnswer with words of the context.",
)
MARKS = ("[{n}] ", "{n}. ", "- ", "Passage {n}: ")


@dataclass(frozen=True, slots=True)
class Example:
    """One user turn and its answer; `kind` names the maker."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Text:
    """What examples are made from."""

    sentences: Sequence[str]
    names: Sequence[str]
    words: Sequence[str]
    functions: Sequence[Function]


def gather(prose: Sequence[str], functions: Sequence[Function]) -> Text:
    """Sentences, capitalised names and content words of the prose, beside the functions."""
    sentences = [" ".join(s.split()) for text in prose for s in SENTENCE.findall(text)]
    names = sorted({name for text in prose for name in NAME.findall(text)})
    words = sorted({w.lower() for s in sentences[:40_000] for w in s.split() if len(w) > 3 and WORD.match(w)})
    kept = [f for f in functions if f.arguments and 20 <= len(f.summary) <= 160 and f.summary.isascii()]
    return Text(sentences, names, words, kept)


def ask(passages: Sequence[str], question: str, *, layout: str = LAYOUTS[0], mark: str = MARKS[0]) -> str:
    """The user turn of an extractive question over passages, in the layout that seed-lm knows best."""
    listed = "\n".join(mark.format(n=n) + text for n, text in enumerate(passages, 1))
    return layout.format(passages=listed, question=question)


def _extractive(kind: str, passages: list[str], question: str, answer: str, rng: random.Random) -> Example:
    rng.shuffle(passages)
    varied = rng.random() < 0.5
    prompt = ask(passages, question, layout=rng.choice(LAYOUTS), mark=rng.choice(MARKS)) if varied else ask(passages, question)
    return Example(kind, prompt, answer)


def fact(text: Text, rng: random.Random) -> Example:
    """Three passages state the same attribute of three names (or three attributes of one); the question wants one value."""
    attribute = rng.choice(ATTRIBUTES)
    values = [_value(text, rng) for _ in range(3)]
    subjects = [_subject(text, rng) for _ in range(3)]
    attributes = [attribute] * 3
    if rng.random() < 0.35:
        attributes, subjects = rng.sample(ATTRIBUTES, 3), [subjects[0]] * 3
    passages: list[str] = []
    for subject, name, value in zip(subjects, attributes, values, strict=True):
        form = rng.choice(("The {a} of {s} is {v}.", "{S}'s {a} is {v}.", "The {a} of {s} was {v}.", "{S} has the {a} {v}."))
        stated = form.format(a=name, s=subject, S=subject[0].upper() + subject[1:], v=value)
        padding = rng.choice(text.sentences) if rng.random() < 0.45 else ""
        passages.append(" ".join((stated, padding) if rng.random() < 0.5 else (padding, stated)).strip())
    form = rng.choice(("What is the {a} of {s}?", "What is {s}'s {a}?", "Tell me the {a} of {s}."))
    return _extractive("fact", passages, form.format(a=attributes[0], s=subjects[0]), values[0], rng)


def _subject(text: Text, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.5:
        return rng.choice(text.names)
    if draw < 0.7:
        return f"{rng.choice(text.names)} {rng.choice(text.names)}"
    return f"the {rng.choice(text.words)}" if draw < 0.85 or not text.functions else rng.choice(text.functions).name


def _value(text: Text, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.35:
        return rng.choice(text.words)
    if draw < 0.6:
        return rng.choice(text.names)
    if draw < 0.75:
        return str(rng.randrange(2, 10 ** rng.randrange(1, 5)))
    return f"{rng.choice(text.words)} {rng.choice(text.words)}"


def cloze(text: Text, rng: random.Random) -> Example:
    """A sentence of one of three passages with a word left out: which word?"""
    chosen = rng.sample(text.sentences, 3)
    words = chosen[0].split()
    places = [i for i, w in enumerate(words) if 3 <= i < len(words) - 1 and WORD.match(w)]
    if not places:
        return after(text, rng)
    place = rng.choice(places)
    gap = " ".join([*words[max(0, place - 6) : place], "___", *words[place + 1 : place + 6]])
    return _extractive("cloze", chosen, f'Which word is missing: "{gap}"?', words[place], rng)


def after(text: Text, rng: random.Random) -> Example:
    """Two to four words of one of three passages: which words come next?"""
    chosen = rng.sample(text.sentences, 3)
    words = chosen[0].split()
    start, cue, count = rng.randrange(0, max(1, len(words) - 7)), rng.randrange(2, 5), rng.randrange(1, 5)
    answer = " ".join(words[start + cue : start + cue + count])
    if not answer:
        return fact(text, rng)
    form = rng.choice(('What comes after "{c}"?', 'Which {n} words follow "{c}"?')) if count > 1 else 'Which word follows "{c}"?'
    if "{n}" not in form and count > 1:
        answer = _to_stop(words[start + cue :])
    return _extractive("after", chosen, form.format(c=" ".join(words[start : start + cue]), n=count), answer, rng)


def _to_stop(words: Sequence[str]) -> str:
    kept: list[str] = []
    for word in words[:8]:
        kept.append(word)
        if word[-1] in ",.;:!?":
            break
    return " ".join(kept)


def docs(text: Text, rng: random.Random) -> Example:
    """Three documented functions as passages; the question wants a name, a parameter or a description."""
    if len(text.functions) < 3:
        return fact(text, rng)
    chosen = rng.sample(text.functions, 3)
    wanted = chosen[0]
    passages = [f"`{f.name}({', '.join(f.arguments[:4])})` is a function of {f.package}. {f.summary}" for f in chosen]
    summary = wanted.summary.rstrip(".")
    question, answer = rng.choice(
        (
            (f"Which function has this description: {summary}?", wanted.name),
            (f"What does `{wanted.name}` do?", wanted.summary),
            (f"What is the first parameter of `{wanted.name}`?", wanted.arguments[0]),
            (f"Which package has the function `{wanted.name}`?", wanted.package),
        )
    )
    return _extractive("docs", passages, question, answer, rng)


def repeat(text: Text, rng: random.Random) -> Example:
    """Say a few words, names or a sentence again."""
    draw = rng.random()
    if draw < 0.6:
        pool = text.words if rng.random() < 0.6 else text.names
        said = " ".join(rng.choice(pool) for _ in range(rng.randrange(1, 8)))
    else:
        said = rng.choice(text.sentences)
    return Example("repeat", rng.choice(("Repeat: {s}", "Say this again: {s}", "Copy the text.\n\n{s}")).format(s=said), said)


def quote(text: Text, rng: random.Random) -> Example:
    """Quote the first words of a passage."""
    sentence, count = rng.choice(text.sentences), rng.randrange(1, 7)
    asked = f"Quote the first {count} words." if count > 1 else "Quote the first word."
    return Example("quote", f"{asked}\n\n{sentence}", " ".join(sentence.split()[:count]))


def describe(text: Text, rng: random.Random) -> Example:
    """A function's code → its description, or the other way round."""
    if not text.functions:
        return repeat(text, rng)
    f = rng.choice(text.functions)
    code = f.code[:500]
    if rng.random() < 0.6:
        return Example("describe", f"Describe this function in a sentence.\n\n{code}", f.summary)
    return Example("write", f"Write a Python function: {f.summary}", code)


Mixture = Sequence[tuple[Callable[[Text, random.Random], Example], float]]
EXTRACTIVE: Mixture = ((fact, 0.4), (cloze, 0.15), (after, 0.2), (docs, 0.25))
MIXTURE: Mixture = ((fact, 0.34), (cloze, 0.1), (after, 0.14), (docs, 0.16), (repeat, 0.12), (quote, 0.05), (describe, 0.09))


def examples(text: Text, count: int, *, seed: int, mixture: Mixture = MIXTURE) -> list[Example]:
    """`count` examples drawn from the mixture."""
    rng = random.Random(seed)
    makers, shares = [maker for maker, _ in mixture], [share for _, share in mixture]
    return [rng.choices(makers, shares)[0](text, rng) for _ in range(count)]

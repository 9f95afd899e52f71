"""The tenants of a soak: requests of zipf popularity, each answer held against what its adapter gives alone."""

import json
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from benchmarks.soaking.report import Report
from benchmarks.soaking.world import PROMPTS, TEXTS, TOKENS, World

BUSY = (429, 503)
PATIENCE = 1.0  # seconds at most that a refused client waits, whatever Retry-After says: pressure must stay on


def rest_together(seconds: float) -> None:
    """Sleep out the `seconds` that follow each second of the monotonic clock: all that call it send together, and rest together."""
    beat = time.monotonic() % (1 + seconds)
    if beat > 1:
        time.sleep(1 + seconds - beat)


@dataclass(eq=False)
class Client:
    """One of many; `until` on the monotonic clock. All rest together, `rest` seconds after each second of requests."""

    world: World
    url: str
    report: Report
    until: float
    choice: random.Random
    rest: float = 0.0

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=180) as client:
            while time.monotonic() < self.until:
                rest_together(self.rest)
                base = self.choice.choice(["texts", "words"])
                names = self.world.names[base]
                popular = self.choice.choices(names, [1 / (rank + 1) for rank in range(len(names))])[0]
                name = popular if self.choice.random() > 0.1 else None
                self.report.send()
                try:
                    if base == "texts":
                        self._embed(client, name)
                    else:
                        self._complete(client, name)
                except httpx.TransportError as error:
                    self.report.count("broken connection", lost=[f"{type(error).__name__}: {error}"])

    def _embed(self, client: httpx.Client, name: str | None) -> None:
        rows = [self.choice.randrange(len(TEXTS)) for _ in range(self.choice.choice([1, 1, 3]))]
        answer = client.post("/v1/embeddings", json={"model": "texts", "adapter": name, "input": [TEXTS[row] for row in rows]})
        if answer.status_code != 200:
            self._refused("embed", answer)
            return
        made_by = self._made_by(answer.headers["x-embedft-adapter"], name)
        wrong = [] if made_by else [f"{name} answered by {answer.headers['x-embedft-adapter']}"]
        for row, item in zip(rows, answer.json()["data"], strict=True):
            cosines = {key: float(np.dot(solo[row], item["embedding"])) for key, solo in self.world.solo["texts"].items()}
            best = max(cosines, key=lambda key: cosines[key])
            if made_by and (best != made_by or cosines[best] < 0.9999):
                wrong.append(f"{name}: nearest to {best[:12]} at {cosines[best]:.5f}")
        self.report.count("embed", answered=1, wrong=wrong)

    def _complete(self, client: httpx.Client, name: str | None) -> None:
        row, kind = self.choice.randrange(len(PROMPTS)), self.choice.choice(["whole", "stream", "cancelled"])
        body = {"model": "words", "adapter": name, "prompt": PROMPTS[row], "max_tokens": TOKENS, "temperature": 0}
        body |= {"ignore_eos": True, "logprobs": 0, "stream": kind != "whole"}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                self._refused(kind, answer)
            elif kind == "whole":
                answer.read()
                self._check(kind, name, row, answer.headers, answer.json()["choices"][0]["logprobs"]["tokens"])
            else:
                self._follow(kind, name, row, answer)

    def _follow(self, kind: str, name: str | None, row: int, answer: httpx.Response) -> None:
        words: list[str] = []
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                self._check(kind, name, row, answer.headers, words)
                return
            if not line.startswith("data: "):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                self.report.count(kind, refused=f"in mid-stream: {event['error']['code']}")
                return
            words += [word for part in event["choices"] for word in (part.get("logprobs") or {}).get("tokens", [])]
            if kind == "cancelled" and words:
                self.report.count(kind, cancelled=1)
                return
        self.report.count(kind, lost=["a stream ended without [DONE] and without an error"])

    def _check(self, kind: str, name: str | None, row: int, headers: httpx.Headers, words: list[str]) -> None:
        made_by = self._made_by(headers["x-embedft-adapter"], name)
        if made_by is None:
            self.report.count(kind, answered=1, wrong=[f"{name} answered by {headers['x-embedft-adapter']}"])
            return
        tokens, sure = self.world.solo["words"][made_by][row]
        right = len(words) == TOKENS and self.world.says(words[:sure], tokens[:sure])
        wrong = [] if right else [f"{name}: {words} where alone {[self.world.word(token) for token in tokens]}"]
        self.report.count(kind, answered=1, wrong=wrong)

    def _made_by(self, header: str, name: str | None) -> str | None:
        """The generation that the response names, if it is one of the name that was asked for."""
        plain, _, digits = header.partition("@")
        if name is None:
            return "base" if header == "base" else None
        return next((one for one in self.world.generations[name] if plain == name and digits and one.startswith(digits)), None)

    def _refused(self, kind: str, answer: httpx.Response) -> None:
        """Busy is a refusal with reason; any other status is a wrong answer, since every request was a good one."""
        code = answer.json()["error"]["code"]
        wrong: list[Any] = [] if answer.status_code in BUSY else [f"{answer.status_code} {answer.text[:200]}"]
        self.report.count(kind, refused=code, wrong=wrong)
        time.sleep(min(PATIENCE, float(answer.headers.get("retry-after", PATIENCE))))

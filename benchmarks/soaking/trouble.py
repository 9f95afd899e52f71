"""What goes wrong in a soak: generations swapped, damaged adapters offered, engines killed. And how much memory all of it takes."""

import itertools
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

from benchmarks.soaking.report import SETTLED, Report
from benchmarks.soaking.world import World

ADMIN = {"authorization": "Bearer soak"}
ENDED = ("engine_not_ready", "adapter_unavailable")  # what a load may be told while an engine is away


def reload(world: World, url: str, report: Report, until: float) -> None:
    """The first adapter of each base gets its other generation, and between two of these somebody offers a damaged one."""
    damaged = damaged_folders(world)
    bad = itertools.cycle([(base, offer) for offer in [*damaged, "../x", "no-such-thing", "a" * 64] for base in world.names])
    with httpx.Client(base_url=url, timeout=180, headers=ADMIN) as client:
        for turn in itertools.count(1):
            for names in world.names.values():
                answer = client.put(f"/v1/adapters/{names[0]}", json={"source": world.generations[names[0]][turn % 2]})
                code = "" if answer.status_code == 200 else answer.json()["error"]["code"]
                unforeseen = [f"reload: {answer.text[:300]}"] if code and code not in ENDED else []
                report.count(f"reload refused: {code}" if code else "reload", wrong=unforeseen)
                at, offer = next(bad)
                _offer(client, world.names[at][1], offer, report)
                if time.monotonic() > until:
                    return
                time.sleep(0.5)


def _offer(client: httpx.Client, name: str, source: str, report: Report) -> None:
    answer = client.put(f"/v1/adapters/{name}", json={"source": source})
    if answer.status_code < 300 or (answer.status_code >= 500 and answer.json()["error"]["code"] not in ENDED):
        report.count("bad load", wrong=[f"bad load of {source}: {answer.status_code} {answer.text[:300]}"])
    else:
        report.count(f"bad load refused: {answer.json()['error']['code']}")


def damaged_folders(world: World) -> list[str]:
    """Sources under the store's root, each wrong in another way: cut off, not finite, without effect, for another base."""
    made: list[str] = []
    for base, names in world.names.items():
        whole = world.store.folder(world.generations[names[1]][0])
        for how, damage in (("cut", _cut), ("nan", _not_finite), ("weak", _without_effect), ("foreign", _foreign)):
            folder = world.store.root / f"damaged-{base}-{how}"
            shutil.copytree(whole, folder)
            damage(folder)
            made.append(folder.name)
    return made


def _cut(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def _not_finite(folder: Path) -> None:
    _changed(folder, float("nan"))


def _without_effect(folder: Path) -> None:
    _changed(folder, 0.0)


def _changed(folder: Path, factor: float) -> None:
    from safetensors.torch import load_file, save_file

    path = str(folder / "adapter_model.safetensors")
    save_file({name: tensor * (factor if "lora_B" in name else 1.0) for name, tensor in load_file(path).items()}, path)


def _foreign(folder: Path) -> None:
    passport = json.loads((folder / "passport.json").read_text(encoding="utf-8"))
    passport["base"]["fingerprint"] = "0" * 64
    (folder / "passport.json").write_text(json.dumps(passport), encoding="utf-8")


def kill(process: int, report: Report, until: float, *, every: float) -> None:
    """One engine after the other, SIGKILL."""
    for turn in itertools.count():
        due = time.monotonic() + every
        while time.monotonic() < due:
            if time.monotonic() > until - 1:
                return
            time.sleep(0.2)
        running = engines(process)
        if running:
            running[turn % len(running)].kill()
            report.count("kill")


def engines(process: int) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for one in psutil.Process(process).children(recursive=True):
        line = _line(one)
        if any(part.startswith("serve.engines") for part in line) and "guard.py" not in " ".join(line[:4]):
            found.append(one)
    return sorted(found, key=lambda one: " ".join(_line(one)))


def _line(process: psutil.Process) -> Sequence[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def weigh(process: int, report: Report, until: float) -> None:
    while time.monotonic() < until:
        gateway, now = psutil.Process(process), time.time()
        sizes = [_size(one) for one in [gateway, *gateway.children(recursive=True)]]
        running = engines(process)
        settled = len(running) > 1 and all(now - one.create_time() > SETTLED for one in running)
        report.memory.append((time.monotonic(), sizes[0], sum(sizes), settled))
        time.sleep(2)


def _size(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0

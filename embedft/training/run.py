"""The folder of an unfinished run: what it was started with, and its checkpoints. Gone once the adapter is published."""

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any, cast

from embedft.base import compute_dtype
from embedft.errors import AdapterInvalid, ResumeRefused, UsageError
from embedft.files import hold, write_text
from embedft.recipe import CausalLMRecipe, EmbeddingRecipe
from embedft.training.progress import note

COMPLETE = "complete"  # written last into a checkpoint: one without it was cut off and is ignored
FINISHED = "finished"  # in the checkpoint of a run's last step: nothing is left to train


@dataclass(frozen=True)
class Run:
    """`folder` holds run.json and checkpoint-N/; `checkpoint` is where to go on from (None: from the start)."""

    folder: Path
    checkpoint: Path | None
    command: str

    @property
    def finished(self) -> bool:
        """Everything is trained; what came after it went wrong."""
        return self.checkpoint is not None and (self.checkpoint / FINISHED).is_file()

    @contextmanager
    def ending(self) -> Generator[None]:
        """Around what publishes. An adapter that is refused for what it is would be refused again: that run is over, as a published one."""
        try:
            yield
        except AdapterInvalid:
            self._discard()
            note(f"{self.folder.name}: nothing of this run is kept, for --resume would end the same: change the recipe and train anew")
            raise
        self._discard()

    def _discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        _own(self.folder)  # which is no more: nothing is held


def open_run(
    recipe: EmbeddingRecipe | CausalLMRecipe,
    *,
    root: Path,
    data_hash: str,
    base_fingerprint: str,
    resume: bool,
    reading: Mapping[str, Any] | None = None,
) -> Run:
    """Begin a run afresh under `root`/.training/<name>, or find where the last one stopped. One that could go on is kept beside it.

    `reading`: how texts are read (prompts, pooling, …), also where the recipe leaves that to files of the base, which may change.
    Raises ResumeRefused where there is no complete checkpoint, or naming each setting that is no longer the same; UsageError where
    another process trains that name.
    """
    folder = root / ".training" / recipe.name
    _own(folder)
    facts = {"recipe": recipe.model_dump(mode="json"), "data": data_hash, "base": base_fingerprint, "machine": _machine(recipe.task)}
    facts["reading"] = dict(reading or {})
    if not resume:
        _set_aside(folder)
        folder.mkdir(parents=True)
        _own(folder)
        write_text(folder / "run.json", json.dumps(facts, indent=1, sort_keys=True))
        return Run(folder, None, resume_command(recipe))
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        kept = [path for other in sorted(folder.parent.glob(f"{recipe.name}~*")) if (path := last_checkpoint(other))]
        if kept:
            names = ", ".join(f"{path.parent} ({path.name})" for path in kept)
            raise ResumeRefused(f"{recipe.name!r} itself has no checkpoint, but earlier runs are kept: {names}; move one to {folder}")
        raise ResumeRefused(f"there is no checkpoint of {recipe.name!r} to resume: start it without --resume")
    try:
        then = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ResumeRefused(f"{recipe.name!r} cannot resume: {folder / 'run.json'} cannot be read: start it without --resume") from None
    _refuse_changes(recipe.name, then, facts)
    return Run(folder, checkpoint, resume_command(recipe))


_owned: dict[Path, int] = {}  # folders of runs that this process trains, and what holds them until it ends


def _own(folder: Path) -> None:
    """No other process trains in `folder` from now on. Where there is none yet, nothing."""
    if (held := _owned.pop(folder, None)) is not None:  # of an earlier run in this same process
        os.close(held)
    if folder.is_dir():
        found = hold(folder)
        if found is None:
            raise UsageError(f"{folder.name!r} is being trained by another process: wait for it, or change `name` in the recipe")
        _owned[folder] = found


def _set_aside(folder: Path) -> None:
    """Make room for a new run: what holds a whole checkpoint, be it of another recipe or base, is moved and never deleted."""
    if reached := last_checkpoint(folder):
        kept = next(path for number in count(1) if not (path := folder.with_name(f"{folder.name}~{number}")).exists())
        folder.rename(kept)
        note(
            f"{folder.name}: begun afresh; an earlier run ({reached.name}) is kept in {kept}: delete it, or move it back to {folder} "
            "and go on with it by --resume"
        )
    shutil.rmtree(folder, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def resume_command(recipe: EmbeddingRecipe | CausalLMRecipe) -> str:
    """The command line that goes on: this process's own with --resume, where it is embedft's."""
    if Path(sys.argv[0]).name in {"embedft", "embedft.exe"}:
        given = [part for part in sys.argv[1:] if part != "--resume"]
        return shlex.join(["embedft", *given, "--resume"])
    command = "train-embed" if recipe.task == "embedding" else "train-lm"
    return f"embedft {command} RECIPE --resume   # RECIPE: that of {recipe.name!r}"


def _machine(task: str) -> dict[str, Any]:
    """Whatever decides, beside recipe, data and base, what a step computes."""
    import torch

    from embedft import attention, gelu, native

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", str(compute_dtype()).removeprefix("torch.")
    found = {"torch": str(torch.__version__), **_versions(), "threads": torch.get_num_threads(), "device": device, "dtype": dtype}
    found["processor"] = hashlib.sha256(native.processor().encode()).hexdigest()[:12]  # torch too chooses its kernels by it
    if task == "embedding":
        found |= {"attention": attention.identity(), "gelu": gelu.identity()}
    return found


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(("embedft", "transformers", "peft", "tokenizers", "bitsandbytes", "sentence-transformers"))
    for name in found:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _refuse_changes(name: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    before, after = _flat(then["recipe"]), _flat(now["recipe"])
    changes = [
        f"{key} was {before.get(key)!r}, is now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    changes += [
        f"the run's {key} was {then['machine'].get(key)!r}, is now {value!r}"
        for key, value in now["machine"].items()
        if then["machine"].get(key) != value
    ]
    if not changes:  # what a recipe says of this has been told
        was, reading = _flat(then.get("reading", now["reading"])), _flat(now["reading"])
        changes = [f"the base's own {key} was {was.get(key)!r}, is now {reading[key]!r}" for key in reading if was.get(key) != reading[key]]
    for what in ("data", "base"):
        if then[what] != now[what]:
            changes.append(f"the {what} changed ({then[what][:12]}… → {now[what][:12]}…)")
    if changes:
        raise ResumeRefused(f"{name!r} cannot resume: " + "; ".join(changes) + ": undo that, or start without --resume")


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(cast("dict[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat

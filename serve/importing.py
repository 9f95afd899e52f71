"""What a PUT names by `source` and is not in the store yet: fetched, checked, proven where nobody has, and then in the store."""

import asyncio
import contextlib
import shutil
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from embedft.adapters.passport import PASSPORT
from embedft.adapters.store import AdapterStore, check_folder
from embedft.adapters.transfer import check_contents, check_weights
from embedft.errors import AdapterInvalid, EmbedftError, InputInvalid
from serve.engine import Engine
from serve.errors import ModelNotFound
from serve.foreign import take
from serve.prover import Prover
from serve.remote import Sources, fetched
from serve.sources import NO_PASSPORT, contained


class Importer:
    """Over the server's store, engines and rules."""

    def __init__(self, store: AdapterStore, engines: dict[str, Engine], prover: Prover, rules: Sources) -> None:
        self._store, self._engines, self._prover, self._rules = store, engines, prover, rules

    @asynccontextmanager
    async def source_of(self, name: str, source: str | None, *, base: str | None) -> AsyncGenerator[str | None]:
        """What the lifecycle can put: `source` itself where the store has it, else the generation of what was fetched, which does not
        stay in the store where it was not put.

        `base` names the base of an adapter without passport. Raises InputInvalid, AdapterInvalid, ModelNotFound.
        """
        if base is not None and (source in (None, "store") or await asyncio.to_thread(self._has, source)):
            raise InputInvalid("invalid_parameter", "what the store has knows its base: leave `base` out, or name another `source`", "base")
        if source is None or ("://" not in source and base is None):
            yield source
            return
        if base is not None and base not in self._engines:
            raise ModelNotFound(base, list(self._engines))
        with self._store.stage() as stage:
            proven = await self._brought(name, source, stage, base=base)
            trial = self._store.trial(stage, renew=proven)
            identity = await asyncio.to_thread(trial.__enter__)
            try:
                yield identity
            except BaseException:
                await asyncio.shield(asyncio.to_thread(self._undone, identity, partial(trial.__exit__, *sys.exc_info())))
                raise
            await asyncio.to_thread(trial.__exit__, None, None, None)

    def _undone(self, identity: str, leave: Callable[[], Any]) -> None:
        leave()
        self._store.discard(identity)

    def _has(self, source: str) -> bool:
        with contextlib.suppress(EmbedftError, OSError):
            return self._store.folder(source).is_dir()
        return False

    async def _brought(self, name: str, source: str, stage: Path, *, base: str | None) -> bool:
        """The adapter into `stage`, proven; whether it was so before."""
        if "://" in source:
            await fetched(source, stage, self._rules, name=name)
            await asyncio.to_thread(check_fetched, stage, name)
        else:
            await asyncio.to_thread(_copied, contained(self._store.root, source), stage, name)
        proven = (stage / PASSPORT).is_file()
        if not proven:
            if base is None:
                raise AdapterInvalid(name, NO_PASSPORT)
            await self._prover.prove("import", stage, name=name, engine=self._engines[base])
        await asyncio.to_thread(check_contents, stage, name)
        return proven


def check_fetched(stage: Path, name: str) -> None:
    check_folder(stage, name)
    check_weights(stage, name)


def _copied(folder: Path, stage: Path, name: str) -> None:
    if not (folder / PASSPORT).is_file():
        take(folder, stage, name)
        return
    check_folder(folder, name)
    shutil.copytree(folder, stage, dirs_exist_ok=True)

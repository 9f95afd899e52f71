"""Which engine an adapter belongs to, and whether its folder is whole and fits it, before anything of it gets there."""

from collections.abc import Collection, Iterable
from pathlib import Path

from embedft.adapters.passport import CONFIG, WEIGHTS, Passport, generation, read_passport
from embedft.adapters.transfer import check_contents
from embedft.errors import AdapterInvalid, BaseMismatch, MethodUnsupported
from embedft.methods import method_named
from serve.engine import Engine
from serve.sources import Found


def checked(name: str, found: Found) -> Passport:
    """The passport of a folder whose content is what its generation says. AdapterInvalid."""
    check_contents(found.folder, name)
    passport = read_passport(found.folder, name=name)
    if generation(found.folder) != found.generation:
        raise AdapterInvalid(name, "its content is not what its generation says: the file was changed or is damaged")
    return passport


def state_of(folder: Path) -> tuple[tuple[str, int, int, int], ...] | None:
    """What would change if a file of the adapter did; None where they cannot be read."""
    try:
        stats = [(name, (folder / name).stat()) for name in (WEIGHTS, CONFIG)]
    except OSError:
        return None
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def home_of(passport: Passport, engines: Iterable[Engine]) -> Engine | None:
    """Where one base is served twice, by two engines or for two tasks, the first of the adapter's task."""
    wanted = (passport.task, passport.base.fingerprint)
    return next((engine for engine in engines if (engine.config.task, engine.info.fingerprint) == wanted), None)


def engine_for(name: str, passport: Passport, engines: Collection[Engine]) -> Engine:
    """The engine of the adapter's base. BaseMismatch where there is none."""
    engine = home_of(passport, engines)
    if engine is None:
        of_task = [engine.said for engine in engines if engine.config.task == passport.task]
        raise BaseMismatch(name, trained_on=passport.base.said, serving=", ".join(of_task) or f"no base for {passport.task}")
    return engine


def check_fit(name: str, passport: Passport, engine: Engine) -> None:
    """Raise BaseMismatch, MethodUnsupported or AdapterInvalid where the engine cannot serve it as it was trained."""
    if passport.base.fingerprint != engine.info.fingerprint:
        raise BaseMismatch(name, trained_on=passport.base.said, serving=engine.said)
    method = method_named(passport.method)
    if engine.config.engine == "vllm" and not method.vllm:
        convert = f"convert it first: embedft adapters convert {name} --to lora; or" if method.to_lora != "no" else "it has no LoRA form:"
        raise MethodUnsupported(method.name, where="by vLLM", why=f"{convert} serve it by the peft engine (embedft serve --engine peft)")
    if method.vllm and passport.r > engine.config.max_lora_rank:
        limit = engine.config.max_lora_rank
        raise AdapterInvalid(name, f"its rank {passport.r} is above this engine's {limit}: raise max_lora_rank of the base")
    if passport.task == "embedding" and passport.pooling != engine.info.pooling:
        raise AdapterInvalid(name, f"it pools by {passport.pooling}, the engine by {engine.info.pooling}")
    if passport.task == "embedding" and passport.max_length > engine.max_length:
        raise AdapterInvalid(name, f"its max_length {passport.max_length} is above the engine's {engine.max_length}")

"""What a server is told: its bases, its store, its limits. Read once from YAML or derived from the store; closed and frozen."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from embedft.adapters.passport import Passport
from embedft.adapters.store import AdapterStore
from embedft.base import BUILT_INS, BaseSpec
from embedft.errors import EmbedftError, UsageError
from embedft.methods.table import METHODS
from embedft.strict_yaml import read_yaml
from serve.engines.settings import EngineKind, parse_cores
from serve.fields import told
from serve.remote import Sources
from serve.tenants import TenantEntry, read_keys

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseConfig(_Section):
    """One base in one engine. `name` is what clients put into `model`; `places`: how many requests the engine is given at once.

    `slots`: how many adapters it holds at once; none: all of them. vLLM has its own LRU beneath (`max_loras` on the device).
    A cross_encoder reranks, has no adapters and an engine of its own kind.
    `tool_parser`: how vLLM finds the base's own tool calls in its text.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    model: str
    task: Literal["embedding", "causal_lm", "cross_encoder"]
    quantization: str = "none"
    revision: str | None = None
    engine: EngineKind | None = None
    max_loras: PositiveInt = 8
    max_lora_rank: PositiveInt = 64
    cores: str | None = None
    max_length: PositiveInt | None = None
    kv_gib: PositiveFloat | None = None
    places: PositiveInt = 32
    slots: PositiveInt | None = None
    tool_parser: str | None = Field(default=None, pattern=r"^[a-z0-9_]+$")

    @model_validator(mode="after")
    def _sound(self) -> "BaseConfig":
        if self.cores is not None:
            parse_cores(self.cores)
        if self.engine is not None and (self.engine == "cross") != (self.task == "cross_encoder"):
            raise ValueError(f"engine {self.engine} cannot serve task {self.task}: leave `engine` out")
        return self

    @property
    def spec(self) -> BaseSpec:
        return BaseSpec(self.model, self.quantization, self.revision)


class Limits(_Section):
    """Caps on one request; beyond them it is a 400 or a 413, never a slow death. And on what may wait: beyond that, 429 or 503.

    `requests`: under way in all; `queue`: requests waiting at one base, `tenant_queue` of one tenant; `queue_seconds`: the longest
    wait, and how long one may go on that is asked again after its engine died; `held_bytes`: of all bodies at once, of which one
    tenant may hold three quarters; `body_seconds`: within which a body must have come; `prompts`: of one completion; `mixes`: of one
    tenant, each kept so long after its last use.
    """

    body_bytes: PositiveInt = 16 << 20
    n: PositiveInt = 16
    max_tokens: PositiveInt = 4096
    prompts: PositiveInt = 64
    inputs: PositiveInt = 2048
    text_characters: PositiveInt = 1_000_000
    requests: PositiveInt = 4096
    queue: PositiveInt = 1024
    tenant_queue: PositiveInt = 256
    queue_seconds: PositiveFloat = 120.0
    held_bytes: PositiveInt = 512 << 20
    body_seconds: PositiveFloat = 60.0
    mixes: PositiveInt = 4
    mix_seconds: PositiveFloat = 900.0


class ServerConfig(_Section):
    """`indexes`: the folder of RAG indexes, or none. `keys`: the tenants' file; without one ($EMBEDFT_KEYS neither) only loopback is bound.

    `start_seconds`: how long an engine may take to answer first; `stop_seconds`: how long it may take to end.
    """

    bases: tuple[BaseConfig, ...] = Field(min_length=1)
    adapters: Path
    indexes: Path | None = None
    keys: Path | None = None
    tenants: tuple[TenantEntry, ...] = ()
    sources: Sources = Sources()
    access_log: bool = True
    log_texts: bool = False
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    allowed_hosts: tuple[str, ...] = ()
    limits: Limits = Limits()
    start_seconds: PositiveFloat = 600.0
    stop_seconds: PositiveFloat = 10.0

    @model_validator(mode="after")
    def _sound(self) -> "ServerConfig":
        names = [base.name for base in self.bases]
        if len(set(names)) != len(names):
            raise ValueError(f"two bases of one name: {', '.join(names)}")
        if self.host not in LOOPBACK and not self.tenants:
            raise ValueError(
                f"host {self.host}: without a keys file the server binds to loopback only; use 127.0.0.1, or name one (--keys FILE; "
                "`embedft key TENANT` makes what goes into it)"
            )
        return self


def load_config(
    path: Path | None,
    *,
    store: AdapterStore,
    engine: EngineKind | None = None,
    adapters: Path | None = None,
    host: str | None = None,
    port: int | None = None,
    indexes: Path | None = None,
    keys: Path | None = None,
) -> ServerConfig:
    """The YAML file's settings, or the bases that the adapters of `store` need. What else is given goes before the file's word, but for
    `engine`, which is for the bases that name none; `store` is where neither names `adapters`.

    Raises UsageError with all that is wrong.
    """
    content: dict[str, Any] = {"adapters": str(store.root), **(_read(path) if path else {"bases": bases_of(store)})}
    given = {"adapters": adapters, "indexes": indexes, "keys": keys}
    content |= {name: str(place.resolve()) for name, place in given.items() if place is not None}
    content |= {name: value for name, value in {"host": host, "port": port}.items() if value is not None}
    if "tenants" in content:
        raise UsageError(f"{path}: tenants stand in a file of their own: keys: FILE")
    if path:
        _resolve_paths(content, path.parent)
    if content.get("indexes") and not Path(str(content["indexes"])).is_dir():
        raise UsageError(f"indexes: there is no folder {content['indexes']}: make it; `embedft rag index --out DIR/NAME` puts one there")
    content["tenants"] = read_keys(Path(str(content["keys"])) if content.get("keys") else None)
    try:
        config = ServerConfig.model_validate(content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc'])) or 'server'}: {told(item, ServerConfig)}" for item in error.errors()]
        raise UsageError(f"{path or 'server'}:\n" + "\n".join(f"  - {problem}" for problem in problems)) from None
    default = engine or default_engine()
    bases = tuple(
        base.model_copy(update={"engine": "cross" if base.task == "cross_encoder" else base.engine or default}) for base in config.bases
    )
    return config.model_copy(update={"bases": with_cores(bases, free_cores())})


def free_cores() -> list[int]:
    """The cores that CPU engines may share out; none where a GPU does the work or the system does not say."""
    if Path("/dev/nvidiactl").exists() or not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))


def with_cores(bases: tuple[BaseConfig, ...], cores: list[int]) -> tuple[BaseConfig, ...]:
    """Give each vLLM engine without cores its own equal part, so that no two share one while another is free."""
    taken = {core for base in bases if base.cores for core in parse_cores(base.cores)}
    left = [core for core in cores if core not in taken]
    waiting = [base.name for base in bases if base.engine == "vllm" and not base.cores]
    if len(waiting) < 2 and not taken:
        return bases
    if len(left) < len(waiting):
        return bases
    parts = {name: left[place :: len(waiting)] for place, name in enumerate(waiting)}
    return tuple(base.model_copy(update={"cores": ",".join(map(str, parts[base.name]))}) if base.name in parts else base for base in bases)


def default_engine() -> EngineKind:
    return "vllm" if importlib.util.find_spec("vllm") else "peft"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected settings such as `bases:`, found none")
    return {str(key): value for key, value in content.items()}


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    """The file's relative paths are relative to it; a base's `model` where a folder of that name is there, as in a recipe."""
    for key in ("adapters", "indexes", "keys"):
        if content.get(key) and not Path(str(content[key])).is_absolute():
            content[key] = str((folder / str(content[key])).resolve())
    bases: Any = content.get("bases")
    for base in bases if isinstance(bases, list) else ():
        if isinstance(base, dict) and isinstance(model := cast("dict[str, Any]", base).get("model"), str):
            there = folder / Path(model).expanduser()
            if model not in BUILT_INS and there.is_dir():
                base["model"] = str(there.resolve())


def _is_lora(passport: Passport) -> bool:
    return passport.method in METHODS and METHODS[passport.method].vllm


def bases_of(store: AdapterStore) -> list[dict[str, Any]]:
    """One base for each fingerprint that an adapter of the store was trained on, with the largest rank among them."""
    found: dict[str, list[Passport]] = {}
    for name in store.names():
        try:
            passport = store.passport(name)
        except EmbedftError:
            continue  # a damaged adapter is listed with its reason once the server runs
        found.setdefault(passport.base.fingerprint, []).append(passport)
    if not found:
        raise UsageError(f"the store {store.root} holds no adapter, so no base to serve: train one, or name bases in a CONFIG file")
    bases: list[dict[str, Any]] = []
    for passports in found.values():
        base, rank = passports[0].base, max((passport.r for passport in passports if _is_lora(passport)), default=16)
        name = Path(base.model).name
        if any(other["name"] == name for other in bases):
            name = f"{name}-{base.quantization}-{base.fingerprint[:6]}"
        bases.append(
            {
                "name": name,
                "model": base.model,
                "quantization": base.quantization,
                "revision": base.revision,
                "task": passports[0].task,
                "max_lora_rank": rank,
            }
        )
    return bases

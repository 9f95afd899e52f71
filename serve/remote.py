"""Adapters from elsewhere: hf://repo@revision, s3://, gs:// and https://, from allowed places only, capped in bytes and time.

A place is allowed by its prefix. An https host must resolve to public addresses (an allowed literal loopback address excepted), the
connection goes to the very address that was checked, and no redirect is followed: a server cannot be sent to its own network.
"""

import asyncio
import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, field_validator

from embedft.adapters.passport import CONFIG, PASSPORT, WEIGHTS
from embedft.adapters.probes import PROBES
from embedft.errors import AdapterInvalid, InputInvalid
from embedft.sentence_folder import FILES as OF_VECTORS

NEEDED, WELCOME = (CONFIG, WEIGHTS), (PASSPORT, PROBES, *OF_VECTORS)
CHUNK = 1 << 20
SCHEMES = ("hf", "s3", "gs", "https", "http")


class Sources(BaseModel):
    """`allow`: prefixes such as hf://our-org/, hf://our-org/repo or s3://bucket/adapters/. None: nothing is fetched from anywhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allow: tuple[str, ...] = ()
    max_bytes: PositiveInt = 2 << 30
    seconds: PositiveFloat = 300.0

    @field_validator("allow")
    @classmethod
    def _places(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in allow:
            place = urlsplit(prefix)
            if place.scheme not in SCHEMES or not place.netloc:
                raise ValueError(f"{prefix!r} allows nothing: write {', '.join(SCHEMES[:-1])} or http, then ://, a host, bucket or user")
        return allow


async def fetched(source: str, stage: Path, rules: Sources, *, name: str) -> None:
    """`fetch` in a thread of its own, which nobody waits for beyond `rules.seconds`: a place that does not answer takes none of the
    threads that requests are worked at in, nor keeps the server from ending. Raises as `fetch` does.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Exception | None] = loop.create_future()

    def run() -> None:
        failure: Exception | None = None
        try:
            fetch(source, stage, rules, name=name)
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(lambda: None if ended.done() else ended.set_result(failure))

    threading.Thread(target=run, name=f"fetch {name}", daemon=True).start()
    try:
        async with asyncio.timeout(rules.seconds):
            failure = await ended
    except TimeoutError:
        raise AdapterInvalid(name, f"it cannot be fetched: not done in {rules.seconds:.0f} s") from None
    if failure is not None:
        raise failure


def fetch(source: str, stage: Path, rules: Sources, *, name: str) -> None:
    """The adapter's files at `source` into `stage`. InputInvalid source_refused; AdapterInvalid where they cannot be had."""
    place = allowed(source, rules.allow)
    until = time.monotonic() + rules.seconds
    try:
        if place.scheme == "hf":
            _from_hub(place, stage, rules)
        elif place.scheme in ("https", "http"):
            _from_web(place, stage, rules, until)
        else:
            import fsspec

            files, root = fsspec.core.url_to_fs(source)
            copy_files(files, str(root), stage, max_bytes=rules.max_bytes, until=until)
    except (InputInvalid, AdapterInvalid):
        raise
    except Exception as error:  # fsspec's backends and the hub raise what they like
        raise AdapterInvalid(name, f"it cannot be fetched: {str(error).splitlines()[0][:300] or type(error).__name__}") from error


def allowed(source: str, prefixes: Sequence[str]) -> SplitResult:
    """`source` taken apart, if one of `prefixes` holds it: same scheme, same host, and a path below it. A repo holds its revisions."""
    refused = InputInvalid("source_refused", "this place is not among the server's allowed sources", "source")
    if len(source) > 1024 or any(ord(letter) <= 32 or ord(letter) > 126 or letter in "\\%" for letter in source):
        raise refused
    try:
        place = urlsplit(source)
        place.port  # noqa: B018  (raises where it is none)
    except ValueError:
        raise refused from None
    path = PurePosixPath(place.path or "/")
    repo = PurePosixPath(place.path.partition("@")[0] or "/") if place.scheme == "hf" else path
    plain = not (place.query or place.fragment or place.username or place.password) and ".." not in path.parts
    if place.scheme not in SCHEMES or not plain:
        raise refused
    for prefix in map(urlsplit, prefixes):
        below = path.is_relative_to(prefix.path or "/") or repo.is_relative_to(prefix.path or "/")
        if (prefix.scheme, prefix.netloc) == (place.scheme, place.netloc) and below:
            return place
    raise refused


def public_address(place: SplitResult) -> str:
    """The address to connect to. A literal one has been allowed by name; what a name resolves to must be public."""
    host = place.hostname or ""
    refused = InputInvalid("source_refused", f"{host} is not a public address", "source")
    try:
        literal = ipaddress.ip_address(host)
        return str(literal)
    except ValueError:
        pass
    if place.scheme != "https":
        raise refused
    found = {entry[4][0] for entry in socket.getaddrinfo(host, place.port or 443, type=socket.SOCK_STREAM)}
    if not found or not all(ipaddress.ip_address(address).is_global for address in found):
        raise refused
    return str(sorted(found)[0])


def copy_files(files: Any, root: str, stage: Path, *, max_bytes: int, until: float) -> None:
    """What an adapter needs out of an fsspec folder; sizes are summed up before the first byte is fetched, and counted as bytes come."""
    listed: dict[str, Any] = files.find(root, detail=True)
    chosen = {name: f"{root.rstrip('/')}/{name}" for name in (*NEEDED, *WELCOME)}
    sizes = {name: listed[path]["size"] for name, path in chosen.items() if path in listed}
    _complete(sizes)
    if sum(sizes.values()) > max_bytes:
        raise InputInvalid("source_too_large", f"{sum(sizes.values())} bytes: at most {max_bytes}", "source")
    left = max_bytes
    for name in sizes:
        with files.open(chosen[name], "rb") as file:
            left = _written(iter(partial(file.read, CHUNK), b""), stage / name, left=left, until=until)


def _from_hub(place: SplitResult, stage: Path, rules: Sources) -> None:
    import huggingface_hub

    repo, at, revision = f"{place.netloc}{place.path}".rstrip("/").partition("@")
    if not at or not revision:
        raise InputInvalid("source_refused", "name the revision: hf://user/repo@revision", "source")
    info: Any = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings if file.rfilename in (*NEEDED, *WELCOME)}
    _complete(sizes)
    if sum(sizes.values()) > rules.max_bytes:
        raise InputInvalid("source_too_large", f"{sum(sizes.values())} bytes: at most {rules.max_bytes}", "source")
    for name in sizes:
        huggingface_hub.hf_hub_download(repo, name, revision=info.sha, local_dir=str(stage))


def _from_web(place: SplitResult, stage: Path, rules: Sources, until: float) -> None:
    import httpx

    address, left = public_address(place), rules.max_bytes
    host = f"[{address}]" if ":" in address else address
    port = f":{place.port}" if place.port else ""
    with httpx.Client(follow_redirects=False, timeout=30, trust_env=False) as client:
        for name in (*NEEDED, *WELCOME):
            url = f"{place.scheme}://{host}{port}{place.path.rstrip('/')}/{name}"
            options: dict[str, Any] = {
                "headers": {"host": place.netloc, "accept-encoding": "identity"},
                "extensions": {"sni_hostname": place.hostname},
            }
            with client.stream("GET", url, **options) as answer:
                if answer.status_code == 404 and name in WELCOME:
                    continue
                if answer.status_code != 200:
                    raise ConnectionError(f"{name}: the server answered {answer.status_code}")
                if (coding := answer.headers.get("content-encoding", "identity").lower()) != "identity":
                    raise ConnectionError(f"{name}: the server sent it as {coding} unasked: let it send the files as they are")
                left = _written(answer.iter_raw(), stage / name, left=left, until=until)


def _written(chunks: Iterable[bytes], path: Path, *, left: int, until: float) -> int:
    """`chunks` into `path`; how many of the `left` bytes may still come. InputInvalid source_too_large, TimeoutError."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        for chunk in chunks:
            left -= len(chunk)
            if left < 0:
                raise InputInvalid("source_too_large", "it sends more bytes than `sources.max_bytes` allows", "source")
            if time.monotonic() > until:
                raise TimeoutError("not done in `sources.seconds`")
            file.write(chunk)
    return left


def _complete(found: Any) -> None:
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise FileNotFoundError(f"there is no {missing[0]} there")

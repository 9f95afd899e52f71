"""Adapters from elsewhere: only from allowed places, never into the server's own network, capped, and whole."""

import asyncio
import gzip
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import fsspec
import pytest
from pydantic import ValidationError

from embedft.adapters.store import AdapterStore
from embedft.errors import AdapterInvalid, InputInvalid
from serve.importing import Importer
from serve.remote import NEEDED, Sources, allowed, copy_files, fetch, public_address
from tests.serve.test_choice import refused
from tests.serve.world import ADMIN, World, fill_adapter

ALLOW = ("hf://our/", "s3://bucket/adapters/", "https://files.example/a/", "http://127.0.0.1:1/")


@pytest.mark.parametrize(
    "source",
    [
        "https://files.example.evil/a/x",
        "https://files.example@evil/a/x",
        "https://evil@files.example/a/x",
        "https://files.example/a/../b",
        "https://files.example/ab/x",
        "https://files.example/a/%2e%2e/b",
        "https://files.example:444/a/x",
        "https://FILES.example/a/x\n",
        "https://files.example/a/x?next=1",
        "https://files.example\\@evil/a/x",
        "http://files.example/a/x",
        "http://169.254.169.254/latest",
        "http://127.0.0.1:2/x",
        "s3://bucket/other",
        "s3://bucket2/adapters/x",
        "file:///etc",
        "memory://x",
        "github://a:b@/x",
        "simplecache::s3://bucket/adapters/x",
        "hf://other/x@1",
        "https://ｆiles.example/a/x",
    ],
)
def test_a_place_that_is_not_allowed_is_refused(source: str) -> None:
    with pytest.raises(InputInvalid) as caught:
        allowed(source, ALLOW)
    assert caught.value.code == "source_refused"


def test_allowed_places_are_taken_apart() -> None:
    assert allowed("https://files.example/a/x", ALLOW).hostname == "files.example"
    assert allowed("s3://bucket/adapters/x", ALLOW).path == "/adapters/x"
    with pytest.raises(InputInvalid):
        allowed("https://files.example/a/x", ())


def test_a_repo_of_the_hub_is_allowed_in_every_revision_or_in_one() -> None:
    assert allowed("hf://our/one@v1", ("hf://our/one",)).path == "/one@v1"
    assert allowed("hf://our/one@v1", ("hf://our/one@v1",)).path == "/one@v1"
    for source in ("hf://our/one@v2", "hf://our/other@v1", "hf://our/one-more@v1"):
        with pytest.raises(InputInvalid):
            allowed(source, ("hf://our/one@v1",))


@pytest.mark.parametrize("prefix", ["our-org/", "ftp://files.example/", "hf:our-org", "https://", ""])
def test_a_prefix_that_could_allow_nothing_is_told(prefix: str) -> None:
    with pytest.raises(ValidationError, match="allows nothing"):
        Sources(allow=(prefix,))


def test_a_name_that_resolves_into_the_own_network_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(address: str) -> Any:
        return lambda *_, **__: [(2, 1, 6, "", (address, 443))]

    for address in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fd00::1", "0.0.0.0"):
        monkeypatch.setattr("socket.getaddrinfo", resolved(address))
        with pytest.raises(InputInvalid, match="public"):
            public_address(allowed("https://files.example/a/x", ALLOW))
    monkeypatch.setattr("socket.getaddrinfo", resolved("93.184.216.34"))
    assert public_address(allowed("https://files.example/a/x", ALLOW)) == "93.184.216.34"
    with pytest.raises(InputInvalid, match="public"):  # whoever could stand between would be believed
        public_address(allowed("http://files.example/a/x", ("http://files.example/",)))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [*resolved("93.184.216.34")(), *resolved("10.1.2.3")()])
    with pytest.raises(InputInvalid, match="public"):
        public_address(allowed("https://files.example/a/x", ALLOW))


def test_of_the_hub_one_revision_is_fetched_and_it_is_measured_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    files = [SimpleNamespace(rfilename=name, size=40) for name in ("adapter_config.json", "adapter_model.safetensors", "evil.bin")]

    def info(_: Any, repo: str, *, revision: str, **__: Any) -> Any:
        asked.append((repo, revision))
        return SimpleNamespace(siblings=files, sha="0123abcd")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name, **more: asked.append((repo, name, more["revision"])))
    rules = Sources(allow=("hf://our/",), max_bytes=80)
    for source in ("hf://our/one", "hf://our/one@"):
        with pytest.raises(InputInvalid, match="name the revision"):
            fetch(source, tmp_path, rules, name="g")
    assert asked == []
    with pytest.raises(InputInvalid, match="80 bytes: at most 79"):
        fetch("hf://our/one@main", tmp_path, rules.model_copy(update={"max_bytes": 79}), name="g")
    assert asked == [("our/one", "main")]
    fetch("hf://our/one@main", tmp_path, rules, name="g")
    assert asked[2:] == [("our/one", file.rfilename, "0123abcd") for file in files[:2]]  # of the commit that was measured
    files.pop(0)
    with pytest.raises(AdapterInvalid, match=r"there is no adapter_config\.json there"):
        fetch("hf://our/one@main", tmp_path, rules, name="g")


def test_no_proxy_of_the_environment_stands_between(
    site: tuple[str, Path], shared_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would resolve names itself, into whatever network it is in."""
    url, folder = site
    (folder / "direct").mkdir()
    fill_adapter(folder / "direct", "g", shared_world.texts, seed=1, scale=1.0, task="embedding")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    fetch(f"{url}/direct", tmp_path, Sources(allow=(f"{url}/",)), name="g")
    assert (tmp_path / "passport.json").is_file()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("site")

    class Pages(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=str(folder))

        def do_GET(self) -> None:
            if self.path.startswith("/sent"):
                self.send_response(302)
                self.send_header("location", "/good/adapter_config.json")
                self.end_headers()
            elif self.path.startswith("/slow"):
                self.send_response(200)
                self.end_headers()
                for _ in range(100):
                    time.sleep(0.05)
                    self.wfile.write(b"x")
            elif self.path.startswith("/packed") or (self.path.startswith("/packs") and "gzip" in self.headers["accept-encoding"]):
                content = gzip.compress((folder / "plain" / Path(self.path).name).read_bytes())
                self.send_response(200)
                self.send_header("content-encoding", "gzip")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            else:
                super().do_GET()

        def log_message(self, *_: Any) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


def test_an_adapter_is_fetched_whole_and_redirects_caps_and_deadlines_hold(
    site: tuple[str, Path], shared_world: World, tmp_path: Path
) -> None:
    url, folder = site
    (folder / "good").mkdir()
    fill_adapter(folder / "good", "g", shared_world.texts, seed=1, scale=1.0, task="embedding")
    (folder / "good" / "evil.bin").write_bytes(b"pickle")
    rules = Sources(allow=(f"{url}/",), max_bytes=1 << 20)
    fetch(f"{url}/good", tmp_path, rules, name="g")
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "passport.json", "probes.safetensors"
    }  # fmt: skip
    assert (tmp_path / "passport.json").read_bytes() == (folder / "good" / "passport.json").read_bytes()
    for path, match in (("sent", "302"), ("none", "404")):
        with pytest.raises(AdapterInvalid, match=match):
            fetch(f"{url}/{path}", tmp_path, rules, name="g")
    with pytest.raises(AdapterInvalid, match="done in"):
        fetch(f"{url}/slow", tmp_path, rules.model_copy(update={"seconds": 0.5}), name="g")
    with pytest.raises(InputInvalid, match="bytes"):
        fetch(f"{url}/good", tmp_path, rules.model_copy(update={"max_bytes": 100}), name="g")


def test_what_says_how_sentence_transformers_makes_vectors_comes_along(site: tuple[str, Path], shared_world: World, tmp_path: Path) -> None:
    url, folder = site
    (folder / "saved" / "1_Pooling").mkdir(parents=True)
    fill_adapter(folder / "saved", "g", shared_world.texts, seed=1, scale=1.0, task="embedding")
    said = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json")
    files = fsspec.filesystem("memory")
    for name in said:
        (folder / "saved" / name).write_text(name)
    for name in (*NEEDED, *said):
        files.pipe_file(f"/bucket/saved/{name}", (folder / "saved" / name).read_bytes())
    (tmp_path / "web").mkdir()
    fetch(f"{url}/saved", tmp_path / "web", Sources(allow=(f"{url}/",)), name="g")
    (tmp_path / "bucket").mkdir()
    copy_files(files, "/bucket/saved", tmp_path / "bucket", max_bytes=1 << 20, until=time.monotonic() + 5)
    for place in ("web", "bucket"):
        assert {name: (tmp_path / place / name).read_text() for name in said} == {name: name for name in said}


def test_what_was_fetched_and_not_put_does_not_stay_in_the_store(site: tuple[str, Path], shared_world: World, tmp_path: Path) -> None:
    url, folder = site
    (folder / "spare").mkdir()
    fill_adapter(folder / "spare", "g", shared_world.texts, seed=1, scale=1.0, task="embedding")
    store = AdapterStore(tmp_path)
    importer = Importer(store, {}, cast("Any", None), Sources(allow=(f"{url}/",)))

    async def put(*, refused: bool) -> None:
        async with importer.source_of("g", f"{url}/spare", base=None) as source:
            assert store.folder(source or "").is_dir()
            if refused:
                raise AdapterInvalid("g", "refused")

    with pytest.raises(AdapterInvalid):
        asyncio.run(put(refused=True))
    assert list((tmp_path / "objects").iterdir()) == []
    asyncio.run(put(refused=False))
    assert len(list((tmp_path / "objects").iterdir())) == 1


def test_a_server_that_may_compress_is_asked_not_to_and_one_that_does_is_refused(
    site: tuple[str, Path], shared_world: World, tmp_path: Path
) -> None:
    url, folder = site
    for name in ("plain", "packs"):
        (folder / name).mkdir()
        fill_adapter(folder / name, "g", shared_world.texts, seed=1, scale=1.0, task="embedding")
    rules = Sources(allow=(f"{url}/",), max_bytes=1 << 20, seconds=5)
    fetch(f"{url}/packs", tmp_path, rules, name="g")
    assert (tmp_path / "passport.json").read_bytes() == (folder / "plain" / "passport.json").read_bytes()
    with pytest.raises(AdapterInvalid, match="gzip"):
        fetch(f"{url}/packed", tmp_path, rules, name="g")


def test_an_fsspec_folder_is_measured_before_a_byte_is_fetched(shared_world: World, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    source = tmp_path / "source"
    source.mkdir()
    fill_adapter(source, "g", shared_world.texts, seed=1, scale=1.0, task="embedding")
    for path in source.iterdir():
        files.pipe_file(f"/bucket/g/{path.name}", path.read_bytes())
    files.pipe_file("/bucket/g/../evil", b"x")
    stage = tmp_path / "stage"
    stage.mkdir()
    until = time.monotonic() + 5
    copy_files(files, "/bucket/g", stage, max_bytes=1 << 20, until=until)
    assert len(list(stage.iterdir())) == 4
    with pytest.raises(InputInvalid, match="bytes"):
        copy_files(files, "/bucket/g", stage, max_bytes=10, until=until)
    with pytest.raises(FileNotFoundError):
        copy_files(files, "/bucket/none", stage, max_bytes=10, until=until)
    listed = files.find("/bucket/g", detail=True)
    small = SimpleNamespace(find=lambda *_, **__: {path: entry | {"size": 1} for path, entry in listed.items()}, open=files.open)
    with pytest.raises(InputInvalid, match="it sends more bytes"):
        copy_files(small, "/bucket/g", stage, max_bytes=100, until=until)
    with pytest.raises(TimeoutError):
        copy_files(files, "/bucket/g", stage, max_bytes=1 << 20, until=time.monotonic() - 1)


def test_places_that_do_not_answer_hold_up_neither_what_serves_nor_the_servers_end(world: World) -> None:
    mute = socket.create_server(("127.0.0.1", 0), backlog=64)
    place = f"http://127.0.0.1:{mute.getsockname()[1]}/"
    server = world.start(sources={"allow": [place], "seconds": 4.0})
    try:
        with ThreadPoolExecutor(40) as pool:
            puts = [pool.submit(server.client.put, f"/v1/adapters/x{n}", json={"source": f"{place}x"}, headers=ADMIN) for n in range(40)]
            time.sleep(0.5)
            long = {"input": "x" * 100_000, "adapter": "a"}  # which is tokenized in a thread
            assert server.post("/v1/embeddings", long, timeout=2.0).status_code == 200
            for put in puts:
                refused(put.result(), 422, "adapter_invalid")
        began = time.monotonic()
    finally:
        server.stop()
        mute.close()
    assert time.monotonic() - began < 8

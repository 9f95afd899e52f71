"""What serve/deploy/ ships: the dashboard asks for metrics that there are, the configuration is one that the server takes."""

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedft.cli import main
from embedft.errors import UsageError
from serve.config import load_config
from serve.tenants import TenantEntry
from serve.tracing import tracing
from tests.serve.world import ROOT, Server, World

DEPLOY = ROOT / "serve" / "deploy"


def test_every_metric_of_the_dashboard_exists(shared: Server) -> None:
    shared.post("/v1/embeddings", {"input": "x", "adapter": "a"})
    shared.post("/v1/completions", {"model": "s", "prompt": "x", "max_tokens": 2, "stream": True})
    shared.post("/v1/embeddings", {"input": "x", "adapter": "nix"})
    there = set(re.findall(r"^# TYPE (\S+)", shared.client.get("/metrics").text, flags=re.MULTILINE))
    panels = json.loads((DEPLOY / "dashboard.json").read_text())["panels"]
    asked = {name for panel in panels for target in panel["targets"] for name in re.findall(r"embedft_\w+", target["expr"])}
    assert len(asked) >= 12
    assert {re.sub(r"_bucket$", "", name) for name in asked} <= there


def test_the_shipped_configuration_is_one_the_server_takes(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "ops", "--admin", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert TenantEntry.model_validate(made["entry"]).admin
    assert made["key"] not in json.dumps(made["entry"])
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"tenants": [made["entry"]]}))
    (tmp_path / "server.yaml").write_text((DEPLOY / "server.yaml").read_text())
    config = load_config(tmp_path / "server.yaml", store=world.store, host="0.0.0.0")
    assert [base.name for base in config.bases] == ["minilm", "seed-lm"]
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounted = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    ours = {"./keys.yaml", "./adapters", "./admin.key"}  # made by whoever deploys
    assert all((DEPLOY / path).is_file() for path in mounted if path not in ours)
    assert main(["key", "no such name!"]) == 2


def test_the_image_is_built_of_what_there_is() -> None:
    build = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["embedft"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    lines = (ROOT / build["dockerfile"]).read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert all((ROOT / source).exists() for source in copied)
    extras = next(line.partition("=")[2] for line in lines if line.startswith("ARG EXTRAS="))
    assert set(extras.split(",")) <= tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()


def test_a_request_is_one_span_without_its_text() -> None:
    import asyncio

    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from serve.access import AccessLog
    from serve.tracing import spans_to

    kept = InMemorySpanExporter()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["record"].tell(tenant="anna", base="words", body="secret")
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def nothing(*_: Any) -> None:
        return

    lines: list[str] = []
    caller = [(b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": caller, "state": {}}
    asyncio.run(AccessLog(app, lines.append, texts=True, trace=spans_to(SimpleSpanProcessor(kept)))(scope, nothing, nothing))
    (span,) = kept.get_finished_spans()
    assert span.attributes is not None
    assert (span.attributes["embedft.tenant"], span.attributes["embedft.status"], span.status.is_ok) == ("anna", 503, False)
    assert "secret" not in str(span.attributes)
    assert "secret" in lines[0]
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"


def test_traces_without_their_library_are_refused_at_the_start_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracing() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UsageError, match=r"pip install 'embedft\[traces\]'"):
        tracing()

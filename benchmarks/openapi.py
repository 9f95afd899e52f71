"""schemathesis over the whole of OpenAPI: no 5xx, no answer that breaks its schema. The tests run a few examples of it, this many.

    python -m benchmarks.openapi --examples 300

The server is a real one over the `fake` engine, with two bases, adapters of every kind and the admin's token.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from serve.openapi import ANSWERS

RESULTS = Path(__file__).parent / "results"
CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance]
SEED = 20261121
ROUTES = sorted(key for key in ANSWERS if not key[1].startswith("/v1/rag"))  # RAG's are there only over indexes


def examine(described: dict[str, Any], method: str, path: str, *, url: str, headers: dict[str, str], examples: int) -> Counter[int]:
    """Statuses of so many generated requests of one operation, always the same ones. Raises at the first answer that is wrong."""
    schema: Any = schemathesis.openapi.from_dict(described)
    statuses: Counter[int] = Counter()

    @seed(SEED)
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy())
    def run(case: Any) -> None:
        try:
            answer = case.call(base_url=url, headers={**(case.headers or {}), **headers})
        except (UnicodeError, httpx.InvalidURL):  # what no client can send
            return
        statuses[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    run()
    return statuses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=300)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.serve.world import ADMIN, make_world

    began, rows, wrong = time.perf_counter(), list[dict[str, Any]](), list[str]()
    with tempfile.TemporaryDirectory(prefix="openapi-") as home:
        server = make_world(Path(home)).start()
        try:
            described = server.client.get("/openapi.json").json()
            for method, path in ROUTES:
                try:
                    found = examine(described, method, path, url=server.url, headers=ADMIN, examples=arguments.examples)
                    rows.append({"route": f"{method.upper()} {path}", "statuses": {str(status): found[status] for status in sorted(found)}})
                except (Exception, BaseExceptionGroup) as error:  # schemathesis' failures are such a group
                    wrong.append(f"{method.upper()} {path}: {str(error)[:2000]}")
        finally:
            server.stop()
    requests = sum(sum(row["statuses"].values()) for row in rows)
    report = {"seed": SEED, "examples_each": arguments.examples, "requests": requests, "seconds": round(time.perf_counter() - began)}
    text = json.dumps({**report, "wrong": wrong, "routes": rows}, indent=2) + "\n"
    (RESULTS / "openapi.json").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

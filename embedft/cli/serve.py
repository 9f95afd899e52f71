"""`embedft serve` and `embedft key`."""

import argparse
import json
from pathlib import Path
from typing import Any

from embedft.cli.options import command, store_of, store_option


def add_commands(commands: Any) -> None:
    serve = command(commands, "serve", _run_server, "serve adapters over their bases, chosen per request by adapter=")
    serve.add_argument(
        "config", metavar="CONFIG", nargs="?", type=Path, help="a YAML file; without one, the bases that the store's adapters need"
    )
    serve.add_argument("--engine", choices=("vllm", "peft", "fake"), help="default: vllm where it is installed, else peft")
    serve.add_argument("--host", help="default: CONFIG's, else 127.0.0.1; any other wants --keys")
    serve.add_argument("--port", type=int, help="default: CONFIG's, else 8000; 0: any that is free")
    serve.add_argument(
        "--indexes", type=Path, metavar="DIR", help="a folder of RAG indexes to answer from (embedft rag index --out DIR/NAME)"
    )
    serve.add_argument("--keys", type=Path, metavar="FILE", help="the tenants' keys file (embedft key TENANT)")
    store_option(serve)
    key = command(commands, "key", _new_key, "make a tenant's API key, and the entry for the server's keys file")
    key.add_argument("tenant", metavar="TENANT")
    key.add_argument("--admin", action="store_true", help="may change what is served, and sees everything")
    key.add_argument("--use", metavar="NAME", action="append", default=[], help="an adapter it may use, or a pattern; repeatable")


def _run_server(arguments: argparse.Namespace) -> int:
    from serve.config import load_config
    from serve.run import run

    options = {"engine": arguments.engine, "host": arguments.host, "port": arguments.port, "indexes": arguments.indexes}
    options |= {"keys": arguments.keys, "adapters": arguments.adapters}
    config = load_config(arguments.config, store=store_of(arguments), **options)
    return run(config)


def _new_key(arguments: argparse.Namespace) -> None:
    from serve.tenants import entry_for, new_key

    key, digest = new_key()
    entry = entry_for(arguments.tenant, digest, admin=arguments.admin, adapters=arguments.use)
    if arguments.json:
        print(json.dumps({"key": key, "entry": entry}))
        return
    print(
        f"give this to {arguments.tenant}; it is shown once and kept nowhere:\n\n    {key}\n\nand this into the keys file, under tenants:\n"
    )
    print(f"  - {json.dumps(entry)}")

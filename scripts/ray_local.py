"""Replicas on Ray Serve, on this machine alone.

    python scripts/ray_local.py [--model DIR] [--adapters DIR ...] [--config FILE] [--replicas N] [--json]

A line on standard input, a JSON object of an application's arguments, changes them and deploys anew. Ends with
standard input, at SIGTERM or at Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from random import SystemRandom
from typing import Any

from gralora_server.model_fetch import ensure_default_model
from gralora_server.ray.local import ENVIRONMENT, HOST, cluster, deploy

EXAMPLES = Path(__file__).parent.parent / "examples" / "adapters"
# Above those of Ray's workers, and below those that a system gives to whoever asks for any: these stay free until Serve
# binds them.
PORTS = range(20_000, 32_000)
HOW_TO_ASK = """\
{replicas} replicas serve at {grpc} (gRPC) and {http} (HTTP). Ask them:

    gralora generate --address {grpc} --adapter pirate "Tell me about the sea."
    gralora adapters list --address {grpc}
    curl http://{http}/v1/models

Ctrl-C ends them."""


def main() -> None:
    options = _options()
    os.environ.update(ENVIRONMENT)
    arguments = _arguments(options)
    free = filter(_is_free, SystemRandom().sample(PORTS, len(PORTS)))
    grpc_port, http_port = options.grpc_port or next(free), options.http_port or next(free)
    cpus = max(os.cpu_count() or 1, options.replicas + 1)
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
        cluster(Path(folder), cpus=cpus, grpc_port=grpc_port, http_port=http_port),
    ):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # Ray has put one of its own there
        deploy(arguments)
        told = {"grpc": f"{HOST}:{grpc_port}", "http": f"{HOST}:{http_port}", "replicas": options.replicas}
        print(json.dumps(told) if options.json else HOW_TO_ASK.format(**told), flush=True)
        for line in sys.stdin:
            arguments = _changed(arguments, json.loads(line))
            deploy(arguments)
            print(json.dumps({"deployed": True}), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--adapters", type=Path, nargs="*", default=[EXAMPLES])
    parser.add_argument("--config", type=Path, help="a configuration file of `gralora serve`")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--grpc-port", type=int, default=9000, help="0: any")
    parser.add_argument("--http-port", type=int, default=8000, help="0: any")
    parser.add_argument("--json", action="store_true", help="say addresses as JSON")
    return parser.parse_args()


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    arguments: dict[str, Any] = {"replicas": {"number": options.replicas, "cpus": 1}}
    if options.config is not None:
        return arguments | {"config": str(options.config.absolute())}
    model = options.model or ensure_default_model()
    sources = [str(folder.absolute()) for folder in options.adapters]
    return arguments | {"engine": {"model": str(model.absolute())}, "adapters": {"sources": sources}}


def _changed(arguments: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Table by table."""
    tables = arguments.keys() | changes.keys()
    return {
        name: arguments[name] | changes[name] if name in arguments and name in changes else (changes | arguments)[name]
        for name in tables
    }


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()

"""The real server in its own process (`gralora serve`), and a client of each of its ports in others."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.worker import Worker
from gralora_server.loadtest.local_server import LocalServer, running


@dataclass(frozen=True, slots=True)
class Service:
    """A server that takes requests, and the clients that ask it."""

    grpc_client: Worker
    http_client: Worker
    server: LocalServer


@contextmanager
def serving(
    model_dir: Path,
    adapters_dir: Path,
    *,
    max_num_seqs: int,
    adapter_pool_bytes: int,
    kv_cache_bytes: int,
    more: Sequence[str] = (),
) -> Iterator[Service]:
    """With the settings of the engine that it is compared with. All processes end with the block."""
    command = ["serve", "--log-level", "error", "--address", "127.0.0.1:0", "--http-address", "127.0.0.1:0"]
    command += ["--model", str(model_dir), "--adapters", str(adapters_dir), "--no-prefix-cache"]
    command += ["--max-num-seqs", str(max_num_seqs), "--kv-cache-bytes", str(kv_cache_bytes)]
    command += ["--adapter-pool-bytes", str(adapter_pool_bytes), *more]
    with running(command) as server:
        assert server.http_address is not None
        with (
            client("benchmarks.grpc_client", server.address) as grpc_client,
            client("benchmarks.http_client", server.http_address, "ours") as http_client,
        ):
            yield Service(grpc_client, http_client, server)


def client(module: str, *arguments: str) -> Worker:
    return Worker([sys.executable, "-m", module, *arguments], environment=os.environ)

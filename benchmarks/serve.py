"""The real server in its own process (`gralora serve`), and a client in another."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.worker import Worker
from gralora_server.loadtest.local_server import LocalServer, running


@dataclass(frozen=True, slots=True)
class Service:
    """A server that takes requests, and the client that asks it."""

    client: Worker
    server: LocalServer


@contextmanager
def serving(
    model_dir: Path, adapters_dir: Path, *, max_num_seqs: int, adapter_pool_bytes: int, kv_cache_bytes: int
) -> Iterator[Service]:
    """With the settings of the engine that it is compared with. Both processes end with the block."""
    command = ["serve", "--log-level", "error", "--address", "127.0.0.1:0"]
    command += ["--model", str(model_dir), "--adapters", str(adapters_dir), "--no-prefix-cache"]
    command += ["--max-num-seqs", str(max_num_seqs), "--kv-cache-bytes", str(kv_cache_bytes)]
    command += ["--adapter-pool-bytes", str(adapter_pool_bytes)]
    with running(command) as server:
        client = [sys.executable, "-m", "benchmarks.grpc_client", server.address]
        with Worker(client, environment=os.environ) as worker:
            yield Service(worker, server)

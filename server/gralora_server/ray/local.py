"""A cluster of Ray on this machine alone, for trying, tests and measurements: on loopback, without a dashboard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

APPLICATION = "gralora"
SERVICES = ("gralora_server.ray.ingress:add_services",)
# Before Ray is imported: nobody is asked for a token or told of the use, and the proxy is the one that streams gRPC.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_worker_niceness": "0",  # 15 of its own accord: replicas would stand behind all else that this machine does
}
HOST = "127.0.0.1"
OBJECT_STORE_BYTES = 128 << 20  # messages do not go through it


@contextmanager
def cluster(folder: Path, *, cpus: int, grpc_port: int, http_port: int) -> Iterator[None]:
    """Ray and its proxies while it lasts. `folder`: for sockets, so its path is short; and for logs."""
    import ray
    from ray import serve

    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=str(folder),
        _node_ip_address=HOST,
    )
    try:
        serve.start(
            http_options={"host": HOST, "port": http_port},
            grpc_options={"port": grpc_port, "grpc_servicer_functions": [*SERVICES]},
            logging_config={"enable_access_log": False},  # our own log has a line for each call
        )
        yield
        serve.shutdown()
    finally:
        ray.shutdown()


def deploy(arguments: Mapping[str, Any]) -> None:
    """Run the application, or take the one that runs to this state. Returns when all replicas serve."""
    from ray import serve

    from gralora_server.ray_app import build

    serve.run(build(arguments), name=APPLICATION)

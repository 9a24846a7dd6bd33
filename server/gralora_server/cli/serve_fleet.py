"""`gralora serve-fleet`: the rival that `gralora loadtest compare` starts. Not for serving."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gralora_runtime.config import EngineConfig, in_directory
from gralora_server.cli.environment import limit_spinning
from gralora_server.cli.logs import configure
from gralora_server.cli.options import Json, parse_address, parse_bytes
from gralora_server.cli.output import announce
from gralora_server.config import ServerConfig
from gralora_server.ports import Engine
from gralora_server.settings.sections import DEFAULT_ADDRESS
from gralora_server.settings.values import default_of


def serve_fleet(
    *,
    model: Annotated[Path, typer.Option(help="A model directory.")],
    adapters: Annotated[Path, typer.Option(help="The directory of adapters to merge.")],
    max_models: Annotated[int, typer.Option(min=1, help="Merged models in memory at once.")],
    preload: Annotated[list[str] | None, typer.Option(help="Adapters that are merged before it serves.")] = None,
    address: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = DEFAULT_ADDRESS,
    max_num_seqs: Annotated[int, typer.Option(help="Requests in one step of one model.")] = default_of(
        EngineConfig, "max_num_seqs"
    ),
    kv_cache_bytes: Annotated[
        int | None, typer.Option(parser=parse_bytes, metavar="BYTES", help="Of all models together.")
    ] = None,
    log_level: Annotated[str, typer.Option()] = "info",
    json: Json = False,
) -> None:
    """Serve each adapter as a merged model of its own; the models take turns. For comparison."""
    configure(log_level)
    limit_spinning()
    import uvloop

    from gralora_server.loadtest.fleet import FleetEngine
    from gralora_server.service import serve

    host, port = parse_address(address)
    config = EngineConfig(
        model=model, adapters=in_directory(adapters), max_num_seqs=max_num_seqs, kv_cache_bytes=kv_cache_bytes
    )

    async def start() -> Engine:
        return await FleetEngine.start(config, max_models, preload or ())

    def on_serving(port: int) -> None:
        announce(f"{host}:{port}", as_json=json, model=model)

    uvloop.run(serve(ServerConfig(host=host, port=port), start, on_serving=on_serving))

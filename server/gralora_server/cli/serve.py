"""`gralora serve`: settings to configurations, and the server's life on uvloop."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from gralora_kernels.stages import StartStage
from gralora_runtime.config import EngineConfig
from gralora_server.cli.environment import limit_spinning
from gralora_server.cli.logs import configure
from gralora_server.cli.model import default_model
from gralora_server.cli.options import Json
from gralora_server.cli.output import ExitCode, announce, print_line
from gralora_server.cli.progress import showing
from gralora_server.cli.setting_options import ConfigOption, takes_settings
from gralora_server.config import HttpConfig, ServerConfig
from gralora_server.settings.configurations import engine_config, server_config
from gralora_server.settings.layers import Layers

if TYPE_CHECKING:
    from gralora_server.ports import Engine
    from gralora_server.settings.reloader import Reloader

MAIN = "from gralora_server.cli import main; main()"

_log = logging.getLogger("gralora_server.start")


@takes_settings(ConfigOption)
def serve(
    layers: Layers,
    *,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
    json: Json = False,
) -> None:
    """Serve a model and its adapters until SIGTERM or Ctrl-C. SIGHUP reads the file of --config again.

    Prints one line, SERVING on HOST:PORT, when requests are taken (with --json: address, model, metrics_address,
    http_address and ui_address).
    """
    from gralora_server.settings.reloader import Reloader

    reloader = Reloader(layers.read)
    settings = reloader.settings
    configure(settings.server.log_level, settings.server.log_format)
    config = replace(server_config(settings), supervised=supervised)
    if settings.server.supervise and not supervised:
        raise typer.Exit(_supervise(config, layers))
    limit_spinning()
    model = settings.engine.model if settings.engine.model is not None else default_model()
    if config.vllm_grpc:
        config = replace(config, model_dir=model)
    _run(config, engine_config(settings, model), reloader, as_json=json)


def _supervise(config: ServerConfig, layers: Layers) -> int:
    """The same command in a child, with ports that are known."""
    from gralora_server.settings.reloader import Reloader
    from gralora_server.supervisor import supervise

    def command(shared: ServerConfig) -> list[str]:
        words = [sys.executable, "-c", MAIN, *sys.argv[1:], "--supervised", "--address", _address(shared)]
        return words if shared.http is None else [*words, "--http-address", _address(shared.http)]

    work = supervise(config, command, settings=lambda: Reloader(layers.read), say=print_line, hopeless=ExitCode.USAGE)
    return asyncio.run(work)


def _address(one: ServerConfig | HttpConfig) -> str:
    return f"{one.host}:{one.port}"


async def _start_engine(config: EngineConfig, stage: StartStage) -> Engine:
    with stage("Libraries"):
        from gralora_runtime.async_engine import AsyncEngine

        gc.freeze()  # all of it stays: to pass over it once more takes the collector 300 ms
    return await AsyncEngine.start(config, stage)


def _run(server_config: ServerConfig, engine_config: EngineConfig, reloader: Reloader, *, as_json: bool) -> None:
    import uvloop

    from gralora_server.service import serve as serve_until_stopped

    ports = {"metrics": server_config.metrics, "http": server_config.http, "ui": server_config.ui}
    also: dict[str, str | None] = {f"{name}_address": None for name in ports}

    def note(name: str, port: int) -> None:
        config = ports[name]
        assert config is not None
        also[f"{name}_address"] = f"{config.host}:{port}"

    shown = ExitStack()

    def on_serving(port: int) -> None:
        shown.close()
        announce(f"{server_config.host}:{port}", as_json=as_json, model=engine_config.model, **also)

    with shown:
        stage = shown.enter_context(showing(_log.info))
        uvloop.run(
            serve_until_stopped(
                server_config,
                lambda: _start_engine(engine_config, stage),
                reloader=reloader,
                on_serving=on_serving,
                on_metrics=partial(note, "metrics"),
                on_http=partial(note, "http"),
                on_ui=partial(note, "ui"),
            )
        )

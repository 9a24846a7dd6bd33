"""`gralora serve`: options to configurations, and the server's life on uvloop."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gralora_runtime.config import DEVICES, DTYPES, KERNEL_BACKENDS, PIPELINES, WATCHES, EngineConfig
from gralora_server.cli.environment import limit_spinning
from gralora_server.cli.logs import LEVELS, configure
from gralora_server.cli.model import default_model
from gralora_server.cli.options import (
    DEFAULT_ADDRESS,
    Json,
    default_of,
    parse_address,
    parse_bytes,
    parse_graphs,
    parse_source,
)
from gralora_server.cli.output import CommandError, ExitCode, announce, print_line
from gralora_server.config import MetricsConfig, ServerConfig, TlsConfig

if TYPE_CHECKING:
    from gralora_server.ports import Engine

MAIN = "from gralora_server.cli import main; main()"
ADAPTERS, ENGINE, MEMORY, SERVER = "Adapters", "Engine", "Memory", "Server"


def _engine_option(name: str, text: str = "", *, panel: str = ENGINE, flag: str | None = None, **extra: Any) -> Any:
    names = [flag] if flag is not None else []
    return typer.Option(default_of(EngineConfig, name), *names, help=text, rich_help_panel=panel, **extra)


def _server_option(name: str, text: str = "", *, flag: str | None = None, **extra: Any) -> Any:
    names = [flag] if flag is not None else []
    return typer.Option(default_of(ServerConfig, name), *names, help=text, rich_help_panel=SERVER, **extra)


def _bytes_option(name: str, text: str, *, panel: str = MEMORY) -> Any:
    return _engine_option(name, text, panel=panel, parser=parse_bytes, metavar="BYTES")


def serve(
    *,
    model: Annotated[
        Path | None, typer.Option(help="A model directory. Default: SmolLM2-135M-Instruct, prepared once.")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE[,hold]",
            help="Where adapters come from: a directory with one directory each, the hub's cache, hf://ORG or "
            "hf://ORG/NAME, s3://BUCKET/PREFIX or https://HOST/PATH/{name}.tar.gz. May be given several times. "
            "With ,hold new content waits for a promotion.",
            rich_help_panel=ADAPTERS,
        ),
    ] = None,
    allow_root: Annotated[
        list[Path] | None,
        typer.Option(help="Links in adapter directories may end below this directory, too.", rich_help_panel=ADAPTERS),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="What outlives the server: versions and promotions, downloads, uploads, copies of old versions.",
            rich_help_panel=ADAPTERS,
        ),
    ] = None,
    keep_versions: int = _engine_option(
        "keep_versions", "Versions of a name that are kept; more only if they are in use.", panel=ADAPTERS
    ),
    keep_versions_days: float = _engine_option(
        "keep_versions_days", "Older versions go, counted from their last use.", panel=ADAPTERS
    ),
    copies_bytes: int = _bytes_option(
        "copies_bytes", "Copies of versions whose files may be overwritten.", panel=ADAPTERS
    ),
    download_bytes: int = _bytes_option("download_bytes", "Adapters from other machines.", panel=ADAPTERS),
    hub_endpoint: str = _engine_option("hub_endpoint", "Of hf:// sources.", panel=ADAPTERS),
    hub_token: Annotated[
        str | None, typer.Option(envvar="HF_TOKEN", help="For private adapters.", rich_help_panel=ADAPTERS)
    ] = None,
    s3_endpoint: str | None = _engine_option("s3_endpoint", "Of s3:// sources. Default: AWS.", panel=ADAPTERS),
    allow_archives: bool = _engine_option(
        "allow_archives", "Allow https:// sources.", panel=ADAPTERS, flag="--allow-archives"
    ),
    watch: str = _engine_option(
        "watch", f"Whether directories are watched for changes: {', '.join(WATCHES)}.", panel=ADAPTERS
    ),
    load_share: float = _engine_option(
        "load_share", "Of the cores' time, for loading adapters while steps run on them. 1: no limit.", panel=ADAPTERS
    ),
    address: Annotated[
        str, typer.Option(help="HOST:PORT to listen on; port 0 lets the system choose.")
    ] = DEFAULT_ADDRESS,
    device: str = _engine_option("device", ", ".join(DEVICES)),
    dtype: str = _engine_option("dtype", ", ".join(DTYPES)),
    kernel_backend: str = _engine_option("kernel_backend", ", ".join(KERNEL_BACKENDS)),
    threads: int | None = _engine_option("num_threads", "Default: every core.", flag="--threads"),
    max_num_seqs: int = _engine_option("max_num_seqs", "Requests in one step."),
    max_num_batched_tokens: int = _engine_option("max_num_batched_tokens", "Tokens in one step."),
    max_model_len: int | None = _engine_option("max_model_len", "Prompt and output. Default: the model's own."),
    max_queue: int = _engine_option("max_queue", "Requests that may wait."),
    max_adapter_rank: int = _engine_option("max_adapter_rank", "Largest r * k + hybrid r."),
    max_adapter_slots: int = _engine_option("max_adapter_slots", "Adapters in the pool at once."),
    prefix_cache: bool = _engine_option(
        "enable_prefix_cache", "Reuse the pages of common prefixes.", flag="--prefix-cache/--no-prefix-cache"
    ),
    cuda_graphs: Annotated[
        Any,
        typer.Option(
            parser=parse_graphs,
            metavar="on|off|ROWS,...",
            help="Decode steps that a GPU captures at start: on (up to --max-num-seqs rows), off, or numbers of rows.",
            rich_help_panel=ENGINE,
        ),
    ] = "on",
    pipeline: str = _engine_option(
        "pipeline", f"Plan and launch a step while the one before runs: {', '.join(PIPELINES)} (auto: on a GPU)."
    ),
    batch_invariant: bool = _engine_option(
        "batch_invariant", "On a GPU, the same bits whatever shares the batch, at the price of slower products."
    ),
    page_size: int = _engine_option("page_size", "Tokens.", panel=MEMORY),
    kv_cache_bytes: int | None = _bytes_option("kv_cache_bytes", "Default: from the free memory."),
    adapter_pool_bytes: int | None = _bytes_option("adapter_pool_bytes", "Default: from the free memory."),
    host_cache_bytes: int = _bytes_option("host_cache_bytes", "Adapters kept in host memory behind the pool."),
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="Bearer tokens, one a line, each optionally followed by generate or admin.", rich_help_panel=SERVER
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM file of the certificate: serve with TLS.", rich_help_panel=SERVER)
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.", rich_help_panel=SERVER)] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM file: serve only clients certified by it.", rich_help_panel=SERVER)
    ] = None,
    metrics_address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a page for Prometheus. Default: none is served.", rich_help_panel=SERVER),
    ] = None,
    metrics_max_adapters: int = _engine_option(
        "max_named_adapters",
        "Adapters with series of their own; the others are counted together.",
        panel=SERVER,
        flag="--metrics-max-adapters",
    ),
    reflection: bool = _server_option("reflection", "Answer gRPC reflection."),
    max_request_s: float | None = _server_option("max_request_s", "Longest generation. Default: no limit."),
    grace_s: float = _server_option("drain_grace_s", "Running requests may finish after SIGTERM.", flag="--grace-s"),
    step_timeout_s: float = _server_option(
        "step_timeout_s", "A step that takes longer is stuck: no new requests are taken, and --supervise starts anew."
    ),
    supervise: Annotated[
        bool,
        typer.Option(
            "--supervise",
            help="Serve in a child, and start another when it ends; the port stays.",
            rich_help_panel=SERVER,
        ),
    ] = False,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
    log_level: Annotated[str, typer.Option(help=", ".join(LEVELS), rich_help_panel=SERVER)] = "info",
    json: Json = False,
) -> None:
    """Serve a model and its adapters until SIGTERM or Ctrl-C.

    Prints one line, SERVING on HOST:PORT, when requests are taken (with --json: address, model and metrics_address).
    """
    if log_level not in LEVELS:
        raise CommandError(ExitCode.USAGE, f"--log-level must be one of {', '.join(LEVELS)}, got {log_level!r}")
    host, port = parse_address(address)
    server_config = ServerConfig(
        host=host,
        port=port,
        tls=_tls(tls_cert, tls_key, tls_client_ca),
        auth_token_file=token_file,
        metrics=_metrics(metrics_address),
        reflection=reflection,
        max_request_s=max_request_s,
        drain_grace_s=grace_s,
        step_timeout_s=step_timeout_s,
        supervised=supervised,
    )
    configure(log_level)
    if supervise and not supervised:
        raise typer.Exit(_supervise(server_config))
    limit_spinning()
    engine_config = EngineConfig(
        model=model if model is not None else default_model(),
        adapters=tuple(map(parse_source, adapters or ())),
        allow_roots=tuple(allow_root or ()),
        state_dir=state_dir,
        keep_versions=keep_versions,
        keep_versions_days=keep_versions_days,
        copies_bytes=copies_bytes,
        download_bytes=download_bytes,
        hub_endpoint=hub_endpoint,
        hub_token=hub_token,
        s3_endpoint=s3_endpoint,
        allow_archives=allow_archives,
        watch=watch,
        device=device,
        dtype=dtype,
        kernel_backend=kernel_backend,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        max_queue=max_queue,
        page_size=page_size,
        kv_cache_bytes=kv_cache_bytes,
        adapter_pool_bytes=adapter_pool_bytes,
        max_adapter_slots=max_adapter_slots,
        host_cache_bytes=host_cache_bytes,
        max_adapter_rank=max_adapter_rank,
        enable_prefix_cache=prefix_cache,
        num_threads=threads,
        load_share=load_share,
        cuda_graphs=cuda_graphs,
        pipeline=pipeline,
        batch_invariant=batch_invariant,
        max_named_adapters=metrics_max_adapters,
    )
    _run(server_config, engine_config, as_json=json)


def _tls(certificate: Path | None, private_key: Path | None, client_ca: Path | None) -> TlsConfig | None:
    if certificate is not None and private_key is not None:
        return TlsConfig(certificate=certificate, private_key=private_key, client_ca=client_ca)
    if certificate is not None or private_key is not None or client_ca is not None:
        raise CommandError(ExitCode.USAGE, "--tls-cert and --tls-key belong together, and --tls-client-ca needs both")
    return None


def _metrics(address: str | None) -> MetricsConfig | None:
    if address is None:
        return None
    host, port = parse_address(address)
    return MetricsConfig(host=host.strip("[]"), port=port)


def _supervise(server_config: ServerConfig) -> int:
    """The same command in a child, with a port that is known."""
    from gralora_server.supervisor import supervise

    def command(port: int) -> list[str]:
        return [sys.executable, "-c", MAIN, *sys.argv[1:], "--supervised", "--address", f"{server_config.host}:{port}"]

    return asyncio.run(supervise(server_config, command, say=print_line, hopeless=ExitCode.USAGE))


async def _start_engine(config: EngineConfig) -> Engine:
    from gralora_runtime.async_engine import AsyncEngine

    return await AsyncEngine.start(config)


def _run(server_config: ServerConfig, engine_config: EngineConfig, *, as_json: bool) -> None:
    import uvloop

    from gralora_server.service import serve as serve_until_stopped

    metrics_address: str | None = None

    def note_metrics(port: int) -> None:
        nonlocal metrics_address
        assert server_config.metrics is not None
        metrics_address = f"{server_config.metrics.host}:{port}"

    def on_serving(port: int) -> None:
        address = f"{server_config.host}:{port}"
        announce(address, as_json=as_json, model=engine_config.model, metrics_address=metrics_address)

    serving = serve_until_stopped(
        server_config, lambda: _start_engine(engine_config), on_serving=on_serving, on_metrics=note_metrics
    )
    uvloop.run(serving)

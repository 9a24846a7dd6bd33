"""The whole configuration: each setting once, with its type, its text and its default. Knows nothing of where it is
read from; `configurations.py` says what the engine and the service make of it.

A setting is one line. What it is called in the file is its name here; its option and its variable follow from that
(`table.py`), and so do the help texts, the JSON schema, the example file and the table in the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, SecretStr

from gralora_runtime.config import EngineConfig
from gralora_server.config import ServerConfig
from gralora_server.settings.values import (
    Address,
    Bytes,
    Device,
    Dtype,
    Graphs,
    KernelBackend,
    LogFormat,
    LogLevel,
    Pipeline,
    Source,
    Watch,
    Weights,
    default_of,
)
from gralora_server.tenants.settings import Count, Positive, Strict, TenancySettings

DEFAULT_ADDRESS = f"{default_of(ServerConfig, 'host')}:{default_of(ServerConfig, 'port')}"


@dataclass(frozen=True, slots=True)
class Called:
    """What a setting is called elsewhere, where that is not its name here."""

    option: str = ""  # on the command line, without the dashes
    field: str = ""  # of the engine's or the service's configuration
    variable: str = ""  # that is also looked at, after its own


def _engine(name: str, text: str) -> Any:
    return Field(default=default_of(EngineConfig, name), description=text)


def _server(name: str, text: str) -> Any:
    return Field(default=default_of(ServerConfig, name), description=text)


class Section(Strict):
    """A table of the file whose settings are options and variables, too."""

    reloads: ClassVar[bool] = False  # whether a running server takes changes of it


class AdapterSettings(Section):
    """Where adapters come from, and what is kept of them."""

    sources: Annotated[tuple[Source, ...], Called(option="adapters", field="adapters")] = _engine(
        "adapters",
        "Where adapters come from: a directory with one directory each, the hub's cache, hf://ORG or hf://ORG/NAME, "
        "s3://BUCKET/PREFIX or https://HOST/PATH/{name}.tar.gz. With ,hold new content waits for a promotion.",
    )
    allow_roots: Annotated[tuple[Path, ...], Called(option="allow-root")] = _engine(
        "allow_roots", "Links in adapter directories may end below these directories, too."
    )
    allow_unknown_config_keys: Annotated[tuple[str, ...], Called(option="allow-unknown-config-key")] = _engine(
        "allow_unknown_config_keys",
        "A key of adapter_config.json that is not known here: it is passed over, as PEFT does, and told.",
    )
    state_dir: Path | None = _engine(
        "state_dir", "What outlives the server: versions and promotions, downloads, uploads, copies of old versions."
    )
    keep_versions: Count = _engine("keep_versions", "Versions of a name that are kept; more only if they are in use.")
    keep_versions_days: Annotated[float, Field(gt=0)] = _engine(
        "keep_versions_days", "Older versions go, counted from their last use."
    )
    copies_bytes: Bytes = _engine("copies_bytes", "Copies of versions whose files may be overwritten.")
    download_bytes: Bytes = _engine("download_bytes", "Adapters from other machines.")
    upload_bytes: Bytes = _engine("upload_bytes", "Adapters that clients sent.")
    hub_endpoint: str = _engine("hub_endpoint", "Of hf:// sources.")
    hub_token: Annotated[SecretStr | None, Called(variable="HF_TOKEN")] = _engine(
        "hub_token", "For private adapters. Default: $HF_TOKEN."
    )
    s3_endpoint: str | None = _engine("s3_endpoint", "Of s3:// sources. Default: AWS.")
    allow_archives: bool = _engine("allow_archives", "Allow https:// sources.")
    watch: Watch = _engine("watch", "Whether directories are watched for changes.")
    load_share: Annotated[float, Field(gt=0, le=1)] = _engine(
        "load_share", "Of the cores' time, for loading adapters while steps run on them. 1: no limit."
    )


class EngineSettings(Section):
    """The model, and how its steps are computed."""

    model: Path | None = Field(
        default=None, description="A model directory. Default: SmolLM2-135M-Instruct, prepared once."
    )
    device: Device = _engine("device", "Where steps are computed.")
    dtype: Dtype = _engine("dtype", "What they are computed in. auto: float32 on the CPU, the checkpoint's on a GPU.")
    weights: Weights = _engine(
        "weights",
        "The base model's in a CPU's memory. as-saved: in 4, 8 or 16 bits where those hold them. Answers are the same, "
        "bit for bit.",
    )
    kernel_backend: KernelBackend = _engine("kernel_backend", "Which kernels apply adapters.")
    threads: Annotated[Count | None, Called(field="num_threads")] = _engine("num_threads", "Default: every core.")
    max_num_seqs: Count = _engine("max_num_seqs", "Requests in one step.")
    max_num_batched_tokens: Count = _engine("max_num_batched_tokens", "Tokens in one step.")
    max_model_len: Count | None = _engine("max_model_len", "Prompt and output. Default: the model's own.")
    max_queue: Count = _engine("max_queue", "Requests that may wait; one tenant has at most four fifths of them.")
    max_queue_tokens: Count | None = _engine(
        "max_queue_tokens", "Tokens of prompts that may wait. Default: sixteen times what the KV cache holds."
    )
    profile: Path | None = Field(
        default=None,
        description="Of this machine, by gralora plan profile: what tenants are charged for. Default: a CPU's.",
    )
    max_adapter_rank: int = _engine("max_adapter_rank", "Largest r * k + hybrid r.")
    max_added_tokens: int = _engine("max_added_tokens", "Tokens that an adapter may have more than the base model.")
    max_adapter_slots: Count = _engine("max_adapter_slots", "Adapters in the pool at once.")
    prefix_cache: Annotated[bool, Called(field="enable_prefix_cache")] = _engine(
        "enable_prefix_cache", "Reuse the pages of common prefixes."
    )
    cuda_graphs: Graphs = _engine(
        "cuda_graphs",
        "Decode steps that a GPU captures at start: on (up to max_num_seqs rows), off, or numbers of rows.",
    )
    pipeline: Pipeline = _engine("pipeline", "Plan and launch a step while the one before runs. auto: on a GPU.")
    batch_invariant: bool = _engine(
        "batch_invariant", "On a GPU, the same bits whatever shares the batch, at the price of slower products."
    )


class MemorySettings(Section):
    """How memory is shared out."""

    page_size: Count = _engine("page_size", "Tokens in a page of the KV cache.")
    kv_cache_bytes: Bytes | None = _engine("kv_cache_bytes", "Keys and values. Default: from the free memory.")
    adapter_pool_bytes: Bytes | None = _engine(
        "adapter_pool_bytes", "Adapters that steps use. Default: from the free memory."
    )
    host_cache_bytes: Bytes = _engine("host_cache_bytes", "Adapters kept in host memory behind the pool.")


class ServerSettings(Section):
    """How the server is reached, and by whom."""

    address: Address = Field(
        default=DEFAULT_ADDRESS, description="HOST:PORT to listen on; port 0 lets the system choose."
    )
    token_file: Annotated[Path | None, Called(field="auth_token_file")] = _server(
        "auth_token_file", "Bearer tokens, one a line, each optionally followed by generate or admin."
    )
    tls_cert: Path | None = Field(default=None, description="PEM file of the certificate: serve with TLS.")
    tls_key: Path | None = Field(default=None, description="PEM file of its key.")
    tls_client_ca: Path | None = Field(default=None, description="PEM file: serve only clients certified by it.")
    http_address: Address | None = Field(
        default=None, description="HOST:PORT for OpenAI's clients, over HTTP. Default: there is none."
    )
    ui_address: Address | None = Field(
        default=None,
        description="HOST:PORT of a page for browsers that shows the server at work. Default: none is served.",
    )
    metrics_address: Address | None = Field(
        default=None, description="HOST:PORT of a page for Prometheus. Default: none is served."
    )
    metrics_max_adapters: Annotated[int, Field(ge=0), Called(field="max_named_adapters")] = _engine(
        "max_named_adapters", "Adapters with series of their own; the others are counted together."
    )
    otlp_endpoint: str | None = Field(
        default=None, description="http://HOST:4317 of an OpenTelemetry collector, for traces. Default: there are none."
    )
    trace_sampling: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0, description="Share of requests that are traced, of those whose clients trace nothing themselves."
    )
    explain_requests: Annotated[int, Field(ge=0), Called(field="max_explained_requests")] = _engine(
        "max_explained_requests", "Requests that ended last, of which gralora explain can tell where their time went."
    )
    kserve: bool = _server("kserve", "Serve KServe's and Triton's gRPC clients, too.")
    vllm_grpc: bool = _server("vllm_grpc", "Serve vLLM's gRPC protocol, too: a worker of NVIDIA Dynamo.")
    reflection: bool = _server("reflection", "Answer gRPC reflection.")
    max_message_bytes: Bytes = _server("max_message_bytes", "Largest message that is received.")
    max_request_s: Positive | None = _server("max_request_s", "Longest generation. Default: no limit.")
    max_connection_age_s: Positive | None = _server(
        "max_connection_age_s", "Connections are closed after it, so that balancers spread them anew. Default: never."
    )
    write_timeout_s: Positive = _server("write_timeout_s", "A client that takes no message for so long is dropped.")
    grace_s: Annotated[float, Field(ge=0), Called(field="drain_grace_s")] = _server(
        "drain_grace_s", "Running requests may finish after SIGTERM."
    )
    step_timeout_s: Positive = _server(
        "step_timeout_s", "A step that takes longer is stuck: nothing new is begun, and supervised servers start anew."
    )
    supervise: bool = Field(
        default=False, description="Serve in a child process, and start another when it ends; the port stays."
    )
    log_format: LogFormat = Field(default="human", description="Lines for people, or JSON objects.")
    log_level: LogLevel = Field(default="info", description="What is logged to standard error.")


class ObjectiveSettings(Section):
    """What latency requests are to have."""

    reloads: ClassVar[bool] = True

    first_token_s: Positive | None = _engine(
        "first_token_s", "Requests whose first token would come later are refused at once. Default: none is."
    )


class Settings(TenancySettings):
    """The whole file: who the tenants are, and everything that is an option of `gralora serve` as well."""

    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    memory: MemorySettings = MemorySettings()
    adapters: AdapterSettings = AdapterSettings()
    objectives: ObjectiveSettings = ObjectiveSettings()

"""The engine's settings, checked once. Nothing changes them afterwards: what "auto" became is in `EngineInfo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gralora_runtime.adapters.checkpoint.config_keys import KNOWN
from gralora_runtime.adapters.checkpoint.spec import MAX_ADDED_TOKENS
from gralora_runtime.errors import ConfigError
from gralora_runtime.scheduling.fairness import CPU_PRICES, Prices

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
AS_SAVED = "as-saved"
LEAST_BITS = {AS_SAVED: 4, "float32": 32}  # that a CPU keeps base weights in
WEIGHTS = tuple(LEAST_BITS)
WATCHES = ("auto", "poll", "off")
PIPELINES = ("auto", "on", "off")
KERNEL_BACKENDS = ("auto", "reference", "cpu", "triton")
COUNTS = (
    *("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_queue", "max_queue_tokens", "page_size"),
    *("kv_cache_bytes", "adapter_pool_bytes", "max_adapter_slots", "keep_versions", "num_threads"),
)


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """Where adapters come from: a directory, or what `catalogue/sources/choice.py` knows besides."""

    uri: str
    follows: bool = True  # its newest content is served by itself; otherwise it waits for a promotion


def in_directory(path: Path | None) -> tuple[AdapterSource, ...]:
    """The adapters of one directory, or none."""
    return () if path is None else (AdapterSource(str(path)),)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes are bytes, tokens or counts as their names say; None means: derived from the model and free memory."""

    model: Path
    adapters: tuple[AdapterSource, ...] = ()  # asked in this order
    allow_roots: tuple[Path, ...] = ()  # links in adapter directories may end below these too
    allow_unknown_config_keys: tuple[str, ...] = ()  # of adapters; all others that nobody here knows are refused
    state_dir: Path | None = None  # what outlives the server: the catalogue, downloads, uploads, old versions
    keep_versions: int = 8  # of a name; those that are promoted, pinned or in use stay besides
    keep_versions_days: float = 30.0  # since a version was last used, or else made
    copies_bytes: int = 20 << 30  # of copies of what directories held, in the state directory
    download_bytes: int = 50 << 30  # of adapters that came from other machines, in the state directory
    upload_bytes: int = 50 << 30  # of adapters that clients sent, in the state directory
    hub_endpoint: str = "https://huggingface.co"
    hub_token: str | None = None
    s3_endpoint: str | None = None  # None: AWS; who asks, and where, is found as AWS's own tools find it
    allow_archives: bool = False  # https:// sources
    watch: str = "auto"  # whether directories are watched: auto (by the system's events), poll, or off
    device: str = "auto"
    dtype: str = "auto"  # auto: float32 on the CPU, the checkpoint's own on a GPU
    weights: str = AS_SAVED  # how a CPU keeps the base model's; what is computed is the same, bit for bit
    kernel_backend: str = "auto"
    max_num_seqs: int = 32  # rows in one step
    max_num_batched_tokens: int = 256  # tokens in one step; a longer prompt is prefilled in chunks of at most this
    max_model_len: int | None = None
    max_queue: int = 1024  # requests waiting, for pages or for their adapter; one tenant may have four fifths of them
    max_queue_tokens: int | None = None  # of prompts that wait; None: sixteen times what the KV cache holds
    first_token_s: float | None = None  # refuse who would wait longer for the first token; None: no objective
    prices: Prices = CPU_PRICES  # by which tenants are charged
    page_size: int = 16  # tokens
    kv_cache_bytes: int | None = None
    adapter_pool_bytes: int | None = None
    max_adapter_slots: int = 4096  # adapters resident in the pool at once, whatever their size
    host_cache_bytes: int = 512 << 20  # loaded adapters kept in host memory behind the pool
    max_adapter_rank: int = 2048  # of r * k + hybrid_r: bounds the kernels' intermediate
    max_added_tokens: int = MAX_ADDED_TOKENS  # of an adapter whose vocabulary is larger than the base model's
    enable_prefix_cache: bool = True
    num_threads: int | None = None
    load_share: float = 0.03  # of the cores' time, for loading adapters while steps run on the same cores
    cuda_graphs: tuple[int, ...] | None = None  # rows of the decode steps that a GPU captures; (): none of them
    batch_invariant: bool = False  # on a GPU, too, the same bits whatever shares the batch; the CPU's always are
    pipeline: str = "auto"  # a step is planned and launched while the one before runs; auto: on a GPU
    max_explained_requests: int = 1000  # that have ended, of which it can be told what they took
    max_named_adapters: int = 100  # with counts of their own; what all others do is counted together

    def __post_init__(self) -> None:
        for name, allowed in (
            ("device", DEVICES),
            ("dtype", DTYPES),
            ("weights", WEIGHTS),
            ("kernel_backend", KERNEL_BACKENDS),
            ("pipeline", PIPELINES),
            ("watch", WATCHES),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        least = dict.fromkeys(COUNTS, 1) | {"max_named_adapters": 0, "max_explained_requests": 0, "max_added_tokens": 0}
        for name, fewest in least.items():
            value = getattr(self, name)
            if value is not None and value < fewest:
                raise ConfigError(f"{name} must be at least {fewest}, got {value}")
        if any(not 1 <= rows <= self.max_num_seqs for rows in self.cuda_graphs or ()):
            raise ConfigError(
                f"cuda_graphs must be numbers of rows from 1 to max_num_seqs ({self.max_num_seqs}), "
                f"got {', '.join(map(str, self.cuda_graphs or ()))}"
            )
        if not 0.0 < self.load_share <= 1.0:
            raise ConfigError(f"load_share must be above 0 and at most 1, got {self.load_share:g}")
        for name in ("keep_versions_days", "first_token_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:  # neither is what is no number
                raise ConfigError(f"{name} must be more than 0, got {value}")
        if known := KNOWN.intersection(self.allow_unknown_config_keys):
            raise ConfigError(
                f"allow_unknown_config_keys has {', '.join(sorted(known))}, which is known and has a meaning"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), or decoding rows would not fit into a step"
            )

"""Builds a ready engine from its settings: decides what "auto" means, sizes the pools, checks, warms up. Blocking."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from gralora_kernels.cpu import threads as cpu_threads
from gralora_kernels.dispatch import AdapterBackend, build_backend, resolve_backend
from gralora_kernels.packing import Packing
from gralora_kernels.stages import StartStage, untold
from gralora_kernels.tables import GroupTable
from gralora_kernels.warmup import load_kernels
from gralora_runtime.adapters.catalogue.catalogue import Retention
from gralora_runtime.adapters.catalogue.sources.choice import SourceSettings, open_source
from gralora_runtime.adapters.catalogue.sources.downloads import Downloads
from gralora_runtime.adapters.catalogue.sources.fetch import Limits
from gralora_runtime.adapters.catalogue.sources.s3_access import S3Access
from gralora_runtime.adapters.catalogue.sources.source import Source
from gralora_runtime.adapters.catalogue.uploads import UploadLimits, Uploads
from gralora_runtime.adapters.checkpoint.spec import added_name
from gralora_runtime.adapters.manager import AdapterManager
from gralora_runtime.adapters.residency.pace import Pace
from gralora_runtime.adapters.residency.pool import AdapterPool
from gralora_runtime.adapters.residency.transfer import Transfer, no_steps, transfer_to
from gralora_runtime.config import LEAST_BITS, EngineConfig
from gralora_runtime.errors import ConfigError
from gralora_runtime.info import EngineInfo
from gralora_runtime.model.adaptable import changeable_shapes, embedding_name, head_name, norms_of, weight_norms
from gralora_runtime.model.base_layers import BaseLayers
from gralora_runtime.model.chat_turns import tool_format
from gralora_runtime.model.experts import parameter_shapes
from gralora_runtime.model.kv_pool import KVPool, page_bytes
from gralora_runtime.model.loading import BaseModel, load_base_model
from gralora_runtime.model.programs.added import AddedTables
from gralora_runtime.model.programs.apart import Apart
from gralora_runtime.model.programs.choice import kv_in_panels, make_runner, reserved_bytes
from gralora_runtime.model.programs.gpu.graphs import usual_ladder
from gralora_runtime.model.programs.runner import Runner, Served
from gralora_runtime.model.refusal import refusing
from gralora_runtime.model.selfcheck import check_runner, expected_logits
from gralora_runtime.model.tokenization import PromptTokenizer
from gralora_runtime.observation.steps import StepObservation
from gralora_runtime.scheduling.pages import PagePool
from gralora_runtime.scheduling.scheduler import Scheduler
from gralora_runtime.stepping.batch import BatchBuilder
from gralora_runtime.stepping.engine import Engine
from gralora_runtime.stepping.executor import Beside, Executor, InTurn
from gralora_runtime.stepping.fence import StepFence

logger = logging.getLogger(__name__)

# Shares of the memory that is free once the model is loaded. On the CPU both pools are backed lazily, and the rest of
# the machine wants memory too; on a GPU nobody else does.
KV_CACHE_SHARE = {"cpu": 0.25, "cuda": 0.75}
ADAPTER_POOL_SHARE = {"cpu": 0.1, "cuda": 0.15}
SECONDS_A_DAY = 86_400.0
MEMORY_S = 1.0  # at most, of a start, for memory that the first adapters will need: more is written beside requests


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What `AsyncEngine` drives."""

    engine: Engine
    runner: Runner
    adapters: AdapterManager
    base: BaseModel
    prompts: PromptTokenizer
    info: EngineInfo
    prepare_thread: Callable[[], None]  # what the stepping thread must call first


def assemble(config: EngineConfig, base: BaseModel | None = None, *, stage: StartStage = untold) -> EngineParts:
    """Load the model and connect the pieces. Raises `ConfigError` or `ModelUnsupportedError` before anything serves.

    `base`: a model that was loaded already; one like it has been checked, so it is not checked again. `stage` is told
    what is being done.
    """
    device = resolve_device(config.device)
    backend = _resolve_backend(config.kernel_backend, device)
    num_threads = config.num_threads or len(os.sched_getaffinity(0))
    _use_threads(num_threads, device)
    kernels = _meanwhile(lambda: load_kernels(backend, stage))
    expected = None
    if base is None:
        base, expected = _read_model(config, device, stage)
    rungs = usual_ladder(config.max_num_seqs) if config.cuda_graphs is None else config.cuda_graphs
    reserved = reserved_bytes(
        base,
        backend,
        max_tokens=config.max_num_batched_tokens,
        max_rows=config.max_num_seqs,
        num_rungs=len(rungs),
    )
    pipelined = config.pipeline == "on" or (config.pipeline == "auto" and device.type == "cuda")
    fence = StepFence()
    transfer = _transfer(config, device, fence, cores=num_threads, pipelined=pipelined)
    layers = BaseLayers(base.model)
    with stage("Adapters: which there are"):
        adapters = _adapter_manager(
            config, base, layers, backend.packing, transfer, free_bytes=_free_bytes(device) - reserved
        )
    try:
        kv_pool, max_model_len = _kv_pool(
            config, base, _free_bytes(device) - reserved, in_panels=kv_in_panels(backend, device)
        )
        num_pages = len(kv_pool.keys[0])
        with stage("Model: its program"), refusing(base.name, base.model.config, "set up"):
            groups, apart = _groups_and_apart(config, base, adapters.pool, backend)
            parameters = {shape.name: groups.pop((shape.name,)) for shape in parameter_shapes(base.model)}
            runner = make_runner(
                Served(
                    base=base,
                    kv_pool=kv_pool,
                    arena=adapters.pool.arena,
                    groups=groups,
                    parameters=parameters,
                    head_name=head_name(base.model),
                    embedding_name=embedding_name(base.model),
                    apart=apart,
                    layers=layers,
                    backend=backend,
                    page_size=config.page_size,
                    max_num_tokens=config.max_num_batched_tokens,
                    max_num_rows=config.max_num_seqs,
                    max_model_len=max_model_len,
                    rungs=rungs,
                    batch_invariant=config.batch_invariant,
                    least_bits=LEAST_BITS[config.weights],
                    stage=stage,
                )
            )
        layers.open()
        kernels.result()
        batch = BatchBuilder(
            max_num_tokens=config.max_num_batched_tokens,
            page_size=config.page_size,
            slot_generation=adapters.pool.generation,
        )
        if expected is not None:
            with stage("Model: the first steps, checked"), refusing(base.name, base.model.config, "computed in steps"):
                check_runner(
                    base, runner, batch, config.page_size, expected,
                    max_num_tokens=config.max_num_batched_tokens, max_model_len=max_model_len,
                )  # fmt: skip
        with stage("Adapters: memory for the first ones"):
            adapters.await_memory(MEMORY_S)
    except BaseException:
        layers.open()
        adapters.close()
        raise
    scheduler = Scheduler(
        PagePool(num_pages, config.page_size, enable_prefix_cache=config.enable_prefix_cache),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        release_lease=adapters.release,
        now_s=time.monotonic,
        prices=config.prices,
    )
    info = _info(
        config,
        base,
        kernel_backend=backend.name,
        max_model_len=max_model_len,
        num_pages=num_pages,
        adapter_pool_bytes=adapters.stats().pool_bytes_total,
    )
    logger.info("engine ready: %s", info)
    vocab_size: int = base.model.config.vocab_size
    prompts = PromptTokenizer(base.tokenizer, base.chat_tokenizer, vocab_size)

    def prepare_thread() -> None:
        _use_threads(num_threads, device)

    observation = StepObservation()
    executor = _device_executor(runner, observation, info, device, backend, max_added_tokens=config.max_added_tokens)
    if executor is None and device.type == "cuda":
        pipelined = False  # what samples on the host waits for each step
    if executor is None:
        executor = Beside(runner, observation, prepare_thread) if pipelined else InTurn(runner, observation)
    engine = Engine(scheduler, batch, executor, observation, fence, pipelined=pipelined)
    return EngineParts(engine, runner, adapters, base, prompts, info, prepare_thread)


def _transfer(config: EngineConfig, device: torch.device, fence: StepFence, *, cores: int, pipelined: bool) -> Transfer:
    wait_for_steps = fence.wait if pipelined else no_steps  # unpipelined, no step runs whose leases were given back
    return transfer_to(
        device, wait_for_steps, Pace(share=config.load_share, cores=cores, steps_run=lambda: fence.is_open)
    )


def _groups_and_apart(
    config: EngineConfig, base: BaseModel, pool: AdapterPool, backend: AdapterBackend
) -> tuple[dict[tuple[str, ...], GroupTable], Apart]:
    """The pool's groups of linear layers, and what has the others'."""
    groups = dict(pool.groups)
    ends = embedding_name(base.model), head_name(base.model)
    embedding, head = (groups.pop((name,)) for name in ends)
    added = [groups.pop((added_name(name),)) for name in ends if (added_name(name),) in groups]
    apart = Apart(
        head=head,
        embedding=embedding,
        added=AddedTables(*added) if added else None,
        norms={shape.name: groups.pop((shape.name,)) for shape in norms_of(base.model)},
        arena=pool.arena,
        backend=build_backend(backend.name, base.model.device),
        max_tokens=config.max_num_batched_tokens,
    )
    return groups, apart


def _read_model(config: EngineConfig, device: torch.device, stage: StartStage) -> tuple[BaseModel, torch.Tensor]:
    """And what transformers computes, to be compared with."""
    with stage("Model: weights"):
        base = load_base_model(config.model, device=device, dtype=config.dtype)
    with stage("Model: what transformers computes"), refusing(base.name, base.model.config, "computed"):
        return base, expected_logits(base)


def _meanwhile(work: Callable[[], None]) -> Future[None]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="kernels")
    try:
        return pool.submit(work)
    finally:
        pool.shutdown(wait=False)


def _device_executor(
    runner: Runner,
    observation: StepObservation,
    info: EngineInfo,
    device: torch.device,
    backend: AdapterBackend,
    *,
    max_added_tokens: int,
) -> Executor | None:
    """None where sampling is the host's."""
    if backend.name != "triton":
        return None
    from gralora_kernels.triton_ops.sampling_launch import MAX_VOCAB
    from gralora_runtime.sampling.widths import SamplerOfWidths
    from gralora_runtime.stepping.device_executor import OnDevice

    if (most := info.vocab_size + max_added_tokens) > MAX_VOCAB:
        logger.warning("sampled on the host, step after step: %d tokens are more than %d", most, MAX_VOCAB)
        return None
    sampler = SamplerOfWidths(
        vocab_size=info.vocab_size, max_added_tokens=max_added_tokens, max_rows=info.max_num_seqs, device=device
    )
    if device.type == "cuda":
        sampler.warm_up(torch.float32)  # what programs return
    return OnDevice(runner, sampler, observation)


def resolve_device(name: str) -> torch.device:
    """The device that a setting means. An explicit device that is not there is an error, never a fallback."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch sees no GPU")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _use_threads(count: int, device: torch.device) -> None:
    """OpenMP and Numba keep the number of threads per calling thread, so each thread that computes sets it itself."""
    if device.type == "cpu":
        try:
            cpu_threads.configure(count)
        except ValueError as error:
            raise ConfigError(f"num_threads: {error}") from error
    torch.set_num_threads(count)  # a number that was refused must not stay behind


def _resolve_backend(name: str, device: torch.device) -> AdapterBackend:
    try:
        return resolve_backend(name, device)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"kernel_backend: {error}") from error


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _adapter_manager(
    config: EngineConfig,
    base: BaseModel,
    layers: BaseLayers,
    packing: Packing,
    transfer: Transfer,
    *,
    free_bytes: int,
) -> AdapterManager:
    if config.state_dir is not None:  # whatever link leads there today: paths below it are remembered
        config = replace(config, state_dir=config.state_dir.resolve())
    device = base.model.device
    pool_bytes = config.adapter_pool_bytes or int(free_bytes * ADAPTER_POOL_SHARE[device.type])
    manager: list[AdapterManager] = []  # once there is one
    sources = _sources(
        config,
        in_use=lambda folder: any(made.reads(folder) for made in manager),
        in_catalogue=lambda folder: any(made.has_version_at(folder) for made in manager),
    )
    manager.append(
        AdapterManager(
            modules=changeable_shapes(base.model, config.max_added_tokens),
            device=device,
            dtype=base.model.dtype,
            pool_bytes=pool_bytes,
            max_slots=config.max_adapter_slots,
            host_cache_bytes=config.host_cache_bytes,
            sources=sources,
            watch=config.watch,
            state_dir=config.state_dir,
            copies_bytes=config.copies_bytes,
            retention=Retention(max_versions=config.keep_versions, max_age_s=config.keep_versions_days * SECONDS_A_DAY),
            base_model=base.name,
            # While the model still has its weights: programs free them. 30 to 90 ms for 135M parameters on two cores.
            base_norms=weight_norms(base.model) if sources else {},
            base_layers=layers,
            max_width=config.max_adapter_rank,
            allowed_keys=config.allow_unknown_config_keys,
            packing=packing,
            transfer=transfer,
            vocab_size=base.model.config.vocab_size,
            known_tokens=base.tokenizer.get_vocab_size(with_added_tokens=True),
        )
    )
    return manager[0]


def _sources(
    config: EngineConfig, *, in_use: Callable[[Path], bool], in_catalogue: Callable[[Path], bool]
) -> list[Source]:
    """`in_use`: whether somebody reads from a download, which may not go then; `in_catalogue`: the same of uploads.

    An upload comes before whatever else has its name.
    """
    downloads = None
    uploads: list[Source] = []
    if config.state_dir is not None:
        limits = UploadLimits(total_bytes=config.upload_bytes)
        uploads = [Uploads(config.state_dir / "uploads", limits=limits, in_use=in_catalogue)]
        downloads = Downloads(
            config.state_dir / "downloads", budget_bytes=config.download_bytes, in_use=in_use, limits=Limits()
        )
    return uploads + [
        open_source(
            source.uri,
            settings=SourceSettings(
                follows=source.follows,
                allow_roots=config.allow_roots,
                hub_endpoint=config.hub_endpoint,
                hub_token=config.hub_token,
                s3=S3Access(endpoint=config.s3_endpoint),
                allow_archives=config.allow_archives,
            ),
            downloads=downloads,
        )
        for source in config.adapters
    ]


def _kv_pool(config: EngineConfig, base: BaseModel, free_bytes: int, *, in_panels: bool) -> tuple[KVPool, int]:
    """The pool, and the longest sequence that is served with it."""
    device = base.model.device
    wanted_len = min(config.max_model_len or base.max_positions, base.max_positions)
    if config.max_model_len and config.max_model_len > base.max_positions:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}, but the model ends at {base.max_positions} positions"
        )
    one_page = page_bytes(
        num_layers=base.num_layers,
        page_size=config.page_size,
        num_kv_heads=base.num_kv_heads,
        head_dim=base.head_dim,
        dtype=base.model.dtype,
    )
    budget = config.kv_cache_bytes or int(free_bytes * KV_CACHE_SHARE[device.type])
    pages_per_seq = -(-wanted_len // config.page_size)
    num_pages = min(budget // one_page, config.max_num_seqs * pages_per_seq)
    if config.max_model_len and num_pages < pages_per_seq:
        raise ConfigError(
            f"a sequence of max_model_len={config.max_model_len} tokens needs {pages_per_seq * one_page} bytes of KV "
            f"cache, but there are {budget}"
        )
    # One sequence alone must always fit, or it would wait for pages forever.
    max_model_len = min(wanted_len, num_pages * config.page_size)
    if max_model_len < 2 * config.page_size:
        raise ConfigError(f"kv_cache_bytes={budget} hold {num_pages} pages of {one_page} bytes: too few to serve with")
    pool = KVPool(
        num_layers=base.num_layers,
        num_pages=num_pages,
        page_size=config.page_size,
        num_kv_heads=base.num_kv_heads,
        head_dim=base.head_dim,
        dtype=base.model.dtype,
        device=device,
        in_panels=in_panels,
    )
    return pool, max_model_len


def _info(
    config: EngineConfig,
    base: BaseModel,
    *,
    kernel_backend: str,
    max_model_len: int,
    num_pages: int,
    adapter_pool_bytes: int,
) -> EngineInfo:
    return EngineInfo(
        model=base.name,
        model_type=base.model.config.model_type,
        model_digest=base.digest,
        dtype=str(base.model.dtype).removeprefix("torch."),
        device=str(base.model.device),
        kernel_backend=kernel_backend,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        page_size=config.page_size,
        num_pages=num_pages,
        vocab_size=base.model.config.vocab_size,
        adapter_pool_bytes=adapter_pool_bytes,
        max_adapter_slots=config.max_adapter_slots,
        version=version("gralora-server"),
        tool_format=tool_format(base.chat_tokenizer.chat_template),
    )

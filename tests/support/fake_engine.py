"""An engine without a model: a test decides what each request gets and when. Streams are the real ones."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from gralora_runtime.adapters.catalogue.changes import Changes
from gralora_runtime.adapters.catalogue.names import summed
from gralora_runtime.adapters.catalogue.similar import similar_name
from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.adapters.catalogue.uploads import Uploads
from gralora_runtime.adapters.checkpoint.header import AdapterSummary
from gralora_runtime.adapters.checkpoint.spec import Dialect
from gralora_runtime.adapters.info import (
    AdapterInfo,
    AdapterPage,
    AdapterResidency,
    AdapterStats,
    CanaryInfo,
    Residence,
    UnloadResult,
    VersionInfo,
)
from gralora_runtime.adapters.residency.share import ShareOf
from gralora_runtime.adapters.watch import AdapterWatch
from gralora_runtime.errors import AdapterNotFoundError, DrainingError, EngineDeadError, InvalidRequestError
from gralora_runtime.info import EngineInfo, EngineLoad, TokenizeResult
from gralora_runtime.observation.activity import Activity, RequestActivity
from gralora_runtime.observation.histogram import REQUEST_S, Histogram
from gralora_runtime.observation.holdups import Hold
from gralora_runtime.observation.requests import RequestObservation
from gralora_runtime.observation.snapshot import EngineSnapshot
from gralora_runtime.observation.steps import StepObservation
from gralora_runtime.observation.timeline import Stage, Timeline
from gralora_runtime.observation.timelines import Timelines
from gralora_runtime.request import (
    Delta,
    Finished,
    FinishReason,
    GenerationRequest,
    Prompt,
    ServedAdapter,
    Started,
)
from gralora_runtime.stream import RequestStream

INFO = EngineInfo(
    model="fake",
    model_type="llama",
    model_digest="d" * 64,
    dtype="float32",
    device="cpu",
    kernel_backend="reference",
    max_model_len=2048,
    max_num_seqs=32,
    max_num_batched_tokens=256,
    page_size=16,
    num_pages=100,
    vocab_size=49152,
    adapter_pool_bytes=1 << 30,
    max_adapter_slots=4096,
    version="0.1.0",
)
LOAD = EngineLoad(
    running=1,
    waiting=2,
    waiting_for_adapter=3,
    paused=13,
    pages_total=100,
    pages_free=50,
    pages_cached=20,
    pages_leased=30,
    adapter_leases=4,
    adapter_slots_used=5,
    adapter_slots_total=4096,
    adapter_pool_bytes_used=6,
    adapter_pool_bytes_total=1 << 30,
    steps=7,
    generated_tokens=8,
    preemptions=9,
    pauses=12,
    prefix_hit_tokens=10,
    request_failures=2,
    step_failures=1,
)


STATS = AdapterStats(
    adapters=3,
    leases=4,
    waiting=3,
    slots_used=5,
    slots_total=4096,
    pool_bytes_used=6,
    pool_bytes_total=1 << 30,
    host_bytes_used=7,
    host_bytes_total=1 << 29,
    loads=11,
    load_failures=12,
    load_s=Histogram(REQUEST_S).read(),
    placements=13,
    evictions=14,
    moves=3,
)


def snapshot(observed: RequestObservation | None = None, **changes: object) -> EngineSnapshot:
    """Numbers that are all different, so that none can be taken for another."""
    requests = observed or RequestObservation(100)
    facts: dict[str, object] = {
        "info": INFO,
        "load": LOAD,
        "prefill_tokens": 15,
        "decode_tokens": 16,
        "steps": StepObservation().read(),
        "requests": requests.read(),
        "adapters": STATS,
        "residency": AdapterResidency(
            dict.fromkeys(AdapterState, 0) | {AdapterState.RESIDENT: 2},
            (Residence("poet", 1, AdapterState.RESIDENT, 1200), Residence("bard", 2, AdapterState.HOST, 1300)),
        ),
        "running_adapters": frozenset({"poet", "bard"}),
        "waiting_adapters": frozenset({"cold"}),
    }
    return EngineSnapshot(**facts | changes)  # type: ignore[arg-type]


def activity(observed: RequestObservation | None = None, **changes: object) -> Activity:
    """As `snapshot`."""
    requests, steps = observed or RequestObservation(100), StepObservation().read()
    facts: dict[str, object] = {
        "load": LOAD,
        "prefill_tokens": 15,
        "decode_tokens": 16,
        "phases": {str(phase): counts for phase, counts in steps.phases.items()},
        "first_token": requests.first_token.read(),
        "inter_token": requests.inter_token.read(),
        "adapters": requests.accounts.read(),
    }
    return Activity(**facts | changes)  # type: ignore[arg-type]


def request_activity(request_id: str = "r1", **changes: object) -> RequestActivity:
    """One that waits."""
    facts: dict[str, object] = {
        "request_id": request_id,
        "tenant": "acme",
        "adapter": "poet",
        "version": 2,
        "stage": Stage.QUEUE,
        "age_s": 1.5,
        "prompt_tokens": 30,
        "computed_tokens": 20,
        "output_tokens": 4,
        "max_tokens": 64,
        "preemptions": 1,
        "hold": Hold.PAGES,
        "ahead": 2,
    }
    return RequestActivity(**facts | changes)  # type: ignore[arg-type]


def started(request: GenerationRequest) -> Delta:
    """The delta that begins every generation."""
    digest = "a" * 64 if request.named_adapters else ""
    facts = Started(
        prompt_tokens=3,
        cached_tokens=1,
        queue_time_s=0.25,
        seed=2**64 - 1 if request.sampling.seed is None else request.sampling.seed,
        adapter=request.adapter or summed((one.adapter, one.weight) for one in request.adapters),
        adapter_digest=digest,
        adapters=tuple(
            ServedAdapter(name=one.adapter, version=2, digest="b" * 64, weight=one.weight) for one in request.adapters
        ),
        prompt_token_ids=(7, 8, 9) if request.response.echo_prompt_token_ids else (),
    )
    return Delta(started=facts)


def token(token_id: int, text: str | None = None) -> Delta:
    return Delta(text=f"t{token_id} " if text is None else text, token_ids=(token_id,))


def finished(reason: FinishReason = FinishReason.LENGTH, *, output_tokens: int = 0, **matched: object) -> Delta:
    """The delta that ends every generation."""
    facts = Finished(reason=reason, prompt_tokens=3, cached_tokens=1, output_tokens=output_tokens, **matched)
    return Delta(finished=facts)


class FakeAdapters:
    """Has "poet" resident. `error` is what every change of the catalogue fails with."""

    def __init__(self) -> None:
        self.infos = {"poet": adapter_info("poet")}
        self.uploads: Uploads | None = None  # a server without a state directory
        self.changes = Changes()
        self.error: Exception | None = None
        self.calls: list[tuple[object, ...]] = []
        self.called = threading.Semaphore(0)  # once for each of `calls`, which come from other threads
        self.lookup_s = 0.0  # that `get` takes for a name that there is
        self.loading: concurrent.futures.Future[AdapterInfo] | None = None  # set: `load` hands it out

    def page(
        self, *, size: int, after: str, prefix: str, states: Collection[AdapterState], sees: Callable[[str], bool]
    ) -> AdapterPage:
        names = sorted(name for name in self.infos if name.startswith(prefix) and sees(name))
        left = [name for name in names if name > after]
        page = tuple(self.infos[name] for name in left[:size])
        return AdapterPage(adapters=page, next_after=page[-1].name if len(left) > size else "", total=len(names))

    def watch(self, prefix: str, wake: Callable[[], None], sees: Callable[[str], bool]) -> AdapterWatch:
        names = sorted(name for name in self.infos if name.startswith(prefix) and sees(name))
        return AdapterWatch(names, self.changes.listen(prefix, wake, sees), self.changes, self.infos.get)

    def similar(self, name: str, sees: Callable[[str], bool]) -> str:
        return similar_name(name, filter(sees, self.infos))

    def get(self, name: str) -> AdapterInfo:
        if name not in self.infos:
            raise AdapterNotFoundError(name)
        time.sleep(self.lookup_s)
        return self.infos[name]

    def load(self, name: str, path: Path | None, *, pin: bool = False) -> concurrent.futures.Future[AdapterInfo]:
        self._change("load", name, path, pin)
        if self.loading is not None:
            return self.loading
        done: concurrent.futures.Future[AdapterInfo] = concurrent.futures.Future()
        done.set_result(adapter_info(name, pinned=pin))
        return done

    def limit_pool(self, share_of: ShareOf) -> None:
        self.share_of = share_of

    def flush(self) -> None:
        """Nothing is kept."""

    def unload(self, name: str) -> UnloadResult:
        self._change("unload", name)
        return UnloadResult(name=name, digest=self.get(name).digest, pool_bytes_freed=1000, host_bytes_freed=2000)

    def pin(self, name: str, pinned: bool) -> AdapterInfo:
        self._change("pin", name, pinned)
        self.get(name)
        return adapter_info(name, pinned=pinned)

    def promote(self, name: str, version: str) -> AdapterInfo:
        self._change("promote", name, version)
        return self.get(name)

    def roll_back(self, name: str) -> AdapterInfo:
        self._change("roll_back", name)
        return self.get(name)

    def set_canary(self, name: str, version: str, share: float) -> AdapterInfo:
        self._change("set_canary", name, version, share)
        return self.get(name)

    def _change(self, *call: object) -> None:
        self.calls.append(call)
        self.called.release()
        if self.error is not None:
            raise self.error


class FakeEngine:
    """`script` says what a request gets at once after `started`; a test may go on through `streams[request_id].put`."""

    def __init__(self) -> None:
        self.dead = asyncio.Event()
        self.first_token_s: float | None = None
        self.adapters = FakeAdapters()
        self.requests: list[GenerationRequest] = []
        self.streams: dict[str, RequestStream] = {}
        self.aborted: list[str] = []
        self.script: list[Delta] = []
        self.start_at_once = True  # False: not even `started` is there at first
        self.refusals: list[Exception] = []  # of the next submissions, in turn
        self.knows_any_adapter = True  # False: only those of `adapters`
        self.submitted: asyncio.Queue[str] = asyncio.Queue()  # request ids
        self.abort_happened = asyncio.Event()
        self.draining = asyncio.Event()
        self.timelines = Timelines(1000)
        self.closed = False
        self.busy_since_s: float | None = None  # set: a step began then, and does not end

    def token_text(self, token_id: int) -> str:
        return f"t{token_id} "

    async def submit(self, request: GenerationRequest) -> RequestStream:
        self.requests.append(request)
        if self.refusals:
            raise self.refusals.pop(0)
        if self.draining.is_set():
            raise DrainingError
        for name in request.named_adapters if not self.knows_any_adapter else ():
            await asyncio.to_thread(self.adapters.get, name.partition("@")[0])
        if request.request_id in self.streams:
            raise InvalidRequestError("request_id", request.request_id, "a request of that id is already running")
        stream = RequestStream(request.request_id, self.abort)
        stream.served_by = f"{request.adapter}@2" if request.adapter else ""
        if request.adapters:
            stream.served_by = summed((f"{one.adapter}@2", one.weight) for one in request.adapters)
        self.streams[request.request_id] = stream
        timeline = Timeline.begin(request, request.tenant, time.monotonic())
        timeline.served_by = stream.served_by
        timeline.end("stop", timeline.received_s)
        self.timelines.keep(timeline)
        if self.start_at_once:
            for delta in [started(request), *self.script]:
                stream.put(delta)
        self.submitted.put_nowait(request.request_id)
        return stream

    def abort(self, request_id: str) -> bool:
        if request_id not in self.streams:
            return False
        self.aborted.append(request_id)
        self.abort_happened.set()
        return True

    async def tokenize(self, prompt: Prompt) -> TokenizeResult:
        words = (prompt.text or " ".join(turn.content for turn in prompt.messages or ())).split()
        return TokenizeResult(token_ids=tuple(range(len(words))), max_model_len=INFO.max_model_len)

    def info(self) -> EngineInfo:
        return INFO

    def load(self) -> EngineLoad:
        return LOAD

    def snapshot(self) -> EngineSnapshot:
        return snapshot()

    def activity(self) -> Activity:
        return activity()

    def under_way(self) -> list[RequestActivity]:
        return [request_activity()]

    def begin_drain(self) -> None:
        self.draining.set()

    def die(self) -> None:
        self.dead.set()
        for stream in self.streams.values():
            stream.fail(EngineDeadError())

    async def close(self) -> None:
        self.closed = True


def adapter_info(name: str, *, pinned: bool = False) -> AdapterInfo:
    summary = AdapterSummary(
        dialect=Dialect.PEFT_GRALORA,
        rank=8,
        blocks=2,
        hybrid_rank=4,
        equivalent_rank=20,
        scale=1.5,
        num_modules=90,
        tensor_bytes=1234,
        packed_numel=300,
        base_model="fake",
    )
    return AdapterInfo(
        name=name,
        state=AdapterState.RESIDENT,
        digest="a" * 64,
        source=f"/adapters/{name}",
        pinned=pinned,
        in_flight=2,
        last_used_s=1_700_000_000.5,
        pool_bytes=1200,
        error="",
        warnings=("it is odd",),
        summary=summary,
        version=2,
        previous=1,
        follows=True,
        canary=CanaryInfo(3, 0.25),
        versions=tuple(version_info(number) for number in (1, 2, 3)),
    )


def version_info(number: int) -> VersionInfo:
    return VersionInfo(
        number=number,
        digest=f"{number:x}" * 64,
        state=AdapterState.RESIDENT,
        pinned=number == 2,
        in_flight=number,
        created_s=1_600_000_000.0 + number,
        last_used_s=0.0 if number == 3 else 1_700_000_000.5,
        error="",
        warnings=("it is odd",) if number == 2 else (),
    )

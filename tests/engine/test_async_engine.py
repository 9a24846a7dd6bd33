"""The whole engine on a tiny model with real PEFT adapters: what one request gets never depends on the others."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from support.peft_adapters import gralora_config, lora_config
from support.workspaces import config_of, save_workspace
from torch import Tensor

from gralora_runtime.async_engine import AsyncEngine
from gralora_runtime.config import EngineConfig, in_directory
from gralora_runtime.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    DrainingError,
    EngineDeadError,
    GraloraError,
    InvalidRequestError,
    QueueFullError,
    RequestCancelledError,
    RequestFailedError,
    SlowConsumerError,
    StepFailedError,
    TooLateError,
)
from gralora_runtime.request import (
    ChatMessage,
    Delta,
    FinishReason,
    GenerationRequest,
    Prompt,
    ResponseParams,
    SamplingParams,
    StoppingParams,
)
from gralora_runtime.stepping.batch import StepTensors
from gralora_runtime.stream import RequestStream, merge_deltas

T = TypeVar("T")
CONFIGS = {
    "g0": gralora_config("llama", 8, 2, alpha=32),
    "g1": gralora_config("llama", 16, 4, alpha=64),
    "g2": gralora_config("llama", 4, 1, alpha=16),
    "hybrid": gralora_config("llama", 8, 2, hybrid_r=3, alpha=40),
    "lora": lora_config("llama", 5, alpha=20),
}
ADAPTERS = tuple(CONFIGS)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_workspace(tmp_path_factory.mktemp("engine"), CONFIGS)


@pytest.fixture
def config(workspace: Path) -> EngineConfig:
    return config_of(workspace)


def with_engine(config: EngineConfig, work: Callable[[AsyncEngine], Awaitable[T]]) -> T:
    """Run `work` on a fresh engine, and check that nothing is left behind when it is done."""

    async def run() -> T:
        engine = await AsyncEngine.start(config)
        try:
            result = await work(engine)
            if not engine.dead.is_set():
                assert await engine.wait_idle(30)
                load = engine.load()
                assert (load.running, load.waiting, load.waiting_for_adapter) == (0, 0, 0)
                assert (load.pages_leased, load.adapter_leases) == (0, 0)
                engine.adapters.check_integrity()
                engine._parts.engine.scheduler.check_integrity()
            return result
        finally:
            await engine.close()
            counts = engine.snapshot().requests
            assert counts.received == sum(counts.ended.values()), f"a request ended twice or never: {counts.ended}"

    return asyncio.run(run())


def request(request_id: str, adapter: str = "", *, max_tokens: int = 24, **sampling: object) -> GenerationRequest:
    rng = random.Random(f"{adapter}/{request_id.split('#', maxsplit=1)[0]}")
    return GenerationRequest(
        request_id=request_id,
        prompt=Prompt(token_ids=tuple(rng.randrange(3, 300) for _ in range(rng.randrange(5, 60)))),
        adapter=adapter,
        sampling=SamplingParams(**{"temperature": 0.0} | sampling),
        stopping=StoppingParams(max_tokens=max_tokens, ignore_eos=True),
    )


PATIENCE_S = 60.0


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until it holds. What passes by has to be made to last: looks are a millisecond apart."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s, "it never came to be"
        await asyncio.sleep(0.001)


def slow_down(engine: AsyncEngine, step_s: float) -> None:
    """Let every step take at least so long."""
    runner = engine._parts.runner
    execute = runner.execute

    def slow_execute(tensors: StepTensors) -> Tensor:
        time.sleep(step_s)
        return execute(tensors)

    runner.execute = slow_execute  # type: ignore[method-assign]


async def finish(engine: AsyncEngine, wanted: GenerationRequest) -> Delta:
    stream = await engine.submit(wanted)
    return merge_deltas([delta async for delta in stream])


def test_tokens_are_the_same_alone_and_among_strangers_that_come_go_are_cancelled_and_preempted(
    config: EngineConfig,
) -> None:
    watched = [
        request(f"watched-{name or 'base'}-{kind}", name, max_tokens=40, **sampling)
        for name in ("", *ADAPTERS)
        for kind, sampling in {"greedy": {}, "sampled": {"temperature": 1.5, "seed": 7, "top_p": 0.95}}.items()
    ]

    async def alone(engine: AsyncEngine) -> list[Delta]:
        return [await finish(engine, one) for one in watched]

    async def stranger(engine: AsyncEngine, index: int, rng: random.Random) -> None:
        for turn in range(3):
            length = rng.randrange(1, 40)
            stream = await engine.submit(request(f"stranger-{index}#{turn}", rng.choice(ADAPTERS), max_tokens=length))
            leaves_after = rng.randrange(1, 30)
            seen = 0
            async for delta in stream:
                seen += len(delta.token_ids)
                if seen >= leaves_after:
                    await stream.aclose()
                    break

    async def crowded(engine: AsyncEngine) -> list[Delta]:
        rng = random.Random(0)
        strangers = [asyncio.create_task(stranger(engine, index, rng)) for index in range(31)]
        results = await asyncio.gather(*(finish(engine, one) for one in watched))
        await asyncio.gather(*strangers)
        assert engine.load().preemptions > 0, "nobody was preempted: this test would not notice"
        return results

    expected = with_engine(config, alone)
    # Pages for about three of the sequences, and room for three of the five adapters.
    cramped = replace(config, kv_cache_bytes=144 << 10, max_model_len=110, adapter_pool_bytes=220 << 10)
    actual = with_engine(cramped, crowded)

    assert [delta.token_ids for delta in expected] == [delta.token_ids for delta in actual]
    assert [delta.text for delta in expected] == [delta.text for delta in actual]
    assert len({delta.token_ids for delta in expected}) == len(watched), "adapters do not differ: nothing was tested"


def test_the_same_request_with_another_seed_differs_and_with_the_same_seed_repeats(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> list[tuple[int, ...]]:
        wanted = [request(f"a#{i}", temperature=1.0, seed=seed) for i, seed in enumerate((1, 1, 2))]
        return [(await finish(engine, one)).token_ids for one in wanted]

    first, again, other = with_engine(config, work)

    assert first == again
    assert first != other


def test_a_seed_that_the_server_drew_is_reported_and_repeats_the_answer(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> tuple[Delta, Delta]:
        drawn = await finish(engine, request("a#0", temperature=1.0))
        assert drawn.started is not None
        return drawn, await finish(engine, request("a#1", temperature=1.0, seed=drawn.started.seed))

    drawn, repeated = with_engine(config, work)

    assert drawn.token_ids == repeated.token_ids


def test_a_reloaded_adapter_is_never_answered_from_its_predecessors_pages(
    config: EngineConfig, workspace: Path, tmp_path: Path
) -> None:
    """Same name, same path, same prompt, other weights: the prefix cache and the slot must both notice."""
    folder = tmp_path / "adapters"
    shutil.copytree(workspace / "adapters" / "g0", folder / "customer")
    config = replace(config, adapters=in_directory(folder))

    async def both(engine: AsyncEngine) -> tuple[Delta, Delta]:
        old = await finish(engine, request("r#0", "customer"))
        await asyncio.to_thread(engine.adapters.unload, "customer")
        shutil.rmtree(folder / "customer")
        shutil.copytree(workspace / "adapters" / "g1", folder / "customer")
        await asyncio.wrap_future(engine.adapters.load("customer", folder / "customer"))
        return old, await finish(engine, request("r#1", "customer"))

    old, new = with_engine(config, both)
    fresh = with_engine(config, lambda engine: finish(engine, request("r#0", "customer")))

    assert old.token_ids != new.token_ids
    assert fresh.token_ids == new.token_ids
    assert old.started is not None
    assert new.started is not None
    assert old.started.adapter_digest != new.started.adapter_digest
    assert new.started.cached_tokens == 0


def test_two_adapters_through_one_slot_each_answer_as_themselves(config: EngineConfig) -> None:
    one_at_a_time = replace(config, max_adapter_slots=1)

    async def work(engine: AsyncEngine) -> list[tuple[int, ...]]:
        names = ["g0", "g1", "g0", "", "g1", "g0"]
        return [(await finish(engine, request(f"r#{i}", name))).token_ids for i, name in enumerate(names)]

    first, second, third, base, fifth, sixth = with_engine(one_at_a_time, work)

    assert first == third == sixth
    assert second == fifth
    assert len({first, second, base}) == 3


def test_more_adapters_than_slots_at_once_all_finish(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> list[Delta]:
        return await asyncio.gather(*(finish(engine, request(f"r{i}", ADAPTERS[i % 5])) for i in range(20)))

    results = with_engine(replace(config, max_adapter_slots=2), work)

    assert [len(delta.token_ids) for delta in results] == [24] * 20


def test_a_second_turn_finds_the_first_in_the_prefix_cache_with_the_same_answer(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> tuple[Delta, Delta]:
        return await finish(engine, request("r#0", "g0")), await finish(engine, request("r#1", "g0"))

    first, second = with_engine(config, work)

    assert first.token_ids == second.token_ids
    assert first.finished is not None
    assert second.finished is not None
    assert first.finished.cached_tokens == 0
    assert second.finished.cached_tokens > 0


def test_abort_ends_a_stream_with_the_reason_cancelled_and_an_unknown_id_is_told(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> Delta:
        stream = await engine.submit(request("r", max_tokens=400))
        first = await anext(stream)
        assert engine.abort("r")
        assert not engine.abort("somebody else")
        return merge_deltas([first, *[delta async for delta in stream]])

    result = with_engine(config, work)

    assert result.finished is not None
    assert result.finished.reason is FinishReason.CANCELLED
    assert 0 < len(result.token_ids) < 400


def test_a_client_that_leaves_frees_everything(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> None:
        stream = await engine.submit(request("r", "g0", max_tokens=400))
        await anext(stream)
        await stream.aclose()

    with_engine(config, work)


def test_cancelling_a_submission_that_waits_for_its_adapter_loses_no_lease(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> None:
        holder = await engine.submit(request("holder", "g0", max_tokens=400))
        waiting = asyncio.create_task(engine.submit(request("waiting", "g1")))
        await until(lambda: engine.load().waiting_for_adapter == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await holder.aclose()
        assert len((await finish(engine, request("next", "g1"))).token_ids) == 24

    with_engine(replace(config, max_adapter_slots=1), work)


def test_aborting_a_submission_that_waits_for_its_adapter_ends_it(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> None:
        holder = await engine.submit(request("holder", "g0", max_tokens=400))
        waiting = asyncio.create_task(engine.submit(request("waiting", "g1")))
        await until(lambda: engine.load().waiting_for_adapter == 1)
        assert engine.abort("waiting")
        with pytest.raises(RequestCancelledError):
            await waiting
        await holder.aclose()

    with_engine(replace(config, max_adapter_slots=1), work)


def test_a_deadline_holds_while_waiting_for_an_adapter_and_while_generating(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> FinishReason:
        slow_down(engine, 0.01)  # 440 tokens then take seconds on any machine
        holder = await engine.submit(replace(request("holder", "g0", max_tokens=440), timeout_s=0.6))
        with pytest.raises(DeadlineExceededError):
            await engine.submit(replace(request("waiting", "g1"), timeout_s=0.05))
        finished = merge_deltas([delta async for delta in holder]).finished
        assert finished is not None
        return finished.reason

    assert with_engine(replace(config, max_adapter_slots=1), work) is FinishReason.DEADLINE


def refusals() -> Iterator[object]:
    good = request("r")
    tokens = good.prompt.token_ids
    assert tokens is not None
    yield pytest.param(replace(good, adapter="nobody"), AdapterNotFoundError, "no adapter named 'nobody'", id="unknown")
    yield pytest.param(replace(good, adapter="../g0"), InvalidRequestError, "adapter: ", id="traversal")
    yield pytest.param(replace(good, adapter="/etc"), InvalidRequestError, "adapter: ", id="absolute")
    yield pytest.param(
        replace(good, prompt=Prompt(token_ids=tokens * 200)), InvalidRequestError, "must be shorter than", id="long"
    )
    yield pytest.param(
        replace(good, stopping=StoppingParams(max_tokens=511)),  # the model has room for 512
        InvalidRequestError,
        "stopping.max_tokens: the prompt's",
        id="no-room",
    )
    yield pytest.param(
        replace(good, stopping=StoppingParams(max_tokens=512)),
        InvalidRequestError,
        "stopping.max_tokens: must be less than 512",
        id="never-room",
    )
    yield pytest.param(
        replace(good, prompt=Prompt(token_ids=(1, 999))),
        InvalidRequestError,
        r"token_ids\[1\]: token ids of this model are 0 to 319 \(got 999\)",
        id="vocabulary",
    )
    yield pytest.param(
        replace(good, prompt=Prompt(text="")), InvalidRequestError, "text: the prompt is empty", id="empty"
    )
    yield pytest.param(
        replace(good, prompt=Prompt(messages=(ChatMessage("jester", "hi"),))),
        InvalidRequestError,
        "messages: the model's chat template refuses them: unknown role",
        id="role",
    )
    yield pytest.param(
        replace(good, stopping=StoppingParams(stop_token_ids=(320,))),
        InvalidRequestError,
        "stopping.stop_token_ids: ",
        id="stop-id",
    )
    yield pytest.param(
        replace(good, sampling=SamplingParams(logit_bias={-1: 1.0})),
        InvalidRequestError,
        "sampling.logit_bias: ",
        id="bias-id",
    )


@pytest.mark.parametrize(("wanted", "error", "message"), list(refusals()))
def test_what_cannot_be_served_is_refused_and_the_next_request_is_served(
    config: EngineConfig, wanted: GenerationRequest, error: type[GraloraError], message: str
) -> None:
    async def work(engine: AsyncEngine) -> Delta:
        with pytest.raises(error, match=message):
            await engine.submit(wanted)
        return await finish(engine, request("r"))

    assert len(with_engine(config, work).token_ids) == 24


def test_an_id_in_use_is_refused_and_its_owner_is_not_disturbed(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> int:
        stream = await engine.submit(request("same"))
        with pytest.raises(InvalidRequestError, match="request_id: a request of that id"):
            await engine.submit(request("same"))
        return len(merge_deltas([delta async for delta in stream]).token_ids)

    assert with_engine(config, work) == 24


def test_a_full_queue_says_when_to_come_back(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> float:
        streams = [await engine.submit(request(f"r{i}", max_tokens=300)) for i in range(3)]
        with pytest.raises(QueueFullError) as caught:
            await engine.submit(request("one too many"))
        for stream in streams:
            await stream.aclose()
        return caught.value.retry_after_s

    assert with_engine(replace(config, max_num_seqs=1, max_queue=2), work) > 0


def test_draining_refuses_new_requests_and_finishes_old_ones(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> int:
        stream = await engine.submit(request("old"))
        engine.begin_drain()
        with pytest.raises(DrainingError):
            await engine.submit(request("new"))
        return len(merge_deltas([delta async for delta in stream]).token_ids)

    assert with_engine(config, work) == 24


def test_closing_ends_every_open_stream_with_a_reason(config: EngineConfig) -> None:
    async def run() -> None:
        engine = await AsyncEngine.start(config)
        stream = await engine.submit(request("r", "g0", max_tokens=400))
        await anext(stream)
        await engine.close()
        with pytest.raises(DrainingError):
            async for _ in stream:
                pass
        assert engine.load().adapter_leases == 0

    asyncio.run(run())


class Exploding:
    """Stands before a method and raises at the calls that it is told."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self.left = 0
        self._work = getattr(owner, name)
        patch.setattr(owner, name, self)

    def __call__(self, *args: object, **options: object) -> object:
        if self.left:
            self.left -= 1
            raise RuntimeError("kernel fault")
        return self._work(*args, **options)


@pytest.mark.parametrize("where", ["forward", "build", "plan"])
def test_a_step_that_fails_ends_its_requests_and_the_engine_goes_on(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    async def work(engine: AsyncEngine) -> None:
        inner = engine._parts.engine
        owner, name = {
            "forward": (engine._parts.runner, "execute"),
            "build": (inner.batch, "build"),
            "plan": (inner.scheduler, "plan"),
        }[where]
        expected = (await finish(engine, request("r#0", "g0"))).token_ids
        streams = [await engine.submit(request(f"r#{i}", "g0", max_tokens=400)) for i in (1, 2)]
        for stream in streams:
            await anext(stream)
        Exploding(monkeypatch, owner, name).left = 1
        for stream in streams:
            with pytest.raises(StepFailedError, match="may be sent again") as caught:
                async for _ in stream:
                    pass
            assert caught.value.retry_after_s is not None
        assert (await finish(engine, request("r#3", "g0"))).token_ids == expected
        assert (engine.load().step_failures, engine.load().request_failures) == (1, 0)
        assert engine.snapshot().requests.ended["step_failed"] == 2

    with_engine(config, work)


def test_an_engine_whose_steps_all_fail_says_that_it_is_dead(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: AsyncEngine) -> list[str]:
        Exploding(monkeypatch, engine._parts.runner, "execute").left = 1_000
        ends: list[str] = []
        while not engine.dead.is_set():
            try:
                await finish(engine, request(f"r#{len(ends)}", "g0"))
            except GraloraError as error:
                ends.append(type(error).__name__)
        with pytest.raises(EngineDeadError):
            await engine.submit(request("next"))
        return ends

    assert with_engine(config, work)[:3] == ["StepFailedError"] * 3


def test_a_good_step_between_failures_lets_the_engine_live(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(engine: AsyncEngine) -> None:
        execute = Exploding(monkeypatch, engine._parts.runner, "execute")
        for number in range(6):
            execute.left = 1
            with pytest.raises(StepFailedError):
                await finish(engine, request(f"bad#{number}"))
            await finish(engine, request(f"good#{number}", max_tokens=1))
        assert not engine.dead.is_set()

    with_engine(config, work)


@pytest.mark.parametrize("at_the_end", [False, True])
def test_an_output_that_cannot_be_delivered_ends_its_request_and_no_other(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch, *, at_the_end: bool
) -> None:
    """On the event loop, where one call delivers a whole step."""

    async def work(engine: AsyncEngine) -> None:
        expected = (await finish(engine, request("r#0", "g1"))).token_ids
        unlucky, neighbour = await engine.submit(request("r#1", "g1")), await engine.submit(request("r#2", "g1"))
        put = unlucky.put

        def broken(delta: Delta) -> None:
            if (delta.finished is not None) == at_the_end:
                raise KeyError("a bug")
            put(delta)

        monkeypatch.setattr(unlucky, "put", broken)
        with pytest.raises(RequestFailedError, match="the server's log has the cause"):
            async for _ in unlucky:
                pass
        assert merge_deltas([delta async for delta in neighbour]).token_ids == expected
        await until(lambda: "r#1" not in engine._entries)
        assert engine.snapshot().requests.ended == {"length": 2, "internal": 1}
        assert (await finish(engine, request("r#1", "g1"))).token_ids == expected

    with_engine(config, work)


def test_a_client_that_reads_nothing_is_ended_and_its_tokens_are_not_kept() -> None:
    async def run() -> list[str]:
        aborted: list[str] = []
        stream = RequestStream("slow", aborted.append)
        for _ in range(1025):
            stream.put(Delta(token_ids=(1,)))
        with pytest.raises(SlowConsumerError, match="1025 messages unread"):
            await anext(stream)
        return aborted

    assert asyncio.run(run()) == ["slow"]


def test_unread_deltas_arrive_as_one() -> None:
    async def run() -> Delta:
        stream = RequestStream("r", lambda _: None)
        stream.put(Delta(text="a", token_ids=(1,)))
        stream.put(Delta(text="b", token_ids=(2,)))
        return await anext(stream)

    assert asyncio.run(run()) == Delta(text="ab", token_ids=(1, 2))


def test_stop_strings_logprobs_and_echo_reach_the_caller(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> tuple[Delta, Delta]:
        wanted = replace(
            request("r#0"), response=ResponseParams(logprobs=True, top_logprobs=2, echo_prompt_token_ids=True)
        )
        whole = await finish(engine, wanted)
        middle = whole.text[len(whole.text) // 2 :][:3]
        stopped = await finish(engine, replace(request("r#1"), stopping=StoppingParams(max_tokens=24, stop=(middle,))))
        assert stopped.finished is not None
        assert stopped.finished.stop_string == middle
        assert stopped.text == whole.text[: whole.text.index(middle)]
        return whole, stopped

    whole, _ = with_engine(config, work)

    assert whole.started is not None
    assert whole.started.prompt_token_ids == request("r#0").prompt.token_ids
    assert [entry.token_id for entry in whole.logprobs] == list(whole.token_ids)
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in whole.logprobs)
    assert all(len(entry.top) == 2 for entry in whole.logprobs)


def test_a_held_request_leaves_its_row_to_others_and_has_all_its_tokens_in_the_end(config: EngineConfig) -> None:
    wanted = request("slow", "g0", max_tokens=40)

    async def held(engine: AsyncEngine) -> Delta:
        stream = await engine.submit(wanted)
        seen = [await anext(stream)]
        stream.hold()
        other = await finish(engine, request("other", "g1", max_tokens=5))
        assert len(other.token_ids) == 5
        assert engine.load().paused == 1
        stream.go_on()
        seen += [delta async for delta in stream]
        return merge_deltas(seen)

    one_row = replace(config, max_num_seqs=1)
    expected = with_engine(one_row, lambda engine: finish(engine, wanted))
    actual = with_engine(one_row, held)

    assert actual.token_ids == expected.token_ids
    assert actual.text == expected.text


def test_a_request_that_cannot_be_in_time_is_refused_at_once_and_one_that_can_is_not(config: EngineConfig) -> None:
    async def work(engine: AsyncEngine) -> None:
        slow_down(engine, 0.02)
        for index in range(3):
            await finish(engine, request(f"before-{index}", max_tokens=20))
        flood = [await engine.submit(request(f"r{i}", max_tokens=100)) for i in range(20)]
        with pytest.raises(TooLateError) as caught:
            await engine.submit(replace(request("late", max_tokens=20), timeout_s=0.5))
        assert caught.value.retry_after_s > 0
        assert float(caught.value.metadata()["expected_s"]) > float(caught.value.metadata()["limit_s"])
        other = await finish(engine, replace(request("light", "g0", max_tokens=3), timeout_s=5.0))
        assert len(other.token_ids) == 3
        engine.first_token_s = 0.01
        with pytest.raises(TooLateError, match="first token"):
            await engine.submit(request("by the objective", max_tokens=20))
        never = request("never", max_tokens=engine.info().max_model_len)
        with pytest.raises(InvalidRequestError, match="max_tokens"):  # who hears that it is too late comes again
            await engine.submit(replace(never, timeout_s=0.5))
        for stream in flood:
            await stream.aclose()

    with_engine(replace(config, max_num_seqs=2), work)


def test_a_flood_of_one_tenant_does_not_keep_another_one_waiting(config: EngineConfig) -> None:
    """Its row is there in the next step, and nobody's tokens change."""

    async def work(engine: AsyncEngine) -> list[Delta]:
        flood = [
            asyncio.create_task(finish(engine, replace(request(f"r{i}", "g0", max_tokens=60), tenant="flood")))
            for i in range(30)
        ]
        await until(lambda: engine.load().running == 2 and engine.load().generated_tokens > 10)
        light = await finish(engine, replace(request("light", "g0", max_tokens=3), tenant="light"))
        assert light.finished is not None
        assert sum(task.done() for task in flood) < 10
        return await asyncio.gather(*flood)

    two_rows = replace(config, max_num_seqs=2)
    crowded = with_engine(two_rows, work)
    alone = with_engine(
        two_rows,
        lambda engine: asyncio.gather(*(finish(engine, request(f"r{i}", "g0", max_tokens=60)) for i in range(30))),
    )

    assert [delta.token_ids for delta in crowded] == [delta.token_ids for delta in alone]
    assert any(delta.finished.preemptions for delta in crowded if delta.finished is not None)

"""Quotas and usage over a real socket: who is refused and how, what each call costs, and who is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.callers import calling, limit, served
from support.fake_engine import finished, token
from support.grpc_harness import Served, ask, ask_once, failure, read_all
from support.uploading import contents, messages

from gralora.v1 import server_pb2
from gralora_runtime.adapters.catalogue.uploads import OVERHEAD_BYTES, UploadLimits, Uploads
from gralora_runtime.errors import InvalidRequestError, QueueFullError, QuotaExceededError, SlowConsumerError
from gralora_server.tenants.settings import Role

Code = grpc.StatusCode
ACME, OTHER, ADMIN = calling("acme"), calling("other"), calling("")
ACMES_MANAGER, OTHERS_MANAGER = calling("acme", Role.MANAGE), calling("other", Role.MANAGE)
FILES = contents(0)
NUM_BYTES = sum(map(len, FILES.values()))


@pytest.fixture
def uploads(tmp_path: Path) -> Iterator[Uploads]:
    kept = Uploads(tmp_path / "uploads", limits=UploadLimits(), in_use=lambda _: False)
    yield kept
    kept.close()


class Clock:
    """Of a server's quotas, which the test turns."""

    def __init__(self, s: Served) -> None:
        self.now_s = 0.0
        s.server.quotas._clock = lambda: self.now_s


async def usage(s: Served, caller: dict[str, Any] = ADMIN, **fields: Any) -> dict[tuple[str, str], dict[str, int]]:
    """By tenant and adapter, what is not 0."""
    answer = await s.client.server.GetUsage(server_pb2.GetUsageRequest(**fields), **caller)
    return {
        (row.tenant, row.adapter): {
            field.name: value for field, value in row.ListFields() if field.name not in ("tenant", "adapter")
        }
        for row in answer.usage
    }


async def test_a_refusal_says_which_limit_and_when_to_come_again() -> None:
    async with served() as s:
        clock = Clock(s)
        limit(s, "acme", requests_per_s=0.8, burst_s=2.5)
        s.engine.script = [token(1), finished()]
        for index in range(2):
            await s.client.generation.Generate(ask_once(f"r{index}"), **ACME)
        failed = await failure(s.client.generation.Generate(ask_once(), **ACME))
        await s.client.generation.Generate(ask_once("r-other"), **OTHER)
        await s.client.generation.Generate(ask_once("r-operator"), **ADMIN)
        clock.now_s += float(failed.trailers["grpc-retry-pushback-ms"]) / 1000
        await s.client.generation.Generate(ask_once("r-late"), **ACME)

    assert failed.code is Code.RESOURCE_EXHAUSTED
    assert failed.info.reason == "QUOTA_EXCEEDED"
    assert dict(failed.info.metadata) == {
        "tenant": "acme",
        "limit": "requests_per_s",
        "value": "0.8",
        "asked": "1 request",
    }
    (violation,) = failed.details["QuotaFailure"].violations
    assert (violation.subject, violation.description) == ("tenant:acme", "requests_per_s = 0.8")
    assert failed.details["RetryInfo"].retry_delay.ToMilliseconds() == 1251  # 1250, and as little as there is
    assert failed.trailers["grpc-retry-pushback-ms"] == "1251"
    assert len(s.engine.requests) == 5


async def test_a_stream_is_charged_while_it_runs() -> None:
    async with served() as s:
        Clock(s)
        limit(s, "acme", tokens_per_s=10, burst_s=1)
        call = s.client.generation.StreamGenerate(ask(adapter="poet"), **ACME)
        await call.read()
        for token_id in range(7):
            s.engine.streams["acme r1"].put(token(token_id))
            await call.read()
        failed = await failure(s.client.generation.Generate(ask_once("r2"), **ACME))
        running = await usage(s)
        s.engine.streams["acme r1"].put(finished(output_tokens=7))
        await read_all(call)

    assert failed.info.metadata["limit"] == "tokens_per_s"
    assert failed.info.metadata["asked"] == "about 2 tokens of a prompt"
    counted = {"requests": 1, "prompt_tokens": 3, "cached_tokens": 1, "output_tokens": 7}
    assert running == {("acme", "poet"): counted, ("acme", "(others)"): {"refused": 1}}


async def open_at_once(s: Served, ids: list[str]) -> tuple[dict[str, grpc.aio.UnaryStreamCall], int]:
    """The streams that began, and how many were refused."""
    calls = {request_id: s.client.generation.StreamGenerate(ask(request_id), **ACME) for request_id in ids}
    first = await asyncio.gather(*(call.read() for call in calls.values()), return_exceptions=True)
    refused = [error for error in first if isinstance(error, grpc.aio.AioRpcError)]
    assert {error.code() for error in refused} <= {Code.RESOURCE_EXHAUSTED}
    begun = [request_id.partition(" ")[2] for request_id in s.engine.streams]
    return {request_id: calls[request_id] for request_id in begun if request_id in calls}, len(refused)


async def test_of_twenty_streams_at_once_five_run() -> None:
    """Whoever ends makes room for one more, however it ends."""
    async with served() as s:
        limit(s, "acme", streams=5)
        running, refused = await open_at_once(s, [f"r{index}" for index in range(20)])
        done, failing, leaving = list(running)[:3]
        s.engine.streams[f"acme {done}"].put(finished())
        await read_all(running[done])
        s.engine.streams[f"acme {failing}"].fail(SlowConsumerError(failing, 1))
        await failure(read_all(running[failing]))
        s.engine.abort_happened.clear()
        running[leaving].cancel()
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)
        again, refused_again = await open_at_once(s, [f"again-{index}" for index in range(20)])
        counts = await usage(s)
        for call in (*running.values(), *again.values()):
            call.cancel()

    assert (len(running), refused, len(again), refused_again) == (5, 15, 3, 17)
    assert counts["acme", ""]["requests"] == 8
    assert sum(row.get("refused", 0) for row in counts.values()) == 32


async def test_a_cancelled_request_pays_for_what_it_used_read_or_not() -> None:
    async with served() as s:
        Clock(s)
        limit(s, "acme", tokens_per_s=100, burst_s=1)
        call = s.client.generation.StreamGenerate(ask(), **ACME)
        await call.read()
        stream = s.engine.streams["acme r1"]
        call.cancel()
        for token_id in range(200):  # before the server hears of it
            stream.put(token(token_id))
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)
        failed = await failure(s.client.generation.Generate(ask_once("r2"), **ACME))
        counts = await usage(s)

    assert failed.info.metadata["limit"] == "tokens_per_s"
    assert counts["acme", ""]["output_tokens"] == 200


@pytest.mark.parametrize(
    "error", [QueueFullError(1, 1.0), QuotaExceededError("acme", "queued_requests", 1, "1 request")]
)
async def test_who_is_refused_by_the_engine_is_charged_nothing(error: Exception) -> None:
    async with served() as s:
        Clock(s)
        limit(s, "acme", requests_per_s=1, burst_s=1)
        s.engine.refusals = [error] * 3
        for _ in range(3):
            assert (await failure(s.client.generation.Generate(ask_once(), **ACME))).code is Code.RESOURCE_EXHAUSTED
        s.engine.script = [finished()]
        await s.client.generation.Generate(ask_once(), **ACME)
        counts = await usage(s)

    assert counts == {
        ("acme", ""): {"requests": 1, "prompt_tokens": 3, "cached_tokens": 1},
        ("acme", "(others)"): {"refused": 3},
    }


async def test_a_mistake_is_no_refusal_and_no_usage() -> None:
    async with served() as s:
        limit(s, "acme", requests_per_s=1, burst_s=1)
        for _ in range(3):
            bad = ask_once(stopping={"max_tokens": -1})
            assert (await failure(s.client.generation.Generate(bad, **ACME))).code is Code.INVALID_ARGUMENT
        s.engine.refusals = [InvalidRequestError("prompt", 1, "is too long")]
        assert (await failure(s.client.generation.Generate(ask_once(), **ACME))).code is Code.INVALID_ARGUMENT
        counts = await usage(s)

    assert counts == {}


async def test_without_tenants_everything_is_counted_and_nothing_limited() -> None:
    async with served(tenancy=None) as s:
        s.engine.script = [token(1), finished()]
        for index in range(50):
            await s.client.generation.Generate(ask_once(f"r{index}", adapter="poet"))
        counts = await usage(s, {})

    assert counts == {("", "poet"): {"requests": 50, "prompt_tokens": 150, "cached_tokens": 50, "output_tokens": 50}}


async def test_a_request_that_never_started_used_no_tokens() -> None:
    async with served() as s:
        s.engine.start_at_once = False
        call = s.client.generation.StreamGenerate(ask(), **ACME)
        await call.initial_metadata()
        call.cancel()
        await asyncio.wait_for(s.engine.abort_happened.wait(), 10)
        counts = await usage(s)

    assert counts == {("acme", ""): {"requests": 1}}


async def test_a_tenant_is_told_of_itself_alone() -> None:
    async with served() as s:
        s.engine.script = [finished()]
        for index, caller in enumerate((ACME, OTHER, ADMIN)):
            await s.client.generation.Generate(ask_once(f"r{index}"), **caller)
        everybody = await usage(s)
        own = await usage(s, ACME)
        asked = await usage(s, ACME, tenant="acme")
        operators = await usage(s, tenant="")
        one = await usage(s, tenant="other")
        nobody = await usage(s, tenant="nobody")
        forbidden = [
            await failure(s.client.server.GetUsage(server_pb2.GetUsageRequest(tenant=tenant), **ACME))
            for tenant in ("other", "", "nobody")
        ]

    assert [tenant for tenant, _ in everybody] == ["", "acme", "other"]
    assert own == asked == {("acme", ""): {"requests": 1, "prompt_tokens": 3, "cached_tokens": 1}}
    assert [tenant for tenant, _ in operators] == [""]
    assert [tenant for tenant, _ in one] == ["other"]
    assert nobody == {}
    assert {failed.code for failed in forbidden} == {Code.PERMISSION_DENIED}


async def test_usage_comes_in_pages() -> None:
    async with served() as s:
        s.engine.script = [finished()]
        names = ["poet", "org/bard@main", "org/bard"]
        for index, (name, caller) in enumerate((name, caller) for name in names for caller in (ACME, OTHER)):
            await s.client.generation.Generate(ask_once(f"r{index}", adapter=name), **caller)
        found, token_, sizes = [], "", []
        while token_ or not sizes:
            request = server_pb2.GetUsageRequest(page_size=2, page_token=token_)
            answer = await s.client.server.GetUsage(request, **ADMIN)
            found += [(row.tenant, row.adapter) for row in answer.usage]
            sizes.append(len(answer.usage))
            token_ = answer.next_page_token

    assert sizes == [2, 2, 2]
    assert found == [(tenant, name) for tenant in ("acme", "other") for name in sorted(names)]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"page_size": -1}, "page_size"),
        ({"page_size": 1001}, "page_size"),
        ({"page_token": "x" * 600}, "page_token"),
        ({"tenant": "x" * 600}, "tenant"),
    ],
)
async def test_questions_that_make_no_sense_are_refused(fields: dict[str, Any], field: str) -> None:
    async with served() as s:
        failed = await failure(s.client.server.GetUsage(server_pb2.GetUsageRequest(**fields), **ADMIN))

    assert failed.code is Code.INVALID_ARGUMENT
    assert failed.fields == [field]


async def test_while_the_server_starts_nobody_is_told_of_usage_that_is_not_back_yet() -> None:
    async with served(started=False) as s:
        failed = await failure(s.client.server.GetUsage(server_pb2.GetUsageRequest(), **ADMIN))

    assert (failed.code, failed.info.reason) == (Code.UNAVAILABLE, "STARTING")


async def test_a_prompt_is_charged_by_its_tokens_and_not_by_its_length() -> None:
    """A prompt that looks larger than the limit gets in, and leaves no debt if it is not."""
    async with served() as s:
        Clock(s)
        limit(s, "acme", tokens_per_s=10, burst_s=1)
        s.engine.script = [finished()]
        request = ask_once()
        request.text = "x" * 100_000
        for index in range(3):  # three tokens each, says the engine
            request.request_id = f"r{index}"
            await s.client.generation.Generate(request, **ACME)


async def test_uploads_of_a_tenant_have_their_own_room(uploads: Uploads) -> None:
    whole = NUM_BYTES + OVERHEAD_BYTES
    async with served() as s:
        s.engine.adapters.uploads = uploads
        limit(s, "acme", upload_bytes=2 * whole)
        for name, caller in (("acme/a", ACMES_MANAGER), ("other/x", OTHERS_MANAGER), ("acme/b", ACMES_MANAGER)):
            await s.client.adapters.UploadAdapter(iter(messages(name, FILES)), **caller)
        failed = await failure(s.client.adapters.UploadAdapter(iter(messages("acme/c", FILES)), **ACMES_MANAGER))
        await s.client.adapters.UploadAdapter(iter(messages("other/y", FILES)), **OTHERS_MANAGER)
        await s.client.adapters.UploadAdapter(iter(messages("acme/operators", FILES)), **ADMIN)
        uploads.delete("acme/a")
        uploads.delete("acme/operators")
        await s.client.adapters.UploadAdapter(iter(messages("acme/c", FILES)), **ACMES_MANAGER)
        counts = await usage(s, tenant="acme")

    assert failed.code is Code.RESOURCE_EXHAUSTED
    assert dict(failed.info.metadata) == {
        "tenant": "acme",
        "limit": "upload_bytes",
        "value": str(2 * whole),
        "asked": f"{whole} bytes of an upload beside the {2 * whole} that are kept",
    }
    assert "RetryInfo" not in failed.details  # to wait makes no room
    assert counts == {
        **{("acme", f"acme/{name}"): {"upload_bytes": NUM_BYTES} for name in "abc"},
        ("acme", "(others)"): {"refused": 1},
    }


async def test_globs_say_which_uploads_are_a_tenants_own(uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        limit(s, "acme", adapters=("own-*",), upload_bytes=NUM_BYTES + OVERHEAD_BYTES)
        await s.client.adapters.UploadAdapter(iter(messages("acme/a", FILES)), **ADMIN)
        await s.client.adapters.UploadAdapter(iter(messages("own-a", FILES)), **ACMES_MANAGER)
        failed = await failure(s.client.adapters.UploadAdapter(iter(messages("own-b", FILES)), **ACMES_MANAGER))

    assert failed.info.metadata["limit"] == "upload_bytes"


async def test_the_pool_is_told_whose_an_adapter_is_and_what_it_may_take() -> None:
    async with served() as s:
        share_of = s.engine.adapters.share_of
        before = share_of("acme/a")
        limit(s, "acme", adapter_bytes=1000)
        share = share_of("acme/a")
        limit(s, "acme", adapters=("own-*",), adapter_bytes=2000)
        by_glob, no_longer = share_of("own-a"), share_of("acme/a")
        limit(s, "acme")
        unlimited = share_of("acme/a")

    assert (share.owner, share.max_bytes) == ("acme", 1000)
    assert str(share.refusal("acme/a", 1234)) == (
        "tenant 'acme' is at its limit adapter_bytes = 1000, and asks for 1234 bytes of adapter 'acme/a'"
    )
    assert (by_glob.owner, by_glob.max_bytes) == ("acme", 2000)
    assert (before, no_longer, unlimited) == (None, None, None)


async def test_limits_change_under_a_stream() -> None:
    async with served() as s:
        Clock(s)
        limit(s, "acme", streams=1)
        call = s.client.generation.StreamGenerate(ask(), **ACME)
        await call.read()
        limit(s, "acme", tokens_per_s=10, burst_s=1, streams=2)
        for token_id in range(20):
            s.engine.streams["acme r1"].put(token(token_id))
        await call.read()
        failed = await failure(s.client.generation.Generate(ask_once("r2"), **ACME))
        call.cancel()

    assert failed.info.metadata["limit"] == "tokens_per_s"

"""UploadAdapter over a real socket: what comes in which order, who may send it, and what is left when it ends early."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.fake_engine import adapter_info
from support.grpc_harness import Served, failure, served
from support.uploading import CONFIG, WEIGHTS, chunk, contents, header_of, manifest_of, messages, send, until

from gralora.v1 import adapters_pb2
from gralora_runtime.adapters.catalogue.uploads import UploadLimits, Uploads
from gralora_runtime.errors import AdapterBusyError, AdapterCapacityError, AdapterRejectedError, DrainingError
from gralora_server import uploading

Code = grpc.StatusCode
ADMIN, GENERATE = "admin-token-0123456789", "generate-token-0123456789"
FILES = contents(0)
MANIFEST = manifest_of("bard", FILES)
METHOD = "/gralora.v1.AdapterService/UploadAdapter"
MIB = 1 << 20


@pytest.fixture
def uploads(tmp_path: Path) -> Iterator[Uploads]:
    kept = Uploads(tmp_path / "uploads", limits=UploadLimits(at_once=2), in_use=lambda _: False)
    yield kept
    kept.close()


async def received(s: Served, **header: Any) -> dict[str, int]:
    request = adapters_pb2.GetAdapterUploadRequest(header=header_of(**{"name": "bard", "files": FILES} | header))
    return {file.name: file.size for file in (await s.client.adapters.GetAdapterUpload(request)).files}


async def ends(s: Served, *requests: adapters_pb2.UploadAdapterRequest) -> Any:
    return await failure(s.client.adapters.UploadAdapter(iter(requests)))


async def test_an_upload_is_loaded_and_found(uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        answer = await s.client.adapters.UploadAdapter(iter(messages("bard", FILES, pin=True)))
        found = uploads.find("bard")
        whole = await received(s)

    assert (answer.adapter.name, answer.adapter.pinned) == ("bard", True)
    assert s.engine.adapters.calls == [("load", "bard", found.directory, True)]
    assert (found.directory / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert whole == {CONFIG: len(FILES[CONFIG]), WEIGHTS: 3000}


async def test_a_chunk_may_have_a_mebibyte(uploads: Uploads) -> None:
    files = {CONFIG: b"{}", WEIGHTS: b"w" * (2 * MIB)}
    first, *_ = messages("bard", files)
    halves = [chunk(WEIGHTS, 0, files[WEIGHTS][:MIB]), chunk(WEIGHTS, MIB, files[WEIGHTS][MIB:])]
    async with served() as s:
        s.engine.adapters.uploads = uploads
        answer = await s.client.adapters.UploadAdapter(iter([first, chunk(CONFIG, 0, b"{}"), *halves]))

    assert answer.adapter.name == "bard"


@pytest.mark.parametrize("leaves", ["cancels", "times out"])
async def test_a_call_that_ends_early_leaves_what_it_sent(leaves: str, uploads: Uploads) -> None:
    part = {CONFIG: len(FILES[CONFIG]), WEIGHTS: 2000}
    async with served() as s:
        s.engine.adapters.uploads = uploads
        call = s.client.adapters.UploadAdapter(timeout=3.0 if leaves == "times out" else None)
        for message in messages("bard", FILES)[:-1]:
            await call.write(message)
        await asyncio.to_thread(until, lambda: uploads.received(MANIFEST) == part)
        if leaves == "cancels":
            call.cancel()
        else:
            assert (await failure(call)).code is Code.DEADLINE_EXCEEDED
        assert uploads.find("bard") is None
        answer = await s.client.adapters.UploadAdapter(iter(messages("bard", FILES, part)))

    assert answer.adapter.name == "bard"


async def test_an_upload_that_ends_too_soon_says_what_is_missing(uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        failed = await ends(s, *messages("bard", FILES)[:-1])

    assert failed.code is Code.FAILED_PRECONDITION
    assert failed.info.reason == "ADAPTER_UPLOAD"
    assert failed.message.endswith("is not complete: 2000 of 3000 bytes of adapter_model.safetensors are here")
    assert failed.details["ResourceInfo"].resource_name == "bard"


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([], "part"),
        ([adapters_pb2.UploadAdapterRequest()], "part"),
        ([chunk(WEIGHTS, 0, b"x")], "part"),
        ([messages("bard", FILES)[0]] * 2, "part"),
        ([messages("bard", FILES)[0], chunk(WEIGHTS, 0, b"")], "chunk.data"),
        ([messages("bard", FILES)[0], chunk(WEIGHTS, 0, b"x" * (MIB + 1))], "chunk.data"),
        ([messages("bard", FILES)[0], chunk("golden.json", 0, b"x")], "chunk.file"),
        ([messages("bard", FILES)[0], chunk("../x", 0, b"x")], "chunk.file"),
    ],
    ids=["nothing", "neither", "no header", "two headers", "empty", "too large", "unannounced", "outside"],
)
async def test_messages_that_make_no_sense_are_refused(requests: list[Any], field: str, uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        failed = await ends(s, *requests)

    assert failed.code is Code.INVALID_ARGUMENT
    assert failed.fields == [field]
    assert s.engine.adapters.calls == []


@pytest.mark.parametrize("method", ["UploadAdapter", "GetAdapterUpload"])
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": ""}, "header.name"),
        ({"name": "../bard"}, "header.name"),
        ({"name": "x" * 5000}, "header.name"),
        ({"files": {}}, "header.files"),
        ({"files": {"adapter_model.bin": b"x"}}, "header.files[0].name"),
        ({"files": {f"f{i}": b"x" for i in range(17)}}, "header.files"),
    ],
)
async def test_a_header_that_makes_no_sense_is_refused(
    method: str, changes: dict[str, Any], field: str, uploads: Uploads
) -> None:
    header = header_of(**{"name": "bard", "files": FILES} | changes)
    async with served() as s:
        s.engine.adapters.uploads = uploads
        if method == "UploadAdapter":
            failed = await ends(s, adapters_pb2.UploadAdapterRequest(header=header))
        else:
            request = adapters_pb2.GetAdapterUploadRequest(header=header)
            failed = await failure(s.client.adapters.GetAdapterUpload(request))

    assert failed.code is Code.INVALID_ARGUMENT
    assert failed.fields == [field]


async def test_other_content_than_announced_is_refused(uploads: Uploads) -> None:
    first, *_ = messages("bard", FILES)
    async with served() as s:
        s.engine.adapters.uploads = uploads
        longer = await ends(s, first, chunk(WEIGHTS, 0, b"x" * 3001))
        gap = await ends(s, first, chunk(WEIGHTS, 1, b"x"))
        other = await ends(s, first, chunk(CONFIG, 0, FILES[CONFIG]), chunk(WEIGHTS, 0, b"x" * 3000))

    assert {failed.code for failed in (longer, gap, other)} == {Code.FAILED_PRECONDITION}
    assert {failed.info.reason for failed in (longer, gap, other)} == {"ADAPTER_UPLOAD"}
    assert s.engine.adapters.calls == []
    assert uploads.find("bard") is None


async def test_without_a_state_directory_nothing_is_taken() -> None:
    async with served() as s:
        request = adapters_pb2.GetAdapterUploadRequest(header=header_of("bard", FILES))
        failures = [
            await ends(s, *messages("bard", FILES)),
            await failure(s.client.adapters.GetAdapterUpload(request)),
        ]

    assert [failed.code for failed in failures] == [Code.FAILED_PRECONDITION] * 2
    assert all("was started without a state directory" in failed.message for failed in failures)


@pytest.mark.parametrize(
    "error", [AdapterRejectedError("bard", ["it uses DoRA"]), AdapterCapacityError("bard", 5, 4)], ids=["bad", "large"]
)
async def test_an_adapter_that_cannot_be_loaded_is_refused_with_its_own_error_and_goes(
    error: Exception, uploads: Uploads
) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        s.engine.adapters.loading = concurrent.futures.Future()
        s.engine.adapters.loading.set_exception(error)
        failed = await ends(s, *messages("bard", FILES))
        left = await received(s)

    assert failed.code is Code.FAILED_PRECONDITION
    assert failed.message == str(error)
    assert uploads.find("bard") is None
    assert left == {CONFIG: 0, WEIGHTS: 0}


@pytest.mark.parametrize("error", [DrainingError(), RuntimeError("our bug")], ids=["draining", "bug"])
async def test_a_load_that_ended_for_no_fault_of_the_adapter_keeps_its_files(
    error: Exception, uploads: Uploads
) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        s.engine.adapters.error = error
        await ends(s, *messages("bard", FILES))
        assert uploads.find("bard") is None
        whole = await received(s)
        s.engine.adapters.error = None
        answer = await s.client.adapters.UploadAdapter(iter(messages("bard", FILES, whole)))

    assert sum(whole.values()) == MANIFEST.num_bytes
    assert answer.adapter.name == "bard"


async def test_a_client_that_leaves_during_the_load_does_not_undo_it(uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        s.engine.adapters.loading = concurrent.futures.Future()
        call = s.client.adapters.UploadAdapter(iter(messages("bard", FILES)))
        assert await asyncio.to_thread(s.engine.adapters.called.acquire, timeout=10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        s.engine.adapters.loading.set_result(adapter_info("bard"))
        await asyncio.to_thread(until, lambda: uploads.find("bard"))


async def test_uploads_of_one_name_are_loaded_one_after_the_other(uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        first_load = s.engine.adapters.loading = concurrent.futures.Future()
        first = s.client.adapters.UploadAdapter(iter(messages("bard", FILES)))
        assert await asyncio.to_thread(s.engine.adapters.called.acquire, timeout=10)
        second = asyncio.ensure_future(_answer(s.client.adapters.UploadAdapter(iter(messages("bard", contents(1))))))
        other = manifest_of("bard", contents(1))
        await asyncio.to_thread(until, lambda: uploads.received(other)[WEIGHTS] == 3000)
        loads_another = await asyncio.to_thread(s.engine.adapters.called.acquire, timeout=0.3)
        s.engine.adapters.loading = None
        first_load.set_result(adapter_info("bard"))
        await first
        await second

    assert not loads_another
    assert (uploads.find("bard").directory / WEIGHTS).read_bytes() == contents(1)[WEIGHTS]


async def _answer(call: Any) -> Any:
    return await call


def unloading(name: str, *, delete_upload: bool = True) -> adapters_pb2.UnloadAdapterRequest:
    return adapters_pb2.UnloadAdapterRequest(name=name, delete_upload=delete_upload)


async def test_unloading_deletes_an_upload_only_if_asked_to(uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        await s.client.adapters.UploadAdapter(iter(messages("poet", FILES)))
        await s.client.adapters.UnloadAdapter(unloading("poet", delete_upload=False))
        assert uploads.has("poet")
        answer = await s.client.adapters.UnloadAdapter(unloading("poet"))
        assert not uploads.has("poet")
        await s.client.adapters.UploadAdapter(iter(messages("poet", FILES)))

    assert (answer.name, answer.pool_bytes_freed) == ("poet", 1000)
    assert uploads.has("poet")


async def test_what_was_unloaded_before_can_still_be_deleted(uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        await s.client.adapters.UploadAdapter(iter(messages("bard", FILES)))
        answer = await s.client.adapters.UnloadAdapter(unloading("bard"))  # the catalogue has only the poet

    assert (answer.name, answer.digest, answer.pool_bytes_freed) == ("bard", "", 0)
    assert not uploads.has("bard")


async def test_an_adapter_in_use_keeps_its_upload(uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        await s.client.adapters.UploadAdapter(iter(messages("poet", FILES)))
        s.engine.adapters.error = AdapterBusyError("poet", 3)
        failed = await failure(s.client.adapters.UnloadAdapter(unloading("poet")))

    assert (failed.code, failed.info.reason) == (Code.FAILED_PRECONDITION, "ADAPTER_BUSY")
    assert uploads.has("poet")


@pytest.mark.parametrize("keeps", [True, False], ids=["uploads", "no uploads"])
async def test_what_nobody_uploaded_is_not_unloaded_as_if_it_were(keeps: bool, uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads if keeps else None
        failed = await failure(s.client.adapters.UnloadAdapter(unloading("poet")))

    assert (failed.code, failed.info.reason) == (Code.FAILED_PRECONDITION, "ADAPTER_UPLOAD")
    assert ("cannot be deleted: there is none" if keeps else "without a state directory") in failed.message
    assert s.engine.adapters.calls == []


async def test_an_upload_is_deleted_with_all_versions_of_its_name_or_not_at_all(uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        await s.client.adapters.UploadAdapter(iter(messages("poet", FILES)))
        failed = await failure(s.client.adapters.UnloadAdapter(unloading("poet@1")))

    assert (failed.code, failed.fields) == (Code.INVALID_ARGUMENT, ["delete_upload"])
    assert uploads.has("poet")


async def test_an_upload_that_is_being_loaded_is_deleted_only_afterwards(uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        loading = s.engine.adapters.loading = concurrent.futures.Future()
        await asyncio.to_thread(_put, uploads, "bard")
        uploading_again = s.client.adapters.UploadAdapter(iter(messages("bard", contents(1))))
        assert await asyncio.to_thread(s.engine.adapters.called.acquire, timeout=10)
        deleting = asyncio.ensure_future(_answer(s.client.adapters.UnloadAdapter(unloading("bard"))))
        unloads = await asyncio.to_thread(s.engine.adapters.called.acquire, timeout=0.3)
        loading.set_result(adapter_info("bard"))
        await uploading_again
        await deleting

    assert not unloads
    assert not uploads.has("bard")


def _put(uploads: Uploads, name: str) -> None:
    manifest = manifest_of(name, FILES)
    upload = uploads.begin(manifest)
    send(upload, FILES, {})
    upload.finish()
    upload.close()
    uploads.accept(manifest)


async def test_too_many_uploads_at_once_are_told_to_wait(uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        calls = [s.client.adapters.UploadAdapter() for _ in range(2)]
        for index, call in enumerate(calls):
            for message in messages(f"n{index}", FILES)[:2]:
                await call.write(message)
            sent = manifest_of(f"n{index}", FILES)
            await asyncio.to_thread(until, lambda sent=sent: uploads.received(sent)[CONFIG])
        failed = await ends(s, *messages("bard", FILES))
        for call in calls:
            call.cancel()

    assert failed.code is Code.RESOURCE_EXHAUSTED
    assert failed.info.reason == "ADAPTER_UPLOAD_QUOTA"
    assert "RetryInfo" in failed.details


async def test_a_client_that_stops_sending_loses_its_place_and_keeps_its_bytes(uploads: Uploads, monkeypatch) -> None:
    monkeypatch.setattr(uploading, "STALL_S", 1.0)
    async with served() as s:
        s.engine.adapters.uploads = uploads
        call = s.client.adapters.UploadAdapter()
        for message in messages("bard", FILES)[:2]:
            await call.write(message)
        failed = await failure(call)
        left = await received(s)

    assert failed.code is Code.FAILED_PRECONDITION
    assert "nothing came for 1 s" in failed.message
    assert left == {CONFIG: len(FILES[CONFIG]), WEIGHTS: 0}


async def test_a_drain_ends_an_upload_that_can_go_on_elsewhere(uploads: Uploads) -> None:
    async with served() as s:
        s.engine.adapters.uploads = uploads
        call = s.client.adapters.UploadAdapter()
        for message in messages("bard", FILES)[:2]:
            await call.write(message)
        await asyncio.to_thread(until, lambda: uploads.received(MANIFEST)[CONFIG])
        drained = asyncio.create_task(s.server.drain(0.0))
        failed = await failure(call)
        await drained

    assert failed.code is Code.UNAVAILABLE
    assert uploads.received(MANIFEST)[CONFIG] == len(FILES[CONFIG])


@pytest.mark.parametrize("secret", [GENERATE, "nobodys-token-0123456789"], ids=["generate", "none"])
async def test_without_an_admins_token_an_upload_is_refused_before_anything_is_read(
    secret: str, uploads: Uploads, tmp_path: Path
) -> None:
    """Not even a header: the client has sent nothing when it hears of it, and junk is not looked at."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{ADMIN}\n{GENERATE} generate\n")
    metadata = (("authorization", f"Bearer {secret}"),)
    expected = Code.PERMISSION_DENIED if secret == GENERATE else Code.UNAUTHENTICATED
    async with served(auth_token_file=tokens) as s:
        s.engine.adapters.uploads = uploads
        silent = await failure(s.client.adapters.UploadAdapter(metadata=metadata))
        junk = await failure(s.client.channel.stream_unary(METHOD)(iter([b"\xff\xff"]), metadata=metadata))
        whole = await failure(s.client.adapters.UploadAdapter(iter(messages("bard", FILES)), metadata=metadata))
        request = adapters_pb2.GetAdapterUploadRequest(header=header_of("bard", FILES))
        asked = await failure(s.client.adapters.GetAdapterUpload(request, metadata=metadata))

    assert [failed.code for failed in (silent, junk, whole, asked)] == [expected] * 4
    assert uploads.received(MANIFEST) == {CONFIG: 0, WEIGHTS: 0}


async def test_junk_in_an_upload_is_an_invalid_argument_and_hardly_logged(uploads: Uploads, caplog) -> None:
    caplog.set_level(logging.INFO)
    raw = [message.SerializeToString() for message in messages("bard", FILES)[:2]]
    async with served() as s:
        s.engine.adapters.uploads = uploads
        for _ in range(5):
            failed = await failure(s.client.channel.stream_unary(METHOD)(_sent(*raw, b"\xff\xff")))
            assert failed.code is Code.INVALID_ARGUMENT
            assert failed.fields == ["request"]
        left = await received(s)

    assert left == {CONFIG: len(FILES[CONFIG]), WEIGHTS: 0}
    assert [record for record in caplog.records if record.exc_info] == []
    assert sum("UploadAdapter" in record.getMessage() for record in caplog.records) == 1


async def _sent(*raw: bytes) -> AsyncIterator[bytes]:
    for message in raw:
        yield message

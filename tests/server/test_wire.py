"""Bytes that are no message and callers without a token: a status each, hardly a line in the log, no harm to others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from support.call_lines import call_lines
from support.fake_engine import finished, token
from support.grpc_harness import Failed, Served, ask, ask_once, failure, read_all, served, unpack

from gralora_server.call_log import QUIET_S, SparseLog
from gralora_server.interceptors import AuthInterceptor, CallInterceptor
from gralora_server.tenants.settings import CertificateSettings, TenancySettings, TenantSettings
from gralora_server.tenants.tenancy import Tenancy

Code = grpc.StatusCode
ADMIN, GENERATE = "admin-token-0123456789", "generate-token-0123456789"
JUNK = b"\xff\xff\xff"
# method -> the kind of call that a channel makes of it
OURS = {
    "/gralora.v1.GenerationService/Generate": "unary_unary",
    "/gralora.v1.GenerationService/StreamGenerate": "unary_stream",
    "/gralora.v1.AdapterService/LoadAdapter": "unary_unary",
    "/gralora.v1.ServerService/Tokenize": "unary_unary",
}
HEALTH = {"/grpc.health.v1.Health/Check": "unary_unary", "/grpc.health.v1.Health/Watch": "unary_stream"}
REFLECTION = {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "stream_stream"}
NEED_TOKEN = OURS | REFLECTION
ALL = NEED_TOKEN | HEALTH
FLOOD, AT_ONCE, FEW = 2000, 50, 5


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"{ADMIN}\n{GENERATE} generate\n")
    return path


def bearing(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


async def rejection(s: Served, method: str, *raw: bytes, secret: str = "") -> Failed:
    """How a call ends that sends these bytes, with no serializer between them and the socket."""
    kind, channel = ALL[method], s.client.channel
    metadata = bearing(secret) if secret else ()
    if kind == "unary_unary":
        return await failure(channel.unary_unary(method)(*raw, metadata=metadata))
    if kind == "unary_stream":
        return await failure(channel.unary_stream(method)(*raw, metadata=metadata).read())
    return await asyncio.to_thread(rejected_stream, s.port, method, raw, metadata)


def rejected_stream(port: int, method: str, raw: tuple[bytes, ...], metadata: tuple[tuple[str, str], ...]) -> Failed:
    """By the blocking client: grpc.aio's forgets a status that comes before its write ends (grpc/grpc#36066)."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_stream(method)(iter(raw), metadata=metadata, timeout=10)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
    trailers = dict(caught.value.trailing_metadata())
    return Failed(caught.value.code(), caught.value.details(), trailers, unpack(trailers))


# --- statuses


@pytest.mark.parametrize("authenticated", [False, True], ids=["open", "token"])
@pytest.mark.parametrize("method", ALL)
async def test_bytes_that_are_no_message_are_an_invalid_argument(
    method: str, authenticated: bool, tokens: Path
) -> None:
    settings = {"auth_token_file": tokens} if authenticated else {}
    async with served(**settings) as s:
        failed = await rejection(s, method, JUNK, secret=ADMIN if authenticated else "")

    assert failed.code is Code.INVALID_ARGUMENT
    assert failed.message == "request: must be this method's protobuf message (got '3 bytes')"
    assert failed.fields == ["request"]
    assert failed.info.reason == "INVALID_REQUEST"
    assert s.engine.requests == []


async def test_health_takes_no_token_and_no_junk(tokens: Path) -> None:
    async with served(auth_token_file=tokens) as s:
        codes = [(await rejection(s, method, JUNK)).code for method in HEALTH]

    assert codes == [Code.INVALID_ARGUMENT] * 2


@pytest.mark.parametrize("raw", [JUNK, b"", b"x" * (17 << 20)], ids=["junk", "empty", "beyond-the-limit"])
@pytest.mark.parametrize("secret", ["", "wrong"], ids=["none", "wrong"])
@pytest.mark.parametrize("method", NEED_TOKEN)
async def test_without_a_token_a_call_is_unauthenticated_whatever_its_bytes(
    method: str, secret: str, raw: bytes, tokens: Path
) -> None:
    async with served(auth_token_file=tokens) as s:
        failed = await rejection(s, method, raw, secret=secret)

    assert failed.code is Code.UNAUTHENTICATED
    assert failed.info.reason == "UNAUTHENTICATED"


async def test_without_a_token_a_call_is_unauthenticated_before_it_has_sent_anything(tokens: Path) -> None:
    """Or else it could hold a place for as long as it likes."""
    async with served(auth_token_file=tokens) as s:
        silent = s.client.channel.stream_unary("/gralora.v1.GenerationService/Generate")()
        failed = await failure(silent)

    assert failed.code is Code.UNAUTHENTICATED


async def test_without_the_right_token_a_change_of_adapters_is_denied_whatever_its_bytes(tokens: Path) -> None:
    async with served(auth_token_file=tokens) as s:
        failed = await rejection(s, "/gralora.v1.AdapterService/LoadAdapter", JUNK, secret=GENERATE)

    assert failed.code is Code.PERMISSION_DENIED
    assert s.engine.adapters.calls == []


async def test_junk_ends_a_stream_of_requests_after_the_answers_to_what_came_before() -> None:
    good = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
    async with served() as s:
        call = s.client.channel.stream_stream(*REFLECTION)()
        await call.write(good)
        answer = reflection_pb2.ServerReflectionResponse.FromString(await call.read())
        await call.write(JUNK)
        failed = await failure(call.read())

    assert "grpc.health.v1.Health" in [service.name for service in answer.list_services_response.service]
    assert failed.code is Code.INVALID_ARGUMENT
    assert failed.fields == ["request"]


# --- log lines


async def test_the_log_line_has_the_id_that_the_request_was_given(caplog) -> None:
    caplog.set_level(logging.INFO, logger="gralora_server.calls")
    async with served() as s:
        s.engine.script = [finished()]
        answer = await s.client.generation.Generate(ask_once(request_id="", adapter="poet"))

    assert [(line["request_id"], line["adapter"]) for line in call_lines(caplog)] == [(answer.request_id, "poet@2")]
    assert len(answer.request_id) == 32


async def test_a_flood_of_junk_disturbs_neither_the_log_nor_anyone_else(caplog) -> None:
    caplog.set_level(logging.INFO)
    async with served() as s:
        codes = await flooded(s, ALL)
        final = await rejection(s, "/grpc.health.v1.Health/Check", JUNK)

    assert codes == {Code.INVALID_ARGUMENT}
    assert final.code is Code.INVALID_ARGUMENT
    assert_hardly_logged(caplog, "INVALID_ARGUMENT")


async def test_a_flood_of_refused_calls_disturbs_neither_the_log_nor_anyone_else(caplog, tokens: Path) -> None:
    caplog.set_level(logging.INFO)
    async with served(auth_token_file=tokens) as s:
        codes = await flooded(s, NEED_TOKEN, secret=GENERATE)

    assert codes == {Code.UNAUTHENTICATED}
    assert_hardly_logged(caplog, "UNAUTHENTICATED")


async def flooded(s: Served, methods: dict[str, str], secret: str = "") -> set[Code]:
    """The codes of many calls with junk, while a neighbour's stream goes on and health is asked for."""
    neighbour = s.client.generation.StreamGenerate(ask(), metadata=bearing(secret) if secret else ())
    await s.engine.submitted.get()
    codes: set[Code] = set()
    for begin in range(0, FLOOD, AT_ONCE):
        s.engine.streams["r1"].put(token(begin))
        these = [list(methods)[i % len(methods)] for i in range(begin, begin + AT_ONCE)]
        failures = await asyncio.gather(*(rejection(s, method, JUNK) for method in these))
        codes |= {failed.code for failed in failures}
        health = await s.client.health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    s.engine.streams["r1"].put(finished())
    messages = await read_all(neighbour)
    assert [token_id for message in messages for token_id in message.token_ids] == list(range(0, FLOOD, AT_ONCE))
    assert messages[-1].HasField("finished")
    return codes


def assert_hardly_logged(caplog: pytest.LogCaptureFixture, code: str) -> None:
    """One line for the flood and one for the neighbour, or a few more where the flood lasts long."""
    of_flood = [line for line in call_lines(caplog) if line["code"] == code]
    assert 1 <= len(of_flood) <= FEW
    assert of_flood[0]["method"] in ALL
    assert len(caplog.records) <= len(of_flood) + FEW
    assert [record for record in caplog.records if record.exc_info] == []


def test_a_sparse_log_writes_one_line_in_ten_seconds_and_counts_the_others(caplog) -> None:
    caplog.set_level(logging.INFO, logger="gralora_server.calls")
    clock = SimpleNamespace(now_s=100.0)
    log = SparseLog(lambda: clock.now_s)
    for clock.now_s in (100.0, 100.1, 109.9, 110.0, 111.0, 130.0, 150.0):
        log.write({"method": str(clock.now_s)})

    assert QUIET_S == 10
    assert call_lines(caplog) == [
        {"method": "100.0"},
        {"method": "110.0", "lines_dropped": 2},
        {"method": "130.0", "lines_dropped": 1},
        {"method": "150.0"},
    ]


# --- any service, not only ours


class Numbers:
    """A method of each kind, and of each way to write it; its messages are numbers."""

    def __init__(self) -> None:
        self.decoded: list[bytes] = []
        self.ended = asyncio.Event()  # `each`

    async def same(self, request: int, context: grpc.aio.ServicerContext) -> int:
        return request

    async def total(self, requests: AsyncIterator[int], context: grpc.aio.ServicerContext) -> int:
        return sum([request async for request in requests])

    async def count(self, request: int, context: grpc.aio.ServicerContext) -> AsyncIterator[int]:
        for number in range(request):
            yield number

    async def count_writing(self, request: int, context: grpc.aio.ServicerContext) -> None:
        for number in range(request):
            await context.write(number)

    async def each(self, requests: AsyncIterator[int], context: grpc.aio.ServicerContext) -> AsyncIterator[int]:
        try:
            async for request in requests:
                yield request
        finally:
            self.ended.set()

    async def each_writing(self, requests: AsyncIterator[int], context: grpc.aio.ServicerContext) -> None:
        async for request in requests:
            await context.write(request)

    def handler(self) -> grpc.GenericRpcHandler:
        make = {
            "same": grpc.unary_unary_rpc_method_handler,
            "total": grpc.stream_unary_rpc_method_handler,
            "count": grpc.unary_stream_rpc_method_handler,
            "count_writing": grpc.unary_stream_rpc_method_handler,
            "each": grpc.stream_stream_rpc_method_handler,
            "each_writing": grpc.stream_stream_rpc_method_handler,
        }
        methods = {name: kind(getattr(self, name), self._decode, encode) for name, kind in make.items()}
        methods["raw"] = grpc.unary_unary_rpc_method_handler(self.same)
        return grpc.method_handlers_generic_handler("Numbers", methods)

    def _decode(self, raw: bytes) -> int:
        self.decoded.append(raw)
        return int(raw)


def encode(number: int) -> bytes:
    return str(number).encode()


def literal(name: bytes, value: bytes) -> bytes:
    """A header field of HTTP/2, spelled out."""
    return bytes([0, len(name)]) + name + bytes([len(value)]) + value


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


async def send_raw_call(port: int, path: bytes, **headers: bytes) -> None:
    """What no client library would send: a call whose path and headers are any bytes."""
    fields = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x", b"te": b"trailers"}
    fields |= {b"content-type": b"application/grpc"} | {name.encode(): value for name, value in headers.items()}
    head = b"".join(literal(name, value) for name, value in fields.items())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, head))
    writer.write(frame(0, 1, 1, b"\0\0\0\0\0"))
    await writer.drain()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(reader.read(4096), 0.3)
    writer.close()


@pytest.mark.parametrize("headers", [{}, {"authorization": b"Bearer \xff\xfe"}, {"x-y": b"\xff"}], ids=str)
@pytest.mark.parametrize(
    "path", [b"/gralora\xff\xfe", b"/gralora.v1.GenerationService/Generate", b"\xff", b"/"], ids=str
)
async def test_paths_and_headers_of_any_bytes_leave_the_server_alive(path: bytes, headers: dict[str, bytes]) -> None:
    """With grpcio from 1.84.0 to 1.85.3 a single call whose path is not UTF-8 ends the server, token or not."""
    async with served() as s:
        await send_raw_call(s.port, path, **headers)
        answer = await s.client.health.Check(health_pb2.HealthCheckRequest(), timeout=10)

    assert answer.status == health_pb2.HealthCheckResponse.SERVING


@asynccontextmanager
async def serving_numbers(*interceptors: grpc.aio.ServerInterceptor) -> AsyncIterator[tuple[Numbers, grpc.aio.Channel]]:
    numbers = Numbers()
    server = grpc.aio.server(interceptors=interceptors)
    server.add_generic_rpc_handlers((numbers.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield numbers, channel
    finally:
        await server.stop(None)


async def test_methods_of_every_kind_get_their_messages() -> None:
    async with serving_numbers(CallInterceptor()) as (_, channel):
        assert await channel.unary_unary("/Numbers/same")(b"12") == b"12"
        assert await channel.unary_unary("/Numbers/raw")(JUNK) == JUNK  # has no decoder, so nothing is wrong with it
        assert await channel.stream_unary("/Numbers/total")(iter([b"1", b"20"])) == b"21"
        for name in ("count", "count_writing"):
            assert [part async for part in channel.unary_stream(f"/Numbers/{name}")(b"3")] == [b"0", b"1", b"2"]
        for name in ("each", "each_writing"):
            call = channel.stream_stream(f"/Numbers/{name}")(iter([b"12", b"3"]))
            assert [part async for part in call] == [b"12", b"3"]


async def test_methods_of_every_kind_refuse_junk(caplog) -> None:
    caplog.set_level(logging.INFO)
    async with serving_numbers(CallInterceptor(clock=lambda: 5.0)) as (_, channel):
        failed = [
            await failure(channel.unary_unary("/Numbers/same")(JUNK)),
            await failure(channel.stream_unary("/Numbers/total")(iter([b"1", JUNK]))),
            await failure(channel.unary_stream("/Numbers/count")(JUNK).read()),
            await failure(channel.unary_stream("/Numbers/count_writing")(JUNK).read()),
            await failure(channel.stream_stream("/Numbers/each")(iter([JUNK])).read()),
            await failure(channel.stream_stream("/Numbers/each_writing")(iter([JUNK])).read()),
        ]

    assert [failure.code for failure in failed] == [Code.INVALID_ARGUMENT] * 6
    assert [line["method"] for line in call_lines(caplog)] == ["/Numbers/same"]
    assert len(caplog.records) == 1


async def test_a_refused_call_is_never_decoded(tokens: Path) -> None:
    async with serving_numbers(AuthInterceptor(Tenancy(token_file=tokens)), CallInterceptor()) as (numbers, channel):
        await failure(channel.unary_unary("/Numbers/same")(b"12"))
        await failure(channel.stream_stream("/Numbers/each")(iter([b"12"])).read())
        refused = list(numbers.decoded)
        await channel.unary_unary("/Numbers/same")(b"12", metadata=bearing(GENERATE))

    assert refused == []
    assert numbers.decoded == [b"12"]


async def test_a_call_that_no_certificate_lets_in_is_never_decoded() -> None:
    """Who the peer is, is known only once gRPC has read a unary call's bytes; nobody has looked into them by then."""
    acme = TenantSettings(certificates=(CertificateSettings(subject="a client"),))
    tenancy = Tenancy(TenancySettings(tenants={"acme": acme}), asks_for_certificates=True)
    async with serving_numbers(AuthInterceptor(tenancy), CallInterceptor()) as (numbers, channel):
        failed = [
            await failure(channel.unary_unary("/Numbers/same")(JUNK)),
            await failure(channel.stream_unary("/Numbers/total")(iter([JUNK]))),
            await failure(channel.unary_stream("/Numbers/count")(JUNK).read()),
            await failure(channel.unary_stream("/Numbers/count_writing")(JUNK).read()),
        ]

    assert {failure.code for failure in failed} == {Code.UNAUTHENTICATED}
    assert numbers.decoded == []


async def test_a_client_that_leaves_ends_its_method_while_that_awaits_the_next_request() -> None:
    async with serving_numbers(CallInterceptor()) as (numbers, channel):
        call = channel.stream_stream("/Numbers/each")()
        await call.write(b"1")
        assert await call.read() == b"1"
        call.cancel()
        await asyncio.wait_for(numbers.ended.wait(), 10)

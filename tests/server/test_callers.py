"""Who a handler takes its caller for: each call's own, by whatever it showed, and as of now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.call_lines import call_lines
from support.certificates import LOCALHOST, Authority, Pair
from support.fake_engine import finished
from support.grpc_harness import ask, ask_once, failure, read_all, served
from support.tenants import OPERATOR, as_, bearing, certified, secret_of, two_tenants
from support.web_tokens import issuer, signed

from gralora.v1 import adapters_pb2
from gralora_runtime.errors import ConfigError
from gralora_server.config import TlsConfig
from gralora_server.tenants.caller import ANYBODY, Caller, current
from gralora_server.tenants.settings import Role, TenantSettings

Code = grpc.StatusCode
URI = "spiffe://cluster.example/acme"


# --- one task


class Noting(grpc.aio.ServerInterceptor):
    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[object] | None] = []

    async def intercept_service(self, continuation, call):
        self.tasks.append(asyncio.current_task())
        return await continuation(call)


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_grpc_serves_a_call_and_its_interceptors_in_one_task(kind: str) -> None:
    """What an interceptor sets in its context, the handler then sees, and no other call does."""
    noting, served_in = Noting(), []

    async def answer(request, context) -> bytes:
        served_in.append(asyncio.current_task())
        return b""

    async def generate(request, context):
        served_in.append(asyncio.current_task())
        yield b""

    make: Callable[..., object] = getattr(grpc, f"{kind}_rpc_method_handler")
    handler = make(generate if kind.endswith("stream") else answer)
    server = grpc.aio.server(interceptors=[noting])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Tasks", {"note": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for _ in range(2):
            request = iter([b""]) if kind.startswith("stream") else b""
            call = getattr(channel, kind)("/Tasks/note")(request)
            await (call.read() if kind.endswith("stream") else call)
    await server.stop(None)

    assert noting.tasks == served_in
    assert len(set(served_in)) == 2


async def test_calls_at_the_same_time_are_each_their_own_callers() -> None:
    async with served(tenancy=two_tenants()) as s:
        calls = [
            s.client.generation.StreamGenerate(ask(request_id=f"r{i}"), metadata=as_(("acme", "bob")[i % 2]))
            for i in range(20)
        ]
        for call in calls:
            await call.read()
        of_operator = s.client.generation.StreamGenerate(ask(), metadata=bearing(OPERATOR))
        await of_operator.read()
        tenants = {request.request_id.split()[-1]: request.tenant for request in s.engine.requests[:20]}

    assert tenants == {f"r{i}": ("acme", "bob")[i % 2] for i in range(20)}
    assert s.engine.requests[20].tenant == ""
    assert current() is ANYBODY


# --- log lines


async def test_a_log_line_names_the_tenant_if_there_is_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gralora_server.calls")
    async with served(tenancy=two_tenants()) as s:
        s.engine.script = [finished()]
        await s.client.generation.Generate(ask_once("a"), metadata=as_("acme"))
        await s.client.generation.Generate(ask_once("b"), metadata=bearing(OPERATOR))
        await failure(s.client.generation.Generate(ask_once(adapter="bob/x"), metadata=as_("acme")))
        await failure(s.client.adapters.PinAdapter(adapters_pb2.PinAdapterRequest(name="acme/x"), metadata=as_("acme")))

    told = [(line["code"], line["request_id"], line.get("tenant", "none")) for line in call_lines(caplog)]
    assert told == [
        ("OK", "a", "acme"),
        ("OK", "b", "none"),
        ("NOT_FOUND", "r1", "acme"),
        ("PERMISSION_DENIED", "", "acme"),
    ]


async def test_no_secret_is_ever_logged(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    web = signed(role="root")
    async with served(tenancy=two_tenants(jwt=issuer(tmp_path))) as s:
        s.engine.script = [finished()]
        await s.client.generation.Generate(ask_once(), metadata=as_("acme"))
        await failure(s.client.generation.Generate(ask_once(), metadata=bearing("a-wrong-secret")))
        await failure(s.client.generation.Generate(ask_once(), metadata=bearing(web)))

    assert "a web token was refused" not in caplog.text  # its claims are, not its signature
    for secret in (secret_of("acme"), "a-wrong-secret", web):
        assert secret not in caplog.text


# --- settings that change while calls come


async def test_from_one_call_to_the_next_other_settings_may_hold() -> None:
    without_acme = two_tenants().model_copy(update={"tenants": {"bob": TenantSettings()}})
    async with served(tenancy=two_tenants()) as s:
        running = s.client.generation.StreamGenerate(ask("long"), metadata=as_("acme"))
        await running.read()
        s.engine.script = [finished()]
        s.server.tenancy.replace(without_acme)
        failed = await failure(s.client.generation.Generate(ask_once(), metadata=as_("acme")))
        s.engine.streams["acme long"].put(finished())
        ended = await read_all(running)
        s.server.tenancy.replace(two_tenants())
        answer = await s.client.generation.Generate(ask_once(), metadata=as_("acme"))

    assert failed.code is Code.UNAUTHENTICATED
    assert ended[-1].HasField("finished")
    assert answer.HasField("finished")


async def test_a_server_that_was_open_may_be_closed() -> None:
    async with served() as s:
        s.engine.script = [finished()]
        await s.client.generation.Generate(ask_once("a"))
        s.server.tenancy.replace(two_tenants())
        failed = await failure(s.client.generation.Generate(ask_once("b")))
        health = await s.client.health.Check(health_pb2.HealthCheckRequest())

    assert failed.code is Code.UNAUTHENTICATED
    assert health.status == health_pb2.HealthCheckResponse.SERVING


# --- web tokens


async def test_a_web_token_is_a_caller(tmp_path: Path) -> None:
    async with served(tenancy=two_tenants(jwt=issuer(tmp_path))) as s:
        s.engine.script = [finished()]
        await s.client.generation.Generate(ask_once(), metadata=bearing(signed(role="generate")))
        expired = await failure(s.client.generation.Generate(ask_once(), metadata=bearing(signed(exp=1.0))))
        wrong = await failure(s.client.generation.Generate(ask_once(), metadata=bearing("a-wrong-secret")))

    assert [(request.tenant, request.weight) for request in s.engine.requests] == [("acme", 3.0)]
    assert expired == wrong
    assert wrong.code is Code.UNAUTHENTICATED


# --- certificates


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def tls(authority: Authority, tmp_path: Path) -> TlsConfig:
    certificate, key = authority.certify("a server", LOCALHOST).write(tmp_path, "server")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.pem)
    return TlsConfig(certificate=certificate, private_key=key, client_ca=ca)


def showing(authority: Authority, pair: Pair) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(authority.pem, pair.key, pair.certificate)


@pytest.mark.parametrize(
    ("subject", "names"),
    [
        ("client-7", ()),
        ("client.acme.example", (x509.DNSName("client.acme.example"),)),
        (URI, (x509.RFC822Name("a@acme.example"), x509.UniformResourceIdentifier(URI))),
    ],
    ids=["common-name", "DNS", "URI"],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["unary", "stream"])
async def test_a_certificate_is_a_caller_by_any_name_in_it(
    subject: str, names: tuple[x509.GeneralName, ...], streaming: bool, tls: TlsConfig, authority: Authority, caplog
) -> None:
    caplog.set_level(logging.INFO, logger="gralora_server.calls")
    credentials = showing(authority, authority.certify("client-7", *names))
    async with served(tls=tls, tenancy=certified(subject), credentials=credentials) as s:
        s.engine.script = [finished()]
        if streaming:
            await read_all(s.client.generation.StreamGenerate(ask()))
        else:
            await s.client.generation.Generate(ask_once())
        denied = await failure(s.client.adapters.PinAdapter(adapters_pb2.PinAdapterRequest(name="acme/x")))

    assert [(request.tenant, request.weight) for request in s.engine.requests] == [("acme", 3.0)]
    assert denied.code is Code.PERMISSION_DENIED
    assert s.engine.adapters.calls == []
    assert {line["tenant"] for line in call_lines(caplog)} == {"acme"}


async def test_a_certificate_of_nobody_is_refused_as_a_wrong_token_is(tls: TlsConfig, authority: Authority) -> None:
    credentials = showing(authority, authority.certify("stranger", x509.RFC822Name("client-7")))
    async with served(tls=tls, tenancy=certified("client-7"), credentials=credentials) as s:
        unknown = await failure(s.client.generation.Generate(ask_once()))
        wrong = await failure(s.client.generation.Generate(ask_once(), metadata=bearing("a-wrong-secret")))
        upload = await failure(s.client.adapters.UploadAdapter(iter([adapters_pb2.UploadAdapterRequest()])))

    assert unknown == wrong
    assert unknown.code is upload.code is Code.UNAUTHENTICATED
    assert s.engine.requests == []


async def test_a_token_says_who_calls_even_beside_a_certificate(tls: TlsConfig, authority: Authority) -> None:
    """A proxy shows its own certificate, and its clients' tokens."""
    credentials = showing(authority, authority.certify("client-7"))
    async with served(tls=tls, tenancy=certified("client-7"), credentials=credentials) as s:
        s.engine.script = [finished()]
        await s.client.generation.Generate(ask_once(), metadata=as_("bob"))
        wrong = await failure(s.client.generation.Generate(ask_once(), metadata=bearing("a-wrong-secret")))

    assert [request.tenant for request in s.engine.requests] == ["bob"]
    assert wrong.code is Code.UNAUTHENTICATED


async def test_reflection_and_health_by_certificate(tls: TlsConfig, authority: Authority) -> None:
    """One is an asynchronous generator, the other needs no caller."""
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    services = []
    for name in ("client-7", "stranger"):
        credentials = showing(authority, authority.certify(name))
        async with served(tls=tls, tenancy=certified("client-7"), credentials=credentials) as s:
            health = await s.client.health.Check(health_pb2.HealthCheckRequest())
            call = reflection_pb2_grpc.ServerReflectionStub(s.client.channel).ServerReflectionInfo(iter([asked]))
            services.append(await call.read() if name == "client-7" else await failure(call.read()))
            assert health.status == health_pb2.HealthCheckResponse.SERVING

    assert services[0].list_services_response.service
    assert services[1].code is Code.UNAUTHENTICATED


async def test_certificates_without_an_authority_stop_the_start() -> None:
    with pytest.raises(ConfigError, match="no client authority"):
        async with served(tenancy=certified("client-7")):
            pass


def test_outside_of_a_call_anybody_is_calling() -> None:
    assert current() == Caller("", Role.ADMIN)

"""What every HTTP call passes through: who may call, what may be sent, and what a stranger can do."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from unittest.mock import MagicMock

import pytest
from support.call_lines import call_lines
from support.fake_engine import finished
from support.http_harness import CHAT, TEXT, error_of, http_served
from support.tenants import OWN, PUBLIC, THEIRS, Registered, secret_of, two_tenants

from gralora_runtime.errors import ConfigError
from gralora_server.config import HttpConfig, ServerConfig
from gralora_server.gate import Gate
from gralora_server.http import exchange, protocol
from gralora_server.http.adapters import AdapterEndpoints
from gralora_server.http.calls import OPEN
from gralora_server.http.generation import GenerationEndpoints
from gralora_server.http.protocol import MAX_HEAD_BYTES
from gralora_server.http.server_endpoints import ServerEndpoints
from gralora_server.service import serving_http
from gralora_server.servicers import AdapterServicer
from gralora_server.tenants.roles import ROLES
from gralora_server.tenants.settings import Role

SECRET = "a-users-own-token"
JSON = {"content-type": "application/json"}


async def raw(port: int, data: bytes, *, close: bool = False) -> bytes:
    """All that is answered until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        if close:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"model": "fake"}, "prompt"),
        (TEXT | {"model": ""}, "model"),
        (TEXT | {"temperature": "warm"}, "temperature"),
        (TEXT | {"temperature": -1}, "temperature"),
        (TEXT | {"top_p": 0}, "top_p"),
        (TEXT | {"max_tokens": 0}, "max_tokens"),
        (TEXT | {"max_tokens": 2**40}, "max_tokens"),
        (TEXT | {"max_tokens": 1.5}, "max_tokens"),
        (TEXT | {"n": 0}, "n"),
        (TEXT | {"n": 65}, "n"),
        (TEXT | {"n": 40, "prompt": ["a", "b"]}, "prompt"),
        (TEXT | {"prompt": []}, "prompt"),
        (TEXT | {"prompt": ""}, "prompt"),
        (TEXT | {"prompt": [1, -1]}, "prompt"),
        (TEXT | {"prompt": [[]]}, "prompt"),
        (TEXT | {"prompt": ["a", 1]}, "prompt"),
        (TEXT | {"seed": -1}, "seed"),
        (TEXT | {"stop": [""]}, "stop[0]"),
        (TEXT | {"logit_bias": {"x": 1}}, "logit_bias"),
        (TEXT | {"logit_bias": {"5": "much"}}, "logit_bias[5]"),
        (TEXT | {"logprobs": 21}, "top_logprobs"),
        (TEXT | {"echo": True}, "echo"),
        (TEXT | {"best_of": 3}, "best_of"),
        (TEXT | {"temprature": 0.5}, "temprature"),
        (TEXT | {"stream": "yes"}, "stream"),
    ],
)
async def test_what_is_wrong_is_named_as_the_body_has_it(body: dict[str, object], field: str) -> None:
    async with http_served() as s:
        response = await s.client.post("/v1/completions", json=body)
        s.engine.script = [finished()]
        fine = await s.client.post("/v1/completions", json=TEXT)

    told = error_of(response)
    assert (response.status_code, told["code"]) == (400, "INVALID_REQUEST")
    assert told["param"].startswith(field)
    assert field in told["message"]
    assert fine.status_code == 200


@pytest.mark.parametrize(
    "turns", [[], [{"content": "a"}], [{"role": "", "content": "a"}], "hello", [{"role": "user", "content": 5}]]
)
async def test_a_conversation_that_is_none(turns: object) -> None:
    async with http_served() as s:
        response = await s.client.post("/v1/chat/completions", json=CHAT | {"messages": turns})

    assert error_of(response)["param"].startswith("messages")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "\\ud800", "prompt": "x"}'])
async def test_a_body_that_is_no_json_object(content: bytes) -> None:
    async with http_served() as s:
        response = await s.client.post("/v1/completions", content=content, headers=JSON)

    assert error_of(response)["code"] == "INVALID_REQUEST"


async def test_a_body_of_a_million_mistakes_costs_as_little_as_one() -> None:
    mistakes = {f"field{number}": number for number in range(100_000)}
    async with http_served() as s:
        unknown = await s.client.post("/v1/completions", json=TEXT | mistakes)
        wrong = await s.client.post("/v1/completions", json=TEXT | {"prompt": [[None]] * 100_000})
        deep = await s.client.post("/v1/completions", content=b"[" * 100_000, headers=JSON)

    for response in (unknown, wrong, deep):
        assert error_of(response)["code"] == "INVALID_REQUEST"
        assert len(response.content) < 2000


@pytest.mark.parametrize("kind", ["text/plain", "", "multipart/form-data; boundary=x"])
async def test_a_body_of_another_kind(kind: str) -> None:
    async with http_served() as s:
        response = await s.client.post("/v1/completions", content=json.dumps(TEXT), headers={"content-type": kind})

    assert (response.status_code, error_of(response)["code"]) == (415, "CONTENT_TYPE")


async def test_a_body_that_is_too_large_is_refused_whether_or_not_it_says_so() -> None:
    async def parts():
        for _ in range(64):
            yield b" " * 1024

    async with http_served(max_message_bytes=10_000) as s:
        told = await s.client.post("/v1/completions", content=b" " * 50_000, headers=JSON)
        untold = await s.client.post("/v1/completions", content=parts(), headers=JSON)
        s.engine.script = [finished()]
        fine = await s.client.post("/v1/completions", json=TEXT)

    assert [error_of(response)["code"] for response in (told, untold)] == ["BODY_TOO_LARGE"] * 2
    assert fine.status_code == 200


async def test_a_body_that_never_ends_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(exchange, "BODY_S", 0.2)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    async with http_served() as s:
        answer = await raw(s.port, head)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"BODY_TOO_SLOW" in answer


async def test_a_path_or_method_that_there_is_not() -> None:
    async with http_served() as s:
        path = await s.client.get("/v2/completions")
        method = await s.client.get("/v1/completions")

    assert (path.status_code, error_of(path)["code"]) == (404, "NO_SUCH_PATH")
    assert (method.status_code, error_of(method)["code"]) == (405, "NO_SUCH_METHOD")


@pytest.mark.parametrize(
    "head",
    [
        b"x: " + b"y" * (2 * MAX_HEAD_BYTES) + b"\r\n\r\n",
        b"".join(b"x%d: %s\r\n" % (number, b"y" * 100) for number in range(1000)) + b"\r\n",
        b"x: " + b"y" * (2 * MAX_HEAD_BYTES),  # and never more
    ],
    ids=["one", "many", "endless"],
)
async def test_a_bomb_of_headers_is_refused(head: bytes) -> None:
    async with http_served() as s:
        answer = await raw(s.port, b"GET /health HTTP/1.1\r\nhost: x\r\n" + head)
        fine = await s.client.get("/health")

    assert answer.startswith(b"HTTP/1.1 431 ")
    assert fine.status_code == 200


async def test_a_long_body_beside_its_head_is_no_bomb() -> None:
    async with http_served() as s:
        s.engine.script = [finished()]
        response = await s.client.post("/v1/completions", json=TEXT | {"prompt": "x" * (4 * MAX_HEAD_BYTES)})
        again = await s.client.post("/v1/completions", json=TEXT | {"prompt": "x" * (4 * MAX_HEAD_BYTES)})

    assert (response.status_code, again.status_code) == (200, 200)


async def test_a_head_that_never_ends_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.2)
    async with http_served() as s:
        silent = await raw(s.port, b"")
        begun = await raw(s.port, b"GET /health HT")
        after_one = await raw(s.port, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /he")

    assert silent.startswith(b"HTTP/1.1 408 ")
    assert begun.startswith(b"HTTP/1.1 408 ")
    assert after_one.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in after_one


@pytest.mark.parametrize(
    "data", [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
async def test_what_is_no_http_is_refused_and_not_logged(data: bytes, caplog) -> None:
    async with http_served() as s:
        with caplog.at_level(logging.INFO):
            caplog.clear()  # of the line that says where the server listens
            answer = await raw(s.port, data)
            told = list(caplog.records)

    assert answer.startswith(b"HTTP/1.1 4")
    assert not told


async def test_a_call_without_a_token_is_refused_with_its_body_unread(tmp_path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{SECRET} generate\n")
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 900000\r\n\r\n"
    )
    async with http_served(auth_token_file=tokens) as s:
        s.engine.script = [finished()]
        reader, writer = await asyncio.open_connection("127.0.0.1", s.port)
        writer.write(head)
        line = await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        wrong = await s.client.post("/v1/completions", json=TEXT, headers={"Authorization": "Bearer other"})
        right = await s.client.post("/v1/completions", json=TEXT, headers={"Authorization": f"Bearer {SECRET}"})
        health = await s.client.get("/health")

    assert line.startswith(b"HTTP/1.1 401 ")
    assert (wrong.status_code, error_of(wrong)["code"]) == (401, "UNAUTHENTICATED")
    assert (right.status_code, health.status_code) == (200, 200)


async def test_requests_of_one_connection_are_not_each_other_s_caller(tmp_path) -> None:
    """Also when the second is there before the first has been answered."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{SECRET} generate\n")
    head = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n"
    async with http_served(auth_token_file=tokens) as s:
        answer = await raw(
            s.port, head + b"authorization: Bearer a-users-own-token\r\n\r\n" + head + b"connection: close\r\n\r\n"
        )

    assert re.findall(rb"HTTP/1.1 (\d+)", answer) == [b"200", b"401"]


async def test_a_route_has_the_rights_of_its_rpc(tmp_path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{SECRET} generate\nthe-bosses-own-token admin\n")
    async with http_served(auth_token_file=tokens) as s:
        schema = (await s.client.get("/openapi.json")).json()
        answers = {}
        for path, verbs in schema["paths"].items():
            for verb, operation in verbs.items():
                url = path.replace("{name}", "poet")
                open_to_all = await s.client.request(verb, url, json={})
                user = await s.client.request(verb, url, json={}, headers={"Authorization": f"Bearer {SECRET}"})
                answers[verb, path] = (open_to_all.status_code, user.status_code, "security" in operation)

    for (verb, path), (nobody, user, needs_token) in answers.items():
        assert (nobody == 401) == needs_token, path
        manages = (path.startswith("/v1/adapters/") and verb != "get") or path.endswith("load_lora_adapter")
        assert (user == 403) == manages, (verb, path, user)


def test_each_endpoint_has_the_rights_of_an_rpc_that_there_is() -> None:
    gate = Gate()
    generation = GenerationEndpoints(gate, MagicMock(), write_timeout_s=1)
    adapters = AdapterEndpoints(gate, AdapterServicer(gate, MagicMock(), MagicMock()))
    endpoints = [*generation.all(), *adapters.all(), *ServerEndpoints(gate, MagicMock(), ()).all()]

    assert len(endpoints) > 15
    assert {endpoint.rpc for endpoint in endpoints} <= {OPEN, *ROLES}
    assert {endpoint.path for endpoint in endpoints if endpoint.rpc == OPEN} == {"/health", "/openapi.json", "/docs"}


async def test_another_tenant_s_adapter_does_not_exist() -> None:
    """Told with the same words as one that nobody has, and in no list."""
    acme = {"Authorization": f"Bearer {secret_of('acme')}"}
    async with http_served(tenancy=two_tenants()) as s:
        s.engine.adapters.infos = Registered(OWN, THEIRS, PUBLIC)
        s.engine.script = [finished()]
        own = await s.client.post("/v1/completions", json=TEXT | {"model": OWN}, headers=acme)
        theirs = await s.client.post("/v1/completions", json=TEXT | {"model": THEIRS}, headers=acme)
        nobodys = await s.client.post("/v1/completions", json=TEXT | {"model": "bob/nothing"}, headers=acme)
        models = (await s.client.get("/v1/models", headers=acme)).json()["data"]
        model = await s.client.get(f"/v1/models/{THEIRS}", headers=acme)
        manager = {"Authorization": f"Bearer {secret_of('acme', Role.MANAGE)}"}
        unloading = await s.client.delete(f"/v1/adapters/{THEIRS}", headers=manager)

    assert own.status_code == 200
    assert theirs.text == nobodys.text.replace("bob/nothing", THEIRS)
    assert theirs.status_code == model.status_code == unloading.status_code == 404
    assert {one["id"] for one in models} == {"fake", OWN, PUBLIC}
    assert [request.tenant for request in s.engine.requests] == ["acme"]


async def test_each_call_has_a_line_in_the_log(caplog) -> None:
    async with http_served() as s:
        s.engine.script = [finished()]
        with caplog.at_level(logging.INFO, logger="gralora_server.calls"):
            await s.client.post("/v1/completions", json=TEXT | {"model": "poet"}, headers={"X-Request-Id": "r1"})
            await s.client.post("/v1/completions", json=TEXT | {"n": 0})

    first, second = call_lines(caplog)
    assert (first["method"], first["request_id"], first["adapter"]) == ("POST /v1/completions", "r1", "poet@2")
    assert (first["code"], second["code"]) == ("OK", "INVALID_ARGUMENT")


async def test_documentation_needs_nothing_from_elsewhere() -> None:
    async with http_served() as s:
        page = await s.client.get("/docs")
        schema = (await s.client.get("/openapi.json")).json()

    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    for path in schema["paths"]:
        assert path in page.text
    asked = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert asked["$ref"].rpartition("/")[2] in schema["components"]["schemas"]


async def test_a_port_that_is_taken_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with http_served() as s:
            config = ServerConfig(port=0, http=HttpConfig(host="127.0.0.1", port=port))
            with pytest.raises(ConfigError, match=str(port)):
                async with serving_http(config, s.server):
                    pass

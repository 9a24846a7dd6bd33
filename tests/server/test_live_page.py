"""The live page: its files are anybody's, what they show is an operator's, and neither waits for streams or steps."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import httpx2
import pytest
from support.fake_engine import FakeEngine, adapter_info, request_activity
from support.tenants import OPERATOR, secret_of, two_tenants

from gralora_runtime.adapters.catalogue.store import AdapterState
from gralora_runtime.errors import ConfigError
from gralora_runtime.observation.timeline import Mark, Stage, Timeline
from gralora_runtime.observation.usage import Tally
from gralora_server.config import HttpConfig, ServerConfig, TlsConfig
from gralora_server.live.page import LivePage
from gralora_server.live.table import ROWS
from gralora_server.parts import Parts
from gralora_server.tenants.request_ids import scoped
from gralora_server.tenants.settings import LimitSettings, Role, TenancySettings, TenantSettings
from gralora_server.tenants.usage import Counts

UI = HttpConfig(host="127.0.0.1", port=0)
FILES = files("gralora_server.live") / "files"
TLS = Path(__file__).parent / "tls"


@contextmanager
def opened(engine: FakeEngine | None = None, **settings: object) -> Iterator[tuple[httpx2.Client, Parts]]:
    """A client of a page, and what the page is of."""
    config = ServerConfig(ui=UI, **settings)
    parts = Parts(config)
    if engine is not None:
        parts.gate.open(engine)
    page = LivePage(UI, config, parts)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{page.port}", timeout=10) as client:
            yield client, parts
    finally:
        page.close()


def now(client: httpx2.Client, headers: dict[str, str] | None = None, **query: str) -> dict:
    answer = client.get(
        "/now", params={name.replace("__", "."): value for name, value in query.items()}, headers=headers
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_what_is_shown_is_what_the_engine_does() -> None:
    engine = FakeEngine()
    engine.under_way = lambda: [
        request_activity(scoped("acme", "r1")),
        request_activity("r2", tenant="adapter:poet", stage=Stage.DECODE, hold=None, ahead=0, age_s=9.0),
    ]
    with opened(engine) as (client, parts):
        parts.usage.add("acme", "poet", Counts(1, 2, 3, 4, 5, 6))
        found = now(client, requests__sort="age_s", requests__order="descending")

    assert found["phase"] == "serving"
    assert found["server"]["model"] == "fake"
    assert [row["id"] for row in found["requests"]["rows"]] == ["r2", "r1"]
    first, second = found["requests"]["rows"]
    assert (first["tenant"], first["stage"], first["hold"]) == ("(operator)", "decode", None)
    assert second["hold"] == "pages"
    assert (second["tenant"], second["ahead"], second["output_tokens"], second["max_tokens"]) == ("acme", 2, 4, 64)
    assert found["load"]["pages"] == {"leased": 30, "cached": 20, "free": 50}
    (adapter,) = found["adapters"]["rows"]
    assert (adapter["name"], adapter["version"], adapter["state"], adapter["bytes"]) == ("poet", 2, "resident", 1200)
    tenants = {row["tenant"]: row for row in found["tenants"]["rows"]}
    assert (tenants["acme"]["waiting"], tenants["acme"]["output_tokens"]) == (1, 4)
    assert (tenants["(operator)"]["running"], tenants["(operator)"]["waiting"]) == (1, 0)


def test_the_history_grows_and_who_has_seen_some_is_told_the_rest() -> None:
    with opened(FakeEngine()) as (client, _):
        first = now(client)["history"]["at_s"]
        while not (rest := now(client, after=str(first[-1]))["history"]["at_s"]):
            pass

    assert set(first).isdisjoint(rest)


def test_before_there_is_an_engine_the_page_says_so() -> None:
    with opened() as (client, _):
        found = now(client)

    assert found["phase"] == "starting"
    assert "server" not in found


def test_of_five_thousand_adapters_a_page_is_sent_in_the_order_that_is_asked_for() -> None:
    engine = FakeEngine()
    infos = [replace(adapter_info(f"a{number:04}"), in_flight=number % 2500) for number in range(5000)]
    engine.adapters.infos = {info.name: info for info in infos}
    with opened(engine) as (client, _):
        answer = client.get("/now", params={"adapters.sort": "in_flight", "adapters.order": "descending"})
        searched = now(client, adapters__search="A499", adapters__page="1")["adapters"]
    found = answer.json()["adapters"]

    assert [row["name"] for row in found["rows"]][:2] == ["a2499", "a4999"]
    assert (len(found["rows"]), found["found"], found["pages"]) == (ROWS, 5000, 100)
    assert len(answer.content) < 100_000
    assert [row["name"] for row in searched["rows"]] == [f"a{number}" for number in range(4990, 5000)]


def test_traffic_is_of_the_version_that_had_it_and_trouble_is_told() -> None:
    engine = FakeEngine()
    activity = engine.activity()
    engine.activity = lambda: replace(activity, adapters={"poet@2": Tally(3, 40, 50), "poet@1": Tally(9, 9, 9)})
    engine.adapters.infos["sad"] = replace(adapter_info("sad"), state=AdapterState.FAILED, error="it is broken")
    with opened(engine) as (client, _):
        rows = {row["name"]: row for row in now(client)["adapters"]["rows"]}

    assert (rows["poet"]["requests"], rows["poet"]["tokens"]) == (3, 50)
    assert (rows["sad"]["requests"], rows["sad"]["state"], rows["sad"]["trouble"]) == (None, "failed", "it is broken")


def test_tenants_have_their_weights_and_limits() -> None:
    tenants = {"acme": TenantSettings(weight=3.0, limits=LimitSettings(streams=4, tokens_per_s=100.0))}
    with opened(FakeEngine(), tenancy=TenancySettings(tenants=tenants, **admins())) as (client, _):
        (row,) = now(client, bearing(OPERATOR), tenants__search="acme")["tenants"]["rows"]

    assert row["weight"] == 3.0
    assert row["limits"] == {"streams": 4, "tokens_per_s": 100.0}


def admins() -> dict[str, object]:
    return {"admin_tokens": two_tenants().admin_tokens}


def bearing(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        (bearing("wrong"), 401),
        (bearing(secret_of("acme")), 403),
        (bearing(secret_of("acme", Role.MANAGE)), 403),
        (bearing(secret_of("acme", Role.ADMIN)), 200),
        (bearing(OPERATOR), 200),
    ],
)
def test_only_an_admin_sees_what_the_page_shows(headers: dict[str, str], status: int) -> None:
    with opened(FakeEngine(), tenancy=two_tenants()) as (client, _):
        answer = client.get("/now", headers=headers)
        page = client.get("/")

    assert answer.status_code == status
    assert status == 200 or "poet" not in answer.text
    assert page.status_code == 200


def test_where_anybody_may_look_it_is_from_this_machine_alone() -> None:
    with opened(FakeEngine()) as (client, parts):
        ours = ("localhost", f"localhost:{client.base_url.port}", "127.0.0.1:1", "[::1]:1")
        others = ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1:1.evil.example", "")
        answers = {host: client.get("/now", headers={"host": host}).status_code for host in (*ours, *others)}
        assert client.get("/explanation?id=r1", headers={"host": "evil.example"}).status_code == 403
        with pytest.raises(ConfigError, match="anybody could look"):
            LivePage(HttpConfig(host="0.0.0.0", port=0), ServerConfig(), parts)

    assert answers == dict.fromkeys(ours, 200) | dict.fromkeys(others, 403)


def test_with_tokens_it_may_have_any_address_and_name() -> None:
    with opened(FakeEngine(), tenancy=two_tenants()) as (client, parts):
        answer = client.get("/now", headers={"host": "gralora.example", **bearing(OPERATOR)})
        page = LivePage(HttpConfig(host="0.0.0.0", port=0), ServerConfig(tenancy=two_tenants()), parts)
        page.close()

    assert answer.status_code == 200


def test_a_port_in_use_is_refused_with_its_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            LivePage(HttpConfig(host="127.0.0.1", port=port), ServerConfig(), Parts(ServerConfig()))


def test_nothing_that_a_page_loads_is_from_elsewhere_or_in_line() -> None:
    """Of what the policy forbids the browser would only complain."""
    page, script = ((FILES / name).read_text() for name in ("index.html", "live.js"))

    assert re.findall(r"(?:src|href)=\"(?!#)([^\"]+)\"", page) == ["live.svg", "live.css", "live.js"]
    assert re.findall(r"<style|<script(?! type=\"module\" src=)|\son\w+=|\sstyle=", page) == []
    assert (
        re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|https?://(?!www\.w3\.org/2000/svg)",
            script,
        )
        == []
    )


def test_every_answer_says_what_a_browser_may_do_with_it() -> None:
    with opened(FakeEngine()) as (client, _):
        answers = [client.get(path) for path in ("/", "/live.js", "/live.css", "/live.svg", "/now")]

    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", ["/%2e%2e/page.py", "/files/live.js", "/now/", "/v1/completions", "/live.py"])
def test_there_is_nothing_else(path: str) -> None:
    with opened(FakeEngine()) as (client, _):
        assert client.get(path).status_code == 404
        assert client.post("/now").status_code == 405


def test_a_request_is_explained_by_its_id_and_its_tenant() -> None:
    engine = FakeEngine()
    found = Timeline(request_id=scoped("acme", "r1"), tenant="acme", received_s=10.0, outcome="length", ended_s=11.0)
    found.marks += [Mark(Stage.PREFILL, 10.0), Mark(Stage.DECODE, 10.25), Mark(Stage.DELIVERY, 11.0)]
    engine.timelines.keep(found)
    with opened(engine, tenancy=two_tenants()) as (client, _):
        told, of_another, unknown = (
            client.get("/explanation", params=query, headers=bearing(OPERATOR))
            for query in ({"tenant": "acme", "id": "r1"}, {"tenant": "bob", "id": "r1"}, {"id": "<b>"})
        )
        by_tenant = client.get("/explanation", params={"id": "r1"}, headers=bearing(secret_of("acme")))

    assert [(part["stage"], part["duration_s"]) for part in told.json()["parts"][:2]] == [
        ("prefill", 0.25),
        ("decode", 0.75),
    ]
    assert told.json()["says"]
    assert (of_another.status_code, unknown.status_code, by_tenant.status_code) == (404, 404, 403)


def ended(request_id: str, tenant: str, **facts: object) -> Timeline:
    made = Timeline(request_id=request_id, tenant=tenant, outcome="stop", **facts)
    made.marks += [Mark(Stage.DECODE, made.received_s), Mark(Stage.DELIVERY, made.ended_s)]
    return made


def test_requests_that_ended_are_listed_the_last_one_first() -> None:
    engine = FakeEngine()
    for one in (
        ended(scoped("acme", "r1"), "acme", received_s=1.0, received_at=100.0, ended_s=3.0, served_by="poet@2"),
        ended("r2", "adapter:poet", received_s=2.0, received_at=101.0, ended_s=5.0, left_s=6.0, first_token_s=0.5),
        Timeline(request_id="running", received_s=3.0),
    ):
        engine.timelines.keep(one)
    with opened(engine, tenancy=two_tenants()) as (client, _):
        rows = now(client, bearing(OPERATOR), ended__order="descending")["ended"]["rows"]
        searched = now(client, bearing(OPERATOR), ended__search="ACME")["ended"]["rows"]

    assert [(row["id"], row["tenant"], row["adapter"]) for row in rows] == [
        ("r2", "(operator)", ""),
        ("r1", "acme", "poet@2"),
    ]
    assert [(row["total_s"], row["first_token_s"], row["outcome"]) for row in rows] == [
        (4.0, 0.5, "stop"),
        (2.0, None, "stop"),
    ]
    assert [row["id"] for row in searched] == ["r1"]


def test_an_id_alone_is_that_of_the_last_request_that_was_called_so() -> None:
    engine = FakeEngine()
    engine.timelines.keep(ended(scoped("bob", "r1"), "bob", received_s=5.0, ended_s=6.0))
    engine.timelines.keep(ended(scoped("acme", "r1"), "acme", received_s=1.0, ended_s=3.0))
    with opened(engine, tenancy=two_tenants()) as (client, _):
        told = client.get("/explanation", params={"id": "r1"}, headers=bearing(OPERATOR)).json()
        unknown = client.get("/explanation", params={"id": "acme r1"}, headers=bearing(OPERATOR))

    assert (told["request_id"], told["tenant"], told["total_s"]) == ("r1", "bob", 1.0)
    assert unknown.status_code == 404


@pytest.mark.parametrize("query", [{"requests.sort": "prompt"}, {"adapters.page": "0"}, {"after": "nan"}])
def test_a_question_that_cannot_be_meant_is_refused(query: dict[str, str]) -> None:
    with opened(FakeEngine()) as (client, _):
        answer = client.get("/now", params=query)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(query))


def test_the_page_answers_while_the_event_loop_of_the_streams_is_held_up() -> None:
    async def held_up() -> int:
        with opened(FakeEngine()) as (client, _):
            return client.get("/now").status_code  # this loop runs nothing meanwhile

    assert asyncio.run(held_up()) == 200


def test_the_page_is_served_with_the_servers_certificate() -> None:
    tls = TlsConfig(certificate=TLS / "server.pem", private_key=TLS / "server.key")
    config = ServerConfig(tls=tls)
    parts = Parts(config)
    parts.gate.open(FakeEngine())
    page = LivePage(UI, config, parts)
    try:
        answer = httpx2.get(
            f"https://localhost:{page.port}/now", verify=ssl.create_default_context(cafile=TLS / "ca.pem")
        )
    finally:
        page.close()

    assert answer.status_code == 200


def test_prompts_and_answers_are_nowhere_in_it() -> None:
    """Of all that an engine tells of a request, none is text but its names."""
    with opened(FakeEngine()) as (client, _):
        (row,) = now(client)["requests"]["rows"]

    texts = {name for name, value in row.items() if isinstance(value, str)}
    assert texts == {"id", "tenant", "adapter", "stage", "hold"}

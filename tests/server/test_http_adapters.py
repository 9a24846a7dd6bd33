"""Adapters over HTTP: what is listed, and what becomes of a load, an unload and the twins of the other RPCs."""

from __future__ import annotations

import pytest
from support.fake_engine import adapter_info
from support.http_harness import error_of, http_served

from gralora_runtime.errors import AdapterBusyError


async def test_models_are_the_base_and_all_adapters() -> None:
    async with http_served() as s:
        listed = (await s.client.get("/v1/models")).json()
        poet = (await s.client.get("/v1/models/poet")).json()
        base = (await s.client.get("/v1/models/fake")).json()
        nobody = await s.client.get("/v1/models/nobody")

    assert listed == {"object": "list", "data": [base, poet]}
    assert (base["id"], base["parent"]) == ("fake", None)
    assert (poet["id"], poet["parent"], poet["state"]) == ("poet", "fake", "RESIDENT")
    assert (nobody.status_code, error_of(nobody)["code"]) == (404, "ADAPTER_NOT_FOUND")


async def test_more_adapters_than_a_page_holds_are_all_listed(monkeypatch) -> None:
    monkeypatch.setattr("gralora_server.validation.MAX_PAGE_SIZE", 2)
    async with http_served() as s:
        s.engine.adapters.infos = {name: adapter_info(name) for name in "abcde"}
        listed = (await s.client.get("/v1/models")).json()["data"]

    assert [model["id"] for model in listed] == ["fake", *"abcde"]


async def test_an_adapter_is_loaded_and_unloaded_as_vllm_s_clients_do() -> None:
    async with http_served() as s:
        body = {"lora_name": "poet", "lora_path": "/adapters/poet"}
        loaded = await s.client.post("/v1/load_lora_adapter", json=body)
        unloaded = await s.client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
        s.engine.adapters.error = AdapterBusyError("poet", 3)
        busy = await s.client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})

    assert (loaded.status_code, unloaded.status_code) == (200, 200)
    assert "poet" in loaded.json()["message"]
    (load, unload, _) = s.engine.adapters.calls
    assert (load[:2], str(load[2])) == (("load", "poet"), "/adapters/poet")
    assert unload == ("unload", "poet")
    assert (busy.status_code, error_of(busy)["code"]) == (400, "ADAPTER_BUSY")


@pytest.mark.parametrize(
    ("verb", "path", "body", "call"),
    [
        ("POST", "/v1/adapters/acme/poet/pin", {"pinned": True}, ("pin", "acme/poet", True)),
        ("POST", "/v1/adapters/acme/poet/promote", {"version": "3"}, ("promote", "acme/poet", "3")),
        ("POST", "/v1/adapters/acme/poet/rollback", {}, ("roll_back", "acme/poet")),
        (
            "POST",
            "/v1/adapters/acme/poet/canary",
            {"version": "3", "share": 0.5},
            ("set_canary", "acme/poet", "3", 0.5),
        ),
        ("POST", "/v1/adapters/acme/poet", {"pin": True}, ("load", "acme/poet", None, True)),
        ("DELETE", "/v1/adapters/acme/poet", None, ("unload", "acme/poet")),
    ],
)
async def test_each_rpc_has_a_twin(verb: str, path: str, body: object, call: tuple[object, ...]) -> None:
    async with http_served() as s:
        s.engine.adapters.infos["acme/poet"] = s.engine.adapters.infos["poet"]
        response = await s.client.request(verb, path, json=body)

    assert response.status_code == 200, response.text
    assert s.engine.adapters.calls == [call]


async def test_a_query_s_words_are_the_message_s_values() -> None:
    async with http_served() as s:
        states = {"states": "ADAPTER_STATE_RESIDENT,ADAPTER_STATE_HOST"}
        some = await s.client.get("/v1/adapters", params=states)
        wrong = await s.client.get("/v1/adapters", params={"states": "GONE"})
        deleting = await s.client.delete("/v1/adapters/poet", params={"delete_upload": "maybe"})

    assert some.status_code == 200
    assert error_of(wrong)["code"] == error_of(deleting)["code"] == "INVALID_REQUEST"


async def test_a_twin_s_answer_has_the_message_s_fields() -> None:
    async with http_served() as s:
        page = (await s.client.get("/v1/adapters", params={"page_size": "1"})).json()
        one = (await s.client.get("/v1/adapters/poet")).json()["adapter"]

    assert page["total_size"] == 1
    assert page["adapters"] == [one]
    assert (one["name"], one["state"], one["pinned"]) == ("poet", "ADAPTER_STATE_RESIDENT", False)


@pytest.mark.parametrize(
    ("path", "body"),
    [("promote", {"versoin": "3"}), ("promote", {"version": 3}), ("promote", {"name": "other"}), ("pin", [])],
)
async def test_a_twin_says_what_is_wrong(path: str, body: object) -> None:
    async with http_served() as s:
        response = await s.client.post(f"/v1/adapters/poet/{path}", json=body)

    assert (response.status_code, error_of(response)["code"]) == (400, "INVALID_REQUEST")
    assert s.engine.adapters.calls == []


async def test_tokenizing() -> None:
    async with http_served() as s:
        text = (await s.client.post("/tokenize", json={"model": "fake", "prompt": "hello"})).json()
        chat = await s.client.post("/tokenize", json={"messages": [{"role": "user", "content": "hello"}]})
        neither = await s.client.post("/tokenize", json={})

    assert text["count"] == len(text["tokens"])
    assert text["max_model_len"] == 2048
    assert chat.status_code == 200
    assert error_of(neither)["param"] == "prompt"

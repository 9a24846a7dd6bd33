"""Tenants of a load test: what each does is what was said of it, and does not depend on the others."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.fake_server import FakeServer
from gralora_runtime.errors import ConfigError
from gralora_server.client.connection import Connection
from gralora_server.loadtest.arrivals import Closed, Renewal
from gralora_server.loadtest.tenants import TenantLoad, Tenants, read_tenants
from gralora_server.loadtest.trace import Trace
from gralora_server.loadtest.workload import Popularity, Workload, parse_lengths


def common(**changes) -> Workload:
    settings = {
        "arrivals": Renewal(10.0),
        "adapters": (),
        "popularity": Popularity(),
        "prompt": parse_lengths("16"),
        "output": parse_lengths("8"),
        "duration_s": 200.0,
        "warmup_s": 10.0,
        "seed": 1,
    }
    return Workload(**(settings | changes))


def trace_of(tenants: Tenants, **changes) -> Trace:
    return tenants.trace(common(**changes), {name: [f"{name}/x"] for name in tenants.loads})


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_shares_are_of_all_requests() -> None:
    trace = trace_of(read_tenants("light:1,flood:9", None))

    found = Counter(one.tenant for one in trace.requests)
    assert len(trace.requests) == pytest.approx(2000, rel=0.1)
    assert found["light"] == pytest.approx(200, rel=0.25)
    assert all(one.adapter == f"{one.tenant}/x" for one in trace.requests)
    assert [one.arrival_s for one in trace.requests] == sorted(one.arrival_s for one in trace.requests)
    assert trace.tenants == ("flood", "light")
    assert trace.peak is None


FILE = """
[light]
arrivals = "constant:1"
weight = 2
token = "secret-light"

[flood]
arrivals = "step:0,50,20,50,0,100"
prompt_tokens = "512-1024"
output_tokens = "4"

[rest]
popularity = "identical"
"""


def test_a_file_says_what_each_tenant_does(tmp_path: Path) -> None:
    tenants = read_tenants(write(tmp_path / "tenants.toml", FILE), None)

    trace = trace_of(tenants)

    of = {name: [one for one in trace.requests if one.tenant == name] for name in tenants.loads}
    assert len(of["light"]) == 199
    assert len(of["rest"]) == pytest.approx(2000, rel=0.1)  # all that the command line has
    assert {one.prompt_tokens for one in of["light"]} == {16}
    assert all(512 <= one.prompt_tokens <= 1024 and one.output_tokens == 4 for one in of["flood"])
    assert all(50 <= one.arrival_s < 100 for one in of["flood"])
    assert trace.peak == (50.0, 100.0)
    assert tenants.tokens == {"light": "secret-light"}
    assert tenants.weights == {"light": 2.0, "flood": 1.0, "rest": 1.0}
    assert "secret" not in " ".join([repr(tenants.loads), *(load.described for load in tenants.loads.values())])
    assert tenants.loads["light"].described == "weight 2.0, arrivals constant:1"


def test_what_one_tenant_does_does_not_depend_on_the_others() -> None:
    light = TenantLoad(arrivals="poisson:2")

    alone = trace_of(Tenants({"light": light}, {}))
    beside = trace_of(Tenants({"flood": TenantLoad(arrivals="poisson:50"), "light": light}, {}))

    assert [one for one in beside.requests if one.tenant == "light"] == list(alone.requests)
    assert len({one.seed for one in beside.requests}) > 0.99 * len(beside.requests)  # no prompts in common


@pytest.mark.parametrize("tenants", [{"a": TenantLoad()}, {"a": TenantLoad(arrivals="closed:4")}])
def test_a_closed_loop_cannot_be_a_tenants(tenants: dict[str, TenantLoad]) -> None:
    arrivals = Closed(4) if tenants["a"].arrivals is None else Renewal(1.0)

    with pytest.raises(ConfigError, match="a closed loop has no rate"):
        trace_of(Tenants(tenants, {}), arrivals=arrivals)


def test_nothing_after_the_warm_up_is_refused() -> None:
    with pytest.raises(ConfigError, match="no request would be counted"):
        trace_of(Tenants({"a": TenantLoad(arrivals="step:5,10,0,10")}, {}), warmup_s=100.0)


class OfTenants(FakeServer):
    """It lists to each token what is its own, and everything to who has none."""

    async def ListAdapters(self, request, context):
        whole = await super().ListAdapters(request, context)
        token = dict(context.invocation_metadata()).get("authorization", "").removeprefix("Bearer ")
        own = [one for one in whole.adapters if one.name.startswith(token)]
        return type(whole)(adapters=own)


def adapters_of(tenants: Tenants, most: int | None = None) -> dict[str, list[str]]:
    async def ask() -> dict[str, list[str]]:
        server, port = await OfTenants(tuple(f"{name}/{i}" for name in ("a", "b") for i in range(3))).start()
        try:
            return await tenants.adapters(Connection(target=f"127.0.0.1:{port}"), most)
        finally:
            await server.stop(None)

    return asyncio.run(ask())


def test_a_token_says_which_adapters_are_a_tenants() -> None:
    tenants = Tenants({"first": TenantLoad(), "second": TenantLoad()}, {"first": "a/", "second": "b/"})

    assert adapters_of(tenants) == {"first": ["a/0", "a/1", "a/2"], "second": ["b/0", "b/1", "b/2"]}
    assert adapters_of(tenants, 1) == {"first": ["a/0"], "second": ["b/0"]}


def test_without_tokens_no_two_have_an_adapter_in_common() -> None:
    tenants = Tenants({"x": TenantLoad(), "y": TenantLoad(), "z": TenantLoad(adapters=("a/0", "*/2"))}, {})

    assert adapters_of(tenants) == {
        "x": ["a/0", "a/2", "b/1"],
        "y": ["a/1", "b/0", "b/2"],
        "z": ["a/0", "a/2", "b/2"],
    }


def test_too_few_adapters_are_an_error() -> None:
    with pytest.raises(ConfigError, match="7 tenants without tokens share 6 adapters"):
        adapters_of(Tenants({str(i): TenantLoad() for i in range(7)}, {}))
    with pytest.raises(ConfigError, match=r"tenant x: the server lists no adapter that matches c/\*"):
        adapters_of(Tenants({"x": TenantLoad(adapters=("c/*",))}, {}))


def test_tokens_are_read_from_a_file(tmp_path: Path) -> None:
    write(tmp_path / "tokens", "# of the test\nlight abc\n\nflood  def\n")

    tenants = read_tenants("light:1,flood:5", tmp_path / "tokens")

    assert tenants.tokens == {"light": "abc", "flood": "def"}
    assert tenants.connection(Connection(target="x")).token == "abc"
    assert tenants.connection(Connection(target="x", token="own")).token == "own"
    assert Tenants({}, {}).connection(Connection(target="x")).token is None


@pytest.mark.parametrize(
    "text", ["light", "light:", "light:0", "light:-1", ":1", "light:1,", "a:1,a:2", "a:nan", "a:inf"]
)
def test_shares_that_are_not_understood(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not understood at .* \(examples: light:1,flood:50"):
        read_tenants(text, None)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[light\n", "is no TOML"),
        ("light = 3\n", "light: Input should be .*got 3"),
        ("[light]\nspeed = 4\n", "light.speed: Extra inputs are not permitted, got 4"),
        ("[light]\nweight = 0\n", "light.weight: Input should be greater than 0, got 0"),
    ],
)
def test_files_that_are_not_understood(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_tenants(write(tmp_path / "tenants.toml", text), None)


def test_no_error_shows_a_token(tmp_path: Path) -> None:
    path = write(tmp_path / "tenants.toml", '[light]\ntokens = "secret"\n')
    write(tmp_path / "tokens", "light secret secret\n")

    for tenants, tokens in ((path, None), ("light:1", tmp_path / "tokens")):
        with pytest.raises(ConfigError) as caught:
            read_tenants(tenants, tokens)
        assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="the tokens nowhere cannot be read"):
        read_tenants("light:1", Path("nowhere"))
    with pytest.raises(ConfigError, match=r"the tenants nowhere.toml cannot be read"):
        read_tenants("nowhere.toml", None)

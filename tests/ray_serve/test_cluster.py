"""A real Ray Serve with two replicas: who serves what, what one is told all know, and what a lost one takes with it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import count, cycle, islice
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from support.ray_cluster import HOMES, NAMES, SOON_S, TOKEN, Cluster, ray_cluster

from gralora.v1 import adapters_pb2, generation_pb2, server_pb2
from gralora_server.ray.homes import most, order

pytestmark = pytest.mark.alone
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if find_spec("ray") is None:
        pytest.skip("ray is not installed")
    with ray_cluster(tmp_path_factory.mktemp("ray_serve")) as cluster:
        yield cluster


def reason(error: grpc.RpcError) -> str:
    """Of a status that our server set."""
    status = rpc_status.from_call(error)
    info = error_details_pb2.ErrorInfo()
    if status is not None:
        any(detail.Unpack(info) for detail in status.details)
    return info.reason


def refused(call: Callable[[], object]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def made(call: Callable[[], object]) -> grpc.RpcError | None:
    """Why it was not, or None."""
    try:
        call()
    except grpc.RpcError as error:
        return error
    return None


def test_both_replicas_give_the_same_answers(cluster: Cluster) -> None:
    answers = {name: cluster.ask_both(name) for name in ("", *NAMES)}

    assert all(len(token_ids) == 1 for token_ids in answers.values())
    assert len({next(iter(token_ids)) for token_ids in answers.values()}) > 1


def test_the_file_for_a_cluster_is_as_serve_wants_it(cluster: Cluster) -> None:
    """In a process of its own, as importing Ray changes a good deal of one."""
    file = Path(__file__).parent.parent.parent / "deploy" / "ray" / "serve.yaml"
    schema = "from ray.serve.schema import ServeDeploySchema as S; import sys, yaml; S(**yaml.safe_load(sys.stdin))"
    with file.open() as text:
        checked = subprocess.run(
            [sys.executable, "-c", schema], stdin=text, capture_output=True, text=True, check=False
        )

    assert checked.returncode == 0, checked.stderr


def test_a_stream_comes_in_pieces(cluster: Cluster) -> None:
    messages = list(cluster.stream("a0", max_tokens=16))

    assert messages[0].HasField("started")
    assert messages[-1].finished.usage.output_tokens == 16
    assert len(messages) > 3


def test_an_adapter_is_served_at_its_home(cluster: Cluster) -> None:
    replicas = dict.fromkeys(cluster.answers(""), 0)
    later = [(name, cluster.ask(name).replica) for _ in range(5) for name in HOMES]

    at_home = sum(replica == order(name, replicas)[0] for name, replica in later)
    assert at_home >= 0.9 * len(later)  # a replica that is slow to tell how busy it is gets nothing


def test_a_burst_of_cold_adapters_is_spread_and_each_is_itself(cluster: Cluster) -> None:
    """The worst that can be: all are at home with the same replica, and nobody has served any of them."""
    replicas = dict.fromkeys(cluster.answers(""), 0)
    home = min(replicas)
    at_home = (name for name in (f"burst{number}" for number in count()) if order(name, replicas)[0] == home)
    weights = dict(zip(islice(at_home, 16), cycle(NAMES), strict=False))
    for name, like in weights.items():
        cluster.put(name, like)
    streams = {name: cluster.stream(name, max_tokens=64) for name in weights}  # all are under way at the same time
    ended = {name: outcome(stream) for name, stream in streams.items()}
    served = Counter(dict(stream.trailing_metadata())["gralora-replica"] for stream in streams.values())
    later = Counter(cluster.ask(name).replica for name in weights)

    assert {code for code, _, _ in ended.values()} == {Code.OK}
    for name, (_, _, token_ids) in ended.items():
        assert tuple(token_ids[:8]) == cluster.ask(weights[name]).token_ids
    assert served.total() == 16
    assert max(served.values()) <= most(16, 2)
    assert later[home] >= 0.9 * later.total()


def test_a_client_may_say_itself_by_what_its_request_is_placed(cluster: Cluster) -> None:
    """A version is placed as its adapter is."""
    replicas = dict.fromkeys(cluster.answers(""), 0)
    hints = [*HOMES, *(f"{name}@1" for name in HOMES)]
    found = [cluster.ask("a0", hint=hint).replica == order(hint.partition("@")[0], replicas)[0] for hint in hints]

    assert sum(found) >= 0.9 * len(found)


def test_a_hint_decides_nothing_but_the_place(cluster: Cluster) -> None:
    assert cluster.ask("a0", hint="a1").token_ids == cluster.ask("a0").token_ids
    assert cluster.ask("a1").token_ids != cluster.ask("a0").token_ids


def test_errors_have_codes_and_details(cluster: Cluster) -> None:
    unknown = refused(lambda: cluster.ask("nobody"))
    streamed = refused(lambda: list(cluster.stream("nobody", max_tokens=1)))
    empty = refused(lambda: cluster.generation.Generate(generation_pb2.GenerateRequest(), metadata=cluster.metadata))

    for error in (unknown, streamed):
        assert (error.code(), reason(error)) == (Code.NOT_FOUND, "ADAPTER_NOT_FOUND")
    assert (empty.code(), reason(empty)) == (Code.INVALID_ARGUMENT, "INVALID_REQUEST")


def test_nobody_is_served_without_a_token(cluster: Cluster) -> None:
    error = refused(lambda: cluster.generation.Generate(generation_pb2.GenerateRequest(text="hello")))
    request = urllib.request.Request(f"http://{cluster.http}/v1/models")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)

    caught.value.close()

    assert (error.code(), reason(error)) == (Code.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert caught.value.code == 401


def complete(cluster: Cluster, adapter: str, **headers: str) -> list[str]:
    """The lines of a stream over HTTP."""
    body = {"model": adapter, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "stream": True}
    headers |= {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
    url = f"http://{cluster.http}/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return [line for line in answer.read().decode().splitlines() if line.startswith("data: ")]


def test_http_goes_through_serves_proxy(cluster: Cluster) -> None:
    lines = complete(cluster, "a0")

    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 2


def test_over_http_serves_header_says_by_what_a_request_is_placed(cluster: Cluster) -> None:
    replicas = dict.fromkeys(cluster.answers(""), 0)
    names = [f"web{number}" for number in range(8)]
    for name in names:
        cluster.put(name, "kept")
        complete(cluster, name, serve_multiplexed_model_id=name)
    used = cluster.used()

    assert sum(name in used[order(name, replicas)[0]] for name in names) >= len(names) - 1


def test_an_adapter_that_one_replica_loads_all_have_and_lose(cluster: Cluster) -> None:
    cluster.load("brought")
    answers = cluster.ask_both("brought")
    cluster.adapters.UnloadAdapter(
        adapters_pb2.UnloadAdapterRequest(name="brought"), metadata=cluster.metadata, timeout=60
    )
    errors = [refused(partial(cluster.ask, "brought", hint="")) for _ in range(8)]

    assert len(answers) == 1
    assert {error.code() for error in errors} == {Code.NOT_FOUND}


def test_a_request_is_aborted_wherever_it_runs(cluster: Cluster) -> None:
    for number in range(4):  # of whom not all are asked where the request is
        request = generation_pb2.StreamGenerateRequest(
            request_id=f"abort-{number}",
            token_ids={"ids": [5]},
            sampling={"temperature": 0.0},
            stopping={"max_tokens": 200, "ignore_eos": True},
        )
        call = cluster.generation.StreamGenerate(request, metadata=cluster.metadata, timeout=60)
        next(call)
        answer = cluster.server.AbortRequest(
            server_pb2.AbortRequestRequest(request_id=f"abort-{number}"), metadata=cluster.metadata, timeout=30
        )
        call.cancel()

        assert answer.aborted


def test_a_replica_is_killed_and_service_resumes_with_all_that_was_loaded(cluster: Cluster) -> None:
    cluster.load("lasting")
    (expected,) = cluster.ask_both("lasting")
    _, _, wanted = outcome(cluster.stream("lasting", max_tokens=100))
    streams = [cluster.stream("lasting", max_tokens=100) for _ in range(6)]
    first = [next(stream) for stream in streams]
    cluster.lose(cluster.replicas()[0])
    ended = [outcome(stream) for stream in streams]

    assert all(message.HasField("started") for message in first)
    assert {code for code, _, _ in ended} <= {Code.OK, Code.UNAVAILABLE}
    assert {why for code, why, _ in ended if code is Code.UNAVAILABLE} <= {"REPLICA_LOST"}
    for message, (code, _, rest) in zip(first, ended, strict=True):
        token_ids = [*message.token_ids, *rest]
        assert token_ids == wanted if code is Code.OK else token_ids == wanted[: len(token_ids)]
    cluster.resume()
    assert cluster.ask_both("lasting") == {expected}


def test_a_lost_list_of_changes_comes_back_from_the_replicas(cluster: Cluster) -> None:
    cluster.load("before")
    (expected,) = cluster.ask_both("before")
    (actor,) = cluster.processes("ray::Changes")
    cluster.lose(actor)
    until_s = time.monotonic() + SOON_S
    while (lost := made(partial(cluster.load, "after"))) is not None:
        assert (lost.code(), reason(lost)) == (Code.UNAVAILABLE, "CHANGES_LOST")
        assert time.monotonic() < until_s
    cluster.lose(cluster.replicas()[0])
    cluster.resume()

    assert cluster.ask_both("before") == cluster.ask_both("after") == {expected}


def test_a_rolling_update_drops_no_stream(cluster: Cluster) -> None:
    over = threading.Event()
    codes: list[grpc.StatusCode] = []
    wanted = cluster.ask("a0", max_tokens=60).token_ids
    wrong: list[tuple[int, ...]] = []

    def keep_asking() -> None:
        while not over.is_set():
            code, _, token_ids = outcome(cluster.stream("a0", max_tokens=60))
            codes.append(code)
            if tuple(token_ids) != wanted:
                wrong.append(tuple(token_ids))

    askers = [threading.Thread(target=keep_asking) for _ in range(3)]
    before = {process.pid for process in cluster.replicas()}
    for asker in askers:
        asker.start()
    try:
        cluster.deploy({"server": {"max_request_s": 3000}})
    finally:
        over.set()
        for asker in askers:
            asker.join()

    assert set(codes) == {Code.OK}
    assert wrong == []
    assert before.isdisjoint(process.pid for process in cluster.replicas())


def outcome(stream: grpc.Call) -> tuple[grpc.StatusCode, str, list[int]]:
    """How a stream ended, and the tokens until then."""
    token_ids: list[int] = []
    try:
        for message in stream:
            token_ids += message.token_ids
    except grpc.RpcError as error:
        return error.code(), reason(error), token_ids
    return Code.OK, "", token_ids
